"""The maximum that is subtracted from a tile's scores, and what its differences lose where scores have a format.

That is §3.5 and 3.6 of docs/verdict.md. Where a kernel ends its tiles is not known, so there is one `RunningMax` for
each size that they may have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.exact.attention import Rows
from cpjax.crosscheck.exact.formats import Format

LEAST_TILE = 16
"""Keys of the smallest tile that is thought of: what a matrix unit takes at once."""

Moved = Callable[[Float[np.ndarray, "R n"] | float, slice], Float[np.ndarray, "R m"]]
"""What errors of some keys' exponents, one for each or one for all of them, do together."""


def tile_sizes(rows: Rows) -> list[int]:
    """16, 32, 64, … keys, up to the first size that holds every chunk."""
    sizes = [LEAST_TILE]
    while sizes[-1] < rows.chunk_sizes.max():
        sizes.append(2 * sizes[-1])
    return sizes


@dataclass(frozen=True)
class RunningMax:
    """The running maximum of each row, tile after tile of each chunk.

    Tiles in which no row's maximum rises are taken together with the tile before: n spans of keys.
    """

    rows: Rows
    fmt: Format
    """Of the scores."""
    score_spacing: Float[np.ndarray, "R S"]
    """Spacing of the scores."""
    tile: int
    """Keys a tile."""
    begins_with_sink: bool = False
    """Whether the maximum of each chunk begins with the sink."""

    @cached_property
    def _spans(self) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"], Float[np.ndarray, "R n"]]:
        """First key of each span, whether it is the first of its chunk, and the maxima (−inf: nothing seen yet)."""
        edges = self.rows.edges.tolist()
        starts = np.concatenate([np.arange(start, stop, self.tile) for start, stop in pairwise(edges)])
        top = np.maximum.reduceat(self.rows.score, starts, axis=1)
        for start, stop in pairwise(np.searchsorted(starts, edges).tolist()):
            np.maximum.accumulate(top[:, start:stop], axis=1, out=top[:, start:stop])
        if self.begins_with_sink:
            top = np.maximum(top, self.rows.chunk_max[:, -1:])
        is_first = np.isin(starts, edges)
        begins = is_first.copy()
        begins[1:] |= (top[:, 1:] > top[:, :-1]).any(axis=0)
        return starts[begins], is_first[begins], top[:, begins]

    @cached_property
    def jump_sigma(self) -> tuple[Float[np.ndarray, "R n"], Float[np.ndarray, "R n"]]:
        """Standard deviation of the rounding of old − new maximum, where it rises (§3.6).

        First where the new maximum lies between numbers of the difference's spacing, then where only the old one does.
        0 where both are multiples of it, and where there was no maximum before.
        """
        _, is_first, top = self._spans
        old = np.concatenate([top[:, :1], top[:, :-1]], axis=1)
        rises = (top > old) & ~np.isneginf(old) & ~is_first
        new, old = np.where(rises, top, 0.0), np.where(rises, old, 0.0)
        step, of_new, of_old = (self.fmt.spacing(x) for x in (new - old, new, old))
        sigma = np.where(rises, step, 0.0) / np.sqrt(12)
        return np.where(of_new < step, sigma, 0.0), np.where((of_new >= step) & (of_old < step), sigma, 0.0)

    def _steps(self) -> tuple[Float[np.ndarray, "R S"], Float[np.ndarray, "R S"]]:
        """Spacing of each difference s − m where s lies between the numbers of that spacing; and where only m does.

        Elsewhere both are multiples of it, and the difference is exact.
        """
        rows, (starts, _, top) = self.rows, self._spans
        top = np.where(np.isneginf(top), 0.0, top)
        sizes = np.diff(np.append(starts, rows.score.shape[1]))
        of_top, top = (np.repeat(x, sizes, axis=1) for x in (self.fmt.spacing(top), top))
        step = self.fmt.spacing(np.where(rows.seen, rows.score - top, 0.0))
        own = self.score_spacing < step
        return np.where(own, step, 0.0), np.where(~own & (of_top < step), step, 0.0)

    @property
    def own_sigma(self) -> Float[np.ndarray, "R S"]:
        """Standard deviation of the errors that keys have each for itself."""
        return self._steps()[0] / np.sqrt(12)

    @cached_property
    def common_sigma(self) -> Float[np.ndarray, "R S"]:
        """Standard deviation of the errors that all keys have alike which are diminished by the same maximum.

        In float32, which is exact enough: there is one such array for each size of tile.
        """
        return (self._steps()[1] / np.sqrt(12)).astype(np.float32)

    def variance(self, moved: Moved) -> Float[np.ndarray, "R m"]:
        """Variance of what these common errors and the rescales do (V_m + V_r)."""
        starts, is_first, top = self._spans
        of_new, of_old = self.jump_sigma
        has_common, has_jump = self.common_sigma.any(), np.any((of_new > 0) | (of_old > 0), axis=0)
        total = together = before = np.zeros_like(moved(0.0, slice(0, 0)))
        counted = 0  # keys from here on are not in `before` yet
        for n, (start, stop) in enumerate(pairwise([*starts.tolist(), self.rows.score.shape[1]])):
            is_new = (top[:, n] > top[:, n - 1])[:, None] | is_first[n]
            total, together = total + np.where(is_new, together**2, 0.0), np.where(is_new, 0.0, together)
            if is_first[n]:
                before, counted = np.zeros_like(before), start
            if has_jump[n]:  # a rescale multiplies all keys of the chunk that were met before
                before, counted = before + moved(1.0, slice(counted, start)), start
                total = total + (of_old[:, n, None] * before) ** 2
                together = together + of_new[:, n, None] * before
            if has_common:
                keys = slice(start, stop)
                together = together + moved(self.common_sigma[:, keys], keys)
        return total + together**2
