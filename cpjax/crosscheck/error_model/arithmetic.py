"""The arithmetic that is judged: a precision profile at work on some rows, and what several terms need of both."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.error_model.drift import EqualTerms, equal_terms, product_drift, row_sum_drift
from cpjax.crosscheck.error_model.ties import Ties, score_ties_of, ties_of
from cpjax.crosscheck.exact.attention import Rows
from cpjax.crosscheck.exact.formats import FORMATS, Format
from cpjax.precision import KEY_TILE, Precision

Merging = Int[np.ndarray, "R C"]
"""Per row the chunks in the order of merging."""

ORACLE = 2.0
"""The oracle is float64 itself: for the float64 profile its own errors count too, so unit roundoff is doubled (§2)."""

HALVES = ("float16", "bfloat16")

BLOCK = 8
"""Products that a matrix unit adds at once to the sum so far, which it cuts off toward zero (§3.5, 3.7): 16 or 8, read
off a GPU (docs/fingerprint.md); fewer lose more."""


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
    def probability(self) -> Format:
        """The format of the factor of v."""
        return FORMATS[self.precision.probability]

    @property
    def out(self) -> Format:
        """The format of the result."""
        return FORMATS[self.precision.out]

    @property
    def carry(self) -> Format:
        """The format in which the output travels from merge to merge."""
        return FORMATS[self.precision.carry]

    @property
    def score(self) -> Format:
        """The format of the scores."""
        return FORMATS[self.precision.score]

    @property
    def has_rounded_scores(self) -> bool:
        """Whether scores have a format of their own."""
        return self.precision.score != self.precision.compute

    @property
    def has_rounded_distances(self) -> bool:
        """Whether s − m is rounded to a format of its own."""
        return self.precision.distance != self.precision.compute

    @property
    def has_rounded_sum(self) -> bool:
        """Whether the row sum takes the probabilities as they are rounded."""
        return self.precision.total != self.precision.compute

    @property
    def eps(self) -> float:
        """Unit roundoff of everything that is not stored in a format of its own."""
        return FORMATS[self.precision.compute].u * (ORACLE if self.precision.compute == "float64" else 1.0)

    @property
    def has_half_factors(self) -> bool:
        """Whether q·k and p·v are products of half formats, which matrix units add."""
        return self.precision.probability in HALVES

    def cut_off(self, terms: Int[np.ndarray, "..."] | int) -> Float[np.ndarray, "..."] | float:
        """The share of a sum of so many products that matrix units lose at most, always toward zero (§3.5).

        Each block costs up to 2ε of the sum so far, which grows to the whole block by block.
        """
        return self.eps * (np.ceil(np.divide(terms, BLOCK)) + 1)

    @property
    def least_normal(self) -> float:
        """Of the compute format: processors may take anything below it for 0."""
        return FORMATS[self.precision.compute].least_normal

    @property
    def scale_size(self) -> float:
        """|scale|, or 1 where it is 0 and every score is exact."""
        return abs(self.scale) or 1.0

    @cached_property
    def drift(self) -> Float[np.ndarray, " R"]:
        """The share by which row sums are off because their terms err alike (§3.7)."""
        share = row_sum_drift(self.rows, FORMATS[self.precision.compute])
        return (share * self.rows.chunk_weight).sum(axis=1)

    @cached_property
    def product_drift(self) -> Float[np.ndarray, "R V"]:
        """Of sums of p·v, in units of the output."""
        return product_drift(self.rows, FORMATS[self.precision.compute])

    @cached_property
    def equal_terms(self) -> EqualTerms:
        """Variances of sums in which terms come again (§3.7)."""
        return equal_terms(self.rows, self.ties, FORMATS[self.precision.compute])

    @cached_property
    def depth(self) -> Float[np.ndarray, " R"]:
        """Unit roundoffs of a sum over the keys (§5): of a tile, then of the tiles, and of terms that err alike."""
        tiled = KEY_TILE + self.rows.seen.shape[1] / KEY_TILE
        return tiled + self.drift / self.eps

    @cached_property
    def seen_keys(self) -> Int[np.ndarray, " R"]:
        """How many keys each row sees, the sink included."""
        return np.count_nonzero(self.rows.seen, axis=1)

    @cached_property
    def seen_of_chunks(self) -> Int[np.ndarray, "R C"]:
        """How many keys each row sees of each chunk."""
        seen = self.rows.seen
        return np.stack([np.count_nonzero(seen[:, a:b], axis=1) for a, b in pairwise(self.rows.edges)], axis=1)

    @cached_property
    def chunk_count(self) -> Int[np.ndarray, " R"]:
        """Chunks that have any weight."""
        return (self.rows.chunk_weight > 0).sum(axis=1)

    @cached_property
    def chunk_pull(self) -> Float[np.ndarray, "R C V"]:
        """How far each chunk pulls the output, B_c − a_c out: what an error of its weight is multiplied by."""
        return self.rows.chunk_part - self.rows.chunk_weight[..., None] * self.rows.out[:, None]

    @cached_property
    def lse_size(self) -> Float[np.ndarray, " R"]:
        """|lse|, 0 where nothing is seen."""
        return np.where(self.seen_keys > 0, np.abs(self.rows.lse), 0.0)

    @cached_property
    def weighted_size(self) -> Float[np.ndarray, "R V"]:
        """Σ A |v|."""
        return self.rows.weight @ self.rows.size

    @cached_property
    def p_value(self) -> Float[np.ndarray, "R S"]:
        """The number that is rounded as the factor of v: p = exp(s − M_c), or its share of the chunk's sum."""
        if not self.precision.is_normalised:
            return self.rows.p
        of_chunk = self.rows.per_key(self.rows.chunk_weight)
        return np.divide(self.rows.weight, of_chunk, out=np.zeros_like(of_chunk), where=of_chunk > 0)

    @cached_property
    def p_worth(self) -> Float[np.ndarray, "R S"]:
        """What one unit of p is worth in the output, g_c = exp(M_c − lse), or a_c; 0 where hidden."""
        rows = self.rows
        if self.precision.is_normalised:
            return np.where(rows.seen, rows.per_key(rows.chunk_weight), 0.0)
        with np.errstate(invalid="ignore"):  # −inf − (−inf) where a row sees nothing; replaced below
            worth = np.exp(rows.chunk_max - rows.lse[:, None])
        return np.where(rows.seen, rows.per_key(np.nan_to_num(worth, nan=0.0)), 0.0)

    @cached_property
    def flushed(self) -> Float[np.ndarray, "R S"]:
        """Weights of keys whose p is below the least normal number of the compute format, and may become 0."""
        return np.where(self.p_value < self.least_normal, self.rows.weight, 0.0)

    @cached_property
    def underflow(self) -> Float[np.ndarray, "R V"]:
        """The most that `out` loses where whatever is below the least normal number becomes 0 (§3.7)."""
        of_sums = np.minimum(self.weighted_size, self.seen_keys[:, None] * self.least_normal)
        return of_sums + self.lost_to_zero

    @cached_property
    def lost_to_zero(self) -> Float[np.ndarray, "R V"]:
        """What `out` loses where exponentials and the output itself become 0."""
        least, out = self.least_normal, np.abs(self.rows.out)
        of_p = times_few(self.flushed, self.rows.size) + self.flushed.sum(axis=1, keepdims=True) * out
        is_small = (out < 2 * least) & (FORMATS[self.precision.out].least_normal == least)
        return of_p + np.where(is_small, np.minimum(out, least), 0.0)

    @cached_property
    def p_choices(self) -> list[tuple[Float[np.ndarray, "R S"], Float[np.ndarray, "R S"]]]:
        """p and its worth: by each chunk's own maximum, and if there is a larger sink, by that (§3.11)."""
        rows, choices = self.rows, [(self.p_value, self.p_worth)]
        if (rows.max_with_sink > rows.chunk_max)[:, : len(rows.key_chunks)].any():
            worth = np.exp(rows.max_with_sink - rows.lse[:, None])
            choices.append((np.exp(rows.furthest_below), np.where(rows.seen, rows.per_key(worth), 0.0)))
        return choices

    @cached_property
    def mergings(self) -> "list[Merging | None]":
        """The order of merging, the sink included: it may come first or last (§3.11)."""
        if self.merging is None or not self.rows.has_sink:
            return [self.merging]
        sink = np.full((len(self.merging), 1), self.merging.shape[1])
        return [np.hstack([sink, self.merging]), np.hstack([self.merging, sink])]

    @cached_property
    def largest_running(self) -> Float[np.ndarray, "R V"]:
        """No partial sum of the chunks' parts exceeds this in magnitude, whatever the order: Ω (§3.4)."""
        part = self.rows.chunk_part
        return np.maximum(np.maximum(part, 0).sum(axis=1), np.maximum(-part, 0).sum(axis=1))

    @cached_property
    def chunk_lse_spacing(self) -> Float[np.ndarray, "R C"]:
        """Spacing of the format in which a chunk's lse is stored, where that is coarser than the compute format."""
        if self.precision.lse == self.precision.compute:
            return np.zeros_like(self.rows.chunk_weight)
        with np.errstate(divide="ignore", invalid="ignore"):
            lse = np.log(self.rows.chunk_weight) + self.rows.lse[:, None]
        fmt = FORMATS[self.precision.lse]
        return np.where(self.rows.chunk_weight > 0, fmt.spacing(np.where(np.isfinite(lse), lse, 0.0)), 0.0)

    @cached_property
    def ties(self) -> Ties:
        """Keys whose probabilities are rounded alike (§3.9)."""
        return ties_of(self.rows)

    @cached_property
    def score_ties(self) -> Ties:
        """Keys whose scores are rounded alike; they differ from `ties` only where scores are rounded themselves."""
        return score_ties_of(self.rows, self.score.digits) if self.has_rounded_scores else self.ties


def times_few(few: Float[np.ndarray, "R S"], value: Float[np.ndarray, "S V"]) -> Float[np.ndarray, "R V"]:
    """few @ value, where most rows of `few` are 0 and are not multiplied."""
    at = np.flatnonzero(few.any(axis=1))
    product = np.zeros((len(few), value.shape[1]))
    if len(at):
        product[at] = few[at] @ value
    return product
