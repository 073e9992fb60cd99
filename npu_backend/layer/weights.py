"""Which tensors a layer case has: weights by their names in a checkpoint, each in one of four kinds.

    FLOAT          weight F16 [n, k]
    W8A8           weight I8 [n, k], input_scale [1], input_offset [1], deq_scale [n] I64 or F32, quant_bias [n] I32
    W8A8_DYNAMIC   weight I8 [n, k], weight_scale [n, 1]
    W4A8_DYNAMIC   weight I8 [n/2, k], rows 2i in the low 4 bits; weight_scale [n, 1], scale_bias [n, P] F32;
                   with groups of k also weight_scale_second [n, G]

Scales and offsets are F32 or F16. weight_offset and weight_offset_second may be there and must be 0; weight_scale may
be there in W8A8. Sources: msmodelslim 3de0a3c (save/ascendv1.py), vllm-ascend 182b75e (quantization/methods).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from npu_backend.contracts.ring_mla import NOPE, ROPE, VALUE
from npu_backend.errors import InputError
from npu_backend.layer.config import LayerConfig

KINDS = ("FLOAT", "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
SCALES = ("F32", "F16")
BIAS = "mlp.gate.e_score_correction_bias"


class Rule(NamedTuple):
    """What a tensor must be; None in a shape is any number."""

    dtypes: tuple[str, ...]
    shape: tuple[int | None, ...]
    is_needed: bool = True


def linears(config: LayerConfig, is_moe: bool) -> dict[str, tuple[int, int]]:
    """Name, without `.weight`, of every linear layer that may be quantised → (n, k)."""
    wide, heads = config.hidden_size, config.num_attention_heads
    found: dict[str, tuple[int, int]] = {}
    if config.q_lora_rank is None:
        found["self_attn.q_proj"] = (heads * (NOPE + ROPE), wide)
    else:
        found["self_attn.q_a_proj"] = (config.q_lora_rank, wide)
        found["self_attn.q_b_proj"] = (heads * (NOPE + ROPE), config.q_lora_rank)
    found["self_attn.kv_a_proj_with_mqa"] = (config.kv_lora_rank + ROPE, wide)
    found["self_attn.o_proj"] = (wide, heads * VALUE)
    if not is_moe:
        return found | _mlp("mlp", wide, config.intermediate_size)
    for expert in range(config.n_routed_experts):
        found |= _mlp(f"mlp.experts.{expert}", wide, config.moe_intermediate_size)
    if config.n_shared_experts:
        found |= _mlp("mlp.shared_experts", wide, config.moe_intermediate_size * config.n_shared_experts)
    return found


def _mlp(name: str, wide: int, inner: int) -> dict[str, tuple[int, int]]:
    return {f"{name}.gate_proj": (inner, wide), f"{name}.up_proj": (inner, wide), f"{name}.down_proj": (wide, inner)}


def kinds_of(said: object, config: LayerConfig, is_moe: bool) -> dict[str, str]:
    """Every linear layer's kind.

    Raises:
      InputError: one is missing, unknown, or of a kind that no operator has here.
    """
    if not isinstance(said, dict):
        raise InputError(f"kinds is a JSON {type(said).__name__}; it must be an object: name of a linear layer → kind")
    wanted = linears(config, is_moe)
    if missing := [name for name in wanted if name not in said]:
        raise InputError(f"kinds does not name {missing[0]}; it must say of each linear layer what kind it is")
    if unknown := sorted(said.keys() - wanted.keys()):
        raise InputError(f"kinds names {unknown[0]}, which this layer does not have, or which is never quantised")
    for name, kind in said.items():
        if kind not in KINDS:
            raise InputError(f"{name} is {kind!r:.60}; its kind must be one of {', '.join(KINDS)}")
        if kind == "W8A8" and name.startswith("mlp.experts."):
            raise InputError(
                f"{name} is W8A8; no grouped product takes a static scale for FP16 results, use W8A8_DYNAMIC"
            )
    _check_together(said, config, is_moe)
    return dict(said)


def _check_together(kinds: Mapping[str, str], config: LayerConfig, is_moe: bool) -> None:
    """What one operator computes is of one kind: gate and up, and the same matrix of all experts."""
    mlps = ["mlp.experts.0", "mlp.shared_experts"] if is_moe else ["mlp"]
    pairs = [(f"{mlp}.gate_proj", f"{mlp}.up_proj") for mlp in mlps if f"{mlp}.gate_proj" in kinds]
    for expert in range(1, config.n_routed_experts if is_moe else 0):
        parts = ("gate_proj", "up_proj", "down_proj")
        pairs += [(f"mlp.experts.0.{part}", f"mlp.experts.{expert}.{part}") for part in parts]
    for one, other in pairs:
        if kinds[one] != kinds[other]:
            raise InputError(
                f"{one} is {kinds[one]} and {other} is {kinds[other]}; one product computes both, give one kind"
            )


def rules(config: LayerConfig, is_moe: bool, kinds: Mapping[str, str]) -> dict[str, Rule]:
    """Name of every tensor that a case has, or may have → what it must be."""
    wide, latent, tokens = config.hidden_size, config.kv_lora_rank, None
    found = {"hidden": Rule(("F16",), (tokens, wide)), "position": Rule(("I32",), (tokens,))}
    norms = {"input_layernorm": wide, "post_attention_layernorm": wide, "self_attn.kv_a_layernorm": latent}
    if config.q_lora_rank is not None:
        norms["self_attn.q_a_layernorm"] = config.q_lora_rank
    found |= {f"{name}.weight": Rule(("F16",), (size,)) for name, size in norms.items()}
    found["self_attn.kv_b_proj.weight"] = Rule(("F16",), (config.num_attention_heads * (NOPE + VALUE), latent))
    if is_moe:
        found["mlp.gate.weight"] = Rule(("F32",), (config.n_routed_experts, wide))
        found[BIAS] = Rule(("F32",), (config.n_routed_experts,))
    for name, (n, k) in linears(config, is_moe).items():
        found |= {f"{name}.{part}": rule for part, rule in _parts(kinds[name], n, k).items()}
    return found


def _parts(kind: str, n: int, k: int) -> dict[str, Rule]:
    column = Rule(SCALES, (n, 1))
    may_be = column._replace(is_needed=False)
    match kind:
        case "FLOAT":
            return {"weight": Rule(("F16",), (n, k))}
        case "W8A8":
            parts = {"weight": Rule(("I8",), (n, k)), "input_scale": Rule(SCALES, (1,))}
            parts |= {"input_offset": Rule(SCALES, (1,)), "deq_scale": Rule(("I64", "F32"), (n,))}
            return parts | {"quant_bias": Rule(("I32",), (n,)), "weight_scale": may_be, "weight_offset": may_be}
        case "W8A8_DYNAMIC":
            return {"weight": Rule(("I8",), (n, k)), "weight_scale": column, "weight_offset": may_be}
        case _:
            groups = Rule(SCALES, (n, None), is_needed=False)
            parts = {"weight": Rule(("I8",), (n // 2, k)), "weight_scale": column, "weight_offset": may_be}
            parts |= {"scale_bias": Rule(("F32",), (n, None))}
            return parts | {"weight_scale_second": groups, "weight_offset_second": groups}


def check_tensors(dtypes: Mapping[str, str], shapes: Mapping[str, list[int]], wanted: Mapping[str, Rule]) -> None:
    """Every tensor of a case is what the rules say.

    Raises:
      InputError: the first that is not.
    """
    missing = sorted(name for name, rule in wanted.items() if rule.is_needed and name not in dtypes)
    unknown = sorted(dtypes.keys() - wanted.keys())
    if missing or unknown:
        raise InputError(f"missing tensors {missing[:3]}, unknown tensors {unknown[:3]}; see docs/formats.md")
    for name, dtype in dtypes.items():
        rule, shape = wanted[name], shapes[name]
        if dtype not in rule.dtypes:
            raise InputError(f"tensor {name!r} is {dtype}; it must be {' or '.join(rule.dtypes)}")
        fits = len(shape) == len(rule.shape) and all(
            size == must or (must is None and size > 0) for size, must in zip(shape, rule.shape, strict=True)
        )
        if not fits:
            must = ["any" if size is None else size for size in rule.shape]
            raise InputError(f"tensor {name!r} has shape {shape}; it must be {must}")


def check_values(arrays: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> None:
    """Offsets of weights are 0, those of activations whole; gate and up have one; 4-bit weights can be packed.

    Raises:
      InputError: the first that is not.
    """
    for name, array in arrays.items():
        if name.endswith((".weight_offset", ".weight_offset_second")) and array.any():
            raise InputError(f"tensor {name!r} is not 0; quantised weights are symmetric")
    for name, kind in kinds.items():
        if kind == "W8A8":
            _check_static(arrays, name)
        if kind != "W4A8_DYNAMIC":
            continue
        n, k = 2 * len(arrays[f"{name}.weight"]), arrays[f"{name}.weight"].shape[1]
        if n != len(arrays[f"{name}.weight_scale"]) or n % 8:
            raise InputError(
                f"{name} has {len(arrays[f'{name}.weight_scale'])} rows; 4-bit weights need a multiple of 8"
            )
        second = arrays.get(f"{name}.weight_scale_second")
        if second is not None and k % second.shape[1]:
            raise InputError(f"{name} has {k} columns, which do not come in {second.shape[1]} groups")


def _check_static(arrays: Mapping[str, np.ndarray], name: str) -> None:
    scale, offset = (float(arrays[f"{name}.{part}"][0]) for part in ("input_scale", "input_offset"))
    if not 0 < scale < np.inf:
        raise InputError(f"{name}.input_scale is {scale:g}; it must be positive and finite")
    if not np.isfinite(offset) or offset != round(offset) or not -128 <= offset <= 127:
        raise InputError(f"{name}.input_offset is {offset:g}; npu_quantize takes a whole number from -128 to 127")
    up = name.replace("gate_proj", "up_proj")
    if (scale, offset) != tuple(float(arrays[f"{up}.{part}"][0]) for part in ("input_scale", "input_offset")):
        raise InputError(
            f"{name} and {up} have several input_scale or input_offset; their activations are quantised once, give one"
        )
