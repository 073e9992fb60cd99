"""Correct results: FlashAttention-2 inside each chunk of keys, chunk results merged, every rounding where it belongs.

For a tile of keys, with m the running row maximum, l the row sum and acc the weighted sum (arXiv 2307.08691, alg. 1),

    s   = scale · q·k                 rounded to `score` after q·k and after the multiplication; scale itself too
    m'  = max(m, max s)               s − m' and m − m' rounded to `score`
    l'  = l e^(m − m') + Σ e^(s − m')             of unrounded e^…
    acc'= acc e^(m − m') + Σ e^(s − m') v         with e^… rounded to `probability`
    out = acc / l, lse = m + ln l                 out rounded to `carry`

then chunk after chunk in the given order: out = (e^(lse_a − m) out_a + e^(lse_b − m) out_b) / (sum of both weights),
rounded to `carry`. The first chunk a row meets is not merged with anything. Between q·k and the maximum stand softcap,
ALiBi and bias (`_shaped`); an attention sink enters in one of `SINKS`. `ring_mla_fp16` follows the vendor's
kernel stage by stage. Plain NumPy; tests/trial/test_trial_emulators.py holds it against a twin written with scalars.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int

from cpjax.trial.problem import Problem, Result, places, visible
from cpjax.trial.summation import product, total

Order = str | tuple[int, ...]
"""`ascending`, `ring`, `gather` (docs/formats.md), or the chunk numbers as every row meets them."""


SINKS = ("first", "last", "start", "end")
"""The sink is merged as (0, sink) before all chunks or after them, or is in the first chunk's kernel: m = sink, l = 1
to begin with, or l + e^(sink − m) in the end, m raised to the sink if that is more."""


@dataclass(frozen=True)
class Arithmetic:
    """Formats by name, and what a correct implementation is free to choose: tile, order of summation, base of exp, how
    a sink enters, whether tanh(x) is 2 sigmoid(2x) − 1, whether ALiBi is slope · kv_position, lse put right afterwards.

    `scale` and `distance` are those of the scores unless said; `query`: of scale · q, multiplied before q·k; `summed`:
    of the exponentials that the row sum takes; `block`: of a chunk's out, `carry` unless said. `is_normalised`: one
    tile, whose e^… are divided by l before they are rounded.
    """

    compute: str
    score: str
    probability: str
    carry: str
    out: str
    scale: str = ""
    distance: str = ""
    query: str = ""
    summed: str = ""
    block: str = ""
    is_normalised: bool = False
    tile: int = 512
    summation: str = "blas"
    base_two: bool = False
    sink: str = "last"
    tanh_of_sigmoid: bool = False
    alibi_of_key: bool = False


def _flash(fmt: str, **more: Any) -> Arithmetic:
    return Arithmetic("float32", more.pop("score", "float32"), fmt, more.pop("carry", fmt), fmt, **more)


PROFILES: dict[str, Arithmetic] = {
    "flash_fp16": _flash("float16"),
    "ring_mla_fp16": _flash("float16", score="float16"),
    "float32": _flash("float32"),
    "float64": Arithmetic("float64", "float64", "float64", "float64", "float64"),
    "flash_bf16": _flash("bfloat16"),
}
for _name, _fmt in (("fp16", "float16"), ("bf16", "bfloat16")):
    PROFILES |= {
        f"fia_{_name}": _flash(_fmt, carry="float32", block=_fmt),
        f"softmax_{_name}": _flash(_fmt, is_normalised=True),
        f"eager_{_name}": _flash(_fmt, score=_fmt, scale="float32", distance="float32", is_normalised=True),
        f"rounded_sum_{_name}": _flash(_fmt, summed=_fmt),
        f"scaled_query_{_name}": _flash(_fmt, query=_fmt),
    }


def dtype_of(profile: str) -> str:
    """The dtype of the arrays that a profile is meant for.

    >>> dtype_of("flash_bf16"), dtype_of("float32")
    ('bfloat16', 'float32')
    """
    return {"fp16": "float16", "bf16": "bfloat16"}.get(profile.rpartition("_")[2], profile)


Chunks = Int[np.ndarray, "C L"]
"""Indices of the keys in each chunk, −1 where a chunk is shorter than the longest."""


def attend(problem: Problem, arithmetic: Arithmetic, order: Order = "ascending") -> Result:
    """A correct result. Rows that see nothing: out 0, lse −inf."""
    blocks = chunk_results(problem, arithmetic, cut(problem.key.shape[1], problem.chunk_count))
    return fold(*with_sink(problem, arithmetic, blocks, visits(problem, order)), arithmetic)


def with_sink(
    problem: Problem, arithmetic: Arithmetic, blocks: Result, order: Int[np.ndarray, "T M"]
) -> tuple[Result, Int[np.ndarray, "T M1"]]:
    """The chunk results and their order, with one more chunk for a sink that is merged as a partial."""
    if problem.sink is None or arithmetic.sink not in ("first", "last"):
        return blocks, order
    logit = _of_heads(problem.sink[None], problem, arithmetic.compute)
    lse = np.broadcast_to(logit, blocks.lse[:1].shape)
    number = np.full((len(order), 1), len(blocks.lse))
    blocks = Result(np.concatenate([blocks.out, 0 * blocks.out[:1]]), np.concatenate([blocks.lse, lse]))
    return blocks, np.hstack([number, order] if arithmetic.sink == "first" else [order, number])


def cut(length: int, count: int) -> Chunks:
    """`count` chunks of ceil(length / count) consecutive keys; the last ones may be short or empty.

    >>> cut(5, 4).tolist()
    [[0, 1], [2, 3], [4, -1], [-1, -1]]
    """
    size = -(-length // count)
    index = np.arange(size * count).reshape(count, size)
    return np.where(index < length, index, -1)


def visits(problem: Problem, order: Order) -> Int[np.ndarray, "T M"]:
    """The chunks in the order in which each query row meets them."""
    cp, length = problem.cp, problem.query.shape[1]
    if cp == 1:
        return np.broadcast_to(np.arange(problem.chunk_count), (length, problem.chunk_count))
    chunk = np.arange(length) // -(-length // problem.chunk_count)
    rank = np.minimum(chunk, 2 * cp - 1 - chunk)
    if isinstance(order, tuple):
        return np.broadcast_to(np.array(order), (length, len(order)))
    if order == "ascending":
        return np.broadcast_to(np.arange(2 * cp), (length, 2 * cp))
    step = np.arange(cp)
    source = (rank[:, None] - step) % cp if order == "ring" else np.broadcast_to(step, (length, cp))
    return np.stack([source, 2 * cp - 1 - source], axis=-1).reshape(length, 2 * cp)


def chunk_results(problem: Problem, arithmetic: Arithmetic, chunks: Chunks) -> Result:
    """FlashAttention-2 over the tiles of each chunk, chunks side by side: `out` `[C, B, K, G, T, V]`, `lse` alike."""
    compute = np.dtype(arithmetic.compute)
    batch, length, heads, _ = problem.query.shape
    kv_heads, value_dim = problem.value.shape[2:]
    query = problem.query.astype(compute).reshape(batch, length, kv_heads, heads // kv_heads, -1)
    query = query.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    scale, tile = problem.scale, arithmetic.tile
    if arithmetic.query:
        query, scale = rounded(query * compute.type(scale), arithmetic.query), 1.0
    if arithmetic.is_normalised:
        tile = chunks.shape[1]
    rows = (len(chunks), *query.shape[:4])
    maximum = np.full(rows, -np.inf, compute)
    weight, weighted = np.zeros(rows, compute), np.zeros((*rows, value_dim), compute)
    logit = _sink_inside(problem, arithmetic, compute)
    # What is divided by the whole sum before it is rounded needs the sink in the sum from the start.
    at_start = arithmetic.sink == "start" or arithmetic.is_normalised
    if logit is not None and at_start:
        maximum[0], weight[0] = logit[0], 1
    for start in range(0, chunks.shape[1], tile):
        index = chunks[:, start : start + tile]
        seen = visible(problem, index.ravel()).reshape(batch, length, *index.shape)
        score = scores(query, _gathered(problem.key, index, compute), scale, arithmetic)
        score = _shaped(score, problem, index, arithmetic)
        score = np.where(seen.transpose(2, 0, 1, 3)[:, :, None, None], score, compute.type(-np.inf))
        before, maximum = maximum, np.maximum(maximum, score.max(axis=-1))
        base = _finite(maximum)
        distance = arithmetic.distance or arithmetic.score
        p = _exp(rounded(score - base[..., None], distance), arithmetic)
        shrink = _exp(rounded(before - base, distance), arithmetic)
        weight = weight * shrink + total(rounded(p, arithmetic.summed or arithmetic.compute), arithmetic.summation)
        if arithmetic.is_normalised:
            p = p / np.where(weight == 0, 1, weight)[..., None]
        values = _gathered(problem.value, index, compute)
        kept = weighted * shrink[..., None]
        weighted = product(rounded(p, arithmetic.probability), values, arithmetic.summation, start=kept)
    if logit is not None and not at_start:
        before, maximum = maximum.copy(), maximum
        maximum[0] = np.maximum(maximum[0], logit[0])
        shrink = _exp(rounded(before[0] - maximum[0], arithmetic.score), arithmetic)
        weight[0] = weight[0] * shrink + _exp(rounded(logit[0] - maximum[0], arithmetic.score), arithmetic)
        weighted[0] *= shrink[..., None]
    if not arithmetic.is_normalised:
        weighted = weighted / np.where(weight == 0, 1, weight)[..., None]
    out = rounded(weighted, arithmetic.block or arithmetic.carry)
    lse = _log_sum(_finite(maximum), weight, arithmetic)
    if problem.alibi is not None and arithmetic.alibi_of_key:
        lse = lse - _of_heads(problem.alibi, problem, compute) * places(problem)[0][:, None, None].astype(compute)
    return Result(out, lse)


def _sink_inside(problem: Problem, arithmetic: Arithmetic, compute: np.dtype) -> np.ndarray | None:
    """The sinks' logits, if the first chunk's kernel takes them in."""
    if problem.sink is None or arithmetic.sink not in ("start", "end"):
        return None
    logit = rounded(_of_heads(problem.sink[None], problem, compute), arithmetic.score)
    return logit * compute.type(np.log2(np.e)) if arithmetic.base_two else logit


def _of_heads(x: np.ndarray, problem: Problem, dtype: Any) -> np.ndarray:
    """A number a head, `[B or 1, N]`, as `[1, B or 1, K, G, 1]`."""
    return x.astype(dtype).reshape(1, len(x), problem.key.shape[2], -1, 1)


def _shaped(score: np.ndarray, problem: Problem, index: Chunks, arithmetic: Arithmetic) -> np.ndarray:
    """Softcap, ALiBi and bias, rounded to `score` after each step; `score` is `[C, B, K, G, T, L]`."""
    compute = score.dtype.type
    unit = compute(np.log2(np.e)) if arithmetic.base_two else compute(1)
    if problem.softcap is not None:
        cap = compute(problem.softcap) * unit
        inside = rounded(score / cap, arithmetic.score)
        if arithmetic.tanh_of_sigmoid:
            bent = compute(2) / (compute(1) + np.exp(compute(-2) * inside)) - compute(1)
        else:
            bent = np.tanh(inside)
        score = rounded(cap * rounded(bent, arithmetic.score), arithmetic.score)
    if problem.alibi is not None:
        here, there = places(problem)
        key = there[:, index].swapaxes(0, 1)[:, :, None, None, None]  # [C, B, 1, 1, 1, L]
        query = here[None, :, None, None, :, None]
        distance = (-key if arithmetic.alibi_of_key else np.abs(query - key)).astype(compute)
        slope = _of_heads(problem.alibi, problem, compute)[..., None] * unit
        score = rounded(score - rounded(slope * distance, arithmetic.score), arithmetic.score)
    if problem.bias is not None:
        batch, heads, length, _ = problem.bias.shape
        groups = 1 if heads == 1 else problem.key.shape[2]
        bias = problem.bias[..., index].reshape(batch, groups, -1, length, *index.shape)
        score = rounded(score + np.moveaxis(bias, -2, 0).astype(compute) * unit, arithmetic.score)
    return score


def scores(query: np.ndarray, key: np.ndarray, scale: float, arithmetic: Arithmetic) -> np.ndarray:
    """scale · q·k for `[B, K, G, T, H]` and `[C, B, K, 1, L, H]`; times log2(e) if exponentials are to base two."""
    factor = np.float64(scale) * (np.log2(np.e) if arithmetic.base_two else 1.0)
    factor = rounded(np.asarray(factor, arithmetic.compute), arithmetic.scale or arithmetic.score)
    raw = product(query, key.swapaxes(-1, -2), arithmetic.summation)
    return rounded(rounded(raw, arithmetic.score) * factor, arithmetic.score)


def merge(a: Result, b: Result, arithmetic: Arithmetic) -> Result:
    """Two partial results; where one saw no key (lse −inf) its weight is 0 and the other comes out unchanged."""
    base = _finite(np.maximum(a.lse, b.lse))
    weight_a, weight_b = np.exp(a.lse - base), np.exp(b.lse - base)
    weight = weight_a + weight_b
    out = weight_a[..., None] * a.out + weight_b[..., None] * b.out
    with np.errstate(divide="ignore"):  # neither saw a key: log 0 = −inf is meant
        lse = base + np.log(weight)
    return Result(rounded(out / np.where(weight == 0, 1, weight)[..., None], arithmetic.carry), lse)


def fold(
    blocks: Result, order: Int[np.ndarray, "T M"], arithmetic: Arithmetic, join: Callable[..., Result] = merge
) -> Result:
    """The chunk results of each row, merged one after the other in the row's own order by `join`."""
    row = np.arange(order.shape[0])
    so_far: Result | None = None
    for chunk in order.T:
        # Indices around a slice put the row axis first: [T, B, K, G, …]; every row picks its own chunk.
        block = Result(blocks.out[chunk, :, :, :, row], blocks.lse[chunk, :, :, :, row])
        so_far = block if so_far is None else join(so_far, block, arithmetic)
    assert so_far is not None  # there is at least one chunk
    return as_result(so_far, arithmetic)


