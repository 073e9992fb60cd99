"""What exact arithmetic gives for some rows, in float64, taken apart the way the computation that is judged is.

The error model needs more than the answer: every weight, every chunk's share and output, and the running output after
each merge, because each of these is a place where something was rounded.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.exact.logits import PLAIN, Logits

SINK = -1
"""What stands for a chunk's number, and for a key's index, where the attention sink is meant."""


@dataclass(frozen=True)
class Rows:
    """Exact attention of R queries of one head over S keys (only keys that at least one of them sees), C chunks.

    The keys are ordered by chunk; `edges[c]:edges[c + 1]` are the keys of chunk `chunks[c]`. An attention sink is the
    last key, of value 0, and a chunk of its own.
    """

    index: Int[np.ndarray, " S"]
    """Which of all keys these are; the sink is `SINK`."""
    chunks: Int[np.ndarray, " C"]
    """The chunks that at least one row sees, ascending; then, if there is a sink, `SINK`."""
    value: Float[np.ndarray, "S V"]
    score: Float[np.ndarray, "R S"]
    """The logit: scale · q·k, unless `logits` has more; −inf where hidden."""
    weight: Float[np.ndarray, "R S"]
    """The softmax: rows sum to 1, or to 0 where nothing is seen."""
    norms: Float[np.ndarray, "R S"]
    """|scale| |q| |k|, which bounds the rounding of the dot product."""
    seen: Bool[np.ndarray, "R S"]
    edges: Int[np.ndarray, " C1"]
    chunk_max: Float[np.ndarray, "R C"]
    chunk_weight: Float[np.ndarray, "R C"]
    """Σ of the weights in a chunk, a_c."""
    chunk_part: Float[np.ndarray, "R C V"]
    """Σ of weight · value in a chunk, B_c = a_c o_c."""
    out: Float[np.ndarray, "R V"]
    lse: Float[np.ndarray, " R"]
    product: Float[np.ndarray, "R S"]
    """scale · q·k, 0 where hidden and for the sink."""
    logits: Logits
    """What else a logit is made of; its arrays have no column for the sink."""

    @property
    def has_sink(self) -> bool:
        """Whether the last key is a sink."""
        return self.logits.sink is not None

    @property
    def key_count(self) -> int:
        """How many keys there are but the sink."""
        return len(self.index) - self.has_sink

    @property
    def key_chunks(self) -> Int[np.ndarray, " C"]:
        """The chunks but the sink's."""
        return self.chunks[: len(self.chunks) - self.has_sink]

    @cached_property
    def capped(self) -> Float[np.ndarray, "R S"]:
        """The logit after the softcap."""
        return self.logits.capped(self.product)

    @cached_property
    def slope(self) -> Float[np.ndarray, "R S"] | float:
        """d logit / d (scale · q·k): 1 − tanh², or 1 without a softcap; 0 for the sink."""
        if self.logits.softcap is None and not self.has_sink:
            return 1.0
        slope = np.ones_like(self.product)
        if self.logits.softcap is not None:
            slope -= (self.capped / self.logits.softcap) ** 2
        slope[:, self.key_count :] = 0.0
        return slope

    @cached_property
    def size(self) -> Float[np.ndarray, "S V"]:
        """|value|."""
        return np.abs(self.value)

    @cached_property
    def square(self) -> Float[np.ndarray, "S V"]:
        """value²."""
        return self.value**2

    @property
    def chunk_sizes(self) -> Int[np.ndarray, " C"]:
        """Keys a chunk."""
        return np.diff(self.edges)

    @cached_property
    def below(self) -> Float[np.ndarray, "R S"]:
        """How far each score lies below its chunk's maximum, s − M_c <= 0; −inf where hidden."""
        return self.score - self.per_key(np.where(np.isneginf(self.chunk_max), 0.0, self.chunk_max))

    @cached_property
    def p(self) -> Float[np.ndarray, "R S"]:
        """exp(s − M_c), 0 where hidden: what a kernel multiplies values by before it divides."""
        return np.exp(self.below)

    @property
    def furthest_below(self) -> Float[np.ndarray, "R S"]:
        """The same, if the sink is in each chunk's maximum, as in a kernel that begins with it."""
        return self.below if not self.has_sink else self.score - self.per_key(self.max_with_sink)

    @property
    def max_with_sink(self) -> Float[np.ndarray, "R C"]:
        """The maximum of each chunk and the sink."""
        return np.maximum(self.chunk_max, self.chunk_max[:, -1:]) if self.has_sink else self.chunk_max

    def per_key(self, x: Float[np.ndarray, "R C"]) -> Float[np.ndarray, "R S"]:
        """A chunk's number repeated for each of its keys; not to be written to."""
        if x.shape[1] == 1:
            return np.broadcast_to(x, self.score.shape)
        return np.repeat(x, self.chunk_sizes, axis=1)

    @cached_property
    def of_scale(self) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, " R"]]:
        """By how much `out` and lse move if the scale is larger by its own size: Σ A_j x_j (v_j − out), Σ A_j x_j.

        x_j is scale · q·k, times d logit / d (scale · q·k).
        """
        moved = self.weight * self.product
        if not isinstance(self.slope, float):
            moved *= self.slope
        of_lse = moved.sum(axis=1)
        return moved @ self.value - of_lse[:, None] * self.out, of_lse


