"""Is this result right? The judge: problem, evidence, verdict. What it rests on is derived in docs/verdict.md."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cpjax.arrays import as_array
from cpjax.attention import Computation
from cpjax.crosscheck.diagnosis import diagnose
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.judging.evidence import collect
from cpjax.crosscheck.judging.problem import Array, Problem, checked_problem
from cpjax.crosscheck.judging.range_check import rows_out_of_range
from cpjax.crosscheck.judging.sampling import chosen_rows, suspicious_rows
from cpjax.crosscheck.judging.verdict import Verdict, decide, malformed
from cpjax.errors import InputError
from cpjax.partition import Partition
from cpjax.precision import Precision
from cpjax.wording import counted, is_are


def judge(
    query: Array,
    key: Array,
    value: Array,
    out: Any,
    lse: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    window: int | None = None,
    partition: str | Partition | None = None,
    cp: int = 1,
    layout: str | None = None,
    precision: str | Precision | None = None,
    order: str = "ascending",
    softcap: Any = None,
    sink: Array | None = None,
    alibi: Array | None = None,
    bias: Array | None = None,
    computation: Computation | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Does correct arithmetic in the stated precision explain this result?

    Args:
      query, key, value: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]` in global token order; N a multiple of K. Arrays
        of NumPy, torch, JAX or DLPack, or lists; where their dtypes differ a precision must be named. What no query
        sees may hold NaN.
      out: the result that is judged, `[B, T, N, V]`, in the profile's out format (or a wider dtype that holds it).
      lse: `[B, T, N]` float32 or wider, natural logarithm of Σ exp(scaled score), −inf where nothing is seen; or None.
      scale: multiplies q·k; None is 1/√H.
      is_causal, window, segment_ids: who may see whom (`cpjax.mask`). `segment_ids` `[B, T]`, or a pair for queries and
        keys; −1 is a pad, which is not judged.
      q_positions, kv_positions: global positions `[B, T]`, `[B, S]`; None is 0, 1, 2, …. Causal with T ≠ S needs both.
      partition: who holds which tokens, and so into which chunks the keys were cut; each chunk's result was stored and
        merged. A value of `cpjax.partition`, or a name (zigzag, contiguous, striped, packed, blocks, interleaved) over
        `cp` ranks. None: one chunk for cp 1, zigzag for more. `layout` is another word for its name.
      precision: a profile of `cpjax.precision`, or its name; None: float16 arrays are `flash_fp16`, float32 and float64
        what they say.
      order: in which order chunks were merged: `ascending`, `ring`, `gather`, or `unknown`; or `together`,
        where all keys were computed at once and nothing was merged, whatever the partition.
      softcap: a positive number, or None: a logit x = scale · q·k becomes softcap · tanh(x / softcap).
      alibi: slopes, `[N]` or `[B, N]`: slope · |q_position − kv_position| is then taken off.
      bias: added last; float, broadcasts to `[B, N, T, S]`. −inf hides the key, as in PyTorch's `attn_mask`.
      sink: `[N]`, for each query head the logit of one more key, of value 0, that every query sees. `lse` counts it.
      computation: what was computed, in one value (`cpjax.attention.Computation`), in place of is_causal, window (its
        mask), scale, softcap, sink, alibi, bias, precision, partition and order.
      seed: chooses the rows that are judged when there are too many; at least one in 128 of each head, and every row is
        still checked for NaN, infinity, and for being an average of the values that it may see; rows of zeros and
        copies of other rows are judged, too.
      progress: called with the number of rows done and their total.

    Returns:
      The verdict. A result of the wrong shape or dtype does not pass; it never raises. `asked` says what it answers.

    Raises:
      InputError: (a ValueError) the problem itself makes no sense: inputs that do not fit together, an unknown name,
        causal with different lengths and no positions, something said by a keyword and by `computation`.

    >>> rng = np.random.default_rng(0)
    >>> query, key, value = (rng.standard_normal((1, 64, 2, 16)).astype(np.float16) for _ in range(3))
    >>> judge(query, key, value, np.zeros_like(value)).passed
    False
    """
    words = {
        "scale": scale,
        "is_causal": is_causal,
        "window": window,
        "partition": partition,
        "cp": cp,
        "layout": layout,
    }
    words |= {"precision": precision, "order": order, "softcap": softcap, "sink": sink, "alibi": alibi, "bias": bias}
    if computation is not None:
        words = _said(computation, words)
    problem = checked_problem(
        query, key, value, q_positions=q_positions, kv_positions=kv_positions, segment_ids=segment_ids, **words
    )
    return judge_problem(problem, out, lse, seed, progress)


