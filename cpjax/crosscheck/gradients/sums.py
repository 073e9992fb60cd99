"""What is added up of one gradient, tile by tile, and what follows: σ, the interval, independent errors (§3–§5)."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.crosscheck.gradients.asked import Asked
from cpjax.crosscheck.gradients.roundings import COHERENT, RANDOM, eps_of

OF_SUM = 2.0
"""Unit roundoffs of Σ |term|, an addition, in the bound (§4)."""


@dataclass(frozen=True, eq=False)
class Expected:
    """Of one tensor: `[B, L, heads, D]`, and `[B, L, heads]` a row. Float64."""

    exact: Float[np.ndarray, "B L N D"]
    sigma: Float[np.ndarray, "B L N D"]
    low: Float[np.ndarray, "B L N D"]
    """The least and the largest number that rounding explains."""
    high: Float[np.ndarray, "B L N D"]
    half_width: Float[np.ndarray, "B L N D"]
    dof: Float[np.ndarray, "B L N"]
    """Effective number of independent errors of a row; 0 where there is nothing to add up."""


class Models(NamedTuple):
    """Of dq, dk and dv."""

    dq: Expected
    dk: Expected
    dv: Expected


class Part(NamedTuple):
    """A tile's part of a tensor: factor @ vectors, and what is off. L rows, M terms."""

    factor: Float[np.ndarray, "L M"]
    stored: Float[np.ndarray, "L M"]
    """Variance of the factor's rounding to a half format."""
    pairs: Float[np.ndarray, "L M"]
    """Variance of all else, independent from pair to pair."""
    known: Float[np.ndarray, "L M"] | None
    """What rounding to the half format does, as far as float32 leaves it known."""
    most: Float[np.ndarray, "L M"]
    """The most that the factor is off."""
    vectors: Float[np.ndarray, "M D"]
    sizes: Float[np.ndarray, " M"]
    """Of `Directions`."""