def as_result(rows: Result, arithmetic: Arithmetic) -> Result:
    """`[T, B, K, G, …]` to `[B, T, N, …]`, in the dtypes in which a result is handed over."""
    length, batch, kv_heads, group = rows.lse.shape
    out = rows.out.swapaxes(0, 1).reshape(batch, length, kv_heads * group, -1)
    with np.errstate(over="ignore"):
        out = out.astype(ml_dtypes.bfloat16 if arithmetic.out == "bfloat16" else arithmetic.out)
    return Result(out, rows.lse.swapaxes(0, 1).reshape(batch, length, kv_heads * group))


def rounded(x: np.ndarray, fmt: str) -> np.ndarray:
    """`x` rounded to `fmt` (nearest, ties to even), in the dtype it came in. Beyond the range: inf, as in hardware."""
    if fmt == "bfloat16":
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(x.dtype)
    with np.errstate(over="ignore"):
        return x if x.dtype == fmt else x.astype(fmt).astype(x.dtype)


def variant(arithmetic: Arithmetic, rng: np.random.Generator, work: int) -> Arithmetic:
    """The same profile as another correct implementation might run it: other tiles, other sums, a wider carry.

    One accumulator takes at most a tile of 512 keys, the depth of summation that the profiles state.

    Args:
      work: multiplications in q·k; above 2^21 sums are left to BLAS, the others would take memory and minutes.
    """
    wide = arithmetic.carry == "float16" and rng.random() < 0.1
    # Half factors are what matrix units multiply; the random numbers are used up as without this choice.
    units = "cut" if arithmetic.probability in ("float16", "bfloat16") else "blas"
    summation = str(rng.choice(["blas", units, "sequential", "pairwise"]))
    summation = summation if work <= 2**21 else "blas"
    return replace(
        arithmetic,
        tile=min(int(rng.choice([16, 64, 128, 512, 512, 2048])), 512 if summation == "sequential" else 2048),
        summation=summation,
        base_two=arithmetic.score == arithmetic.compute and bool(rng.random() < 0.3),
        carry="float32" if wide else arithmetic.carry,
    )


def _gathered(x: np.ndarray, index: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Keys or values `[B, S, K, H]` of the chunks `[C, L]` as `[C, B, K, 1, L, H]`."""
    return x[:, index].astype(dtype).transpose(1, 0, 3, 2, 4)[:, :, :, None]


def _exp(x: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    return np.exp2(x) if arithmetic.base_two else np.exp(x)


def _log_sum(maximum: np.ndarray, weight: np.ndarray, arithmetic: Arithmetic) -> np.ndarray:
    with np.errstate(divide="ignore"):  # a row that sees nothing: log 0 = −inf is meant
        if arithmetic.base_two:
            return (maximum + np.log2(weight)) * weight.dtype.type(np.log(2.0))
        return maximum + np.log(weight)


def _finite(maximum: np.ndarray) -> np.ndarray:
    return np.where(np.isneginf(maximum), maximum.dtype.type(0), maximum)
