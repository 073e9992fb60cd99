"""Whose rows are these? Heads, or the chunks of ranks, that were handed over in each other's place."""

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.diagnosis.sample import index_in_chunk
from cpjax.crosscheck.judging.problem import Problem
from cpjax.dense import dense_attention
from cpjax.mask import Tokens
from cpjax.partition import SequencePartition

NEAR = 2e-2
"""Rows are the same if they differ by less than this share of what two different rows differ by."""

POSITIONS = 3
"""Positions (or indices within a chunk) at which heads (or chunks) are compared."""

MOST_HEADS = 128


def heads_from(problem: Problem, out: np.ndarray) -> Int[np.ndarray, " N"] | None:
    """For each head the head whose outputs it has, if that is a permutation other than the identity."""
    heads = problem.query.shape[2]
    if not 2 <= heads <= MOST_HEADS:
        return None
    at = _late(np.flatnonzero(problem.is_judged[0]))
    exact = np.stack([_exact(problem, 0, at, n) for n in range(heads)])  # [N, P, V]
    return _permutation(out[0, at].astype(np.float64).swapaxes(0, 1), exact)


def batch_from(problem: Problem, out: np.ndarray) -> Int[np.ndarray, " B"] | None:
    """For each batch row the row whose outputs it has, if that is a permutation other than the identity."""
    batch = problem.query.shape[0]
    judged = np.flatnonzero(problem.is_judged.all(axis=0))
    if not 2 <= batch <= MOST_HEADS or not len(judged):
        return None
    at = _late(judged)
    exact = np.stack([_exact(problem, b, at, 0) for b in range(batch)])
    return _permutation(out[:, at, 0].astype(np.float64), exact)


def requests_from(problem: Problem, out: np.ndarray) -> dict[int, int] | None:
    """For each request of a packed row the request whose outputs it has, if some have those of others."""
    for b, segment in enumerate(np.asarray(problem.q_tokens.segment)):
        requests = np.unique(segment[segment >= 0])
        if not 2 <= len(requests) <= MOST_HEADS:
            continue
        own = [_late(np.flatnonzero((segment == request) & problem.is_judged[b])) for request in requests]
        exact = np.stack([_exact(problem, b, at, 0) for at in own])
        source = _permutation(np.stack([out[b, at, 0].astype(np.float64) for at in own]), exact)
        if source is not None:
            return {int(requests[i]): int(requests[j]) for i, j in enumerate(source)}
    return None


def axes_exchanged(problem: Problem, out: np.ndarray) -> bool:
    """Whether `out` is right if its memory is taken for `[B, N, T, V]`."""
    batch, length, heads, dim = out.shape
    if heads < 2 or length < 2:
        return False
    read = out.reshape(batch, heads, length, dim).swapaxes(1, 2)
    at = _late(np.flatnonzero(problem.is_judged[0]))
    exact = np.stack([_exact(problem, 0, at, n) for n in (0, heads - 1)])
    given, off = (np.stack([x[0, at, n] for n in (0, heads - 1)]).astype(np.float64) for x in (read, out))
    square, before = ((given - exact) ** 2).sum(), ((off - exact) ** 2).sum()
    return bool(np.isfinite(square) and square <= NEAR**2 * before)


def kv_heads_from(problem: Problem, out: np.ndarray) -> Int[np.ndarray, " N"] | None:
    """For each head the key/value head that it attends to, if every head has one and some have another than theirs."""
    heads, kv_heads = problem.query.shape[2], problem.key.shape[2]
    if kv_heads < 2 or heads > MOST_HEADS:
        return None
    at = _late(np.flatnonzero(problem.is_judged[0]))
    own = np.arange(heads) // problem.group
    exact = np.stack([[_exact(problem, 0, at, n, k) for k in range(kv_heads)] for n in range(heads)])  # [N, K, P, V]
    given = out[0, at].astype(np.float64).swapaxes(0, 1)[:, None]
    if not np.isfinite(given).all():
        return None
    square = ((given - exact) ** 2).sum(axis=(2, 3))
    typical = NEAR**2 * np.median(square)
    # Heads may have the same keys: then a head has its own.
    nearest = np.where(square[np.arange(heads), own] <= typical, own, square.argmin(axis=1))
    is_near = square.min(axis=1) <= typical
    return nearest if is_near.all() and (nearest != own).any() else None


def chunks_from(problem: Problem, out: np.ndarray) -> Int[np.ndarray, " C"] | None:
    """For each query chunk the chunk whose outputs it has, if that is a permutation other than the identity."""
    if not isinstance(problem.partition, SequencePartition):
        return None
    chunk = problem.q_chunk
    index, count = index_in_chunk(chunk), int(chunk.max()) + 1
    if count < 2 or len(chunk) % count:
        return None
    at = np.concatenate([np.flatnonzero(index == i) for i in _late(np.arange(len(chunk) // count))])
    if not problem.is_judged[0, at].all():
        return None
    head = 0
    by_chunk = np.argsort(chunk[at], kind="stable")
    exact = _exact(problem, 0, at, head)[by_chunk].reshape(count, -1, out.shape[3])
    given = out[0, at, head].astype(np.float64)[by_chunk].reshape(exact.shape)
    return _permutation(given, exact)


def _late(places: Int[np.ndarray, " n"]) -> Int[np.ndarray, " p"]:
    return places[np.linspace(len(places) // 2, len(places) - 1, POSITIONS).astype(int)]


def _exact(problem: Problem, b: int, at: np.ndarray, head: int, kv_head: int | None = None) -> Float[np.ndarray, "P V"]:
    k = head // problem.group if kv_head is None else kv_head
    q_tokens = Tokens(*(np.asarray(x)[b : b + 1, at] for x in problem.q_tokens))
    kv_tokens = Tokens(*(np.asarray(x)[b : b + 1] for x in problem.kv_tokens))
    query, key, value = (
        x[None, :, None] for x in (problem.query[b, at, head], problem.key[b, :, k], problem.value[b, :, k])
    )
    bias = None if problem.bias is None else problem.logits_of(b, at, np.full(len(at), head)).bias
    dense = dense_attention(
        query,
        key,
        value,
        q_tokens,
        kv_tokens,
        mask=problem.mask,
        scale=problem.scale,
        softcap=problem.softcap,
        sink=None if problem.sink is None else problem.sink[[head]],
        alibi=None if problem.alibi is None else problem.alibi[b, [head]],
        bias=None if bias is None else bias[None, None],
    )
    return dense.out[0, :, 0]


def _permutation(given: Float[np.ndarray, "n P V"], exact: Float[np.ndarray, "n P V"]) -> np.ndarray | None:
    """Which of the exact ones each given one is, if every one is close to exactly one of them."""
    flat, right = given.reshape(len(given), -1), exact.reshape(len(exact), -1)
    if not np.isfinite(flat).all():
        return None
    square = ((flat[:, None] - right[None]) ** 2).sum(axis=2)
    nearest = square.argmin(axis=1)
    typical = np.median(square)
    is_near = square.min(axis=1) <= NEAR**2 * typical
    if not is_near.all() or len(np.unique(nearest)) < len(nearest) or (nearest == np.arange(len(nearest))).all():
        return None
    return nearest