def attention_rows(
    query: Float[np.ndarray, "R H"],
    key: Float[np.ndarray, "S H"],
    value: Float[np.ndarray, "S V"],
    seen: Bool[np.ndarray, "R S"],
    chunk: Int[np.ndarray, " S"],
    scale: float,
    logits: Logits = PLAIN,
) -> Rows:
    """Exact attention of these rows; all inputs float64. Keys that no row sees are left out."""
    if logits.bias is not None:
        seen = seen & ~np.isneginf(logits.bias)
    index = np.flatnonzero(seen.any(axis=0))
    if len(index) == 0:
        index = np.zeros(1, int)  # keeps every array non-empty; the row still sees nothing
    index = index[np.argsort(chunk[index], kind="stable")]
    if len(index) < len(key) or (np.diff(index) != 1).any():  # otherwise all keys are there in order: copy nothing
        key, value, seen, chunk = key[index], value[index], seen[:, index], chunk[index]
        logits = logits.of_keys(index)
    edges = np.append(np.flatnonzero(np.diff(chunk, prepend=-1)), len(chunk))
    product = scale * (query @ key.T)
    capped = logits.capped(product)
    score = np.where(seen, (logits.shifted(capped) or [capped])[-1], -np.inf)
    product = np.where(seen, product, 0.0)
    norms = np.sqrt(scale**2 * np.einsum("rh,rh->r", query, query))[:, None] * np.sqrt(np.einsum("sh,sh->s", key, key))
    if logits.sink is not None:
        nothing = np.zeros((len(query), 1))
        score, product, norms = (
            np.hstack(x) for x in ([score, logits.sink[:, None]], [product, nothing], [norms, nothing])
        )
        seen, value = np.hstack([seen, nothing == 0]), np.vstack([value, np.zeros_like(value[:1])])
        index, chunk, edges = np.append(index, SINK), np.append(chunk, SINK), np.append(edges, len(chunk) + 1)
    chunk_max = np.maximum.reduceat(score, edges[:-1], axis=1)
    top = chunk_max.max(axis=1)
    base = np.where(np.isneginf(top), 0.0, top)
    p = np.exp(score - base[:, None])
    total = p.sum(axis=1)
    weight = p / np.where(total == 0, 1.0, total)[:, None]
    parts = [weight[:, a:b] @ value[a:b] for a, b in pairwise(edges)]
    chunk_part = np.stack(parts, axis=1)
    with np.errstate(divide="ignore"):
        lse = base + np.log(total)
    return Rows(
        index=index,
        chunks=chunk[edges[:-1]],
        value=value,
        score=score,
        weight=weight,
        norms=norms,
        seen=seen,
        edges=edges,
        chunk_max=chunk_max,
        chunk_weight=np.add.reduceat(weight, edges[:-1], axis=1),
        chunk_part=chunk_part,
        out=chunk_part.sum(axis=1),
        lse=lse,
        product=product,
        logits=logits,
    )
