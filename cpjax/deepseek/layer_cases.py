"""Small cases of a whole decoder layer: dense and with experts, with float weights and each quantisation.

Weights are random, with the structure, the names and the proportions of `cpjax.deepseek.checkpoint.write_random`;
YaRN and the router have DeepSeek-V3's numbers. `rms_norm_eps` is 1e-5, so that the norms inside attention, whose eps is
1e-6 whatever the config says, can be told from the others. Input scales are those of the float layer on the same
hidden state.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.files.atomic import atomic_write, is_free
from cpjax.crosscheck.files.checksums import write_sums
from cpjax.crosscheck.layer.case import SET_VERSION, LayerCase, write_layer_case
from cpjax.crosscheck.layer.chain import compute_layer
from cpjax.crosscheck.layer.shape import linears_of, products_of
from cpjax.crosscheck.layer.stages import stages_of
from cpjax.deepseek.calibration import Range
from cpjax.deepseek.checkpoint import random_tensors
from cpjax.deepseek.config import SMALL, DeepseekConfig
from cpjax.deepseek.description import FLOAT, PARTS
from cpjax.deepseek.names import cut_axis
from cpjax.deepseek.quantized_checkpoint import SCHEMES, files_of, kind_of
from cpjax.deepseek.quantizers import dynamic_w4a8, dynamic_w8a8, static_w8a8
from cpjax.errors import InputError

TOKENS = 64

CONFIG = replace(
    SMALL,
    vocab_size=16,
    hidden_size=256,
    intermediate_size=384,
    moe_intermediate_size=128,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    kv_lora_rank=64,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    q_lora_rank=96,
    rms_norm_eps=1e-5,
    num_nextn_predict_layers=0,
)
"""4 heads of 128 + 64 and 128, 16 experts in 4 groups; the rest as DeepSeek-V3."""


class Small(NamedTuple):
    """One case of the set."""

    name: str
    is_moe: bool
    scheme: str
    """Of `cpjax.deepseek.quantized_checkpoint.SCHEMES`; "float" for none."""
    says: str
    arithmetic: str = "exact"
    q_lora_rank: int | None = 96
    group: int | None = None
    """Columns of a group with a scale of its own, in W4A8."""


SET = (
    Small("0-dense-float", False, "float", "a dense layer with float weights"),
    Small("1-moe-float", True, "float", "a layer with experts and float weights"),
    Small("2-dense-float-no-q-lora", False, "float", "queries by one projection", q_lora_rank=None),
    Small("3-dense-w8a8", False, "w8a8", "attention W8A8, MLP W8A8_DYNAMIC"),
    Small("4-moe-w8a8", True, "w8a8", "the same with experts"),
    Small("5-dense-w8a8-dynamic", False, "w8a8-dynamic", "W8A8_DYNAMIC throughout"),
    Small("6-moe-w8a8-dynamic", True, "w8a8-dynamic", "the same with experts"),
    Small("7-moe-w4a8", True, "w4a8", "experts W4A8_DYNAMIC, one scale a row"),
    Small("8-moe-w4a8-vendor", True, "w4a8", "the same, as the vendor's hardware computes it", "vendor"),
    Small("9-moe-w4a8-groups-vendor", True, "w4a8", "two scales: groups of 64 columns", "vendor", group=64),
)


def write_layer_cases(folder: Path) -> list[LayerCase]:
    """Write the set and its checksums into a new folder: all of it, or nothing.

    Raises:
      InputError: the folder is there and not empty, or cannot be written.
    """
    if not is_free(folder):
        raise InputError(f"{folder} is there already; nothing is overwritten, name another folder")
    try:
        with atomic_write(folder) as unfinished:
            written = [write_layer_case(unfinished, case) for case in layer_cases()]
            write_sums(unfinished, f"cpjax layers, version {SET_VERSION}")
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror})") from None
    return written


def layer_cases() -> Iterator[LayerCase]:
    """All cases of the set, in the order of their names."""
    for small in SET:
        yield layer_case(small, seed=0)


def layer_case(small: Small, seed: int, *, tokens: int = TOKENS, config: DeepseekConfig = CONFIG) -> LayerCase:
    """One case, from a seed."""
    config = replace(config, q_lora_rank=small.q_lora_rank, first_k_dense_replace=0 if small.is_moe else 1)
    prefix = "model.layers.0."
    given = random_tensors(config, seed, "float16")
    weights = {name.removeprefix(prefix): x for name, x in given.items() if name.startswith(prefix)}
    rng = np.random.default_rng([seed, tokens])
    if small.is_moe:  # float32 throughout, so that a router that computes with less shows
        gate = rng.standard_normal(weights["mlp.gate.weight"].shape, dtype=np.float32)
        weights["mlp.gate.weight"] = gate * np.float32(config.hidden_size**-0.5)
    hidden = rng.standard_normal((tokens, config.hidden_size), dtype=np.float32).astype(np.float16)
    tensors = {"hidden": hidden, "position": np.arange(tokens, dtype=np.int32), **weights}
    names = linears_of(config, small.is_moe)
    plain = LayerCase(small.name, config, small.is_moe, dict.fromkeys(names, FLOAT), "exact", small.says, tensors)
    if small.scheme == "float":
        return plain
    scheme = SCHEMES[small.scheme]
    kinds = {name: kind_of(f"{prefix}{name}.weight", scheme) for name in names}
    ranges = _ranges(plain)
    for name, kind in kinds.items():
        stored = _quantised(f"{prefix}{name}.weight", kind, tensors[f"{name}.weight"], ranges.get(name), small.group)
        tensors |= {other.removeprefix(prefix): x for other, x in stored.items()}
    return replace(plain, kinds=kinds, arithmetic=small.arithmetic, tensors=tensors)


def _ranges(case: LayerCase) -> dict[str, Range]:
    """What goes into each weight of attention, in the float layer."""
    there = compute_layer(case)
    products, found = products_of(case.config, case.is_moe), {}
    for stage in stages_of(case):
        if stage.name in products:
            x = there[stage.inputs[0]]
            one = Range(min(0.0, float(x.min())), max(0.0, float(x.max())))
            found |= dict.fromkeys(products[stage.name].weights, one)
    return found


def _quantised(
    name: str, kind: str, weight: np.ndarray, seen: Range | None, group: int | None
) -> dict[str, np.ndarray]:
    x = weight.astype(np.float64)
    if kind == "W8A8":
        assert seen is not None
        return files_of(name, static_w8a8(x, seen.scale, seen.offset, scale_as="int64"))
    if kind == "W8A8_DYNAMIC":
        return files_of(name, dynamic_w8a8(x))
    return files_of(name, dynamic_w4a8(x, group=group, parts=PARTS[1] if cut_axis(name) == 1 else PARTS[0]))
