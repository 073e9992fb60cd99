"""What a rank holds of a case: its chunks of each request, with the places of their tokens."""

import math
from typing import NamedTuple

import numpy as np

from npu_backend.contracts.latent import HEADS
from npu_backend.errors import InputError
from npu_backend.families import FAMILIES, Family, precision_of
from npu_backend.files import Case
from npu_backend.packing import held_rows
from npu_backend.schedule import chunk_count

PAD = -1
"""The segment of a token that is only filling."""


class Shard(NamedTuple):
    """The tokens of one rank in per-device order, request after request: t = T/cp tokens."""

    query: np.ndarray  # [B, t, N, H] float16
    rows: tuple[np.ndarray, ...]  # keys [B, t, K, H], values [B, t, K, V]; or latents [B, t, 1, C + R]; float16
    position: np.ndarray  # [B, t] int32
    segment: np.ndarray  # [B, t] int32


class Requests(NamedTuple):
    """How the rows of a case are made up of requests. Not packed: one a row, all of one padded length."""

    chunk_lengths: tuple[int, ...]  # tokens of a chunk, per request of a row
    lengths: tuple[tuple[int, ...], ...]  # real tokens, per request of a row, for each batch row
    prefix_lengths: tuple[int, ...]  # cached tokens before each request of a row


