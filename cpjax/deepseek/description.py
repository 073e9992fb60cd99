"""The description file of a quantised checkpoint: which tensor is quantised in which way, and what is then stored.

    quant_model_description.json            beside quant_model_weights[-0000i-of-N].safetensors       "AscendV1"
    quant_model_description_<type>.json     beside quant_model_weight_<type>[…].safetensors           "MindIE"

It maps the name of every tensor to its kind, and has some words about the whole. A weight of kind

    FLOAT           is as it is without quantisation
    W8A8            weight int8 [n, k], input_scale [1], input_offset [1], deq_scale [n], quant_bias [n]
    W8A8_DYNAMIC    weight int8 [n, k], weight_scale [n, 1]
    W4A8_DYNAMIC    weight int8 [n/2, k], weight_scale [n, 1], scale_bias [n, 1] or [n, 16];
                    with a group_size above 0 also weight_scale_second [n, k / group_size]

weight_offset may be there in all of them, and must be 0. The name of a file says nothing: the vendor's W4A8 script
calls its files …_w8a8_dynamic, and their model_quant_type W8A8_DYNAMIC.

Sources: msmodelslim 3de0a3c (save/ascendv1.py, save/mindie_format.py), MindIE-LLM 8b4871a (utils/quantize).
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cpjax.errors import InputError

DESCRIPTION = "quant_model_description.json"
FLOAT = "FLOAT"
KINDS = ("W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC")
"""Quantisations that are computed."""
LINEARS = (
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
"""Weights that may be quantised; kv_b_proj, which absorbs queries, the router, embedding and head are FLOAT."""
SCALES = ("F32", "F16", "BF16")
"""Dtypes of scales and offsets; all are exact in float32."""
PARTS = (1, 16)
"""Sums over parts of k in which scale_bias comes."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of what is not quantised."""


class Description(NamedTuple):
    """What the file says."""

    path: Path
    kinds: dict[str, str]
    """Name of a tensor → its kind."""
    group_size: int
    """Columns of a group that has a scale of its own, in W4A8; 0: a row has one scale."""


class Stored(NamedTuple):
    """What a tensor may be in a file."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    is_needed: bool = True


def find_description(folder: Path) -> Path | None:
    """The description file in the folder of a checkpoint; None: it is not quantised.

    Raises:
      InputError: there are several.
    """
    found = sorted(folder.glob("quant_model_description*.json"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder} has {len(found)} description files ({names:.200}); leave the one of these weights")
    return found[0] if found else None


def read_description(path: Path) -> Description:
    """Parse it.

    Raises:
      InputError: it is no JSON object, a tensor's kind is none of `KINDS`, or group_size is no number.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({next(iter(str(error).splitlines()), '')})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no JSON object; take the description that came with the weights")
    kinds = {name: kind for name, kind in document.items() if "." in name}  # words about the whole have no dot
    for name, kind in kinds.items():
        if kind != FLOAT and kind not in KINDS:
            raise InputError(
                f"{path}: tensor {name} is {kind!r:.60}; only {FLOAT}, {', '.join(KINDS)} are computed, quantise it so"
            )
    group_size = document.get("group_size") or 0
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 0:
        raise InputError(f"{path}: group_size is {group_size!r:.60}; it must be a whole number, 0 for no groups")
    return Description(path, kinds, group_size)


def quantized_kinds(description: Description, wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Name of each weight that is quantised → its kind.

    Args:
      wanted: names of the model's weights.
      there: names of all tensors in the files.

    Raises:
      InputError: the description does not name one of them, names what no file has, says that what belongs together
        is of several kinds, or that something is quantised which is computed from floats only.
    """
    path, kinds = description.path, description.kinds
    if missing := sorted(set(kinds) - set(there)):
        raise InputError(
            f"{path} names tensor {missing[0]}, which no file has; take description and weights of one checkpoint"
        )
    for name, kind in kinds.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        if kinds.get(weight, kind) != kind:
            raise InputError(
                f"{path}: tensor {weight} is {kinds[weight]}, but {name} is {kind}; what belongs together must be "
                "of one kind"
            )
    found = {}
    for name in wanted:
        if name not in kinds:
            raise InputError(f"{path} does not name tensor {name}; it must say of each weight what kind it is")
        if kinds[name] == FLOAT:
            continue
        if name.split(".")[-2] not in LINEARS or not name.endswith(".weight"):
            raise InputError(
                f"{path}: tensor {name} is {kinds[name]}; it is computed only as {FLOAT}, quantise no more than "
                f"{', '.join(LINEARS)}"
            )
        found[name] = kinds[name]
    return found


def stored_of(name: str, kind: str, shape: tuple[int, ...], description: Description) -> dict[str, Stored]:
    """Every tensor that may be stored of a quantised weight, by name, with what it must be.

    Args:
      name: of the weight, `….weight`.
      shape: of the matrix, `(n, k)`.

    Raises:
      InputError: rows that are not whole bytes, columns that are not whole groups.
    """
    (n, k), path, group = shape, description.path, description.group_size
    each = {"weight": Stored(("I8",), ((n, k),)), "weight_offset": Stored(SCALES, ((n, 1),), False)}
    if kind == "W8A8":
        one, row = ((1,),), ((n,),)
        each |= {"input_scale": Stored(SCALES, one), "input_offset": Stored(SCALES, one)}
        each |= {"deq_scale": Stored(("I64", "F32"), row), "quant_bias": Stored(("I32",), row)}
        each |= {"weight_scale": Stored(SCALES, ((n, 1),), False)}
    else:
        each |= {"weight_scale": Stored(SCALES, ((n, 1),))}
    if kind == "W4A8_DYNAMIC":
        if n % 2:
            raise InputError(f"{path}: tensor {name} has {n} rows, which cannot be packed two in a byte")
        each["weight"] = Stored(("I8",), ((n // 2, k),))
        each["scale_bias"] = Stored(("F32",), tuple((n, parts) for parts in PARTS if k % parts == 0))
        if group:
            if k % group:
                raise InputError(f"{path}: group_size is {group}, which does not divide the {k} columns of {name}")
            each["weight_scale_second"] = Stored(SCALES, ((n, k // group),))
            each["weight_offset_second"] = Stored(SCALES, ((n, k // group),), False)
    prefix = name.removesuffix("weight")
    return {prefix + last: stored for last, stored in each.items()}


def document_of(kinds: dict[str, str], model_quant_type: str) -> dict[str, Any]:
    """What is written into the file, as AscendV1 has it: words about the whole, then the kind of every tensor.

    >>> document_of({"lm_head.weight": "FLOAT"}, "W8A8_DYNAMIC")["lm_head.weight"]
    'FLOAT'
    """
    whole = {"model_quant_type": model_quant_type, "version": "1.0.0", "group_size": 0, "metadata": {}}
    return whole | kinds
