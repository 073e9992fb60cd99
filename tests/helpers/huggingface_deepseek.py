"""Hugging Face transformers' DeepseekV3 as a reference, in float64 throughout if asked.

Its code says float32 in its norms, its router, its angles and its softmax, whatever the model's dtype. Lifted, it has
another `torch` in which float32 is float64, so that the two implementations can be held to 1e-10; as it is, to 1e-4.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3ForCausalLM, modeling_rope_utils
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3 import modeling_deepseek_v3


class _Lifted:
    """torch, with float32 spelled float64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def precision(is_lifted: bool) -> Iterator[None]:
    """What the reference's hard-coded float32 means inside this block."""
    modules = (modeling_deepseek_v3, modeling_rope_utils)
    before = [module.torch for module in modules]
    for module in modules if is_lifted else ():
        module.torch = _Lifted()
    try:
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.torch = old


def read(folder: Path) -> Any:
    """The model of a checkpoint, in float64, experts one by one (its faster ways refuse float64)."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    model.config._experts_implementation = "eager"
    return model.eval()


def logits(folder: Path, ids: np.ndarray, *, is_lifted: bool = True) -> np.ndarray:
    """Of all tokens, `[B, T, vocab]`."""
    with precision(is_lifted), torch.no_grad():
        return read(folder)(torch.tensor(ids), use_cache=False).logits.numpy()


def angles(model_config: Any, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines `[B, T, R]` of the reference, each half the same."""
    with precision(True), torch.no_grad():
        rope = modeling_deepseek_v3.DeepseekV3RotaryEmbedding(model_config)
        cos, sin = rope(torch.zeros(1, dtype=torch.float64), torch.tensor(position))
    return cos.numpy(), sin.numpy()


def softmax_scale(model_config: Any) -> float:
    """What multiplies q·k in the reference."""
    return modeling_deepseek_v3.yarn_apply_mscale(model_config.rope_parameters, model_config.qk_head_dim**-0.5)


def route(model_config: Any, x: np.ndarray, gate: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The weight of every expert `[T, E]` that the reference's router gives."""
    with precision(True), torch.no_grad():
        router = modeling_deepseek_v3.DeepseekV3TopkRouter(model_config).double()
        router.weight.copy_(torch.tensor(gate))
        router.e_score_correction_bias.copy_(torch.tensor(bias))
        _, weight, chosen = router(torch.tensor(x))
    found = np.zeros((len(x), len(gate)))
    np.put_along_axis(found, chosen.numpy(), weight.numpy(), axis=1)
    return found


def drafts(folder: Path, ids: np.ndarray, tensors: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """Logits of the first MTP module for all places but the last, `[B, T − 1, vocab]`.

    Args:
      tensors: of the checkpoint; the module's have the number `layer`.
    """
    with precision(True), torch.no_grad():
        model = read(folder)
        module = MtpModel(model, 1).double().eval()
        module.config._attn_implementation = module.config._experts_implementation = "eager"
        one, at = module.layers[0], f"model.layers.{layer}."
        found = {name.removeprefix(at): torch.tensor(x).double() for name, x in tensors.items() if name.startswith(at)}
        experts = range(model.config.n_routed_experts)
        both = [torch.cat([found.pop(f"mlp.experts.{e}.{x}_proj.weight") for x in ("gate", "up")]) for e in experts]
        state = {"post_norm.weight": found.pop("shared_head.norm.weight")}
        state |= {f"{name}.weight": found.pop(f"{name}.weight") for name in ("enorm", "hnorm", "eh_proj")}
        down = torch.stack([found.pop(f"mlp.experts.{e}.down_proj.weight") for e in experts])
        found |= {"mlp.experts.gate_up_proj": torch.stack(both), "mlp.experts.down_proj": down}
        one.load_state_dict(state | {f"mtp_block.{name}": x for name, x in found.items()}, strict=True)
        hidden = model.model(torch.tensor(ids), use_cache=False).last_hidden_state[:, :-1]
        x, place = model.get_input_embeddings()(torch.tensor(ids[:, 1:])), torch.arange(ids.shape[1] - 1)[None]
        mask = torch.full((len(place[0]),) * 2, float("-inf"), dtype=torch.float64).triu(1)[None, None]
        angles = model.model.rotary_emb(x, position_ids=place)
        out = one(x, hidden, position_embeddings=angles, attention_mask=mask, position_ids=place, cache=None)
        return model.lm_head(out).numpy()
