"""Stages from the hidden states to the sum behind attention (arXiv 2405.04434, §2.1).

    input_norm → q_a → q_a_norm → q → query                 queries, their last 64 numbers turned
    input_norm → kv_a → c_kv, k_rope → key, value           the latent, and what all heads make of it
    query, key with k_rope, value → attention, lse → o → attended, post_norm

Every stage takes the FP16 tensors that the result states.
"""

import numpy as np
import torch
from torch import Tensor

from npu_backend.contracts.ring_mla import NOPE, ROPE, VALUE
from npu_backend.layer.angles import cos_sin
from npu_backend.layer.case import LayerCase
from npu_backend.layer.linear import Linear, Product, linear_of, on
from npu_backend.operators import Angles, add_norm, latent_of, norm, ring_mla_block, rotate

LATENT_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm in DeepSeek's own code, whatever rms_norm_eps says."""
Stages = dict[str, Tensor]
"""What each stage gave, by the names of docs/formats.md."""


def keep(stages: Stages, name: str, product: Product) -> Tensor:
    """Put a product among the stages, and what its activations were quantised to."""
    stages[name] = product.out
    if product.activations is not None:
        stages[f"{name}.integers"] = product.activations.integers
        if product.activations.token_scale is not None:
            stages[f"{name}.token_scale"] = product.activations.token_scale
    return product.out


def attention_stages(case: LayerCase, device: torch.device) -> Stages:
    """All stages up to `attended` and `post_norm`."""
    config, arrays, stages = case.config, case.arrays, Stages()
    hidden = on(arrays["hidden"], device)
    angles = Angles(*(on(x, device) for x in cos_sin(config, arrays["position"])))
    weight_of = _norms(case, device)
    stages["input_norm"] = x = norm(hidden, weight_of["input_layernorm"], config.rms_norm_eps)
    _queries(case, x, angles, stages, device)
    kv_a = keep(stages, "kv_a", _linear(case, "self_attn.kv_a_proj_with_mqa", device)(x))
    latent = latent_of(kv_a, weight_of["self_attn.kv_a_layernorm"], angles, LATENT_EPS)
    stages["c_kv"], stages["k_rope"] = latent
    up = on(arrays["self_attn.kv_b_proj.weight"], device)
    heads = torch.nn.functional.linear(latent.c_kv, up).unflatten(1, (config.num_attention_heads, NOPE + VALUE))
    stages["key"], stages["value"] = (part.contiguous() for part in heads.split((NOPE, VALUE), dim=2))
    _attend(case, stages)
    o = keep(stages, "o", _linear(case, "self_attn.o_proj", device)(stages["attention"].flatten(1)))
    added = add_norm(hidden, o, weight_of["post_attention_layernorm"], config.rms_norm_eps)
    stages["attended"], stages["post_norm"] = added.total, added.normed
    return stages


def _linear(case: LayerCase, name: str, device: torch.device) -> Linear:
    return linear_of(case.arrays, [name], case.kinds[name], case.arithmetic, device)


def _norms(case: LayerCase, device: torch.device) -> dict[str, Tensor]:
    names = [name.removesuffix(".weight") for name in case.arrays if name.endswith("layernorm.weight")]
    return {name: on(case.arrays[f"{name}.weight"], device) for name in names}


def _queries(case: LayerCase, x: Tensor, angles: Angles, stages: Stages, device: torch.device) -> None:
    name = "self_attn.q_proj"
    if case.config.q_lora_rank is not None:
        name = "self_attn.q_b_proj"
        q_a = keep(stages, "q_a", _linear(case, "self_attn.q_a_proj", device)(x))
        weight = on(case.arrays["self_attn.q_a_layernorm.weight"], device)
        stages["q_a_norm"] = x = norm(q_a, weight, LATENT_EPS)
    product = _linear(case, name, device)(x)
    heads = product.out.unflatten(1, (case.config.num_attention_heads, NOPE + ROPE))
    q = keep(stages, "q", product._replace(out=heads))
    stages["query"] = torch.cat([q[..., :NOPE], rotate(q[..., NOPE:], angles)], dim=-1)


def _attend(case: LayerCase, stages: Stages) -> None:
    k_rope = stages["k_rope"][:, None].expand(-1, case.config.num_attention_heads, -1)
    key = torch.cat([stages["key"], k_rope], dim=-1)
    query, key, value = (x[None] for x in (stages["query"], key, stages["value"]))
    partial = ring_mla_block(query, key, value, is_causal=True, scale=case.config.softmax_scale)
    stages["attention"], stages["lse"] = partial.out[0].contiguous(), partial.lse[0].contiguous()


def as_arrays(stages: Stages) -> dict[str, np.ndarray]:
    """On the host, as a file wants them."""
    return {name: x.cpu().contiguous().numpy() for name, x in stages.items()}
