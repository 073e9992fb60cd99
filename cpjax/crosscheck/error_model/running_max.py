"""The maximum that is subtracted from a tile's scores, and what the difference loses where scores have a format (§3.5).

Section numbers are those of docs/verdict.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.exact.attention import Rows
from cpjax.crosscheck.exact.formats import Format
from cpjax.precision import KEY_TILE


@dataclass(frozen=True)
class RunningMax:
    """The running maximum of each row, tile after tile of each chunk."""

    rows: Rows
    fmt: Format
    """Of the scores."""

    @cached_property
    def tiles(self) -> list[tuple[slice, bool]]:
        """The keys of each tile, and whether it is the first of its chunk."""
        return [
            (slice(tile, min(tile + KEY_TILE, stop)), tile == start)
            for start, stop in pairwise(self.rows.edges.tolist())
            for tile in range(start, stop, KEY_TILE)
        ]

    @cached_property
    def top(self) -> Float[np.ndarray, "R tiles"]:
        """The largest score of the chunk up to the end of each tile; −inf where nothing was seen yet."""
        found: list[np.ndarray] = []
        for keys, is_first in self.tiles:
            highest = self.rows.score[:, keys].max(axis=1)
            found.append(highest if is_first else np.maximum(found[-1], highest))
        return np.stack(found, axis=1)

    @cached_property
    def jump(self) -> Float[np.ndarray, "R tiles"]:
        """By how much the maximum rises with each tile, 0 where it does not or was −inf."""
        before = np.concatenate([self.top[:, :1], self.top[:, :-1]], axis=1)
        is_first = np.array([is_first for _, is_first in self.tiles])
        from_somewhere = ~is_first & ~np.isneginf(before)
        with np.errstate(invalid="ignore"):
            return np.where(from_somewhere, self.top - before, 0.0)

    @cached_property
    def _steps(self) -> tuple[Float[np.ndarray, "R S"], Float[np.ndarray, "R S"]]:
        """Spacing of each difference s − m where s lies between the numbers of that spacing; and where only m does.

        Elsewhere both are multiples of it, and the difference is exact.
        """
        sizes = [keys.stop - keys.start for keys, _ in self.tiles]
        top = np.repeat(np.where(np.isneginf(self.top), 0.0, self.top), sizes, axis=1)
        score = np.where(self.rows.seen, self.rows.score, top)
        step, of_score, of_top = (self.fmt.spacing(x) for x in (score - top, score, top))
        return np.where(of_score < step, step, 0.0), np.where((of_score >= step) & (of_top < step), step, 0.0)

    @property
    def own_sigma(self) -> Float[np.ndarray, "R S"]:
        """Standard deviation of the errors that keys have each for itself."""
        return self._steps[0] / np.sqrt(12)

    @cached_property
    def common_sigma(self) -> Float[np.ndarray, "R S"]:
        """Standard deviation of the errors that all keys have alike which are diminished by the same maximum."""
        return self._steps[1] / np.sqrt(12)

    def common_variance(self, part: Callable[[slice], Float[np.ndarray, "R n"]]) -> Float[np.ndarray, "R n"]:
        """Σ over maxima of (Σ over the tiles that have it of `part`)².

        Args:
          part: what the errors of a tile's keys, `common_sigma` each, do together.
        """
        total = together = np.zeros_like(part(slice(0, 0)))
        for tile, (keys, is_first) in enumerate(self.tiles):
            is_new = (self.jump[:, tile] > 0)[:, None] | is_first
            total = total + np.where(is_new, together**2, 0.0)
            together = np.where(is_new, 0.0, together) + part(keys)
        return total + together**2
