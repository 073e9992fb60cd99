"""A layer comes in: the format "cpjax.layer", version 1, of docs/formats.md. Reading believes nothing."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npu_backend.errors import InputError
from npu_backend.files import check_digest, check_header, forms_of, opened
from npu_backend.layer.config import LayerConfig, config_of
from npu_backend.layer.weights import check_tensors, check_values, kinds_of, rules

FORMAT, RESULT = "cpjax.layer", "cpjax.layer-result"
ARITHMETICS = ("exact", "vendor")


class LayerCase(NamedTuple):
    """One layer, its hidden states, and how quantised products are computed."""

    name: str
    digest: str
    config: LayerConfig
    is_moe: bool
    kinds: dict[str, str]  # name of a linear layer → its kind
    arithmetic: str  # of quantised products
    arrays: dict[str, np.ndarray]  # all tensors of the file, by name


def read_layer(path: Path) -> LayerCase:
    """Read and check one case.

    Raises:
      InputError: one line that names the file and what is wrong with it.
    """
    try:
        return _read_layer(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_layer(path: Path) -> LayerCase:
    with opened(path) as file:
        dtypes, shapes = forms_of(file)
        metadata = file.metadata() or {}
        check_header(metadata, FORMAT, path.stem)
        said = _description(metadata)
        config = config_of(said["config"], said["is_moe"])
        kinds = kinds_of(said["kinds"], config, said["is_moe"])
        check_tensors(dtypes, shapes, rules(config, said["is_moe"], kinds))
        arrays = {name: file.get_tensor(name) for name in dtypes}
    check_digest(metadata, arrays, dtypes)
    check_values(arrays, kinds)
    tokens = np.arange(len(arrays["hidden"]), dtype=np.int32)
    if not np.array_equal(arrays["position"], tokens):
        raise InputError(
            f"position must be 0 to {len(tokens) - 1}, one for each row of hidden: one request, from its start"
        )
    return LayerCase(path.stem, metadata["digest"], config, said["is_moe"], kinds, said["arithmetic"], arrays)


def _description(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        said = json.loads(metadata.get("case", ""))
    except (ValueError, RecursionError):
        raise InputError("metadata 'case' is not JSON; make the case again") from None
    if not isinstance(said, dict):
        raise InputError(f"metadata 'case' is a JSON {type(said).__name__}; it must be an object")
    known = {"config", "is_moe", "kinds", "arithmetic", "about"}
    if unknown := sorted(said.keys() - known):
        raise InputError(
            f"metadata 'case' has {unknown[0]!r}, which this version does not know; it has {sorted(known)}"
        )
    if not isinstance(said.get("is_moe"), bool):
        raise InputError(f"is_moe is {str(said.get('is_moe'))[:40]!r}; it must be true or false")
    if said.get("arithmetic") not in ARITHMETICS:
        raise InputError(f"arithmetic is {str(said.get('arithmetic'))[:40]!r}; it must be {' or '.join(ARITHMETICS)}")
    return {"config": None, "kinds": None} | said
