"""The conformance set: small cases for who writes a kernel. Those that tell what is wrong come first.

The same bytes on every machine: numbers are made of SHAKE-256 and integers, by no random generator that may change.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.folders import write_cases
from cpjax.mask import PAD, Tokens

VERSION = 2
"""Raised when any byte of any case changes (tests/files/test_conformance.py holds the checksum of all of them)."""

PRECISION = {"spec": "flash_fp16", "sdpa": "flash_fp16", "npu": "ring_mla_fp16"}
HUGE = 8000
TOKENS = 192


class Heads(NamedTuple):
    """Query heads, key/value heads, query and key head dim, value head dim."""

    query: int
    kv: int
    qk_dim: int
    v_dim: int


GQA, MLA = Heads(4, 2, 64, 64), Heads(2, 2, 192, 128)


def write_conformance(folder: Path) -> list[Case]:
    """Write all cases and their checksums into a new folder: all of them, or nothing.

    Raises:
      InputError: the folder is there and not empty, or cannot be written.
    """
    return write_cases(folder, conformance_cases(), f"cpjax conformance set, version {VERSION}")


def conformance_cases() -> Iterator[Case]:
    """All cases, in the order of their names."""
    yield from _diagnostic()
    yield from _ordinary()


def _diagnostic() -> Iterator[Case]:
    number = 0
    for label, heads in (("gqa", GQA), ("mla", MLA)):
        for kind, causal, cp in (("seen", True, 1), ("seen", True, 2), ("seen", False, 2), ("seen", True, 4)):
            number += 1
            says = "q = 0: lse is ln of the number of keys seen; v is one-hot: out says which"
            case = _plain(f"{number:02}-{kind}-{_word(causal)}-{label}-cp{cp}", heads, heads.v_dim, cp, causal=causal)
            yield _about(replace(case, query=np.zeros_like(case.query), value=one_hot(case)), "seen", says)
        number += 1
        case = _plain(f"{number:02}-one-hot-causal-{label}-cp2", heads, heads.v_dim, 2)
        says = "each query has a score of 32 or more with one key, and 0 with all others: out is that key's value"
        yield _about(_pointing(case), "one-hot", says)
        number += 1
        length = heads.v_dim - 13
        case = _plain(f"{number:02}-pads-causal-{label}-cp2", heads, heads.v_dim, 2, real=length)
        says = "pads hold NaN in query, key and value; q = 0 and v one-hot as in 'seen'"
        yield _about(
            _with_nan_in_pads(replace(case, query=np.zeros_like(case.query), value=one_hot(case))), "seen", says
        )
        number += 1
        case = _plain(f"{number:02}-future-causal-{label}-cp2", heads, heads.v_dim, 2)
        value = case.value.copy()
        value[:, heads.v_dim // 2 :] *= np.float16(HUGE)
        says = f"values of the second half are {HUGE:,} times larger: no query of the first half may see a trace of it"
        yield _about(replace(case, value=value), "future", says)


def _ordinary() -> Iterator[Case]:
    number = 20
    wide = Heads(8, 2, 128, 128)
    for label, heads, cp, causal, factor in (
        ("gqa", GQA, 1, True, 1), ("gqa", GQA, 2, True, 1), ("gqa", GQA, 2, False, 1), ("gqa", GQA, 2, True, 4),
        ("mqa", Heads(4, 1, 64, 64), 2, True, 1), ("wide", wide, 2, True, 1), ("gqa", GQA, 3, True, 1),
        ("gqa", GQA, 4, True, 1), ("gqa", GQA, 8, True, 1), ("mla", MLA, 1, True, 1), ("mla", MLA, 2, True, 1),
        ("mla", MLA, 2, False, 1), ("mla", MLA, 2, True, 4), ("mla", MLA, 3, True, 1), ("mla", MLA, 4, True, 1),
        ("mla", MLA, 8, True, 1),
    ):  # fmt: skip
        peaked = "-peaked" if factor != 1 else ""
        case = _plain(f"{number}-{_word(causal)}-{label}{peaked}-cp{cp}", heads, TOKENS, cp, causal=causal)
        says = f"normal inputs{f', queries times {factor}' if factor != 1 else ''}"
        yield _about(replace(case, query=case.query * np.float16(factor)), None, says)
        number += 1
    for label, heads in (("gqa", GQA), ("mla", MLA)):
        for kind, cp, requests in (
            ("packed", 2, ((70, 0), (1, 0), (45, 0))), ("prefix", 2, ((50, 37), (33, 0), (8, 100))),
            ("decode", 1, ((1, 200), (1, 57), (1, 0))),
        ):  # fmt: skip
            says = "requests of (new tokens, cached prefix) " + ", ".join(map(str, requests))
            yield _about(_packed(f"{number}-{kind}-{label}-cp{cp}", heads, requests, cp), None, says)
            number += 1
    yield from _logits(number)
    yield from _caches(number + 6)


def _logits(number: int) -> Iterator[Case]:
    """What is done to the logits besides scale and mask. Each matters: without it the outputs are far away."""
    heads = np.arange(GQA.query, dtype=np.float32)
    of_pair = _normal("bias", (1, GQA.query, TOKENS, TOKENS)).astype(np.float32)
    for i, (word, options, says) in enumerate((
        ("softcap", {"softcap": 2.0}, "logits become 2 · tanh(logit / 2)"),
        ("sink", {"sink": 3 + heads / 2}, "one more key of value 0 in every row, of logit `sink` of its head"),
        ("window", {"window": 40}, "a query sees itself and the 39 keys before it"),
        ("alibi", {"alibi": 2 ** -(2 + heads)}, "logits get −alibi · distance"),
        ("bias", {"bias": of_pair}, "`bias` is added to the logits, another number for each head, query and key"),
        ("all-of-them", {"softcap": 4.0, "sink": 1 + heads, "window": 70, "bias": of_pair / 2},
         "softcap first, then bias, then the sink beside them; within the window"),
    )):  # fmt: skip
        case = _plain(f"{number + i}-{word}-gqa-cp2", GQA, TOKENS, 2)
        query = case.query * np.float16(2 if "softcap" in options else 1)
        yield _about(replace(case, query=query, **options), None, says)


def _caches(number: int) -> Iterator[Case]:
    """Decode over caches that hold other numbers of tokens on each rank, one of them none."""
    requests = ((1, 300), (2, 57), (3, 130))  # new tokens, all tokens
    pages = np.array([[1, 1, 0, 3, 1] + [0] * 14, [2, 0, 1, 3] + [-1] * 15, [3, 3, 3, 0, 1, 1, 1, 0, 3] + [-1] * 10])
    for i, (layout, table) in enumerate((("decode", None), ("interleaved:8", None), ("pages:16", pages))):
        places = [[np.concatenate([_last(n, new if queries else n) for new, n in requests]),
                   np.repeat(np.arange(3), [new if queries else n for new, n in requests])]
                  for queries in (True, False)]  # fmt: skip
        q_tokens, kv_tokens = (Tokens(*(x.astype(np.int32)[None] for x in place)) for place in places)
        name = f"{number + i}-{layout.replace(':', '')}-gqa-cp4"
        case = _case(name, GQA, q_tokens, kv_tokens, 4, layout, causal=True)
        says = f"requests of (new tokens, all tokens) {requests}; two and three new tokens see each other causally"
        ranks = None if table is None else table.astype(np.int32)
        yield _about(replace(case, page_ranks=ranks), None, says)


def _last(count: int, last: int) -> np.ndarray:
    return np.arange(count - last, count)


def _word(causal: bool) -> str:
    return "causal" if causal else "full"


def _about(case: Case, reading: str | None, says: str) -> Case:
    about = {"set": "conformance", "set_version": VERSION, "says": says}
    return replace(case, about=about if reading is None else about | {"reading": reading})


def _plain(name: str, heads: Heads, tokens: int, cp: int, *, causal: bool = True, real: int | None = None) -> Case:
    """Self-attention of one request, all numbers normal; `real` tokens, then pads."""
    position = np.arange(tokens, dtype=np.int32)[None]
    places = Tokens(position, np.where(position < (tokens if real is None else real), 0, PAD).astype(np.int32))
    return _case(name, heads, places, places, cp, "zigzag", causal=causal)


def _packed(name: str, heads: Heads, requests: tuple[tuple[int, int], ...], cp: int) -> Case:
    """Requests one after the other, padded to multiples of 2·cp, then their prefixes (docs/formats.md, `packed`)."""
    position, segment, of_prefix, whose = [], [], [], []
    for i, (new, cached) in enumerate(requests):
        padded = -(-new // (2 * cp)) * 2 * cp
        index = np.arange(padded)
        position.append(np.where(index < new, index + cached, 0))
        segment.append(np.where(index < new, i, PAD))
        of_prefix.append(np.arange(cached))
        whose.append(np.full(cached, i))
    q_tokens = Tokens(*(np.concatenate(x).astype(np.int32)[None] for x in (position, segment)))
    kv_tokens = Tokens(
        *(np.concatenate([*x, *y]).astype(np.int32)[None] for x, y in ((position, of_prefix), (segment, whose)))
    )
    return _case(name, heads, q_tokens, kv_tokens, cp, "packed", causal=True)


def _case(name: str, heads: Heads, q_tokens: Tokens, kv_tokens: Tokens, cp: int, layout: str, *, causal: bool) -> Case:
    tokens, keys = np.shape(q_tokens.position)[1], np.shape(kv_tokens.position)[1]
    query = _normal(f"{name}/query", (1, tokens, heads.query, heads.qk_dim))
    key = _normal(f"{name}/key", (1, keys, heads.kv, heads.qk_dim))
    value = _normal(f"{name}/value", (1, keys, heads.kv, heads.v_dim))
    scale = heads.qk_dim**-0.5
    return Case(name, query, key, value, q_tokens, kv_tokens, scale, causal, cp, PRECISION, {}, layout=layout)


def _normal(name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Nearly normal numbers, FP16: the sum of twelve uniform integers (Irwin-Hall), of mean 0 and variance 1."""
    count = int(np.prod(shape))
    stream = hashlib.shake_256(f"cpjax conformance {VERSION}/{name}".encode()).digest(24 * count)
    uniform = np.frombuffer(stream, "<u2").astype(np.int64).reshape(count, 12)
    total = 2 * uniform.sum(axis=1) - 12 * (2**16 - 1)
    return (total / 2.0**17).astype(np.float16).reshape(shape)


