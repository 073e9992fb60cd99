"""What one device does to bring runs of the text into shards, or shards into runs: the rounds of `partition.moves`."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from cpjax.mask import Tokens
from cpjax.partition.moves import Round

Arrays = TypeVar("Arrays")


def moved(arrays: Arrays, rounds: Sequence[Round], axis_name: str | tuple[str, ...]) -> Arrays:
    """Arrays `[B, t, …]` with their tokens where the rounds bring them; call it inside `jax.shard_map`.

    Its derivative sends the same rounds backwards. Of each round only that is sent which changes its rank.

    Args:
      arrays: one, or a tree of them.
      rounds: of `cpjax.partition.moves.moves`; none leaves the arrays as they are.
      axis_name: the mesh axis over which tokens are sharded, or the axes, outermost first.

    >>> from functools import partial
    >>> from cpjax.parallel import cp_mesh
    >>> from cpjax.partition import Zigzag
    >>> from cpjax.partition.moves import moves
    >>> device = partial(moved, rounds=moves(Zigzag(2).order(8), 2), axis_name="cp")
    >>> jax.shard_map(device, mesh=cp_mesh(2), in_specs=jax.P(None, "cp"), out_specs=jax.P(None, "cp"))(
    ...     jnp.arange(8)[None])
    Array([[0, 1, 6, 7, 2, 3, 4, 5]], dtype=int32)
    """
    if not rounds:
        return arrays
    # What arrives lies round after round; one take puts it into place.
    place = mine(np.argsort(np.concatenate([step.receive for step in rounds], axis=1), axis=1), axis_name)
    return jax.tree.map(lambda x: _take(_arriving(x, rounds, axis_name), place), arrays)


def places(text: Tokens, cp: int, batch: int, axis_name: str | tuple[str, ...]) -> Tokens:
    """The places of this device's tokens, `[B, t]`, of the places `[T]` of all shards: nothing is sent for them.

    >>> from cpjax.parallel import cp_mesh
    >>> text = Tokens(np.array([0, 3, 1, 2]), np.zeros(4, int))
    >>> device = lambda: places(text, 2, 1, "cp").position
    >>> jax.shard_map(device, mesh=cp_mesh(2), in_specs=(), out_specs=jax.P(None, "cp"))()
    Array([[0, 3, 1, 2]], dtype=int32)
    """
    rows = (mine(x.reshape(cp, -1), axis_name) for x in text)
    return Tokens(*(jnp.broadcast_to(row, (batch, *row.shape)) for row in rows))


def mine(table: Int[np.ndarray, "cp n"], axis_name: str | tuple[str, ...]) -> Int[Array, " n"]:
    """This device's row of a table, int32.

    >>> from cpjax.parallel import cp_mesh
    >>> device = lambda: mine(np.array([[5], [6]]), "cp")
    >>> jax.shard_map(device, mesh=cp_mesh(2), in_specs=(), out_specs=jax.P("cp"))()
    Array([5, 6], dtype=int32)
    """
    if len(table) == 1:
        return jnp.asarray(table[0], jnp.int32)
    return jnp.asarray(table, jnp.int32)[lax.axis_index(axis_name)]


def _arriving(x: Array, rounds: Sequence[Round], axis_name: str | tuple[str, ...]) -> Array:
    pieces = []
    for step in rounds:
        sent = _take(x, mine(step.send, axis_name))
        if not step.pairs:
            pieces.append(sent)
            continue
        arrived = lax.ppermute(sent, axis_name, step.pairs)
        if any(step.keeps):
            kept = jnp.asarray(step.keeps)[lax.axis_index(axis_name)]
            arrived = jnp.where(kept, sent, arrived)
        pieces.append(arrived)
    return jnp.concatenate(pieces, axis=1)


def _take(x: Array, index: Int[Array, " n"]) -> Array:
    return x.at[:, index].get(mode="promise_in_bounds", unique_indices=True)
