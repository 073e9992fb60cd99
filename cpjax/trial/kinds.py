"""Kinds of data, friendly and hostile; each a function of a generator that returns a float64 problem.

These are the kinds on which the judge's constants may be tuned; `cpjax.trial.held_out` has those that are quoted.
The hostile ideas occur in both, in other forms, and the seeds are apart too (`cpjax.trial.false_alarms`).
"""

from dataclasses import replace

import numpy as np

from cpjax.trial.draw import Kind, Shape, chunk_of_key, draw_shape, gaussians, log_uniform, pose, towards, whole
from cpjax.trial.problem import Problem


def gaussian(rng: np.random.Generator) -> Problem:
    """Normal data: logits of scale 0.01 to 30, values of scale 1e-6 to 1e4, half of them with a mean."""
    query, key, value = gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.01, 30.0))
    mean = rng.choice([0.0, 0.0, 1.0, -3.0, 100.0])
    return pose(rng, query, key, (value + mean) * log_uniform(rng, 1e-6, 1e4))


def flat(rng: np.random.Generator) -> Problem:
    """Logits near 0: every key has nearly the same weight, and rounding errors of weights are alike."""
    return pose(rng, *gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 1e-3, 0.1), mean=rng.choice([0.0, 1.0])))


def needle(rng: np.random.Generator) -> Problem:
    """Each query picks one key: the softmax is nearly one-hot."""
    query, key, value = gaussians(rng, draw_shape(rng))
    return pose(rng, towards(rng, query, key, rng.uniform(5.0, 40.0)), key, value)


def equal(rng: np.random.Generator) -> Problem:
    """Equal queries, equal keys, equal values: every element rounds alike."""
    arrays = gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.1, 5.0))
    return pose(rng, *(np.broadcast_to(x[:1, :1], x.shape) for x in arrays))


def two_tokens(rng: np.random.Generator) -> Problem:
    """Two distinct tokens repeated: ties, whose errors add instead of averaging out."""
    return pose(rng, *_repeated(rng, gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.3, 4.0)), 2))


def row_constant(rng: np.random.Generator) -> Problem:
    """A constant 30 added to the logits of every row: harmless in float32, costly where scores are FP16."""
    query, key, value = gaussians(rng, draw_shape(rng))
    return pose(rng, *_with_constant(query, key, 30.0), value)


def sink_first(rng: np.random.Generator) -> Problem:
    """The first key takes nearly everything; probabilities of the rest are near FP16's underflow, 2^-24."""
    query, key, value = gaussians(rng, draw_shape(rng), logits=0.5)
    key = key.copy()
    key[:, 0] = 0
    return pose(rng, *_with_constant(query, key, -rng.uniform(14.0, 18.0), spare=0), value)


def cancelling(rng: np.random.Generator) -> Problem:
    """Values of neighbouring chunks have means +3 and −3: chunk outputs are large and cancel in the merge."""
    problem = pose(rng, *gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.03, 1.0)))
    return replace(problem, value=problem.value + 3.0 * np.where(chunk_of_key(problem) % 2, -1.0, 1.0)[:, None, None])


def stagnation(rng: np.random.Generator) -> Problem:
    """A sink in the first chunk and many chunks: every merge moves the output by less than an ulp."""
    query, key, value = gaussians(rng, draw_shape(rng, keys=whole(rng, 64, 2048)), logits=0.3)
    key = key.copy()
    key[:, 0] = 0
    query, key = _with_constant(query, key, -np.log(key.shape[1]) - rng.uniform(2.0, 6.0), spare=0)
    return replace(pose(rng, query, key, value), cp=int(rng.choice([2, 8, 32])))


def tiny_values(rng: np.random.Generator) -> Problem:
    """Values in FP16's subnormal range."""
    query, key, value = gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.1, 4.0))
    return pose(rng, query, key, value * log_uniform(rng, 1e-7, 1e-4))


def one_key(rng: np.random.Generator) -> Problem:
    """One key: the answer is its value, exactly."""
    return pose(rng, *gaussians(rng, draw_shape(rng, keys=1), logits=log_uniform(rng, 0.01, 30.0)))


def few_keys(rng: np.random.Generator) -> Problem:
    """Two to eight keys: few roundings, far from any limit theorem."""
    shape = draw_shape(rng, keys=whole(rng, 2, 8))
    return pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.1, 10.0)))


def one_query(rng: np.random.Generator) -> Problem:
    """One query over many keys: the decode step."""
    shape = draw_shape(rng)._replace(queries=1, batch=1)
    return pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.1, 10.0)))


def tiny_head_dims(rng: np.random.Generator) -> Problem:
    """Head dims 1 to 4 and as few value dims: few elements a row."""
    shape = draw_shape(rng, head_dim=int(rng.integers(1, 5)))._replace(value_dim=int(rng.integers(1, 5)))
    return pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.1, 5.0)))


def many_chunks(rng: np.random.Generator) -> Problem:
    """16 to 128 chunks: as many roundings of the carried output."""
    shape = draw_shape(rng, keys=whole(rng, 64, 2048))
    problem = pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.1, 4.0)))
    return replace(problem, cp=int(rng.choice([8, 16, 64])))


def latent(rng: np.random.Generator) -> Problem:
    """DeepSeek's heads: q·k over 192 dims, values of 128, scale 192^−1/2."""
    shape = draw_shape(rng, head_dim=192)._replace(value_dim=128)
    return pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.1, 8.0)))


def grouped(rng: np.random.Generator) -> Problem:
    """Eight query heads share one or two key/value heads."""
    shape = draw_shape(rng, keys=whole(rng, 1, 512))._replace(heads=8, kv_heads=int(rng.choice([1, 2])))
    return pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.1, 8.0)))


