"""A random checkpoint with quantised layers, as the vendor's tool writes it: names, dtypes, description file.

The float checkpoint of the same seed (`cpjax.deepseek.checkpoint.write_random`) is what is quantised:

    scheme         attention        dense and shared MLP    routed experts    the vendor's name
    w8a8           W8A8             W8A8_DYNAMIC            W8A8_DYNAMIC      mixed quantisation
    w8a8-dynamic   W8A8_DYNAMIC     W8A8_DYNAMIC            W8A8_DYNAMIC      dynamic quantisation
    w4a8           W8A8             W8A8_DYNAMIC            W4A8_DYNAMIC      mixed quantisation, one scale a row

kv_b_proj, router, embedding, head, norms and the MTP modules are FLOAT. Scales of weights are those of
`cpjax.deepseek.quantizers`, and input scales those of `cpjax.deepseek.calibration`: not those that the vendor's tool
would find, and no outliers are smoothed (which would put a bias beside norms). deq_scale is int64 beside FP16 weights,
else float32.

Sources: msmodelslim 3de0a3c (save/ascendv1.py, example/DeepSeek/README.md, quant_deepseek_w4a8.py).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpjax.deepseek.calibration import input_ranges
from cpjax.deepseek.checkpoint import check_free, random_tensors, write_tensors
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.description import DESCRIPTION, FLOAT, LINEARS, PARTS, document_of
from cpjax.deepseek.names import cut_axis, shapes
from cpjax.deepseek.quantized import DynamicW4A8, Quantized, StaticW8A8
from cpjax.deepseek.quantizers import dynamic_w4a8, dynamic_w8a8, static_w8a8
from cpjax.errors import InputError

STEM = "quant_model_weights"


class Scheme(NamedTuple):
    """The kind of each part."""

    attention: str
    mlp: str
    experts: str


SCHEMES = {
    "w8a8": Scheme("W8A8", "W8A8_DYNAMIC", "W8A8_DYNAMIC"),
    "w8a8-dynamic": Scheme("W8A8_DYNAMIC", "W8A8_DYNAMIC", "W8A8_DYNAMIC"),
    "w4a8": Scheme("W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"),
}


def kind_of(name: str, scheme: Scheme) -> str:
    """How a weight of the model is quantised.

    >>> kind_of("model.layers.3.mlp.experts.0.up_proj.weight", SCHEMES["w4a8"])
    'W4A8_DYNAMIC'
    """
    parts = name.split(".")
    if not name.endswith(".weight") or parts[-2] not in LINEARS:
        return FLOAT
    if "self_attn" in parts:
        return scheme.attention
    return scheme.experts if "experts" in parts else scheme.mlp


def write_quantized(
    folder: Path, config: DeepseekConfig, seed: int, scheme: str, *, dtype: str = "float16", shard_bytes: int = 2**18
) -> list[Path]:
    """Write it into a new folder; the safetensors files, in order.

    Args:
      scheme: one of `SCHEMES`.
      dtype: of what stays float.

    Raises:
      InputError: no such scheme; what `write_random` refuses; a matrix that W4A8 cannot pack.
    """
    if scheme not in SCHEMES:
        raise InputError(f"quantisation {scheme!r:.60} is unknown; known are {', '.join(SCHEMES)}")
    check_free(folder)
    tensors, wanted, how = random_tensors(config, seed, dtype), shapes(config), SCHEMES[scheme]
    kinds = {name: kind_of(name, how) if name in wanted else FLOAT for name in tensors}
    static = [name for name, kind in kinds.items() if kind == "W8A8"]
    ranges = input_ranges(config, tensors, static, seed) if static else {}
    written: dict[str, np.ndarray] = {}
    described: dict[str, str] = {}
    for name, x in tensors.items():
        stored = {name: x}
        if kinds[name] != FLOAT:
            x = x.astype(np.float64)
            try:
                if kinds[name] == "W8A8":
                    scale_as = "int64" if dtype == "float16" else "float32"
                    made = static_w8a8(x, ranges[name].scale, ranges[name].offset, scale_as=scale_as)
                elif kinds[name] == "W8A8_DYNAMIC":
                    made = dynamic_w8a8(x)
                else:
                    made = dynamic_w4a8(x, parts=PARTS[1] if cut_axis(name) == 1 else PARTS[0])
            except InputError as error:
                raise InputError(f"tensor {name}: {error}") from None
            stored = files_of(name, made)
        written |= stored
        described |= dict.fromkeys(stored, kinds[name])
    words = {"quantize": "w8a8_dynamic", "moe_quantize": how.experts.lower(), "mla_quantize": how.attention.lower()}
    document = config.as_json() | {"torch_dtype": dtype} | words
    more = {DESCRIPTION: document_of(described, "W8A8_DYNAMIC")}
    return write_tensors(folder, written, document, shard_bytes=shard_bytes, stem=STEM, more=more)


def files_of(name: str, stored: Quantized) -> dict[str, np.ndarray]:
    """The tensors of a quantised weight as files have them, by name: scales of rows are `[n, 1]`, and have an offset 0.

    >>> {name: x.shape for name, x in files_of("a.weight", dynamic_w8a8(np.ones((2, 3)))).items()}
    {'a.weight': (2, 3), 'a.weight_scale': (2, 1), 'a.weight_offset': (2, 1)}
    """
    prefix = name.removesuffix("weight")
    each: dict[str, Any] = stored._asdict()
    if not isinstance(stored, StaticW8A8):
        scale = np.asarray(stored.weight_scale)[:, None]
        each |= {"weight_scale": scale, "weight_offset": np.zeros_like(scale)}
    if isinstance(stored, DynamicW4A8):
        second = each.pop("weight_scale_second")
        if second is not None:
            each |= {"weight_scale_second": second, "weight_offset_second": np.zeros_like(second)}
    return {prefix + last: np.ascontiguousarray(x) for last, x in each.items()}
