"""A case: the inputs of attention and all that is needed to judge an answer, in one file (docs/formats.md)."""

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cpjax.crosscheck.files.atomic import atomic_write
from cpjax.crosscheck.files.latent import Latent, expanded
from cpjax.errors import InputError
from cpjax.mask import Tokens
from cpjax.partition import Pages, Partition, partition_of
from cpjax.partition.cached import Cached
from cpjax.partition.partition import MOST_CP
from cpjax.precision import PROFILES

VERSION = "1"
Description = TypeVar("Description", bound=BaseModel)
NAME = r"[A-Za-z0-9._-]+"
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
"""Of a case whose keys and values are made of a latent; H is D + R."""
MORE_TENSORS = {
    "sink": ("F32", "N"),
    "alibi": ("F32", "N"),
    "bias": ("F32", "bnTS"),
    "page_ranks": ("I32", "rp"),
}
"""What a case may have besides; `b` and `n` are 1, or B and N; `r` requests and the most pages of one, `p`."""


@dataclass(frozen=True)
class Case:
    """One problem, in global token order."""

    name: str
    query: Float[np.ndarray, "B T N H"]
    key: Float[np.ndarray, "B S K H"]
    value: Float[np.ndarray, "B S K V"]
    q_tokens: Tokens
    kv_tokens: Tokens
    scale: float
    is_causal: bool
    cp: int
    precision: dict[str, str]
    """Backend → profile in which it is to compute."""
    about: dict[str, Any]
    """Where the case comes from; free."""
    digest: str = ""
    """SHA-256 of the content; set by `write_case` and `read_case`."""
    layout: str = "zigzag"
    """The name of the partition: `cpjax.partition.PARTITIONS`, with a size where it has one, as "interleaved:8"; or
    "pages:16", with `page_ranks`."""
    window: int | None = None
    """Only keys with |q_position − kv_position| < window are seen; None is no window."""
    softcap: float | None = None
    """Logits become softcap · tanh(logit / softcap)."""
    sink: Float[np.ndarray, " N"] | None = None
    """Per query head, the logit of one more key with value 0; float32, as the next two."""
    alibi: Float[np.ndarray, " N"] | None = None
    """Per query head, a slope: logits get −slope · |q_position − kv_position|."""
    bias: Float[np.ndarray, "b n T S"] | None = None
    """Added to the logits; −inf hides a key. b is 1 or B, n is 1 or N."""
    page_ranks: Int[np.ndarray, "R P"] | None = None
    """Of layout "pages": the rank whose cache holds each page of each request; −1 behind the last page."""
    latent: Latent | None = None
    """What `key` and `value` are made of, if that is what travels; then they are `expanded(latent)`."""

    @property
    def partition(self) -> Partition:
        """Who holds which tokens."""
        return _partition(self.layout, self.cp, self.page_ranks)

    @property
    def logit_options(self) -> dict[str, Any]:
        """What is done to the logits besides mask and scale: those of softcap, sink, alibi and bias that are there."""
        named = {"softcap": self.softcap, "sink": self.sink, "alibi": self.alibi, "bias": self.bias}
        return {name: x for name, x in named.items() if x is not None}


class _Description(BaseModel):
    """The metadata `case` of a case file."""

    model_config = ConfigDict(extra="forbid")
    scale: StrictFloat | StrictInt = Field(allow_inf_nan=False)
    is_causal: StrictBool
    cp: StrictInt = Field(ge=1, le=MOST_CP)
    layout: str
    precision: dict[str, str]
    about: dict[str, Any]
    window: StrictInt | None = Field(default=None, ge=1, le=2**31 - 1)
    softcap: StrictFloat | StrictInt | None = Field(default=None, gt=0, allow_inf_nan=False)


def gaussian_case(
    name: str,
    shape: tuple[int, int, int, int, int],
    *,
    cp: int,
    precision: dict[str, str],
    seed: int,
    about: dict,
    scale: float | None = None,
) -> Case:
    """A causal case of normally distributed inputs, padded at its right end to a multiple of 2·cp.

    Args:
      shape: tokens, query heads, key/value heads, query and key head dim, value head dim.
      scale: None is 1/√H.
    """
    tokens, heads, kv_heads, head_dim, value_dim = shape
    length = math.ceil(tokens / (2 * cp)) * 2 * cp
    rng = np.random.default_rng(seed)
    query, key, value = (
        rng.standard_normal((1, length, *tail), dtype=np.float32).astype(np.float16)
        for tail in ((heads, head_dim), (kv_heads, head_dim), (kv_heads, value_dim))
    )
    position = np.arange(length, dtype=np.int32)[None]
    places = Tokens(position, np.where(position < tokens, 0, -1).astype(np.int32))
    scale = float(head_dim**-0.5) if scale is None else scale
    return Case(name, query, key, value, places, places, scale, True, cp, precision, about | {"seed": seed})


