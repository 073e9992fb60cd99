"""Problems whose logits are more than scale · q·k: softcap, sink, ALiBi slopes, bias. No constant is tuned on them."""

from dataclasses import replace

import numpy as np

from cpjax.trial.draw import Kind, draw_shape, gaussians, log_uniform, pose
from cpjax.trial.emulators import SINKS, Arithmetic
from cpjax.trial.problem import Problem


def other_logits(rng: np.random.Generator) -> Problem:
    """Softcap, sink, ALiBi slopes or a bias, most often one of them, at times several."""
    problem = pose(
        rng, *gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.1, 8.0), mean=rng.choice([0.0, 1.0]))
    )
    return with_other_logits(rng, problem)


def with_other_logits(rng: np.random.Generator, problem: Problem) -> Problem:
    """The problem with at least one of them, in numbers that float32 holds."""
    (batch, length, heads, _), keys = problem.query.shape, problem.key.shape[1]
    which = rng.random(4) < 0.3
    which[rng.integers(4)] = True
    softcap = float(np.float32(log_uniform(rng, 1.0, 50.0))) if which[0] else None
    sink = rng.uniform(-5.0, 12.0, heads) if which[1] else None
    alibi = np.exp2(-rng.uniform(0.5, 8.0, (1, heads))).repeat(batch, axis=0) if which[2] else None
    bias = None
    if which[3]:
        shape = (int(rng.choice([1, batch])), int(rng.choice([1, heads])), length, keys)
        bias = rng.standard_normal(shape) * log_uniform(rng, 0.1, 5.0)
        bias[rng.random(shape) < rng.choice([0.0, 0.3])] = -np.inf
    sink, alibi, bias = (None if x is None else x.astype(np.float16).astype(np.float32) for x in (sink, alibi, bias))
    return replace(problem, softcap=softcap, sink=sink, alibi=alibi, bias=bias)


def with_freedoms(arithmetic: Arithmetic, problem: Problem, rng: np.random.Generator) -> Arithmetic:
    """What a correct implementation is free to choose where a problem has these."""
    if problem.sink is not None:
        arithmetic = replace(arithmetic, sink=str(rng.choice(SINKS)))
    if problem.softcap is not None:
        arithmetic = replace(arithmetic, tanh_of_sigmoid=bool(rng.random() < 0.5))
    # slope · kv_position moves all logits of a row alike, and a sink would have to be moved with them.
    if problem.alibi is not None and problem.is_causal and problem.sink is None:
        arithmetic = replace(arithmetic, alibi_of_key=bool(rng.random() < 0.5))
    return arithmetic


OTHER_LOGITS: dict[str, Kind] = {"other_logits": other_logits}
