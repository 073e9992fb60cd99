"""A case of a layer: config.json, weights as a checkpoint has them, hidden state; in one file (docs/formats.md)."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, StrictBool

from cpjax.crosscheck.files.case import NAME, content_digest, described, expect_metadata, read_tensors, write_tensors
from cpjax.crosscheck.layer.shape import case_tensors, linears_of, may_have, products_of
from cpjax.deepseek.config import DeepseekConfig, config_of
from cpjax.deepseek.description import FLOAT, KINDS
from cpjax.errors import InputError

FORMAT, VERSION = "cpjax.layer", "1"

SET_VERSION = 1
"""Of the cases that `cpjax cases --preset layer` writes; raised when one of them changes."""

DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8", "int32": "I32", "int64": "I64"}
"""Dtypes of NumPy as safetensors writes them."""


@dataclass(frozen=True)
class LayerCase:
    """One decoder layer and the hidden state that goes into it."""

    name: str
    config: DeepseekConfig
    is_moe: bool
    kinds: dict[str, str]
    """Weight that may be quantised, without `.weight` → its kind."""
    arithmetic: Literal["exact", "vendor"]
    """Of quantised products (`cpjax.deepseek.quantized_linear`)."""
    about: str
    """One sentence."""
    tensors: dict[str, np.ndarray]
    """`hidden`, `position`, and the weights by the names of a checkpoint, relative to the layer."""
    digest: str = ""
    """SHA-256 of the content; set by `write_layer_case` and `read_layer_case`."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.tensors["hidden"])


class _Description(BaseModel):
    """The metadata `case`."""

    model_config = ConfigDict(extra="forbid")
    config: dict[str, Any]
    is_moe: StrictBool
    kinds: dict[str, str]
    arithmetic: Literal["exact", "vendor"]
    about: str


def write_layer_case(folder: Path, case: LayerCase) -> LayerCase:
    """Write `folder/name.safetensors`, whole or not at all; the case with its digest.

    Raises:
      InputError: a file is there already, it cannot be written, or the case is none that could be read.
    """
    said = {"config": case.config.as_json(), "is_moe": case.is_moe, "kinds": case.kinds}
    text = json.dumps(said | {"arithmetic": case.arithmetic, "about": case.about})
    dtypes = {name: DTYPES.get(x.dtype.name, x.dtype.name) for name, x in case.tensors.items()}
    checked(case, dtypes)
    case = replace(case, digest=content_digest(text, case.tensors, dtypes))
    metadata = {"format": FORMAT, "version": VERSION, "name": case.name, "case": text, "digest": case.digest}
    write_tensors(folder / f"{case.name}.safetensors", case.tensors, metadata)
    return case


def read_layer_case(path: Path) -> LayerCase:
    """Read and check one case; its digest is computed again.

    Raises:
      InputError: one line that names the file, what is wrong with it and what would be right.
    """
    try:
        tensors, dtypes, metadata = read_tensors(path)
        expect_metadata(metadata, {"format": FORMAT, "version": VERSION, "name": path.stem})
        said = described(_Description, metadata, tensors, dtypes)
        case = LayerCase(
            name=path.stem,
            config=config_of(said.config),
            is_moe=said.is_moe,
            kinds=said.kinds,
            arithmetic=said.arithmetic,
            about=said.about,
            tensors=tensors,
            digest=metadata["digest"],
        )
        return checked(case, dtypes)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def checked(case: LayerCase, dtypes: dict[str, str]) -> LayerCase:
    """The case, if it is one.

    Raises:
      InputError: a name, a kind, a tensor or a number that cannot be.
    """
    if not re.fullmatch(NAME, case.name):
        raise InputError(f"the name {case.name!r} may have only letters, digits, '.', '_' and '-'; rename the case")
    # Whether this layer has experts is what the case says; the router is checked only where there is one.
    replace(case.config, num_hidden_layers=1, first_k_dense_replace=0 if case.is_moe else 1)
    _check_kinds(case)
    hidden = case.tensors.get("hidden")
    if hidden is None or hidden.ndim != 2 or not hidden.size:
        found = "missing" if hidden is None else f"of shape {list(hidden.shape)}"
        raise InputError(f"tensor 'hidden' is {found}; it must be F16 [tokens, {case.config.hidden_size}]")
    needed = case_tensors(case.config, case.is_moe, case.kinds, len(hidden))
    besides = may_have(case.config, case.is_moe, case.kinds)
    missing, extra = sorted(needed.keys() - dtypes), sorted(dtypes.keys() - (needed | besides).keys())
    if missing or extra:
        raise InputError(f"missing tensors {missing[:4]}, unknown tensors {extra[:4]}; see docs/formats.md")
    for name, x in case.tensors.items():
        forms = (needed | besides)[name]
        if (dtypes[name], x.shape) not in forms:
            wanted = " or ".join(f"{dtype} {list(shape)}" for dtype, shape in forms[:2])
            raise InputError(f"tensor {name!r} is {dtypes[name]} {list(x.shape)}; it must be {wanted}")
        _check_numbers(name, x)
    for product in products_of(case.config, case.is_moe).values():
        for last in ("input_scale", "input_offset"):
            found = [case.tensors[f"{name}.{last}"] for name in product.weights if f"{name}.{last}" in case.tensors]
            if any((x != found[0]).any() for x in found[1:]):
                names = " and ".join(product.weights)
                raise InputError(f"{last} of {names} differs; their activations are quantised once, give one number")
    return case


def _check_kinds(case: LayerCase) -> None:
    wanted = linears_of(case.config, case.is_moe)
    if case.kinds.keys() != wanted.keys():
        missing, extra = sorted(wanted.keys() - case.kinds)[:3], sorted(case.kinds.keys() - wanted)[:3]
        raise InputError(f"kinds lacks {missing} and has {extra}; it must name each weight that may be quantised")
    for name, kind in case.kinds.items():
        if kind not in (FLOAT, *KINDS):
            raise InputError(f"{name} is {kind!r:.40}; it must be one of {', '.join((FLOAT, *KINDS))}")
        if kind == KINDS[2] and wanted[name].rows % 2:
            raise InputError(f"{name} has {wanted[name].rows} rows, which cannot be packed two in a byte")
    for product in products_of(case.config, case.is_moe).values():
        experts = range(case.config.n_routed_experts) if product.is_expert else range(1)
        found = {case.kinds[name.format(e=e)] for name in product.weights for e in experts}
        if len(found) > 1:
            raise InputError(
                f"{', '.join(product.weights)} are {' and '.join(sorted(found))}; they must be of one kind"
            )
        if product.is_expert and found == {KINDS[0]}:
            raise InputError(f"{product.weights[0]} is {KINDS[0]}; experts are quantised per token, or are {FLOAT}")


def _check_numbers(name: str, x: np.ndarray) -> None:
    last = name.rpartition(".")[2]
    if name == "position" and (x != np.arange(len(x))).any():
        raise InputError("tensor 'position' is not 0, 1, 2, …; a case is one request from its first token on")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InputError(f"tensor {name!r} holds NaN or infinity; its numbers must be finite")
    if last == "input_scale" and not (x > 0).all():
        raise InputError(f"tensor {name!r} is {x.flat[0]}; it must be a positive number")
    if last.startswith("weight_offset") and x.any():
        raise InputError(f"tensor {name!r} has {x[x != 0].flat[0]}; it must be 0, weights are symmetric")