def latent_case(case: Case, width: int, *, nope: int, seed: int) -> Case:
    """`case` with keys and values of all heads made of a normally distributed latent of this width, and k_rope.

    The weights have variance 1/width, so that keys and values have variance 1.

    Args:
      nope: D, the part of the head dim that is made; the rest is k_rope.
    """
    rng = np.random.default_rng(seed)
    batch, tokens, heads = case.key.shape[0], case.key.shape[1], case.query.shape[2]
    shapes = (batch, tokens, width), (batch, tokens, case.query.shape[3] - nope)
    weights = (width, heads, nope), (width, heads, case.value.shape[3])
    c_kv, k_rope, w_uk, w_uv = (rng.standard_normal(shape, dtype=np.float32) for shape in (*shapes, *weights))
    parts = (c_kv, k_rope, w_uk / np.sqrt(np.float32(width)), w_uv / np.sqrt(np.float32(width)))
    latent = Latent(*(x.astype(np.float16) for x in parts))
    key, value = expanded(latent)
    about = case.about | {"latent": {"width": width, "seed": seed}}
    return replace(case, key=key, value=value, latent=latent, about=about)


def write_case(folder: Path, case: Case) -> Case:
    """Write `folder/name.safetensors`, whole or not at all; the case with its digest.

    Raises:
      InputError: a file is there already, or the folder cannot be written.
    """
    description = {"scale": case.scale, "is_causal": case.is_causal, "cp": case.cp, "layout": case.layout}
    if case.window is not None:  # a case without one stays the bytes that it was
        description["window"] = case.window
    if case.softcap is not None:
        description["softcap"] = case.softcap
    text = json.dumps(description | {"precision": case.precision, "about": case.about})
    made_of = {"key": case.key, "value": case.value} if case.latent is None else vars(case.latent)
    added = {name: getattr(case, name) for name in MORE_TENSORS if getattr(case, name) is not None}
    arrays = (
        made_of
        | added
        | {
            "query": case.query,
            "q_position": case.q_tokens.position,
            "q_segment": case.q_tokens.segment,
            "kv_position": case.kv_tokens.position,
            "kv_segment": case.kv_tokens.segment,
        }
    )
    tensors = (TENSORS if case.latent is None else LATENT_TENSORS) | MORE_TENSORS
    dtypes = {name: dtype for name, (dtype, _) in tensors.items() if name in arrays}
    case = replace(case, digest=content_digest(text, arrays, dtypes))
    metadata = {"format": "cpjax.case", "version": VERSION, "name": case.name, "case": text, "digest": case.digest}
    write_tensors(folder / f"{case.name}.safetensors", arrays, metadata)
    return case


def read_case(path: Path) -> Case:
    """Read and check one case; its digest is computed again.

    Raises:
      InputError: one line that names the file, what is wrong with it and what would be right.
    """
    try:
        tensors, dtypes, metadata = read_tensors(path)
        return _case(path.stem, tensors, dtypes, metadata)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _case(name: str, tensors: dict[str, np.ndarray], dtypes: dict[str, str], metadata: dict[str, str]) -> Case:
    expect_metadata(metadata, {"format": "cpjax.case", "version": VERSION, "name": name})
    if not re.fullmatch(NAME, name):
        raise InputError(f"the name {name!r} may have only letters, digits, '.', '_' and '-'; rename the case")
    _check_tensors(tensors, dtypes)
    said = described(_Description, metadata, tensors, dtypes)
    unknown = [word for word in said.precision.values() if word not in PROFILES]
    if unknown:
        raise InputError(f"precision {unknown[0][:40]!r} is unknown; known are {', '.join(PROFILES)}")
    partition = _partition(said.layout, said.cp, tensors.get("page_ranks"))
    partition.check(tensors["q_segment"], tensors["kv_segment"])
    latent = Latent(*(tensors[x] for x in ("c_kv", "k_rope", "w_uk", "w_uv"))) if "c_kv" in tensors else None
    if latent is not None and isinstance(partition, Cached):
        raise InputError("is a decode with tensor 'c_kv'; decode takes the latent as key and value of one head")
    key, value = (tensors["key"], tensors["value"]) if latent is None else expanded(latent)
    return Case(
        name=name,
        query=tensors["query"],
        key=key,
        value=value,
        q_tokens=Tokens(tensors["q_position"], tensors["q_segment"]),
        kv_tokens=Tokens(tensors["kv_position"], tensors["kv_segment"]),
        scale=float(said.scale),
        is_causal=said.is_causal,
        cp=said.cp,
        precision=said.precision,
        about=said.about,
        digest=metadata["digest"],
        layout=said.layout,
        window=said.window,
        softcap=None if said.softcap is None else float(said.softcap),
        sink=tensors.get("sink"),
        alibi=tensors.get("alibi"),
        bias=tensors.get("bias"),
        page_ranks=tensors.get("page_ranks"),
        latent=latent,
    )


