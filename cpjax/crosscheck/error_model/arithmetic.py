"""The arithmetic that is judged: a precision profile at work on some rows, and what follows from both at once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.exact.attention import Rows
from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.precision import KEY_TILE, Precision

Merging = Int[np.ndarray, "R C"]
"""Per row the chunks in the order of merging."""


@dataclass(frozen=True)
class Arithmetic:
    """Rows of exact attention, and how they were computed. R rows, S keys, C chunks, V value head dim."""

    rows: Rows
    precision: Precision
    merging: Merging | None
    """None: the order is not known."""
    head_dim: int
    scale: float
    """As the profile rounds it."""

    @property
    def _p(self) -> Format:
        return FORMATS[self.precision.probability]

    @property
    def _out(self) -> Format:
        return FORMATS[self.precision.out]

    @property
    def _carry_format(self) -> Format:
        return FORMATS[self.precision.carry]

    @property
    def _eps(self) -> float:
        """Unit roundoff of everything that is not stored in a format of its own. The oracle is float64 itself: for
        the float64 profile its own errors count too, so they count twice."""
        return FORMATS[self.precision.compute].u * (2.0 if self.precision.compute == "float64" else 1.0)

    @property
    def _scale(self) -> float:
        """|scale|, or 1 where it is 0 and every score is exact."""
        return abs(self.scale) or 1.0

    @property
    def _low_precision_scores(self) -> bool:
        return self.precision.score != self.precision.compute

    @property
    def _depth(self) -> float:
        """Additions one after the other in a sum over the keys, as assumed (§5): a tile, then the tiles."""
        return KEY_TILE + self.rows.seen.shape[1] / KEY_TILE

    @cached_property
    def _seen_keys(self) -> Int[np.ndarray, " R"]:
        return self.rows.seen.sum(axis=1)

    @cached_property
    def _chunk_count(self) -> Int[np.ndarray, " R"]:
        """Chunks that have any weight."""
        return (self.rows.chunk_weight > 0).sum(axis=1)

    @cached_property
    def _beside(self) -> Float[np.ndarray, "R C V"]:
        """How far each chunk pulls the output, B_c − a_c out: what an error of its weight is multiplied by."""
        return self.rows.chunk_part - self.rows.chunk_weight[..., None] * self.rows.out[:, None]

    @cached_property
    def _lse_size(self) -> Float[np.ndarray, " R"]:
        return np.where(self._seen_keys > 0, np.abs(self.rows.lse), 0.0)

    @cached_property
    def _weighted_magnitude(self) -> Float[np.ndarray, "R V"]:
        return self.rows.weight @ self.rows.size

    @cached_property
    def _p_value(self) -> Float[np.ndarray, "R S"]:
        """p = exp(s − M_c)."""
        return np.exp(self.rows.below)

    @cached_property
    def _p_weight(self) -> Float[np.ndarray, "R S"]:
        """What one unit of p is worth in the output, g_c = exp(M_c − lse); 0 where hidden."""
        rows = self.rows
        with np.errstate(invalid="ignore"):  # −inf − (−inf) where a row sees nothing; replaced below
            worth = np.exp(rows.chunk_max - rows.lse[:, None])
        return np.where(rows.seen, rows.per_key(np.nan_to_num(worth, nan=0.0)), 0.0)

    @cached_property
    def _largest_running(self) -> Float[np.ndarray, "R V"]:
        """No partial sum of the chunks' parts exceeds this in magnitude, whatever the order (§5)."""
        part = self.rows.chunk_part
        return np.maximum(np.maximum(part, 0).sum(axis=1), np.maximum(-part, 0).sum(axis=1))

    @cached_property
    def _chunk_lse_step(self) -> Float[np.ndarray, "R C"]:
        """Spacing of the format in which a chunk's lse is stored, where that is coarser than the compute format."""
        if self.precision.lse == self.precision.compute:
            return np.zeros_like(self.rows.chunk_weight)
        with np.errstate(divide="ignore", invalid="ignore"):
            lse = np.log(self.rows.chunk_weight) + self.rows.lse[:, None]
        fmt = FORMATS[self.precision.lse]
        return np.where(self.rows.chunk_weight > 0, fmt.spacing(np.where(np.isfinite(lse), lse, 0.0)), 0.0)