def _said(computation: Computation, words: dict[str, Any]) -> dict[str, Any]:
    """The keywords, filled from the computation where they are what they are by default.

    Raises:
      InputError: a keyword and the computation both say something.
    """
    mask = computation.mask
    if mask is not None:
        for name, usual in (("is_causal", True), ("window", None)):
            if words[name] != usual:
                raise InputError(f"{name} is said twice, as a keyword and in the computation's mask; leave one out")
        words = words | {"is_causal": mask.is_causal, "window": mask.window}
    names = ("scale", "softcap", "sink", "alibi", "bias", "precision", "partition")
    order = None if words["order"] == "ascending" else words["order"]
    said = computation.with_words(order=order, **{name: words[name] for name in names})
    return words | said | {"order": said["order"] or "ascending"}


def judge_problem(
    problem: Problem,
    out: Any,
    lse: Any = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """As `judge`, of a problem that is checked already."""
    try:
        out, lse = as_array(out, "out"), None if lse is None else as_array(lse, "lse")
    except InputError as error:
        return malformed(problem, str(error))
    wrong = _misshapen(problem, out, lse)
    if wrong is not None:
        return malformed(problem, wrong)
    chosen = chosen_rows(problem, seed)
    chosen = chosen | suspicious_rows(problem, out, chosen, seed)
    judged = np.broadcast_to(problem.is_judged[..., None], chosen.shape)
    out_of_range = rows_out_of_range(problem, out, lse) & judged & ~chosen
    evidence = collect(problem, out, lse, chosen, progress)
    verdict = decide(
        problem, evidence, has_lse=lse is not None, row_count=int(judged.sum()), out_of_range=int(out_of_range.sum())
    )
    if verdict.passed or not verdict.judgeable:
        return verdict
    return replace(verdict, search=lambda: diagnose(problem, evidence, out, lse))


def _misshapen(problem: Problem, out: np.ndarray, lse: np.ndarray | None) -> str | None:
    """Why this is no result at all, or None."""
    batch, length, heads, _ = problem.query.shape
    expected = {"out": (batch, length, heads, problem.value.shape[3]), "lse": (batch, length, heads)}
    for name, array in (("out", out), ("lse", lse)):
        if array is None:
            continue
        if array.dtype.name not in FORMATS:
            return f"{name} has dtype {array.dtype}; it must be a floating-point format, one of {', '.join(FORMATS)}"
        if array.shape != expected[name]:
            return f"{name} has shape {array.shape}; it must be {expected[name]}"
    return _off_format(problem, out)


def _off_format(problem: Problem, out: np.ndarray) -> str | None:
    """`out` in a wider dtype must hold numbers of the profile's format, or another precision was meant."""
    fmt = problem.precision.out
    if out.dtype.name == fmt:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        off = ~np.isnan(out) & (out.astype(FORMATS[fmt].dtype).astype(out.dtype) != out)
    off &= problem.is_judged[..., None, None]
    if off.any():
        count, name = int(off.sum()), problem.precision.name
        holds = f"{counted(count, 'number')} that {is_are(count)} no {fmt} {'number' if count == 1 else 'numbers'}"
        return (
            f"out ({out.dtype}) holds {holds}, in which {name} stores it; give it in {fmt}, or name another precision"
        )
    return None
