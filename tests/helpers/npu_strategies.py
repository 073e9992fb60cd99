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


def staged_row(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, score=np.float16, probability="float16"
) -> Row:
    """Staged attention of one query `[H]` and the keys it sees, `[n, H]` and `[n, V]`, in tiles of 512 keys.

    Scores and what is computed of them up to the exponential are of the format `score`, probabilities are rounded to
    `probability` as factors of values. FP16 twice is npu_ring_mla (FP16, first ring).
    """
    m, total, exact = score(-np.inf), np.float32(0), True
    weighted = np.zeros(value.shape[1], np.float32)
    for start in range(0, len(key), 512):
        k, v = key[start : start + 512], value[start : start + 512].astype(np.float32)
        raw = (k.astype(np.float32) @ query.astype(np.float32)).astype(score)
        scores = raw * score(np.float32(scale))
        new_m = max(m, scores.max())
        p = exp(scores - new_m)
        rescale = exp(m - new_m)
        exact = (exact or rescale == 0) and np.count_nonzero(p) <= 2
        total = total * rescale + p.sum(dtype=np.float32)
        weighted = weighted * rescale + (rounded(p, probability).astype(np.float32)[:, None] * v).sum(
            0, dtype=np.float32
        )
        m = new_m
    return Row(rounded(weighted / total, probability), log(total) + np.float32(m), exact)


def rounded(x: np.ndarray, fmt: str) -> np.ndarray:
    """float32 rounded to a format; BF16, which NumPy does not have, comes back in float32."""
    return torch.from_numpy(x).bfloat16().float().numpy() if fmt == "bfloat16" else x.astype(fmt)


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
    chunk = p.query.shape[1] // (2 * p.cp if p.cp > 1 else 1)
    query_chunk, head = i // chunk, n // (p.query.shape[2] // p.key.shape[2])
    rank = min(query_chunk, 2 * p.cp - 1 - query_chunk)
    carried = None
    for step in range(p.cp):
        owner = (rank - step) % p.cp
        for kv_chunk in (owner, 2 * p.cp - 1 - owner) if p.cp > 1 else (0,):
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


class Formats(NamedTuple):
    """Unit roundoff and half the smallest subnormal of scores, and of probabilities and outs."""

    score: tuple[float, float]
    value: tuple[float, float]


SINGLE = (2.0**-24, 2.0**-150)
FORMATS = {
    "ring_mla_fp16": Formats((U, ETA), (U, ETA)),
    "float16": Formats(SINGLE, (U, ETA)),
    "bfloat16": Formats(SINGLE, (2.0**-8, 2.0**-134)),
    "float32": Formats(SINGLE, SINGLE),
}


def hard_bound(p: Problem, merges: int) -> tuple[np.ndarray, np.ndarray]:
    """`rounding_bound` of a problem computed by npu_ring_mla in FP16."""
    tensors = (np.where((p.segment == 0)[..., None, None], x, 0) for x in (p.query, p.key, p.value))
    return rounding_bound(*tensors, p.visible, p.scale, merges, FORMATS["ring_mla_fp16"])


