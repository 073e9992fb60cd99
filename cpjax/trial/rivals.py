"""What others would have said of the same result: their acceptance rules, applied to `out` and, where given, to `lse`.

Each rule gets the result, a reference, a correct result staged like the kernel under test (`twin`) and a plain dense
computation in low precision (`plain`), as far as it uses them, and returns whether it accepts. NaN is never accepted.
Where a source states a rule for `out` only, it is applied to `lse` with its float32 constants: to its advantage.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cpjax.trial.emulators import PROFILES, Arithmetic, attend, rounded
from cpjax.trial.problem import Problem, Result, visible

QUERY_TILE = 64


class Against(NamedTuple):
    """What a rule may compare with. `length` is heads times the longest sequence, which one rule depends on."""

    reference: np.ndarray
    twin: np.ndarray
    plain: np.ndarray
    length: int


Rule = Callable[[np.ndarray, Against], bool]


def close(actual: np.ndarray, against: Against, tolerance: float) -> bool:
    """`allclose` with rtol = atol = tolerance."""
    return bool(np.allclose(actual, against.reference, rtol=tolerance, atol=tolerance))


def transformer_engine(actual: np.ndarray, against: Against) -> bool:
    """rtol = atol = eps^(2/3) of the dtype (TransformerEngine's JAX tests, `dtype_tols`)."""
    return close(actual, against, float(np.finfo(actual.dtype).eps) ** (2 / 3))


def magi_attention(actual: np.ndarray, against: Against) -> bool:
    """Largest error at most twice that of a plain low-precision computation (MagiAttention; FlashAttention alike)."""
    return bool(_error(actual, against.reference).max() <= 2 * _error(against.plain, against.reference).max())


def vendor_a(actual: np.ndarray, against: Against) -> bool:
    """`assertRtolEqual`: fails only if more than a share `prec` is off, both relatively and absolutely."""
    prec, least = (1e-3, 6e-8) if actual.dtype == np.float16 else (1e-4, 1e-9)
    error = _error(actual, against.reference)
    size = np.maximum(np.abs(_finite(actual)), np.abs(_finite(against.reference)))
    bad_absolute, bad_relative = ~(error <= prec), ~(error / (size + least) <= prec)
    if np.isnan(error).any():
        return False
    few = bad_absolute.sum() <= error.size * prec or bad_relative.sum() <= error.size * prec
    return bool(not bad_absolute.any() or not bad_relative.any() or few)


def vendor_b(actual: np.ndarray, against: Against) -> bool:
    """`compare_output_data`: |error| ≤ max(1, |reference|)·ε everywhere, with ε by dtype and length."""
    if actual.dtype == np.float16:
        tolerance = 2.0**-8 if against.length + 4 < 2048 else 2.0**-7
    else:
        tolerance = 2.0**-11 if against.length < 2048 else 2.0**-10 if against.length < 16384 else 2.0**-14
    reference = against.reference.astype(actual.dtype).astype(np.float64)
    return bool((_error(actual, reference) <= np.maximum(1, np.abs(_finite(reference))) * tolerance).all())


def vendor_c(actual: np.ndarray, against: Against) -> bool:
    """`compare_cv`: largest, mean and root mean square error at most 10, 2 and 2 times those of the staged twin."""
    least = {"float16": 2.0**-11}.get(str(actual.dtype), 2.0**-14)
    size = np.abs(_finite(against.reference)) + 1e-7
    measured, expected = (_error(x, against.reference) for x in (actual, against.twin))

    def ratio(of: Callable[[np.ndarray], np.ndarray], relative: bool) -> float:
        a, b = (x / size if relative else x for x in (measured, expected))
        return float(of(a) / max(float(of(b)), least))

    root = ratio(lambda x: np.sqrt(np.mean(x * x)), relative=False)
    return ratio(np.max, relative=True) < 10 and ratio(np.mean, relative=True) < 2 and root < 2


def vendor_d(actual: np.ndarray, against: Against) -> bool:
    """Fused infer attention's test: 99.5 % within 2.5e-5 + 0.005·|reference|, no relative error of 10 or more."""
    error, size = _error(actual, against.reference), np.abs(_finite(against.reference))
    within = float((error <= 2.5e-5 + 0.005 * size).mean())
    return bool(within >= 0.995 and (error < 10 * np.maximum(size, 1e-7)).all())


def _close_3(actual: np.ndarray, against: Against) -> bool:
    return close(actual, against, 1e-3)


def _close_2(actual: np.ndarray, against: Against) -> bool:
    return close(actual, against, 1e-2)


RULES: dict[str, Rule] = {
    "allclose 1e-3": _close_3,
    "allclose 1e-2": _close_2,
    "vendor A": vendor_a,
    "vendor B": vendor_b,
    "vendor C": vendor_c,
    "vendor D": vendor_d,
    "eps^(2/3)": transformer_engine,
    "≤ 2× plain": magi_attention,
}


class References(NamedTuple):
    """What all rules need about one problem, computed once."""

    exact: Result
    twin: Result
    plain: Result


def references(problem: Problem, arithmetic: Arithmetic, twin: Result) -> References:
    """float64, the staged twin that is given, and a plain dense computation in the format of `out`."""
    return References(attend(problem, PROFILES["float64"]), twin, plain_attention(problem, arithmetic.out))


def accepted_by(rule: Rule, problem: Problem, result: Result, references: References, *, with_lse: bool) -> bool:
    """Whether the rule accepts `out`, and `lse` too where it is asked about."""
    length = problem.query.shape[2] * max(problem.query.shape[1], problem.key.shape[1])
    parts = ("out", "lse") if with_lse else ("out",)
    exact, twin, plain = references

    def accepts(part: str) -> bool:
        against = Against(getattr(exact, part), getattr(twin, part), getattr(plain, part), length)
        return rule(getattr(result, part), against)

    return all(accepts(part) for part in parts)


def plain_attention(problem: Problem, fmt: str) -> Result:
    """Dense attention as one would write it in `fmt`: q·k, its scaling, the softmax and out each rounded once."""
    group = problem.query.shape[2] // problem.key.shape[2]
    key, value = (
        np.repeat(x, group, axis=2).astype(np.float32).transpose(0, 2, 1, 3) for x in (problem.key, problem.value)
    )
    query = problem.query.astype(np.float32).transpose(0, 2, 1, 3)
    seen = visible(problem, np.arange(problem.key.shape[1]))[:, None]
    out, lse = [], []
    for start in range(0, query.shape[2], QUERY_TILE):
        rows = slice(start, start + QUERY_TILE)
        score = rounded(rounded(query[:, :, rows] @ key.swapaxes(-1, -2), fmt) * np.float32(problem.scale), fmt)
        score = np.where(seen[:, :, rows], score, -np.inf)
        maximum = np.maximum(score.max(axis=-1, keepdims=True), np.finfo(np.float32).min)
        p = np.exp(score - maximum)
        weight = p.sum(axis=-1, keepdims=True)
        out.append(rounded(p / np.where(weight == 0, 1, weight), fmt) @ value)
        with np.errstate(divide="ignore"):  # a row that sees nothing
            lse.append((maximum + np.log(weight))[..., 0])
    joined = np.concatenate(out, axis=2).transpose(0, 2, 1, 3).astype(fmt)
    return Result(joined, np.concatenate(lse, axis=2).transpose(0, 2, 1).astype(np.float32))


def _error(actual: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|actual − reference| in float64; 0 where both are the same infinity."""
    a, b = actual.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where((a == b) & np.isinf(a), 0.0, np.abs(a - b))


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(x), 0.0, x.astype(np.float64))
