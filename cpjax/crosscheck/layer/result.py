"""A result of a layer: what every stage gave, in one file (docs/formats.md)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpjax.crosscheck.files.case import expect_metadata, read_tensors, write_tensors
from cpjax.crosscheck.layer.case import LayerCase
from cpjax.crosscheck.layer.shape import result_tensors
from cpjax.errors import InputError

FORMAT, VERSION = "cpjax.layer-result", "1"
SHOWN = 4
"""Names that an error lists."""


@dataclass(frozen=True)
class LayerResult:
    """A backend's answer."""

    backend: str
    tensors: dict[str, np.ndarray]
    """What each stage gave, by name (`cpjax.crosscheck.layer.shape.result_tensors`)."""
    about: dict[str, Any]
    """Where it comes from; free, but JSON."""


def write_layer_result(folder: Path, case: LayerCase, result: LayerResult) -> Path:
    """Write `folder/name.safetensors`, whole or not at all.

    Raises:
      InputError: a file is there already, or it cannot be written.
    """
    metadata = {"format": FORMAT, "version": VERSION, "name": case.name, "digest": case.digest}
    path = folder / f"{case.name}.safetensors"
    about = json.dumps(result.about)
    write_tensors(path, result.tensors, metadata | {"backend": result.backend, "about": about})
    return path


def read_layer_result(path: Path, case: LayerCase) -> LayerResult:
    """Read a result of this case and check its form.

    Raises:
      InputError: one line: missing, truncated, of another case, a tensor that is missing or of the wrong form.
    """
    tensors, dtypes, metadata = read_tensors(path)
    expect_metadata(metadata, {"format": FORMAT, "version": VERSION, "name": case.name})
    if metadata.get("digest") != case.digest:
        raise InputError(
            f"is a result of another case (digest {str(metadata.get('digest'))[:8]}…, not {case.digest[:8]}…)"
        )
    check_forms(case, tensors, dtypes)
    try:
        about = json.loads(metadata.get("about", "{}"))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise InputError("metadata 'about' is no JSON object")
    return LayerResult(metadata.get("backend", ""), tensors, about)


def check_forms(case: LayerCase, tensors: dict[str, np.ndarray], dtypes: dict[str, str]) -> None:
    """Refuse what no result of this case can be: names, dtypes (as safetensors writes them), shapes.

    Raises:
      InputError: it names the tensor, and what it must be.
    """
    wanted = result_tensors(case.config, case.is_moe, case.kinds, case.tokens)
    missing, extra = [name for name in wanted if name not in tensors], sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise InputError(
            f"missing tensors {missing[:SHOWN]}, unknown tensors {extra[:SHOWN]}; such a result has {len(wanted)} "
            "tensors, one or two for each stage (docs/formats.md)"
        )
    for name, (dtype, shape) in wanted.items():
        if (dtypes[name], tensors[name].shape) != (dtype, shape):
            found = f"{dtypes[name]} {list(tensors[name].shape)}"
            raise InputError(f"tensor {name!r} is {found}; it must be {dtype} {list(shape)}")
