"""The answer: which of dq, dk and dv correct arithmetic explains, in numbers and in words."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from cpjax.crosscheck.gradients.sums import Expected
from cpjax.crosscheck.judging.statistic import LIMIT, RowErrors, spread_z_score, worst_row_z_score, z_score


@dataclass(frozen=True)
class TensorVerdict:
    """Of one gradient."""

    name: str
    failed_tests: tuple[str, ...]
    """form, zeros, bound, spread, worst row, unjudged: those that failed."""
    z: float
    """RMS(error / σ): about 1 for correct arithmetic, less where it is better than claimed."""
    of_bound: float
    """Largest |error| / bound; what decides is the interval, beyond 1 no rounding explains it."""
    worst_row: tuple[int, int, int] | None
    """Batch, token and head of the row with the largest errors."""
    worst_row_z: float
    """RMS(error / σ) of this row."""

    @property
    def passed(self) -> bool:
        """Whether no test failed."""
        return not self.failed_tests

    @property
    def sentence(self) -> str:
        """One line."""
        numbers = f"z {self.z:.3g}, {self.of_bound:.3g} of the bound"
        if self.passed:
            return f"{self.name}: as rounding explains ({numbers})"
        batch, token, head = self.worst_row or (0, 0, 0)
        where = f"; worst row: batch {batch}, token {token}, head {head} (z {self.worst_row_z:.3g})"
        return f"{self.name}: fails {', '.join(self.failed_tests)} ({numbers}{where if self.worst_row else ''})"


@dataclass(frozen=True)
class GradientVerdict:
    """The judge's answer on a backward pass."""

    passed: bool
    judgeable: bool
    """False: nothing is wrong where it could be judged, but somewhere it could not (docs/gradients.md §6)."""
    precision: str
    ds: str
    """How ds was taken to be made, one of `cpjax.crosscheck.gradients.asked.DS`."""
    tensors: tuple[TensorVerdict, ...]
    causes: tuple[str, ...]
    """Faults that explain the result to within rounding; empty where none does, or more than one."""
    assumed: tuple[str, ...]
    """What was not given, and computed exactly."""

    @property
    def failed_tests(self) -> tuple[str, ...]:
        """As "dq spread"."""
        return tuple(f"{one.name} {test}" for one in self.tensors for test in one.failed_tests)

    @property
    def text(self) -> str:
        """For people, several lines."""
        head = (
            "gradients pass" if self.passed else "gradients are WRONG" if self.judgeable else "gradients: not judgeable"
        )
        of_ds = "" if self.ds == "plain" else f", ds {self.ds}"
        given = [f"{name} not given: computed exactly" for name in self.assumed]
        return "\n".join(
            [f"{head} ({self.precision}{of_ds})", *(one.sentence for one in self.tensors), *self.causes, *given]
        )

    def as_json(self) -> dict[str, Any]:
        """The same as plain values; what is no finite number is a word."""

        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: plain(v) for k, v in x.items()}
            if isinstance(x, list | tuple):
                return [plain(v) for v in x]
            return x if not isinstance(x, float) or np.isfinite(x) else str(x)

        tensors = [plain(asdict(one)) | {"passed": one.passed} for one in self.tensors]
        return plain(asdict(self)) | {"tensors": tensors, "failed_tests": list(self.failed_tests)}

    def __bool__(self) -> bool:
        """Refused, so that nobody takes the object itself for the answer.

        Raises:
          TypeError: always.
        """
        raise TypeError("a GradientVerdict is neither true nor false; ask .passed")


def row_errors(given: Float[np.ndarray, "B L N D"], found: Expected, rows: np.ndarray) -> RowErrors:
    """(error / σ)² of the rows that count, `rows` `[B, L, N]`; of a number that cannot be judged it is 0."""
    used = (found.dof > 0) & rows
    given = np.where(judgeable_numbers(found), given, found.exact)
    error, sigma = (given - found.exact)[used], found.sigma[used]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        square = np.minimum(np.nan_to_num((error / sigma) ** 2, nan=np.inf), MOST)
    exact = np.ascontiguousarray(found.exact[used])
    _, same = np.unique(exact.view(f"V{exact.shape[1] * exact.itemsize}").ravel(), return_inverse=True)
    return RowErrors(square.mean(axis=1), found.dof[used], same)


def judgeable_numbers(found: Expected) -> Bool[np.ndarray, "B L N D"]:
    """Where the model bounds the number: not where a correct one may be beyond the range of its format."""
    return np.isfinite(found.low) & np.isfinite(found.high) & np.isfinite(found.sigma)


MOST = 1e30
"""(error / σ)² is no larger than this: cost, keeps means finite."""


def decided(name: str, given: Float[np.ndarray, "B L N D"], found: Expected, rows: np.ndarray) -> TensorVerdict:
    """The verdict on one tensor; `rows` `[B, L, N]` are those that count."""
    counts = rows[..., None]
    inside = (found.low <= given) & (given <= found.high)
    errors = row_errors(given, found, rows)
    judgeable = judgeable_numbers(found)
    tests = {
        "form": bool((~np.isfinite(given) & judgeable & counts).any()) or bool(np.isnan(given[rows]).any()),
        "bound": bool((~inside & judgeable & counts).any()),
        "spread": not spread_z_score(errors) <= LIMIT,
        "worst row": not worst_row_z_score(errors) <= LIMIT,
        "unjudged": bool((~judgeable & counts).any()),
    }
    if not given[rows].any() and found.exact[rows].any():
        # Rounding explains zeros where all gradients vanish in it: then nothing can be said, and zeros never pass.
        tests["zeros" if any(tests.values()) else "unjudged"] = True
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.abs(given - found.exact) / found.half_width
    worst, used = None, np.argwhere((found.dof > 0) & rows)
    if len(errors.dof):
        worst = int(np.argmax(z_score(errors.mean_square, errors.dof)))
    total = errors.dof.sum()
    return TensorVerdict(
        name,
        tuple(test for test, failed in tests.items() if failed),
        z=float(np.sqrt(errors.mean_square.mean())) if total else 0.0,
        of_bound=float(np.nan_to_num(np.where(counts, ratio, 0.0), nan=np.inf).max(initial=0.0)),
        worst_row=None if worst is None else (int(used[worst, 0]), int(used[worst, 1]), int(used[worst, 2])),
        worst_row_z=0.0 if worst is None else float(np.sqrt(errors.mean_square[worst])),
    )
