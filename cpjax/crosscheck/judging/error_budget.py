"""What explains the error of one row: every term of σ and of the bound, by name (docs/verdict.md, sections 3, 5)."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cpjax.crosscheck.error_model.model import ErrorModel
from cpjax.crosscheck.judging.evidence import model_of
from cpjax.crosscheck.judging.problem import Problem
from cpjax.crosscheck.judging.sampling import Tile


@dataclass(frozen=True)
class Share:
    """One term of a budget; terms that are 0 here are left out."""

    name: str
    section: str
    """Of docs/verdict.md."""
    out: float
    """What it gives `out`, RMS over the columns: a standard deviation, or for the bound a half-width."""
    out_share: float
    """Of the variance, or of the half-width."""
    lse: float = 0.0
    lse_share: float = 0.0


@dataclass(frozen=True)
class ErrorBudget:
    """One row: its error, and what correct arithmetic explains. Numbers of `out` are RMS over its columns."""

    batch: int
    position: int
    head: int
    visible_keys: int
    error: float
    sigma: float
    half_width: float
    """How far rounding may move it at most, the last rounding included."""
    worst_column: int
    """Where |error| / half-width is largest."""
    worst_ratio: float
    lse_error: float
    """NaN where no lse is given."""
    lse_sigma: float
    lse_bound: float
    is_judgeable: bool
    terms: tuple[Share, ...]
    """Of σ, the largest first."""
    bound: tuple[Share, ...]
    """Of the half-width before the last rounding."""

    def as_json(self) -> dict[str, Any]:
        """An object for machines; what is not finite is null."""
        return {k: None if isinstance(x, float) and not np.isfinite(x) else x for k, x in asdict(self).items()}


def error_budget(
    problem: Problem, out: np.ndarray, lse: np.ndarray | None, *, batch: int, position: int, head: int
) -> ErrorBudget:
    """The budget of one row of a result `[B, T, N, V]`; `position` is its index in the sequence.

    Raises:
      ValueError: there is no such row, or it is a pad.
    """
    sizes = dict(zip(("batch", "position", "head"), problem.query.shape[:3], strict=True))
    for (name, size), index in zip(sizes.items(), (batch, position, head), strict=True):
        if not 0 <= index < size:
            raise ValueError(f"{name} is {index}; it must be from 0 to {size - 1}")
    if not problem.is_judged[batch, position]:
        raise ValueError(f"position {position} of batch {batch} is a pad, which is not judged")
    row = np.array([position]), np.array([head]), np.zeros(1, int), np.ones(1, int)
    tile = Tile(batch, head // problem.group, *row)
    key, value = (x[batch, :, tile.kv_head].astype(np.float64) for x in (problem.key, problem.value))
    rows, model = model_of(problem, key, value, tile)
    expected = model.expected()
    error = out[batch, position, head].astype(np.float64) - rows.out[0]
    ratio = np.abs(error) / expected.half_width[0]
    worst = int(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)))
    with np.errstate(invalid="ignore"):
        lse_error = float("nan") if lse is None else float(lse[batch, position, head]) - float(rows.lse[0])
    return ErrorBudget(
        batch=batch,
        position=position,
        head=head,
        visible_keys=int(rows.seen[:, : rows.key_count].sum()),
        error=_rms(error),
        sigma=_rms(expected.sigma),
        half_width=_rms(expected.half_width),
        worst_column=worst,
        worst_ratio=float(ratio[worst]),
        lse_error=lse_error,
        lse_sigma=float(expected.lse_sigma[0]),
        lse_bound=float(expected.lse_bound[0]),
        is_judgeable=bool(expected.is_judgeable[0]),
        terms=_terms(model, expected.sigma, expected.lse_sigma),
        bound=_bound(model),
    )


def _terms(model: ErrorModel, sigma: np.ndarray, lse_sigma: np.ndarray) -> tuple[Share, ...]:
    """Variances add, so shares do. Systematic sizes add before they are squared: each has its part of the square."""
    variance, lse_variance = float((sigma**2).mean()), float(lse_sigma[0] ** 2)
    typical = sum((term.typical * term.most for term in model.systematic), np.zeros_like(sigma))
    typical_lse = sum((term.typical * term.lse for term in model.systematic), np.zeros_like(lse_sigma))
    parts = [(term.name, term.section, term.out, term.lse) for term in model.terms]
    parts += [
        (term.name, term.section, term.typical * term.most * typical, term.typical * term.lse * typical_lse)
        for term in model.systematic
    ]
    shares = []
    for name, section, of_out, of_lse in parts:
        out, lse = float(np.mean(of_out)), float(np.mean(of_lse))
        # A term may take away what another has too much.
        sizes = np.sign(out) * abs(out) ** 0.5, lse**0.5
        shares.append(Share(name, section, sizes[0], _ratio(out, variance), sizes[1], _ratio(lse, lse_variance)))
    return _largest_first(shares)


def _bound(model: ErrorModel) -> tuple[Share, ...]:
    total = float(model.bound.before_last.mean())
    sizes = {name: float(part.mean()) for name, part in model.bound.parts.items()}
    sizes["second order"] = total - sum(sizes.values())  # errors of errors: (1 + u)^(C + 2)
    return _largest_first([Share(name, "5", size, _ratio(size, total)) for name, size in sizes.items()])


def _largest_first(shares: list[Share]) -> tuple[Share, ...]:
    shares = [share for share in shares if share.out or share.lse]
    return tuple(sorted(shares, key=lambda share: -max(share.out_share, share.lse_share)))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def _ratio(part: float, total: float) -> float:
    return part / total if total > 0 else 0.0