def rounding_bound(query, key, value, visible, scale, merges, formats: Formats) -> tuple[np.ndarray, np.ndarray]:
    """How far correct staged arithmetic may be from exact attention, merged in any order: out and lse, per element.

    With s exact scores, A = softmax(s), o = Σ A v, and ^ what is computed, for each key j and its row:

      |ŝ − s| ≤ E     rounding of q·k and of its float32 sum; of the scale; of their product
      δ, |δ| ≤ D      log-weight error of j: E, and u·(m̂ − ŝ) for the subtractions s − m and m − m' (m grows, so
                      they telescope), and F for float32: exponentials, sums, lse carried by `merges` merges
      |o' − o|        = |Σ A (e^δ − 1)(v − o)| / Σ A e^δ for the computed weights, exactly
      p, out          U·p + ETA per probability; U·|o_chunk| + ETA per chunk and per merge, where
                      Σ |weight·o_chunk| ≤ Σ A|v|; all in computed weights, at most e^(2 max D) times the exact
    """
    (u_score, eta_score), (u, eta) = formats
    group = query.shape[2] // key.shape[2]
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    key, value = np.repeat(key, group, axis=2), np.repeat(value, group, axis=2)
    seen = visible[:, :, None, :]
    x = np.einsum("btnh,bsnh->btns", query, key)
    size = np.einsum("btnh,bsnh->btns", abs(query), abs(key))
    c = float(np.float16(scale) if u_score == U else np.float32(scale))
    e_raw = u_score * abs(x) + query.shape[3] * 2.0**-24 * (1 + u_score) * size + eta_score
    e = abs(c - scale) * abs(x) + abs(c) * e_raw + u_score * abs(c) * (abs(x) + e_raw) + eta_score
    s = scale * x
    # Rows that see nothing (pads) are not judged; their top of 0 only keeps infinities out.
    top = np.where(seen.any(-1, keepdims=True), np.max(np.where(seen, s + e, -np.inf), axis=-1, keepdims=True), 0)
    weight = np.exp(np.where(seen, s - top, -np.inf))
    total = np.where(seen.any(-1, keepdims=True), weight.sum(-1, keepdims=True), 1)
    a, lse = weight / total, top + np.log(total)
    f32 = (x.shape[-1] + 64) * 2.0**-23 + (merges + 1) * 2.0**-22 * (2 + abs(lse) + abs(top))
    d = np.where(seen, e + u_score * (top - s + e) + f32, 0)
    o = np.einsum("btns,bsnv->btnv", a, value)
    size_v = np.einsum("btns,bsnv->btnv", a, abs(value))
    drift = np.empty_like(o)
    for b, t, n in np.ndindex(*o.shape[:3]):
        gain = a[b, t, n] * np.expm1(d[b, t, n])
        drift[b, t, n] = gain @ abs(value[b, :, n] - o[b, t, n]) / max((a[b, t, n] * np.exp(-d[b, t, n])).sum(), 1e-9)
    underflow = eta * np.exp(top - lse) * np.einsum("btns,bsnv->btnv", np.where(seen, 1.0, 0.0), abs(value))
    more = np.exp(2 * d.max(-1))[..., None]
    bound = drift + more * ((u * (2 + merges) + f32) * size_v + underflow + eta * (1 + 2 * merges))
    judged = seen.any(-1)
    up, down = (np.log(np.where(judged, (a * np.exp(sign * d)).sum(-1), 1)) for sign in (1, -1))
    return bound, np.maximum(up, -down) + f32[..., 0]


class BlockProblem(NamedTuple):
    """One block, queries and keys of their own lengths; causal means j ≤ i + (keys − queries), per request."""

    query: torch.Tensor  # [B, t, N, H]
    key: torch.Tensor  # [B, s, K, H]
    value: torch.Tensor  # [B, s, K, V]
    q_lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...]
    is_causal: bool
    scale: float

    @property
    def visible(self) -> np.ndarray:
        """`[B, t, s]`."""
        i, j = np.arange(self.query.shape[1])[None, :, None], np.arange(self.key.shape[1])[None, None]
        m, n = (np.array(x)[:, None, None] for x in (self.q_lengths, self.kv_lengths))
        return (i < m) & (j < n) & ((j <= i + n - m) | (not self.is_causal))

    def __repr__(self) -> str:
        """Tensors would fill the screen."""
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("qkv", self[:3], strict=True))
        return f"<{shapes} {self.query.dtype} {self.options}>"

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value

    @property
    def options(self) -> dict:
        """The keyword arguments of a wrapper."""
        names = ("is_causal", "scale", "q_lengths", "kv_lengths")
        return {name: getattr(self, name) for name in names}


def real(p: BlockProblem) -> list[np.ndarray]:
    """The tensors in float64, pads 0."""
    lengths = (p.q_lengths, p.kv_lengths, p.kv_lengths)
    alive = [
        (np.arange(x.shape[1]) < np.array(n)[:, None])[..., None, None] for x, n in zip(p[:3], lengths, strict=True)
    ]
    return [np.where(a, x.double().numpy(), 0) for x, a in zip(p[:3], alive, strict=True)]


