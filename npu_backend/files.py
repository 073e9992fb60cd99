"""A case comes in, a result goes out: the formats of docs/formats.md, version 1.

Reading believes nothing: format, version, name, tensors, dtypes, shapes and digest are checked, the digest by computing
it again. Writing is whole or not at all, and never over another case's result.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from npu_backend.errors import InputError

VERSION = "1"
LAYOUTS = ("zigzag", "packed", "decode")
_COMMON = {
    "query": ("F16", "BTNH"),
    "q_position": ("I32", "BT"),
    "q_segment": ("I32", "BT"),
    "kv_position": ("I32", "BS"),
    "kv_segment": ("I32", "BS"),
}
TENSORS = _COMMON | {"key": ("F16", "BSKH"), "value": ("F16", "BSKV")}
"""Name → (dtype as safetensors writes it, shape letters); the same letter is the same number."""
LATENT_TENSORS = _COMMON | {
    "c_kv": ("F16", "BSC"),
    "k_rope": ("F16", "BSR"),
    "w_uk": ("F16", "CND"),
    "w_uv": ("F16", "CNV"),
}
"""Of a case in which keys and values are made of a latent."""


class Case(NamedTuple):
    """One problem. Arrays in global token order; letters as in docs/formats.md."""

    name: str
    digest: str
    query: np.ndarray  # [B, T, N, H] float16
    rows: tuple[np.ndarray, ...]  # what travels: keys [B, S, K, H], values [B, S, K, V]; or latents [B, S, 1, C + R]
    q_position: np.ndarray  # [B, T] int32
    q_segment: np.ndarray
    kv_position: np.ndarray  # [B, S] int32
    kv_segment: np.ndarray
    scale: float
    is_causal: bool
    cp: int
    precision: dict[str, Any]  # backend name → profile name
    layout: str = "zigzag"
    up: tuple[np.ndarray, np.ndarray] | None = None  # with latents: W_UK [C, N, D], W_UV [C, N, V]

    @property
    def value_dim(self) -> int:
        """V."""
        return (self.rows if self.up is None else self.up)[1].shape[-1]


class RankResult(NamedTuple):
    """What one rank has computed, in per-device order."""

    out: np.ndarray  # [B, t, N, V] float16
    lse: np.ndarray  # [B, t, N] float32
    positions: np.ndarray  # [B, t] int32
    segments: np.ndarray  # [B, t] int32


def read_case(path: Path) -> Case:
    """Read and check one case.

    Raises:
      InputError: one line that names the file and what is wrong with it.
    """
    try:
        return _read_case(path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_case(path: Path) -> Case:
    with opened(path) as file:
        dtypes, shapes = forms_of(file)
        _check_tensors(dtypes, shapes)
        arrays = {name: file.get_tensor(name) for name in dtypes}
        metadata = file.metadata() or {}
    check_header(metadata, "cpjax.case", path.stem)
    check_digest(metadata, arrays, dtypes)
    said = _description(metadata.get("case", ""))
    if "key" in arrays:
        rows, up = (arrays.pop("key"), arrays.pop("value")), None
    else:
        rows = latent_rows(arrays.pop("c_kv"), arrays.pop("k_rope"))
        up = arrays.pop("w_uk"), arrays.pop("w_uv")
        if said["layout"] == "decode":
            raise InputError("is a decode with tensor 'c_kv'; decode takes the latent as key and value of one head")
    return Case(path.stem, metadata["digest"], rows=rows, up=up, **arrays, **said)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, to read in the block.

    Raises:
      InputError: there is none, or what is read in the block is not whole.
    """
    if not path.is_file():
        raise InputError("is no file" if path.exists() else "does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"is not a whole safetensors file ({_first_line(error)})") from None


def forms_of(file: Any) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Dtype, as safetensors writes it, and shape of each tensor of an opened file; no tensor is read."""
    headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    dtypes = {name: header.get_dtype() for name, header in headers.items()}
    return dtypes, {name: header.get_shape() for name, header in headers.items()}


def check_header(metadata: dict[str, str], form: str, name: str) -> None:
    """Refuse a case of another format or version, and a name that is not the file's or none at all.

    Raises:
      InputError: what is wrong.
    """
    _expect(metadata, "format", form)
    _expect(metadata, "version", VERSION)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise InputError(f"the name {name!r} may have only letters, digits, '.', '_' and '-'; rename the case")
    _expect(metadata, "name", name)


def check_digest(metadata: dict[str, str], arrays: dict[str, np.ndarray], dtypes: dict[str, str]) -> None:
    """Refuse a case whose content is not that of its digest.

    Raises:
      InputError: it is not.
    """
    if metadata.get("digest") != digest(metadata.get("case", ""), arrays, dtypes):
        raise InputError(
            "the content does not have the digest that the file states; the file was altered, make it again"
        )


def latent_rows(c_kv: np.ndarray, k_rope: np.ndarray) -> tuple[np.ndarray]:
    """What travels of a latent: `[B, S, C]` and `[B, S, R]` in one row a token, `[B, S, 1, C + R]`."""
    return (np.concatenate([c_kv, k_rope], axis=2)[:, :, None],)


def _expect(metadata: dict[str, str], key: str, value: str) -> None:
    if metadata.get(key) != value:
        raise InputError(f"metadata {key!r} is {metadata.get(key)!r}; it must be {value!r}")


def _check_tensors(dtypes: dict[str, str], shapes: dict[str, list[int]]) -> None:
    tensors = LATENT_TENSORS if "c_kv" in dtypes else TENSORS
    added = sorted({"sink", "alibi", "bias"} & dtypes.keys())
    if added:
        raise InputError(f"has tensor {added[0]!r}; no operator is called with one, leave the case out")
    if dtypes.keys() != tensors.keys():
        missing, extra = sorted(tensors.keys() - dtypes.keys()), sorted(dtypes.keys() - tensors.keys())
        raise InputError(
            f"missing tensors {missing}, unknown tensors {extra}; such a case has exactly {sorted(tensors)}"
        )
    sizes: dict[str, tuple[int, str]] = {}
    for name, (dtype, letters) in tensors.items():
        shape = shapes[name]
        if dtypes[name] == "BF16":
            raise InputError(f"tensor {name!r} is BF16; MindIE's context parallelism is FP16 only: convert it to F16")
        if dtypes[name] != dtype:
            raise InputError(f"tensor {name!r} is {dtypes[name]}; it must be {dtype}")
        if len(shape) != len(letters) or 0 in shape:
            raise InputError(f"tensor {name!r} has shape {shape}; it must be [{', '.join(letters)}], nothing empty")
        for letter, size in zip(letters, shape, strict=True):
            known, where = sizes.setdefault(letter, (size, name))
            if size != known:
                raise InputError(f"{letter} is {known} in {where!r} but {size} in {name!r}; they must be equal")
    if tensors is LATENT_TENSORS:
        head_dim, nope, rope = (sizes[letter][0] for letter in "HDR")
        if head_dim != nope + rope:
            raise InputError(f"query head dim {head_dim} is not that of 'w_uk' and 'k_rope', {nope} + {rope}")
    elif sizes["N"][0] % sizes["K"][0]:
        raise InputError(f"{sizes['N'][0]} query heads cannot share {sizes['K'][0]} key/value heads evenly")


def digest(case: str, arrays: dict[str, np.ndarray], dtypes: dict[str, str]) -> str:
    """SHA-256 of a case's content, hex, as docs/formats.md says: description, then name, dtype, shape and bytes."""
    sha = hashlib.sha256(case.encode())
    for name in sorted(arrays):
        shape = ",".join(map(str, arrays[name].shape))
        sha.update(b"".join(word.encode() + b"\0" for word in (name, dtypes[name], shape)))
        sha.update(arrays[name].tobytes())
    return sha.hexdigest()


def _description(text: str) -> dict[str, Any]:
    try:
        case = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"metadata 'case' is not JSON ({_first_line(error)})") from None
    if not isinstance(case, dict):
        raise InputError(f"metadata 'case' is a JSON {type(case).__name__}; it must be an object")
    rules = {
        "scale": ("a finite number", lambda x: type(x) in (int, float) and abs(x) < 1e300 and math.isfinite(x)),
        "is_causal": ("true or false", lambda x: type(x) is bool),
        "cp": ("a whole number, at least 1", lambda x: type(x) is int and x >= 1),
        "layout": (" or ".join(map(repr, LAYOUTS)), lambda x: isinstance(x, str) and x in LAYOUTS),
        "precision": ("an object: backend name → profile name", lambda x: isinstance(x, dict)),
    }
    for key, (rule, holds) in rules.items():
        if not holds(case.get(key)):
            raise InputError(f"{key} is {str(case.get(key))[:40]!r}; it must be {rule}")
    for key, what in (("window", "has a sliding window"), ("softcap", "is called with a softcap")):
        if case.get(key) is not None:
            raise InputError(f"{key} is {str(case[key])[:40]}; no operator {what}, leave the case out")
    unknown = sorted(case.keys() - rules.keys() - {"about", "window", "softcap"})
    if unknown:
        raise InputError(
            f"metadata 'case' has {unknown[0]!r}, which this version does not know; it has {sorted(rules)}"
        )
    return {"scale": float(case["scale"]), **{key: case[key] for key in ("is_causal", "cp", "precision", "layout")}}


