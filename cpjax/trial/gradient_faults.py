"""Wrong gradients, each by the fault that a backward pass is known for, otherwise computed as a correct one is."""

from collections.abc import Callable

import numpy as np

from cpjax.trial.emulators import Arithmetic
from cpjax.trial.gradient_emulators import Backward, Gradients, stored, sums
from cpjax.trial.problem import Problem, Result

Fault = Callable[[Problem, Arithmetic, Backward, Result, np.ndarray], Gradients]


def delta_missing(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """ds = p dp: what the softmax takes back is forgotten; dv is right."""
    return stored(p, a, sums(p, a, b, Result(np.zeros_like(given.out), given.lse), dout))


def scale_twice(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """dq times scale once too often."""
    right = sums(p, a, b, given, dout)
    return stored(p, a, right._replace(dq=right.dq * right.dq.dtype.type(p.scale)))


def scale_missing(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """dk without scale."""
    right = sums(p, a, b, given, dout)
    return stored(p, a, right._replace(dk=right.dk / right.dk.dtype.type(p.scale)))


def lse_of_another_head(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """Head n takes the lse of head n + 1."""
    return stored(p, a, sums(p, a, b, Result(given.out, np.roll(given.lse, -1, axis=2)), dout))


def part_not_home(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """dk and dv of the first chunk's keys lack the queries of the last rank."""
    right, chunk = sums(p, a, b, given, dout), _chunks(p)
    rank = np.minimum(chunk, 2 * p.cp - 1 - chunk)
    lost = (rank == p.cp - 1)[:, None] & (chunk == 0)[None]
    wrong = sums(p, a, b, given, dout, np.broadcast_to(~lost, (p.query.shape[2], *lost.shape)))
    return stored(p, a, Gradients(right.dq, wrong.dk, wrong.dv))


def step_not_added(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """dq of the last chunk's queries lacks the keys of the last rank."""
    right, chunk = sums(p, a, b, given, dout), _chunks(p)
    rank = np.minimum(chunk, 2 * p.cp - 1 - chunk)
    lost = (chunk == chunk.max())[:, None] & (rank == p.cp - 1)[None]
    wrong = sums(p, a, b, given, dout, np.broadcast_to(~lost, (p.query.shape[2], *lost.shape)))
    return stored(p, a, right._replace(dq=wrong.dq))


def tile_skipped(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """Head 0 leaves out a tile on the diagonal, 64 queries and keys from three quarters on."""
    length = p.query.shape[1]
    at, side = length * 3 // 4, min(64, length // 8)
    entering = np.ones((p.query.shape[2], length, p.key.shape[1]), bool)
    entering[0, at : at + side, at : at + side] = False
    return stored(p, a, sums(p, a, b, given, dout, entering))


def group_not_summed(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """dk and dv have the last head of each group only."""
    heads, group = p.query.shape[2], p.query.shape[2] // p.key.shape[2]
    entering = np.arange(heads)[:, None, None] % group == group - 1
    entering = np.broadcast_to(entering, (heads, p.query.shape[1], p.key.shape[1]))
    right, wrong = sums(p, a, b, given, dout), sums(p, a, b, given, dout, entering)
    return stored(p, a, Gradients(right.dq, wrong.dk, wrong.dv))


def unmasked_dv(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """The mask is applied to ds only."""
    right, wrong = sums(p, a, b, given, dout), sums(p, a, b, given, dout, is_masked=False)
    return stored(p, a, right._replace(dv=wrong.dv))


def zeros(p: Problem, a: Arithmetic, b: Backward, given: Result, dout: np.ndarray) -> Gradients:
    """Nothing was written."""
    return stored(p, a, Gradients(*(np.zeros_like(x) for x in sums(p, a, b, given, dout))))


def _chunks(p: Problem) -> np.ndarray:
    length = p.key.shape[1]
    return np.arange(length) // -(-length // p.chunk_count)


FAULTS: dict[str, tuple[Fault, str]] = {
    "δ missing": (delta_missing, "δ = Σ dout·out was not taken off"),
    "scale twice (dq)": (scale_twice, "dq: multiplied by scale once too often"),
    "scale missing (dk)": (scale_missing, "dk: scale is missing"),
    "lse of another head": (lse_of_another_head, "lse of another head: head n took that of head n + 1"),
    "a rank's dk, dv not brought home": (part_not_home, "its part never came home"),
    "dq not summed over steps": (step_not_added, "that step was not added"),
    "a causal tile skipped": (tile_skipped, "in head 0: a tile was skipped"),
    "groups not summed": (group_not_summed, "not summed over the group"),
    "dv without the mask": (unmasked_dv, "dv: probabilities of hidden keys entered"),
    "zeros": (zeros, ""),
}
"""The fault, and what the diagnosis says of it; zeros have no cause that could be told."""
