"""What the tests of npu_backend share: problems, a naive twin of npu_ring_mla's roundings, and an error bound.

Nothing here imports npu_backend, nor cpjax: formats, schedule and roundings are written a second time, from their
documents.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

SCALE = 192**-0.5
U, ETA = 2.0**-11, 2.0**-25  # FP16: unit roundoff, half of the smallest subnormal


class Problem(NamedTuple):
    """Self-attention of B requests: `query` `[B, T, N, 192]`, `key` `[B, T, K, 192]`, `value` `[B, T, K, 128]`."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    lengths: tuple[int, ...]  # real tokens per request; pads follow
    is_causal: bool
    cp: int
    scale: float = SCALE

    @property
    def position(self) -> np.ndarray:
        batch, length = self.query.shape[:2]
        return np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length)).copy()

    @property
    def segment(self) -> np.ndarray:
        return np.where(self.position < np.array(self.lengths)[:, None], 0, -1).astype(np.int32)

    @property
    def visible(self) -> np.ndarray:
        """`[B, T, S]`: same segment, no pad, and not in the future if causal."""
        real, index = self.segment == 0, np.arange(self.query.shape[1])
        seen = real[:, :, None] & real[:, None, :]
        return seen & (index[:, None] >= index[None, :]) if self.is_causal else seen


HEADS = ((1, 1), (2, 2), (2, 1), (4, 4), (4, 2), (4, 1))


@st.composite
def problems(draw, cp: int, max_tokens: int = 72):
    """Any problem that the backend takes, small enough to be computed in milliseconds."""
    heads, kv_heads = draw(st.sampled_from(HEADS))
    lengths = tuple(draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=2)))
    unit = 2 * cp
    total = -(-max(lengths) // unit) * unit + unit * draw(st.integers(0, 1))
    return problem(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(("normal", "needle", "mean"))),
        (heads, kv_heads),
        lengths,
        total,
        is_causal=draw(st.booleans()),
        cp=cp,
    )