def requests_of(case: Case) -> Requests:
    """The requests of a case that `check_computable` has accepted."""
    if case.layout == "zigzag":
        lengths = tuple(int(n) for n in (case.q_segment != PAD).sum(axis=1))
        return Requests((case.query.shape[1] // chunk_count(case.cp),), (lengths,), (0,))
    starts = _starts(case)
    ends = [*starts[1:], case.query.shape[1]]
    segment, prefix = case.q_segment[0], case.kv_segment[0, case.query.shape[1] :]
    return Requests(
        tuple((stop - start) // chunk_count(case.cp) for start, stop in zip(starts, ends, strict=True)),
        tuple((int((segment[start:stop] != PAD).sum()),) for start, stop in zip(starts, ends, strict=True)),
        tuple(int((prefix == i).sum()) for i in range(len(starts))),
    )


def _starts(case: Case) -> list[int]:
    """Where each request of a pack begins: where its segment is seen first."""
    segment = case.q_segment[0]
    return [int(np.argmax(segment == i)) for i in range(int(segment.max()) + 1)]


def shard(case: Case, rank: int) -> Shard:
    """The shard of `rank`. Pads become zeros.

    A pad is hidden from real tokens by the operator's mask, which is added to the scores: that hides any number, but
    not a NaN or an infinity, and what a case stores in its pads is nobody's business.
    """
    held = held_rows(rank, case.cp, requests_of(case).chunk_lengths)
    real = (case.q_segment[:, held] != PAD)[..., None, None]
    query, *rows = (np.where(real, x[:, held], np.float16(0)) for x in (case.query, *case.rows))
    return Shard(query, tuple(rows), case.q_position[:, held], case.q_segment[:, held])


def check_computable(case: Case, family: Family = FAMILIES["ring_mla"]) -> None:
    """Refuse what this backend cannot compute, before any process is started.

    Raises:
      InputError: one line with the rule and the fix.
    """
    name, (_, tokens, heads, head_dim), value_dim = case.name, case.query.shape, case.value_dim
    if case.layout == "decode":
        _check_decode(case, family)
        return
    if not family.takes(head_dim, value_dim):
        raise InputError(
            f"{name}: head dims are {head_dim} (query, key) and {value_dim} (value); "
            f"{family.operators[0]} takes {family.dims}"
        )
    if heads > 128:
        raise InputError(
            f"{name}: {heads} query heads; {family.operators[0]} takes at most 128 per device, split them over tp"
        )
    if case.layout == "zigzag" and tokens != case.kv_position.shape[1]:
        raise InputError(
            f'{name}: {tokens} queries but {case.kv_position.shape[1]} keys; only layout "packed" has a prefix'
        )
    chunks = chunk_count(case.cp)
    if tokens % chunks:
        raise InputError(
            f"{name}: {tokens} tokens are no multiple of 2·cp = {chunks}; "
            f"pad to {math.ceil(tokens / chunks) * chunks} with tokens of segment -1"
        )
    if abs(case.scale) >= 65520:
        raise InputError(f"{name}: scale {case.scale:g} is not finite in FP16, where npu_ring_mla multiplies with it")
    computes = precision_of(family, case.cp)
    wanted = case.precision.get("npu", computes)
    if wanted != computes:
        raise InputError(
            f"{name}: precision {str(wanted)[:40]!r} is wanted of backend npu; operators {family.name} compute in "
            f"{computes}"
        )
    if case.layout == "packed":
        _check_pack(case)
    else:
        _check_rows(case)


def _check_decode(case: Case, family: Family) -> None:
    """One row; requests 0, 1, … one after the other, of each its last tokens as queries and all as keys; no pads."""
    name, (_, _, heads, head_dim), (key, value) = case.name, case.query.shape, case.rows
    kv_heads, value_dim = value.shape[2:]
    if family.name == "ring_mla":
        if (head_dim, value_dim, kv_heads) != (576, 512, 1) or heads not in HEADS:
            raise InputError(
                f"{name}: {heads} heads on {kv_heads}, head dims {head_dim} and {value_dim}; decode by "
                f"atb::npu_multi_head_latent_attention takes the latent, 576 and 512 of 1 head, for {HEADS} query heads"
            )
        if not np.array_equal(value, key[..., :512]):
            raise InputError(f"{name}: values are not the first 512 of the keys' 576, as in a cached latent")
        if not 0 < case.scale <= 1:
            raise InputError(f"{name}: scale {case.scale:g}; the decode operator takes more than 0 and at most 1")
    elif not (family.takes(head_dim, value_dim) or (family.name == "fia" and (head_dim, value_dim) == (576, 512))):
        raise InputError(f"{name}: head dims are {head_dim} and {value_dim}; {family.operators[0]} takes {family.dims}")
    if case.query.shape[0] != 1 or not case.is_causal:
        raise InputError(f"{name}: decode is one causal row of requests; it has {case.query.shape[0]} rows")
    lengths = np.bincount(np.maximum(case.kv_segment[0], 0))
    queries = np.bincount(np.maximum(case.q_segment[0], 0), minlength=len(lengths))
    if len(queries) != len(lengths) or (queries < 1).any() or (queries > lengths).any():
        raise InputError(f"{name}: {queries} new tokens of requests of {lengths}; each has at least one, all cached")
    wanted = [
        (
            np.repeat(np.arange(len(n)), n),
            np.concatenate([np.arange(a, b) for a, b in zip(start, lengths, strict=True)]),
        )
        for n, start in ((queries, lengths - queries), (lengths, 0 * lengths))
    ]
    found = (case.q_segment[0], case.q_position[0]), (case.kv_segment[0], case.kv_position[0])
    if not all(np.array_equal(a, b) for x, y in zip(wanted, found, strict=True) for a, b in zip(x, y, strict=True)):
        raise InputError(
            f"{name}: decode takes requests 0, 1, … one after the other without pads, as keys positions 0, 1, …, as "
            f"queries the last of them"
        )


def _check_rows(case: Case) -> None:
    if not (np.array_equal(case.q_position, case.kv_position) and np.array_equal(case.q_segment, case.kv_segment)):
        raise InputError(f"{case.name}: queries and keys are at different places; this backend needs self-attention")
    index = np.arange(case.query.shape[1])
    for b, (position, segment) in enumerate(zip(case.q_position, case.q_segment, strict=True)):
        real = segment != PAD
        if (segment < PAD).any():
            raise InputError(f"{case.name}: segment {segment.min()} in batch row {b}; segments are -1 (pad) or more")
        if np.unique(segment[real]).size > 1:
            raise InputError(
                f'{case.name}: batch row {b} packs several requests; layout "zigzag" takes one a row, use "packed"'
            )
        if not np.array_equal(real, index < real.sum()):
            raise InputError(f"{case.name}: pads of batch row {b} are not at the right end; move them there")
        if not np.array_equal(position[real], index[real]):
            raise InputError(f"{case.name}: positions of batch row {b} are not 0, 1, 2, …; renumber them")


def _check_pack(case: Case) -> None:
    """One row; requests 0, 1, … one after the other, each padded to a multiple of 2·cp; then their prefixes."""
    name, tokens, unit = case.name, case.query.shape[1], 2 * case.cp
    if case.query.shape[0] != 1:
        raise InputError(f"{name}: {case.query.shape[0]} batch rows; a pack is one row")
    position, segment = case.q_position[0], case.q_segment[0]
    kv_position, kv_segment = case.kv_position[0], case.kv_segment[0]
    if len(kv_position) < tokens or not (
        np.array_equal(position, kv_position[:tokens]) and np.array_equal(segment, kv_segment[:tokens])
    ):
        raise InputError(f"{name}: the first {tokens} keys of a pack must be the queries' own, the prefix follows")
    count = int(segment.max()) + 1
    if (segment < PAD).any() or count < 1 or not np.isin(np.arange(count), segment).all():
        raise InputError(f"{name}: the segments of a pack are 0, 1, 2, … and -1 for pads, none left out")
    starts = _starts(case)
    ends = [*starts[1:], tokens]
    want = np.full(tokens, PAD)
    for i, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        if start >= stop or (start == 0) != (i == 0) or (stop - start) % unit:
            raise InputError(
                f"{name}: request {i} is at {start} to {stop} of the pack; requests follow each other in order, each "
                f"padded at its right end to a multiple of 2·cp = {unit}"
            )
        length, cached = int((segment[start:stop] == i).sum()), int((kv_segment[tokens:] == i).sum())
        want[start : start + length] = i
        if not np.array_equal(position[start : start + length], cached + np.arange(length)):
            raise InputError(f"{name}: positions of request {i} are not {cached}, {cached + 1}, …, after its prefix")
    if not np.array_equal(want, segment):
        raise InputError(f"{name}: pads of a pack are at the right end of their requests; move them there")
    prefix = [(i, j) for i in range(count) for j in range(int((kv_segment[tokens:] == i).sum()))]
    found = list(zip(kv_segment[tokens:].tolist(), kv_position[tokens:].tolist(), strict=True))
    if prefix != found:
        raise InputError(f"{name}: prefixes of a pack are those of request 0, 1, …, positions 0, 1, …, without pads")
