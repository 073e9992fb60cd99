"""What all exchanges share: the blocks of a shard, merged into what is already there; what travels, and the loop."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from cpjax.attention import Attention
from cpjax.mask import Tokens
from cpjax.partial import Partial, merge
from cpjax.precision import Precision
from cpjax.rounding import rounded

Shard = tuple[Array, Array, Tokens]
"""Keys, values and the places of their tokens: what travels."""


Attend = Callable[[Array, Array, Array, Tokens, Tokens, Attention], Partial]
"""Query, key, value, places of both, attention → partial: one block, the part that no exchange cares about."""

State = TypeVar("State")


def fold(
    result: Partial | None,
    query: Array,
    q_tokens: Tokens,
    shard: Shard,
    attention: Attention,
    chunks: int,
    attend: Attend,
) -> Partial:
    """`result` (None: nothing yet) merged with the blocks of a shard, whose keys are cut into `chunks` equal runs."""
    for key, value, kv_tokens in pieces(shard, chunks):
        block = attend(query, key, value, q_tokens, kv_tokens, attention)
        result = block if result is None else merge(result, block, attention.precision)
    assert result is not None  # chunks >= 1
    return result


def finished(result: Partial, attention: Attention) -> Partial:
    """The last result: `out` rounded to the format in which it is handed over."""
    return Partial(rounded(jnp.asarray(result.out), attention.precision.out), result.lse)


def delivered(result: Partial, precision: Precision) -> Partial:
    """The result as a caller gets it: `out` in the profile's out dtype, which loses nothing after `finished`."""
    return Partial(jnp.asarray(result.out).astype(precision.out), result.lse)


def pieces(shard: Shard, chunks: int) -> list[Shard]:
    """The shard cut along its tokens."""
    leaves, structure = jax.tree.flatten(shard)
    cut = zip(*(jnp.split(x, chunks, axis=1) for x in leaves), strict=True)
    return [jax.tree.unflatten(structure, piece) for piece in cut]


def packed(tree: Any) -> tuple[list[Shaped[Array, "B s X"]], Callable[[list], Any]]:
    """Arrays `[B, s, …]` side by side, in one array a dtype, so that they travel together; and the way back.

    >>> key, value, place = jnp.zeros((1, 4, 2, 3)), jnp.ones((1, 4, 2, 5)), jnp.zeros((1, 4), int)
    >>> parcel, unpacked = packed((key, value, place))
    >>> [x.shape for x in parcel], [x.shape for x in unpacked(parcel)]
    ([(1, 4, 16), (1, 4, 1)], [(1, 4, 2, 3), (1, 4, 2, 5), (1, 4)])
    """
    leaves, structure = jax.tree.flatten(tree)
    dtypes = list(dict.fromkeys(x.dtype for x in leaves))
    together = [[n for n, x in enumerate(leaves) if x.dtype == dtype] for dtype in dtypes]
    flat = [x.reshape(*x.shape[:2], math.prod(x.shape[2:])) for x in leaves]
    shapes, ends = [x.shape for x in leaves], [np.cumsum([flat[n].shape[2] for n in group]) for group in together]

    def unpacked(parcel: list) -> Any:
        apart: list = [None] * len(shapes)
        for x, group, end in zip(parcel, together, ends, strict=True):
            for n, piece in zip(group, jnp.split(x, end[:-1], axis=2), strict=True):
                apart[n] = piece.reshape(shapes[n])
        return jax.tree.unflatten(structure, apart)

    return [jnp.concatenate([flat[n] for n in group], axis=2) for group in together], unpacked


def to_next(x: Any, axis_name: str | tuple[str, ...]) -> Any:
    """Each rank's `x` sent to the next rank, the last one's to the first."""
    cp = lax.axis_size(axis_name)
    return lax.ppermute(x, axis_name, [(rank, (rank + 1) % cp) for rank in range(cp)])


def to_previous(x: Any, axis_name: str | tuple[str, ...]) -> Any:
    """Each rank's `x` sent to the rank before it, the first one's to the last."""
    cp = lax.axis_size(axis_name)
    return lax.ppermute(x, axis_name, [(rank, (rank - 1) % cp) for rank in range(cp)])


def repeated(step: Callable[[State], State], state: State, times: int) -> State:
    """`step` so many times, as one loop: the program is as large for 256 ranks as for 4.

    >>> repeated(lambda n: n + 1, jnp.array(0), 3).item()
    3
    """
    if times < 2:
        return step(state) if times else state
    return lax.scan(lambda state, _: (step(state), None), state, length=times)[0]