def problem(seed, kind, heads, lengths, total, *, is_causal, cp) -> Problem:
    """Inputs of a kind; pads hold NaN, which must not spread.

    normal: logits of standard deviation 1. needle: every query wants one key only, any it may see, so that the loss of
    a key is an error of order 1. mean: values of mean 3.
    """
    rng = np.random.default_rng(seed)
    (n, k), batch = heads, len(lengths)
    query, key, value = (rng.normal(size=(batch, total, *tail)) for tail in ((n, 192), (k, 192), (k, 128)))
    scale = SCALE
    if kind == "mean":
        value += 3
    if kind == "needle":
        scale = 0.25
        key = np.sign(key)
        for b, i, h in np.ndindex(batch, total, n):
            last = min(i, lengths[b] - 1) if is_causal else lengths[b] - 1
            query[b, i, h] = key[b, rng.integers(0, last + 1), h // (n // k)]
    arrays = [x.astype(np.float16) for x in (query, key, value)]
    for x in arrays:
        for b, length in enumerate(lengths):
            x[b, length:] = np.nan
    return Problem(*arrays, lengths, is_causal, cp, scale)


def exact_problem(seed, heads, lengths, total, *, is_causal, cp, chunks) -> Problem:
    """Inputs of which every float32 sum in staged attention is exact in any order, so that bits can be compared.

    Queries and keys are multiples of 1/8, so q·k is exact in float32. Of each tile of each chunk two keys are alive;
    the others lie hundreds of logits lower and have probability 0 beside them. Sums have at most two terms then.
    The sequence is computed in so many `chunks`.
    """
    rng = np.random.default_rng(seed)
    (n, k), batch = heads, len(lengths)
    query, key = (rng.integers(-24, 25, size=(batch, total, x, 192)) / 8 for x in (n, k))
    value = rng.normal(size=(batch, total, k, 128))
    query[..., 188:], key[..., 188:] = 16, -56
    chunk = total // chunks
    for b, h in np.ndindex(batch, k):
        for start in (c * chunk + tile for c in range(chunks) for tile in range(0, chunk, 512)):
            stop = min(start + 512, (start // chunk + 1) * chunk)
            alive = rng.integers(start, stop, size=2)
            alive[0] *= start > 0  # the first token is alive, so that every causal query sees one
            key[b, alive, h, 188:] = 0
    return Problem(*(x.astype(np.float16) for x in (query, key, value)), lengths, is_causal, cp)


class Row(NamedTuple):
    """Staged attention of one query of one head. `exact`: every float32 sum in it was exact in any order."""

    out: np.ndarray  # [128] float16
    lse: np.float32
    exact: bool


def staged_row(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> Row:
    """npu_ring_mla (FP16, first ring) of one query `[192]` and the keys it sees, `[n, 192]` and `[n, 128]`."""
    m, total, weighted, exact = np.float16(-np.inf), np.float32(0), np.zeros(128, np.float32), True
    for start in range(0, len(key), 512):
        k, v = key[start : start + 512], value[start : start + 512].astype(np.float32)
        raw = (k.astype(np.float32) @ query.astype(np.float32)).astype(np.float16)
        score = raw * np.float16(scale)
        new_m = max(m, score.max())
        p = exp(score - new_m)
        rescale = exp(m - new_m)
        exact = (exact or rescale == 0) and np.count_nonzero(p) <= 2
        total = total * rescale + p.sum(dtype=np.float32)
        weighted = weighted * rescale + (p.astype(np.float16).astype(np.float32)[:, None] * v).sum(0, dtype=np.float32)
        m = new_m
    return Row((weighted / total).astype(np.float16), log(total) + np.float32(m), exact)


def staged_merge(a: Row, b: Row) -> Row:
    """calc_type_default: float32 on two rounded outs, the result rounded."""
    top = max(a.lse, b.lse)
    weight_a, weight_b = exp(a.lse - top), exp(b.lse - top)
    total = weight_a + weight_b
    out = (weight_a * a.out.astype(np.float32) + weight_b * b.out.astype(np.float32)) / total
    exact = (a.exact or weight_a == 0) and (b.exact or weight_b == 0)
    return Row(out.astype(np.float16), top + log(total), exact)


def staged_ring_row(p: Problem, b: int, i: int, n: int) -> Row:
    """Query i of a ring: chunks in order "ring" of docs/formats.md, merged one after the other."""
    chunk = p.query.shape[1] // (2 * p.cp)
    query_chunk, head = i // chunk, n // (p.query.shape[2] // p.key.shape[2])
    rank = min(query_chunk, 2 * p.cp - 1 - query_chunk)
    carried = None
    for step in range(p.cp):
        owner = (rank - step) % p.cp
        for kv_chunk in (owner, 2 * p.cp - 1 - owner):
            seen = np.flatnonzero(p.visible[b, i, kv_chunk * chunk : (kv_chunk + 1) * chunk]) + kv_chunk * chunk
            if len(seen):
                new = staged_row(p.query[b, i, n], p.key[b, seen, head], p.value[b, seen, head], p.scale)
                carried = new if carried is None else staged_merge(carried, new)
    assert carried is not None
    return carried


def exp(x) -> np.ndarray:
    """PyTorch's float32 exp, of a FP16 or float32 difference; NumPy's differs in last places."""
    return torch.exp(torch.from_numpy(np.atleast_1d(x).astype(np.float32))).numpy().reshape(np.shape(x))[()]


def log(x) -> np.float32:
    """PyTorch's float32 logarithm."""
    return torch.log(torch.tensor(x, dtype=torch.float32)).numpy()[()]


def hard_bound(p: Problem, merges: int) -> tuple[np.ndarray, np.ndarray]:
    """How far correct staged arithmetic may be from exact attention, merged in any order: out and lse, per element.

    With s exact scores, A = softmax(s), o = Σ A v, and ^ what is computed, for each key j and its row:

      |ŝ − s| ≤ E     rounding of q·k to FP16 and of its float32 sum; of the scale; of their product
      δ, |δ| ≤ D      log-weight error of j: E, and U·(m̂ − ŝ) for the FP16 subtractions s − m and m − m' (m grows, so
                      they telescope), and F for float32: exponentials, sums, lse carried by `merges` merges
      |o' − o|        = |Σ A (e^δ − 1)(v − o)| / Σ A e^δ for the computed weights, exactly
      p, out          FP16: U·p + ETA per probability; U·|o_chunk| + ETA per chunk and per merge, where
                      Σ |weight·o_chunk| ≤ Σ A|v|; all in computed weights, at most e^(2 max D) times the exact
    """
    group = p.query.shape[2] // p.key.shape[2]
    query, key, value = (
        np.where((p.segment == 0)[..., None, None], x, 0).astype(np.float64) for x in (p.query, p.key, p.value)
    )
    key, value = np.repeat(key, group, axis=2), np.repeat(value, group, axis=2)
    seen = p.visible[:, :, None, :]
    x = np.einsum("btnh,bsnh->btns", query, key)
    size = np.einsum("btnh,bsnh->btns", abs(query), abs(key))
    c = float(np.float16(p.scale))
    e_raw = U * abs(x) + 192 * 2.0**-24 * (1 + U) * size + ETA
    e = abs(c - p.scale) * abs(x) + c * e_raw + U * c * (abs(x) + e_raw) + ETA
    s = p.scale * x
    # Rows that see nothing (pads) are not judged; their top of 0 only keeps infinities out.
    top = np.where(seen.any(-1, keepdims=True), np.max(np.where(seen, s + e, -np.inf), axis=-1, keepdims=True), 0)
    weight = np.exp(np.where(seen, s - top, -np.inf))
    total = np.where(seen.any(-1, keepdims=True), weight.sum(-1, keepdims=True), 1)
    a, lse = weight / total, top + np.log(total)
    f32 = (x.shape[-1] + 64) * 2.0**-23 + (merges + 1) * 2.0**-22 * (2 + abs(lse) + abs(top))
    d = np.where(seen, e + U * (top - s + e) + f32, 0)
    o = np.einsum("btns,bsnv->btnv", a, value)
    size_v = np.einsum("btns,bsnv->btnv", a, abs(value))
    drift = np.empty_like(o)
    for b, t, n in np.ndindex(*o.shape[:3]):
        gain = a[b, t, n] * np.expm1(d[b, t, n])
        drift[b, t, n] = gain @ abs(value[b, :, n] - o[b, t, n]) / max((a[b, t, n] * np.exp(-d[b, t, n])).sum(), 1e-9)
    underflow = ETA * np.exp(top - lse) * np.einsum("btns,bsnv->btnv", np.where(seen, 1.0, 0.0), abs(value))
    more = np.exp(2 * d.max(-1))[..., None]
    bound = drift + more * ((U * (2 + merges) + f32) * size_v + underflow + ETA * (1 + 2 * merges))
    judged = seen.any(-1)
    up, down = (np.log(np.where(judged, (a * np.exp(sign * d)).sum(-1), 1)) for sign in (1, -1))
    return bound, np.maximum(up, -down) + f32[..., 0]


def write_case(folder: Path, p: Problem, name: str = "case", **changes) -> Path:
    """A case file as docs/formats.md says; `changes` replaces fields of the JSON description."""
    tensors = {"query": p.query, "key": p.key, "value": p.value}
    for side in ("q", "kv"):
        tensors |= {f"{side}_position": p.position, f"{side}_segment": p.segment}
    case = {"scale": p.scale, "is_causal": p.is_causal, "cp": p.cp, "layout": "zigzag"}
    case |= {"precision": {"npu": "ring_mla_fp16"}, "about": {}} | changes
    return write_tensors(folder / f"{name}.safetensors", tensors, json.dumps(case))


def write_tensors(path: Path, tensors: dict[str, np.ndarray], case: str, **changes: str) -> Path:
    """Any tensors and description as a case file with the digest that belongs to them; `changes` replaces metadata."""
    names = {"float16": "F16", "int32": "I32", "float32": "F32", "int64": "I64"}
    sha = hashlib.sha256(case.encode())
    for key in sorted(tensors):
        x = np.ascontiguousarray(tensors[key])
        for word in (key, names[x.dtype.name], ",".join(map(str, x.shape))):
            sha.update(word.encode() + b"\0")
        sha.update(x.tobytes())
    metadata = {"format": "cpjax.case", "version": "1", "name": path.stem, "case": case, "digest": sha.hexdigest()}
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, path, metadata | changes)
    return path


def joined(path: Path, p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`out` and `lse` of a result file in global order, after checking that each rank holds what zigzag gives it."""
    tensors = load_file(path)
    assert set(tensors) == {f"{x}.{r}" for r in range(p.cp) for x in ("out", "lse", "positions", "segments")}
    batch, total, heads = p.query.shape[:3]
    chunk = total // (2 * p.cp)
    out, lse = (
        np.full((batch, total, heads, 128), np.nan, np.float16),
        np.full((batch, total, heads), np.nan, np.float32),
    )
    for rank in range(p.cp):
        rows = np.r_[rank * chunk : (rank + 1) * chunk, total - (rank + 1) * chunk : total - rank * chunk]
        assert (tensors[f"positions.{rank}"] == p.position[:, rows]).all()
        assert (tensors[f"segments.{rank}"] == p.segment[:, rows]).all()
        assert tensors[f"out.{rank}"].dtype == np.float16
        assert tensors[f"lse.{rank}"].dtype == np.float32
        out[:, rows], lse[:, rows] = tensors[f"out.{rank}"], tensors[f"lse.{rank}"]
    return out, lse