@st.composite
def block_problems(draw, dims, dtypes=(torch.float16, torch.bfloat16), heads=HEADS, has_pads=True, is_causal=None):
    """Any block of these head dims `(H, V)`; pads hold NaN, which must not spread."""
    (n, k), (width, v_width), dtype = (draw(st.sampled_from(x)) for x in (heads, dims, dtypes))
    batch, length, count = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 60))
    q_lengths, kv_lengths = (
        tuple(draw(st.integers(0, most)) if has_pads else most for _ in range(batch)) for most in (length, count)
    )
    kind, seed = draw(st.sampled_from(("normal", "needle", "mean"))), draw(st.integers(0, 2**32 - 1))
    is_causal = draw(st.booleans()) if is_causal is None else is_causal
    rng = np.random.default_rng(seed)
    query, key, value = (
        rng.normal(size=x) for x in ((batch, length, n, width), (batch, count, k, width), (batch, count, k, v_width))
    )
    scale = width**-0.5
    value += 3 * (kind == "mean")
    if kind == "needle":  # every query wants one key only, any it may see; its loss is an error of order 1
        scale, key = 64 / width, np.sign(key)
        shown = BlockProblem(
            *map(torch.from_numpy, (query, key, value)), q_lengths, kv_lengths, is_causal, scale
        ).visible
        for b, i in zip(*np.nonzero(shown.any(-1)), strict=True):
            for h in range(n):
                query[b, i, h] = key[b, rng.choice(np.flatnonzero(shown[b, i])), h // (n // k)]
    tensors = [torch.from_numpy(x).to(dtype) for x in (query, key, value)]
    for x, lengths in zip(tensors, (q_lengths, kv_lengths, kv_lengths), strict=True):
        for b, m in enumerate(lengths):
            x[b, m:] = torch.nan
    return BlockProblem(*tensors, q_lengths, kv_lengths, is_causal, scale)


def with_latent(tensors: dict[str, np.ndarray], width: int, kind: str, *, seed: int, is_causal: bool):
    """A case's tensors whose keys (192) and values (128) are made of a latent of this width; pads hold NaN.

    normal: keys and values of variance 1. whole: whole numbers, whose sums are exact in any order. needle: every query
    wants one key only, any it may see; its scale is 1/4.
    """
    rng, (batch, count), heads = np.random.default_rng(seed), tensors["kv_segment"].shape, tensors["query"].shape[2]
    shapes = ((batch, count, width), (batch, count, 64), (width, heads, 128), (width, heads, 128))
    if kind == "whole":
        c_kv, k_rope, w_uk, w_uv = (rng.integers(-1, 2, size=x).astype(float) for x in shapes)
    else:
        c_kv, k_rope, w_uk, w_uv = (rng.normal(size=x) / (np.sqrt(width) if x[0] == width else 1) for x in shapes)
    query = tensors["query"].astype(float)
    if kind == "needle":
        key = np.concatenate(
            [np.einsum("bsc,cnd->bsnd", c_kv, w_uk), np.repeat(k_rope[:, :, None], heads, axis=2)], axis=3
        )
        for b, i in np.argwhere(tensors["q_segment"] >= 0):
            seen = tensors["kv_segment"][b] == tensors["q_segment"][b, i]
            if is_causal:
                seen &= tensors["kv_position"][b] <= tensors["q_position"][b, i]
            query[b, i] = [key[b, rng.choice(np.flatnonzero(seen)), h] for h in range(heads)]
    hidden = tensors["kv_segment"] < 0
    c_kv[hidden], k_rope[hidden] = np.nan, np.nan
    made = {"query": query, "c_kv": c_kv, "k_rope": k_rope, "w_uk": w_uk, "w_uv": w_uv}
    places = {name: x for name, x in tensors.items() if x.dtype == np.int32}
    return places | {name: x.astype(np.float16) for name, x in made.items()}


def places_of(p: Problem) -> dict[str, np.ndarray]:
    """Positions and segments of queries and keys."""
    return {f"{side}_{name}": getattr(p, name) for side in ("q", "kv") for name in ("position", "segment")}


def write_latent(folder: Path, p: Problem, width: int, kind: str, name: str = "case", seed: int = 0, **changes) -> Path:
    """A case file with the queries and places of `p`, and a latent; see `with_latent`."""
    tensors = with_latent({"query": p.query} | places_of(p), width, kind, seed=seed, is_causal=p.is_causal)
    scale = 0.25 if kind == "needle" else SCALE
    return write_tensors(folder / f"{name}.safetensors", tensors, described(p, **{"scale": scale} | changes))


def described(p: Problem, **changes) -> str:
    """The JSON description of a case."""
    case = {"scale": p.scale, "is_causal": p.is_causal, "cp": p.cp, "layout": "zigzag"}
    return json.dumps(case | {"precision": {"npu": "ring_mla_fp16"}, "about": {}} | changes)


def write_case(folder: Path, p: Problem, name: str = "case", **changes) -> Path:
    """A case file as docs/formats.md says; `changes` replaces fields of the JSON description."""
    tensors = {"query": p.query, "key": p.key, "value": p.value} | places_of(p)
    return write_tensors(folder / f"{name}.safetensors", tensors, described(p, **changes))


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


def write_pack(
    folder: Path,
    lengths,
    prefixes,
    *,
    cp,
    is_causal,
    seed,
    heads=(2, 1),
    precision="ring_mla_fp16",
    latent=0,
    kind="normal",
):
    """A packed case; pads hold NaN. `latent` is the width of the latent that keys and values are made of, if any."""
    rng = np.random.default_rng(seed)
    positions, segments = [], []
    for i, (n, cached) in enumerate(zip(lengths, prefixes, strict=True)):
        total = -(-n // (2 * cp)) * 2 * cp
        positions.append(cached + np.arange(total))
        segments.append(np.where(np.arange(total) < n, i, -1))
    position, segment = (np.concatenate(x)[None].astype(np.int32) for x in (positions, segments))
    cached = [(j, i) for i, n in enumerate(prefixes) for j in range(n)]
    more = np.array(cached, np.int32).reshape(-1, 2).T
    kv_position, kv_segment = (
        np.concatenate([x, y[None]], axis=1) for x, y in zip((position, segment), more, strict=True)
    )
    query, key, value = (
        rng.normal(size=(1, n, k, width)).astype(np.float16)
        for n, k, width in (
            (position.shape[1], heads[0], 192),
            (kv_position.shape[1], heads[1], 192),
            (kv_position.shape[1], heads[1], 128),
        )
    )
    query[segment < 0] = np.nan
    key[kv_segment < 0], value[kv_segment < 0] = np.nan, np.nan
    tensors = {"query": query, "key": key, "value": value, "q_position": position, "q_segment": segment}
    tensors |= {"kv_position": kv_position, "kv_segment": kv_segment}
    if latent:
        tensors = with_latent(tensors, latent, kind, seed=seed, is_causal=is_causal)
    about = {"scale": 0.25 if kind == "needle" else SCALE, "is_causal": is_causal, "cp": cp, "layout": "packed"}
    about |= {"precision": {"npu": precision}, "about": {}}
    return write_tensors(folder / "pack.safetensors", tensors, json.dumps(about))


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


def write_decode(folder, lengths, new, *, cp, seed=0, dims=(576, 512), heads=(8, 1), name="decode", **changes):
    """New tokens of requests of so many cached ones. The newest key is what every query wants most, so it matters."""
    rng, (width, v_width), (n, k) = np.random.default_rng(seed), dims, heads
    key = rng.normal(size=(1, sum(lengths), k, width))
    value = key[..., :v_width] if dims == (576, 512) else rng.normal(size=(1, sum(lengths), k, v_width))
    query = rng.normal(size=(1, sum(new), n, width))
    starts = np.cumsum((0, *lengths))
    kv_segment = np.repeat(np.arange(len(lengths)), lengths)
    kv_position = np.concatenate([np.arange(x) for x in lengths])
    q_segment = np.repeat(np.arange(len(new)), new)
    q_position = np.concatenate([np.arange(x - m, x) for x, m in zip(lengths, new, strict=True)])
    for i, (request, last) in enumerate(zip(q_segment, q_position, strict=True)):  # half the weight on some one key
        wanted = starts[request] + rng.integers(0, last + 1)
        for h in range(n):
            query[0, i, h] += 0.2 * np.sign(key[0, wanted, h * k // n])
    tensors = {x: y.astype(np.float16) for x, y in (("query", query), ("key", key), ("value", value))}
    places = {"q_segment": q_segment, "q_position": q_position, "kv_segment": kv_segment, "kv_position": kv_position}
    tensors |= {x: y[None].astype(np.int32) for x, y in places.items()}
    about = {"scale": width**-0.5, "is_causal": True, "cp": cp, "layout": "decode", "precision": {}, "about": {}}
    return write_tensors(Path(folder) / f"{name}.safetensors", tensors, json.dumps(about | changes))