@dataclass(eq=False)
class Sums:
    """Sums over all tiles of one tensor, before the factor `scale`."""

    asked: Asked
    shape: tuple[int, ...]
    scale: float
    count: Int[np.ndarray, "B L"]
    """How many terms each row adds up."""
    without: Collection[str] = ()
    _of: dict[str, np.ndarray] = field(default_factory=dict)
    running: dict[int, np.ndarray] = field(default_factory=dict)
    """By head, what is added up so far, if it is rounded on the way."""
    chunks: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """By chunk, if the parts of chunks are rounded: what pairs with its tokens add up to, and which rows have any."""

    def __getitem__(self, name: str) -> np.ndarray:
        """A sum, zeros before anything is added."""
        shape = self.shape[:3] if name in ("first", "second") else self.shape
        return self._of.setdefault(name, np.zeros(shape))

    def add(self, b: int, at: slice, head: int, part: Part) -> None:
        """A tile's part."""
        here, eps = (b, at, head), eps_of(self.asked)
        terms = self.count[b, at][:, None]
        random = 0.0 if "sums" in self.without else RANDOM * eps**2
        pairs, square = part.pairs + random * terms * part.factor**2, part.vectors**2
        self["exact"][here] += part.factor @ part.vectors
        self["stored"][here] += part.stored @ square
        self["pairs"][here] += pairs @ square
        if part.known is not None:
            self["known"][here] += part.known @ part.vectors
        of_sum = OF_SUM * eps * terms * (np.abs(part.factor) + part.most)
        self["most"][here] += (part.most + of_sum) @ np.abs(part.vectors)
        share = (part.stored + pairs) * part.sizes
        self["first"][here] += share.sum(axis=1)
        self["second"][here] += (share**2).sum(axis=1)

    def carry(
        self, b: int, at: slice, head: int, of: int, part: Part, first: int, seen: Bool[np.ndarray, "L M"]
    ) -> None:
        """The same part, whose running sum is rounded after every so many queries of a head (§3.8).

        Args:
          head, of: of the sums, and the query head whose part it is.
          first: the number of the part's first query.
          seen: which terms there are; to add nothing is exact.
        """
        every, fmt = self.asked.rounded_every, self.asked.fmt
        if every is None:
            return
        running = self.running.setdefault(of, np.zeros((*self.shape[:2], self.shape[3])))
        length, last = part.factor.shape[1], self.asked.problem.query.shape[1]
        start = 0
        while start < length:
            stop = min(length, (first + start) // every * every + every - first)
            running[b, at] += self.scale * (part.factor[:, start:stop] @ part.vectors[start:stop])
            is_last = first + stop == last and self.asked.problem.group == 1  # this one is the last rounding
            if (first + stop) % every == 0 or first + stop == last:
                rounded = np.asarray(seen[:, start:stop].any(axis=1))[:, None] & (not is_last)
                spacing = np.where(rounded, fmt.spacing(running[b, at]), 0.0)
                self["carried"][b, at, head] += spacing**2 / 12
                self["carried most"][b, at, head] += spacing
            start = stop

    def of_chunks(
        self, b: int, at: slice, head: int, part: Part, chunk: Int[np.ndarray, " M"], seen: Bool[np.ndarray, "L M"]
    ) -> None:
        """The same part, by the chunks of its M terms (§3.9)."""
        for number in np.unique(chunk):
            held = chunk == number
            nothing = np.zeros(self.shape), np.zeros(self.shape[:3], bool)
            sums, there = self.chunks.setdefault(int(number), nothing)
            sums[b, at, head] += self.scale * (part.factor[:, held] @ part.vectors[held])
            there[b, at, head] |= seen[:, held].any(axis=1)

    def over_ranks(self, own: Int[np.ndarray, " L"], turn: int) -> None:
        """Roundings of the chunks' parts, and of what is added up after each of them but the last (§3.9).

        Args:
          own: the rank that holds each row.
          turn: −1: parts come from this rank, the one before it, and so on; 1: from the ranks after it.
        """
        cp, rank_of = self.asked.problem.partition.cp, self.asked.rank_of
        count = sum((there.astype(int) for _, there in self.chunks.values()), np.zeros(self.shape[:3], int))
        running, done = np.zeros(self.shape), np.zeros(self.shape[:3], int)
        for step in range(cp):
            source = (own + turn * step) % cp
            for chunk, (sums, there) in sorted(self.chunks.items()):
                here = there & (source == rank_of[chunk])[None, :, None]
                part = np.where(here[..., None], sums, 0.0)
                running, done = running + part, done + here
                # A row with one part is rounded once, and so is the last sum: that is `the last rounding`.
                self._rounded(part, here & (count > 1))
                if self.asked.over_ranks == "out":
                    self._rounded(running, here & (done > 1) & (done < count))

    def _rounded(self, x: Float[np.ndarray, "B L N D"], where: Bool[np.ndarray, "B L N"]) -> None:
        spacing = np.where(where[..., None], _spacing(self.asked.fmt, x), 0.0)
        self["carried"][...] += spacing**2 / 12
        self["carried most"][...] += spacing

    def expected(self, alike: Float[np.ndarray, "B N"]) -> Expected:
        """What correct arithmetic explains; `alike` of `Directions`."""
        fmt, eps, count, scale = self.asked.fmt, eps_of(self.asked), self.count[..., None, None], self.scale
        exact = scale * self["exact"]
        # Known errors that add up to more than independent ones do: equal numbers, lost to zero, few keys (§3.1).
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = (self["known"] ** 2).sum(axis=3) / self["stored"].sum(axis=3)
        ratio = np.where((ratio > 1) & np.isfinite(ratio), ratio, 1.0)[..., None]
        pairs = scale**2 * (self["stored"] * ratio + self["pairs"])
        common = scale**2 * self["common"]
        variance = pairs + common + sum(self._whole(exact, count).values(), np.zeros_like(exact))
        variance = np.where(count > 0, variance, 0.0)
        least = FORMATS[self.asked.problem.precision.compute].least_normal
        most = abs(scale) * self["most"] + 2 * eps * np.abs(exact) + self["carried most"]
        most = most + 2 * least * (count + (np.abs(exact) < 2 * least)) * (count > 0)
        with np.errstate(invalid="ignore"):
            low, high = fmt.round(exact - most), fmt.round(exact + most)
        half = most + np.where(count > 0, _spacing(fmt, exact) / 2, fmt.tiny)
        return Expected(exact, np.sqrt(variance), low, high, half, self._dof(pairs, common, variance, alike))

    def _whole(self, exact: np.ndarray, count: np.ndarray) -> dict[str, np.ndarray | float]:
        """Variances that belong to the sum as a whole, by name."""
        eps, least = eps_of(self.asked), FORMATS[self.asked.problem.precision.compute].least_normal
        every = {
            "sums": COHERENT * eps**2 * count * exact**2,
            "scale": (eps * exact) ** 2 / 3 * (self.scale != 1),
            "underflow": count * least**2 / 3 + (np.abs(exact) < 2 * least) * least**2,
            "sums that are carried": self["carried"],
            "the last rounding": _spacing(self.asked.fmt, exact) ** 2 / 12,
        }
        return {name: x for name, x in every.items() if name not in self.without}

    def _dof(
        self, pairs: np.ndarray, common: np.ndarray, variance: np.ndarray, alike: Float[np.ndarray, "B N"]
    ) -> Float[np.ndarray, "B L N"]:
        """D² / Σ correlation² of the row's D errors (§5)."""
        width = variance.shape[3]
        with np.errstate(invalid="ignore", divide="ignore"):
            of_pairs, of_common = ((x / variance).mean(axis=3) for x in (pairs, common))
            few = np.clip(self["second"] / self["first"] ** 2, 0.0, 1.0)
        of_pairs, of_common, few = (np.nan_to_num(x) for x in (of_pairs, of_common, few))
        rest = 1 - of_pairs - of_common
        squares = of_pairs**2 * (few + (1 - few) * alike[:, None]) + of_common**2
        squares = squares + (rest**2 + 2 * (of_pairs * rest + of_common * rest + of_pairs * of_common)) / width
        return np.where((variance > 0).any(axis=3), 1 / np.clip(squares, 1 / width, 1.0), 0.0)


def _spacing(fmt: Format, x: np.ndarray) -> np.ndarray:
    return fmt.spacing(np.where(np.isfinite(x), x, 0.0))