def one_hot(case: Case) -> Float[np.ndarray, "1 S K V"]:
    """Values that name their key: key j of head k is 1 in column (j + k) mod V, 0 elsewhere."""
    value = np.zeros_like(case.value)
    for j, k in np.ndindex(value.shape[1:3]):
        value[0, j, k, (j + k) % value.shape[3]] = 1
    return value


def _pointing(case: Case) -> Case:
    """Query t of head n points at key (7t + 3n + 5) mod (t + 1) of its key/value head, and at none of another's.

    Key j of head k is 8 in column j + 17k: whoever reads another head's keys reads another token's value.
    """
    query, key = np.zeros_like(case.query), np.zeros_like(case.key)
    group, columns = query.shape[2] // key.shape[2], key.shape[3]
    for t, n in np.ndindex(query.shape[1:3]):
        query[0, t, n, ((7 * t + 3 * n + 5) % (t + 1) + 17 * (n // group)) % columns] = 64
    for j, k in np.ndindex(key.shape[1:3]):
        key[0, j, k, (j + 17 * k) % columns] = 8
    return replace(case, query=query, key=key, value=one_hot(case))


def _with_nan_in_pads(case: Case) -> Case:
    is_pad = (np.asarray(case.q_tokens.segment) == PAD)[..., None, None]
    query, key, value = (np.where(is_pad, np.float16(np.nan), x) for x in (case.query, case.key, case.value))
    return replace(case, query=query, key=key, value=value)