def finished(path: Path, digest: str, form: str = "cpjax.result") -> dict[str, Any] | None:
    """The `about` of the result at `path` if it answers the case of this digest, None if there is no file.

    `form` is the format that the result must have.

    Raises:
      InputError: another file is there. It is never overwritten.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") == form and metadata.get("digest") == digest:
            return json.loads(metadata["about"])
        found = f"the {metadata.get('format')} of digest {str(metadata.get('digest'))[:8]}…"
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        found = f"no whole result ({_first_line(error)})"
    raise InputError(f"{path} is there and is {found}, not this case's ({digest[:8]}…); move it away")


def write_result(
    path: Path,
    case: Case,
    ranks: list[RankResult],
    *,
    precision: str,
    order: str,
    about: dict,
    key_value: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Write the result of all ranks to `path`: whole, or not at all.

    `key_value` are the keys `[B, S, N, H]` and values `[B, S, N, V]` that were made of a case's latents.

    Raises:
      InputError: something is there already.
      OSError: it could not be written; nothing is left.
    """
    tensors: dict[str, np.ndarray] = {}
    if key_value is not None:
        tensors["key"], tensors["value"] = key_value
    for rank, result in enumerate(ranks):
        for name, array in result._asdict().items():
            tensors[f"{name}.{rank}"] = np.ascontiguousarray(array)
    metadata = {
        "format": "cpjax.result",
        "version": VERSION,
        "name": case.name,
        "digest": case.digest,
        "backend": "npu",
    }
    metadata |= {"precision": precision, "order": order, "about": json.dumps(about)}
    write_whole(path, tensors, metadata)


def write_whole(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a result with these tensors: whole, or not at all, and never over anything.

    Raises:
      InputError: something is there already.
      OSError: it could not be written; nothing is left.
    """
    if finished(path, metadata["digest"], metadata["format"]) is not None:
        raise InputError(f"{path} is there already; move it away to compute it again")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, unfinished, metadata)
        os.replace(unfinished, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({_first_line(error)})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