def _partition(layout: str, cp: int, page_ranks: np.ndarray | None) -> Partition:
    word, _, page = layout.partition(":")
    if word != Pages.name:
        if page_ranks is not None:
            raise InputError(
                f"layout is {layout[:40]!r} and tensor 'page_ranks' is there; it belongs to layout 'pages:16'"
            )
        return partition_of(layout, cp)
    if page_ranks is None or not page.isdecimal():
        raise InputError(
            f"layout is {layout[:40]!r}; it must say tokens of a page, as 'pages:16', and have 'page_ranks'"
        )
    is_page = page_ranks >= 0
    if (np.diff(is_page.astype(np.int8), axis=1) > 0).any():
        raise InputError("'page_ranks' has −1 before a page; −1 stands only behind the last page of a request")
    rows = tuple(tuple(row[:n].tolist()) for row, n in zip(page_ranks, is_page.sum(axis=1), strict=True))
    return Pages(cp, page=int(page), ranks=rows)


def _check_tensors(tensors: dict[str, np.ndarray], dtypes: dict[str, str]) -> None:
    is_latent = "c_kv" in tensors
    wanted = LATENT_TENSORS if is_latent else TENSORS
    if not wanted.keys() <= tensors.keys() <= wanted.keys() | MORE_TENSORS.keys():
        missing = sorted(wanted.keys() - tensors.keys())
        extra = sorted(tensors.keys() - wanted.keys() - MORE_TENSORS.keys())
        raise InputError(
            f"missing tensors {missing}, unknown tensors {extra}; such a case has {sorted(wanted)}, and may have "
            f"{sorted(MORE_TENSORS)}"
        )
    wanted = wanted | {name: form for name, form in MORE_TENSORS.items() if name in tensors}
    sizes: dict[str, int] = {}
    for name, (dtype, letters) in wanted.items():
        shape = tensors[name].shape
        if dtypes[name] != dtype or len(shape) != len(letters) or 0 in shape:
            form = f"{dtype} [{', '.join(letters)}], nothing empty"
            raise InputError(f"tensor {name!r} is {dtypes[name]} {list(shape)}; it must be {form}")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise InputError(f"{letter} is {size} in {name!r} but {sizes[letter]} elsewhere; they must be equal")
    for letter, whole in (("b", "B"), ("n", "N")):
        if sizes.get(letter, 1) not in (1, sizes[whole]):
            raise InputError(
                f"'bias' is {list(tensors['bias'].shape)}; its {whole} is {sizes[letter]}, not 1 or {sizes[whole]}"
            )
    if is_latent:
        if sizes["H"] != sizes["D"] + sizes["R"]:
            parts = f"{sizes['D']} + {sizes['R']}"
            raise InputError(f"query head dim {sizes['H']} is not that of 'w_uk' and 'k_rope', {parts}")
    elif sizes["N"] % sizes["K"]:
        raise InputError(f"{sizes['N']} query heads cannot share {sizes['K']} key/value heads evenly")


def content_digest(text: str, arrays: dict[str, np.ndarray], dtypes: dict[str, str]) -> str:
    """SHA-256, hex, of the description, then of each tensor's name, dtype, shape and bytes (docs/formats.md)."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        for word in (name, dtypes[name], ",".join(map(str, arrays[name].shape))):
            sha.update(word.encode() + b"\0")
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()


def described(
    model: type[Description], metadata: dict[str, str], tensors: dict[str, np.ndarray], dtypes: dict[str, str]
) -> Description:
    """What the metadata say of a case, as `model`; the digest of the content is computed again.

    Raises:
      InputError: another digest, or a description that the model refuses.
    """
    text = metadata.get("case", "")
    if metadata.get("digest") != content_digest(text, tensors, dtypes):
        raise InputError("the content does not have the digest that the file states; the file was altered")
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"metadata 'case', {'.'.join(map(str, first['loc'])) or 'as a whole'}: {first['msg']}"
        ) from None


def expect_metadata(metadata: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise InputError for the first metadata key that is not as wanted."""
    for key, value in wanted.items():
        if metadata.get(key) != value:
            raise InputError(f"metadata {key!r} is {str(metadata.get(key))[:60]!r}; it must be {value!r}")


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, str]]:
    """Tensors, their dtypes as safetensors writes them, and metadata of a file.

    Raises:
      InputError: no file, or no whole safetensors file.
    """
    if not path.is_file():
        raise InputError("is no file" if path.exists() else "does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
            return {name: file.get_tensor(name) for name in names}, dtypes, file.metadata() or {}
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(f"is no whole safetensors file ({next(iter(str(error).splitlines()), '')})") from None


def write_tensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file under another name and rename it, so that it is whole or not there.

    Raises:
      InputError: something is there already, or it cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} is there already; nothing is overwritten, move it away")
    try:
        with atomic_write(path) as unfinished:
            content = save({name: np.ascontiguousarray(x) for name, x in arrays.items()}, metadata)
            unfinished.write_bytes(_in_order(content))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written ({next(iter(str(error).splitlines()), '')})") from None


def _in_order(content: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes them in another order in every process."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