def windowed(rng: np.random.Generator) -> Problem:
    """A sliding window; queries and keys are the same tokens."""
    return replace(_natural(rng), window=whole(rng, 1, 64))


def small_integers(rng: np.random.Generator) -> Problem:
    """Whole numbers from −2 to 2: exact scores, many ties, values on a coarse lattice."""
    arrays = gaussians(rng, draw_shape(rng))
    return pose(rng, *(np.clip(np.rint(x), -2, 2) for x in arrays))


def sinks_anywhere(rng: np.random.Generator) -> Problem:
    """One to four sinks at random places; the other keys lie 9 to 19 below, around FP16's underflow."""
    query, key, value = gaussians(rng, draw_shape(rng, keys=whole(rng, 2, 4096)), logits=0.7)
    sinks = rng.choice(key.shape[1], min(key.shape[1], rng.integers(1, 5)), replace=False)
    drop = rng.uniform(9.0, 19.0)
    query, key = query.copy(), key.copy()
    query[..., 0], key[..., 0] = drop, 0.0
    key[:, sinks, :, 0] = query.shape[-1] ** 0.5
    return pose(rng, query, key, value * log_uniform(rng, 1e-2, 1e2))


def early_mass(rng: np.random.Generator) -> Problem:
    """Weight falls steeply with position and values have a mean: late merges move the output by less than an ulp."""
    return _slope(rng, -rng.uniform(3.0, 12.0), mean=rng.choice([0.0, 1.0]), cp=int(rng.choice([4, 16, 64])))


def late_mass(rng: np.random.Generator) -> Problem:
    """Weight rises steeply with position: every tile and every chunk has a new maximum."""
    return _slope(rng, rng.uniform(3.0, 25.0), mean=rng.choice([0.0, 1.0]), cp=int(rng.choice([1, 4, 16])))


def _natural(rng: np.random.Generator, most: int = 256) -> Problem:
    length = whole(rng, 1, most)
    shape = Shape(1, length, length, *[(1, 1), (2, 1)][rng.integers(2)], head_dim=32, value_dim=32)
    arrays = gaussians(rng, shape, logits=log_uniform(rng, 0.1, 8.0))
    return Problem(*arrays, 32**-0.5, is_causal=bool(rng.random() < 0.7), cp=int(rng.choice([1, 2, 4])))


def _repeated(rng: np.random.Generator, arrays: tuple[np.ndarray, ...], count: int) -> list[np.ndarray]:
    """Each array with only `count` distinct tokens; a key and its value repeat together."""
    query, key, value = arrays
    asking, asked = (rng.integers(min(count, x.shape[1]), size=x.shape[1]) for x in (query, key))
    return [query[:, asking], key[:, asked], value[:, asked]]


def shifted_rows(rng: np.random.Generator) -> Problem:
    """A constant of the row's own, −60 to 60, added to all its logits."""
    shape = draw_shape(rng)
    query, key, value = gaussians(rng, shape)
    query, key = query.copy(), key.copy()
    key[..., 0] = 4.0
    query[..., 0] = rng.uniform(-60, 60, query.shape[:3]) * shape.head_dim**0.5 / 4.0
    return pose(rng, query, key, value)


def odd_scales(rng: np.random.Generator) -> Problem:
    """Scales near a power of two or anywhere, a constant on all logits: neighbours are rounded alike by the scale."""
    shape = draw_shape(rng)
    near = 2.0 ** rng.integers(-5, 2) * (1 + rng.choice([-1, 1]) * log_uniform(rng, 2.0**-10, 0.1))
    scale = float(rng.choice([near, log_uniform(rng, 0.01, 2.0)]))
    query, key, value = gaussians(rng, shape)
    query, key = query / (scale * shape.head_dim**0.5), key.copy()
    key[..., 0] = 4.0
    query[..., 0] = rng.uniform(-40, 40) / (4.0 * scale)
    return pose(rng, query, key, value, scale=scale)


def heavy_tails(rng: np.random.Generator) -> Problem:
    """Student's t with two degrees of freedom everywhere: outliers in queries, keys and values."""
    arrays = gaussians(rng, draw_shape(rng))
    heavy = [x / np.sqrt(rng.chisquare(2, x.shape) / 2) for x in arrays]
    return pose(rng, heavy[0] * log_uniform(rng, 0.03, 1.0), np.clip(heavy[1], -20, 20), heavy[2])


def _with_constant(
    query: np.ndarray, key: np.ndarray, constant: float, spare: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The last dim of query and key used up to add `constant` to every logit, except to that of the key `spare`."""
    query, key = query.copy(), key.copy()
    root = np.sqrt(abs(constant) * query.shape[-1] ** 0.5)
    query[..., -1], key[..., -1] = root, np.sign(constant) * root
    if spare is not None:
        key[:, spare, :, -1] = 0
    return query, key


def _slope(rng: np.random.Generator, rise: float, mean: float, cp: int) -> Problem:
    """Logits that rise by `rise` from the first key to the last, with some noise."""
    shape = draw_shape(rng, keys=whole(rng, 2, 2048))
    query, key, value = gaussians(rng, shape, logits=0.3, mean=mean)
    query[..., 0] = shape.head_dim**0.5
    key[..., 0] = np.linspace(0, rise, shape.keys)[:, None]
    return replace(pose(rng, query, key, value), cp=cp)


TUNING: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        gaussian, flat, needle, equal, two_tokens, row_constant, sink_first, cancelling, stagnation, tiny_values,
        one_key, few_keys, one_query, tiny_head_dims, many_chunks, latent, grouped, windowed, small_integers,
        sinks_anywhere, early_mass, late_mass, shifted_rows, odd_scales, heavy_tails,
    )
}  # fmt: skip
