"""Are these gradients right? What it rests on is derived in docs/gradients.md."""

from typing import Any

import numpy as np

from cpjax.crosscheck.gradients.asked import Asked, asked_of, checked_array
from cpjax.crosscheck.gradients.diagnose import causes_of
from cpjax.crosscheck.gradients.exact import NAMES, Gradients
from cpjax.crosscheck.gradients.expected import expected
from cpjax.crosscheck.gradients.verdict import GradientVerdict, decided
from cpjax.crosscheck.judging.problem import Array, Problem, checked_problem
from cpjax.errors import InputError
from cpjax.mask import PAD
from cpjax.partition import Partition
from cpjax.precision import Precision


def judge_gradients(
    query: Array,
    key: Array,
    value: Array,
    out: Any,
    lse: Any,
    dout: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    window: int | None = None,
    sink: Array | None = None,
    partition: str | Partition | None = None,
    cp: int = 1,
    precision: str | Precision | None = None,
    ds: str = "plain",
    rounded_every: int | None = None,
    over_ranks: str | None = None,
) -> GradientVerdict:
    """Does correct arithmetic in the stated precision explain these gradients?

    Args:
      query, key, value: `[B, T, N, H]`, `[B, S, K, H]`, `[B, S, K, V]` in global token order, as of
        `cpjax.crosscheck.judge`, and so scale, is_causal, positions, segment_ids, window, sink.
      out, lse: `[B, T, N, V]`, `[B, T, N]` (natural logarithm) of the forward pass, as the backward pass was given
        them: errors of the forward pass are not blamed on it. None: the backward pass had its own, which is computed
        exactly here, and σ has what rounding may have done to it.
      dout: gradient of out, `[B, T, N, V]`; what it holds for pads does not count.
      dq, dk, dv: what is judged, of the shapes of query, key, value, in the profile's out format (or a wider dtype
        that holds it). dk and dv are summed over the heads of a group. Gradients of pads are not judged.
      partition, cp: who holds which tokens; the diagnosis uses it, and over_ranks.
      precision: float64, float32, flash_fp16 or flash_bf16; None follows from the dtype of the inputs.
      ds: what is rounded to the profile's probability format as the factor of query and key: `plain`: p (dp − δ);
        `of_rounded_p`: the same of the p that is rounded already, for dv; `scaled`: scale · p (dp − δ). It makes no
        difference where probabilities have no format of their own.
      rounded_every: None: dk and dv are summed in the compute format and rounded once. A number: the kernel keeps them
        in the out format, and rounds after each so many queries of a head; heads of a group are then added up.
      over_ranks: None: no part is rounded by itself. Else, in a ring over `cp` ranks, each pair of chunks gives a part
        in the out format, and parts are added up in float32 ("float32") or in the out format ("out").

    Returns:
      The verdict: passed, the failed tests of each tensor, z, and the faults that explain a wrong result.

    Raises:
      InputError: inputs, dq, dk or dv of a wrong shape or dtype; NaN in inputs; a profile that has no model.

    >>> rng = np.random.default_rng(0)
    >>> query, key, value, dout = (rng.standard_normal((1, 32, 2, 16)).astype(np.float16) for _ in range(4))
    >>> zeros = np.zeros_like(query)
    >>> judge_gradients(query, key, value, None, None, dout, zeros, zeros, zeros).failed_tests[:2]
    ('dq bound', 'dq spread')
    """
    problem = checked_problem(
        query, key, value, scale=scale, is_causal=is_causal, q_positions=q_positions, kv_positions=kv_positions,
        segment_ids=segment_ids, window=window, sink=sink, partition=partition, cp=cp, precision=precision,
    )  # fmt: skip
    return judge_gradients_of(problem, out, lse, dout, dq, dk, dv, rounded_every, ds, over_ranks)


def judge_gradients_of(
    problem: Problem,
    out: Any,
    lse: Any,
    dout: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    rounded_every: int | None = None,
    ds: str = "plain",
    over_ranks: str | None = None,
) -> GradientVerdict:
    """As `judge_gradients`, of a problem that is checked already."""
    asked = asked_of(problem, out, lse, dout, rounded_every, ds, over_ranks)
    shapes = (problem.query.shape, problem.key.shape, problem.value.shape)
    given = Gradients(
        *(_gradient(asked, name, x, shape) for name, x, shape in zip(NAMES, (dq, dk, dv), shapes, strict=True))
    )
    right = expected(asked)
    rows = counted_rows(asked)
    tensors = tuple(decided(*one) for one in zip(NAMES, given, right, rows, strict=True))
    passed = all(one.passed for one in tensors)
    failed = {test for one in tensors for test in one.failed_tests}
    causes = () if passed or failed & {"form", "unjudged"} else causes_of(asked, given, right, rows)
    assumed = tuple(name for name, x in (("out", out), ("lse", lse)) if x is None)
    judgeable = passed or failed != {"unjudged"}
    return GradientVerdict(passed, judgeable, problem.precision.name, ds, tensors, causes, assumed)


def counted_rows(asked: Asked) -> Gradients:
    """Which rows of each tensor count, `[B, L, heads]`: all but pads."""
    p = asked.problem
    segments = (p.q_tokens.segment, p.kv_tokens.segment, p.kv_tokens.segment)
    every = zip(segments, (p.query, p.key, p.value), strict=True)
    return Gradients(*(np.broadcast_to((np.asarray(s) != PAD)[..., None], x.shape[:3]) for s, x in every))


def _gradient(asked: Asked, name: str, x: Any, shape: tuple[int, ...]) -> np.ndarray:
    array, fmt = checked_array(name, x, shape), asked.fmt
    wide = array.astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.isfinite(wide) & (fmt.round(wide) != wide)
    if off.any():
        raise InputError(
            f"{name} ({array.dtype}) holds {int(off.sum()):,} numbers that are no {fmt.name}, in which "
            f"{asked.problem.precision.name} stores it; give it in {fmt.name}, or name another precision"
        )
    return wide
