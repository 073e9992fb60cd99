"""The kinds of data whose false alarms are quoted. No constant of the judge may be tuned on them."""

from dataclasses import replace

import numpy as np

from cpjax.trial.draw import Kind, Shape, chunk_of_key, draw_shape, gaussians, log_uniform, pose, towards, whole
from cpjax.trial.problem import Problem


def mixed_scales(rng: np.random.Generator) -> Problem:
    """Every head has its own logit scale, 0.01 to 30, every column its own value scale, 1e-6 to 1e4, and mean."""
    shape = draw_shape(rng)
    query, key, value = gaussians(rng, shape)
    query = query * np.exp(rng.uniform(np.log(0.01), np.log(30.0), (shape.heads, 1)))
    value = value + rng.choice([0.0, 1.0, -1.0, 10.0], (shape.kv_heads, shape.value_dim))
    return pose(rng, query, key, value * np.exp(rng.uniform(np.log(1e-6), np.log(1e4), shape.value_dim)))


def uneven_tokens(rng: np.random.Generator) -> Problem:
    """Every token has a size of its own, log-normal: a few queries, keys and values are many times the others."""
    arrays = gaussians(rng, draw_shape(rng))
    unevenness = rng.uniform(0.5, 1.5)
    sizes = [np.exp(unevenness * rng.standard_normal(x.shape[:3])).clip(max=20.0) for x in arrays]
    query, key, value = (x * size[..., None] for x, size in zip(arrays, sizes, strict=True))
    return pose(rng, query * log_uniform(rng, 0.03, 1.0), key, value)


def two_needles(rng: np.random.Generator) -> Problem:
    """Each query is drawn to two keys alike."""
    query, key, value = gaussians(rng, draw_shape(rng))
    logit = rng.uniform(5.0, 25.0)
    return pose(rng, towards(rng, query, key, logit) + towards(rng, query, key, logit), key, value)


def equal_values(rng: np.random.Generator) -> Problem:
    """All keys have the same value: whatever the weights, the answer is that value."""
    query, key, value = gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.1, 10.0))
    return pose(rng, query, key, np.broadcast_to(value[:, :1] * log_uniform(rng, 1e-4, 1e3), value.shape))


def eight_tokens(rng: np.random.Generator) -> Problem:
    """Eight distinct tokens in random order, values with a mean."""
    query, key, value = gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.1, 8.0), mean=rng.choice([0.0, 2.0]))
    token = rng.integers(min(8, key.shape[1]), size=key.shape[1])
    return pose(rng, query, key[:, token], value[:, token])


def coin_values(rng: np.random.Generator) -> Problem:
    """Queries and values of ±1, keys in steps of 1/2: few different logits, so rows share roundings."""
    query, key, value = gaussians(rng, draw_shape(rng))
    return pose(rng, np.sign(query), np.rint(2 * key) / 2, np.sign(value) * rng.choice([1.0, 3.0, 0.1]))


def sink_ladder(rng: np.random.Generator) -> Problem:
    """Every n-th key is a sink, each a little lower than the one before; the rest lies 6 to 20 below the first."""
    query, key, value = gaussians(rng, draw_shape(rng, keys=whole(rng, 2, 4096)), logits=0.5)
    every, drop = whole(rng, 2, 512), rng.uniform(6.0, 20.0)
    query[..., 0], key[..., 0] = query.shape[-1] ** 0.5, 0.0
    rungs = key[:, rng.integers(every) % key.shape[1] :: every]
    rungs[..., 0] = (drop - rng.uniform(0.0, 2.0) * np.arange(rungs.shape[1]))[:, None].clip(0.0)
    return pose(rng, query, key, value * log_uniform(rng, 1e-2, 1e2))


def staircase(rng: np.random.Generator) -> Problem:
    """Logits that climb, or descend, in 2 to 40 steps of 0.5 to 4."""
    shape = draw_shape(rng, keys=whole(rng, 2, 2048))
    query, key, value = gaussians(rng, shape, logits=0.2, mean=rng.choice([0.0, 1.0]))
    steps = np.arange(shape.keys) * whole(rng, 2, 40) // shape.keys * rng.choice([-1.0, 1.0])
    query[..., -1], key[..., -1] = shape.head_dim**0.5, steps[:, None] * rng.uniform(0.5, 4.0)
    return replace(pose(rng, query, key, value), cp=int(rng.choice([1, 4, 16])))


def one_loud_dim(rng: np.random.Generator) -> Problem:
    """One dim of queries and keys, anywhere, is 3 to 30 times as large as the others."""
    query, key, value = gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.03, 1.0))
    loud = rng.integers(query.shape[-1])
    query[..., loud] *= rng.uniform(3.0, 30.0)
    key[..., loud] *= rng.uniform(1.0, 5.0)
    return pose(rng, query, key, value)


def any_scale(rng: np.random.Generator) -> Problem:
    """A scale that is no power of two and no 1/√H, as position scaling makes them; a third with logits off zero."""
    shape = draw_shape(rng)
    scale = log_uniform(rng, 0.005, 3.0)
    query, key, value = gaussians(rng, shape, logits=log_uniform(rng, 0.1, 6.0), mean=rng.choice([0.0, 2.0]))
    query = query / (scale * shape.head_dim**0.5)
    if rng.random() < 1 / 3:
        key[..., -1] = 1.0
        query[..., -1] = rng.uniform(-25, 25, shape.heads) / scale
    return pose(rng, query, key, value, scale=scale)


def below_zero(rng: np.random.Generator) -> Problem:
    """Every logit is negative, the largest anywhere from −0.01 to −20: the maximum is the finest of all numbers."""
    shape = draw_shape(rng)
    query, key, value = gaussians(rng, shape)
    query, key = np.abs(query) * log_uniform(rng, 0.1, 3.0), -np.abs(key)
    key[..., 0] = -log_uniform(rng, 0.01, 20.0) * shape.head_dim**0.5
    query[..., 0] = 1.0
    return pose(rng, query, key, value)


def chunk_offsets(rng: np.random.Generator) -> Problem:
    """Each chunk's values have a mean of their own, −30 to 30."""
    problem = pose(rng, *gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.03, 3.0)))
    means = rng.uniform(-30, 30, (problem.chunk_count, problem.value.shape[-1])) * rng.choice([0.1, 1.0])
    return replace(problem, value=problem.value + means[chunk_of_key(problem)][None, :, None])


def rotated(rng: np.random.Generator) -> Problem:
    """Rotary positions on a few distinct tokens: logits oscillate with distance, as in trained models."""
    shape = draw_shape(rng, head_dim=64)
    query, key, value = gaussians(rng, shape, logits=log_uniform(rng, 0.5, 4.0))
    key = key[:, rng.integers(min(4, shape.keys), size=shape.keys)]
    angle = np.arange(shape.keys)[:, None] / 10000 ** (np.arange(32) / 32)
    turned = (key[..., :32] + 1j * key[..., 32:]) * np.exp(1j * angle)[:, None]
    return pose(rng, query, np.concatenate([turned.real, turned.imag], axis=-1), value)


def column_scales(rng: np.random.Generator) -> Problem:
    """Value columns from deep in FP16's subnormals to thousands side by side."""
    query, key, value = gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.1, 4.0))
    return pose(rng, query, key, value * np.exp(rng.uniform(np.log(1e-8), np.log(1e3), value.shape[-1])))


def value_spikes(rng: np.random.Generator) -> Problem:
    """One key in a hundred has a value a thousand times larger."""
    query, key, value = gaussians(rng, draw_shape(rng), logits=log_uniform(rng, 0.1, 4.0))
    return pose(rng, query, key, value * np.where(rng.random(value.shape[:3]) < 0.01, 1e3, 1.0)[..., None])


def handful(rng: np.random.Generator) -> Problem:
    """One to three keys, one to three queries, any scale."""
    shape = draw_shape(rng, keys=int(rng.integers(1, 4)))._replace(queries=int(rng.integers(1, 4)))
    query, key, value = gaussians(rng, shape, logits=log_uniform(rng, 0.01, 30.0))
    return pose(rng, query, key, value * log_uniform(rng, 1e-6, 1e4))


def long_row(rng: np.random.Generator) -> Problem:
    """One or two queries over 8,192 to 32,768 keys, nearly flat or not."""
    shape = Shape(1, int(rng.integers(1, 3)), whole(rng, 8192, 32768), 1, 1, 16, 16)
    return pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.03, 6.0), mean=rng.choice([0.0, 1.0])))


def hundreds_of_chunks(rng: np.random.Generator) -> Problem:
    """128 or 256 chunks."""
    shape = draw_shape(rng, keys=whole(rng, 128, 2048))
    problem = pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.05, 6.0), mean=rng.choice([0.0, 1.0])))
    return replace(problem, cp=int(rng.choice([64, 128])))


def wide_heads(rng: np.random.Generator) -> Problem:
    """Head dims 192/128 (MLA), 256, and 576/512 (MLA with its projections absorbed)."""
    head_dim, value_dim = [(192, 128), (256, 256), (576, 512)][rng.integers(3)]
    shape = draw_shape(rng, head_dim=head_dim)._replace(value_dim=value_dim)
    return pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.05, 10.0)))


def one_kv_head(rng: np.random.Generator) -> Problem:
    """Sixteen query heads share one key/value head."""
    shape = draw_shape(rng, keys=whole(rng, 1, 256))._replace(heads=16, kv_heads=1)
    return pose(rng, *gaussians(rng, shape, logits=log_uniform(rng, 0.05, 10.0)))


def packed(rng: np.random.Generator) -> Problem:
    """Several requests in one row, each causal or with a window, with pads at the end."""
    length = whole(rng, 1, 256)
    shape = Shape(1, length, length, 2, 1, 32, 16)
    ends = np.sort(rng.integers(0, length + 1, size=rng.integers(1, 5)))
    segments = np.searchsorted(ends, np.arange(length), side="right")
    segments = np.where(np.arange(length) < length - rng.integers(0, 1 + length // 4), segments, -1)
    return Problem(
        *gaussians(rng, shape, logits=log_uniform(rng, 0.1, 8.0)),
        scale=32**-0.5,
        is_causal=bool(rng.random() < 0.8),
        segments=segments[None].astype(np.int32),
        window=None if rng.random() < 0.5 else whole(rng, 1, 64),
        cp=int(rng.choice([1, 2, 4])),
    )


def blind_rows(rng: np.random.Generator) -> Problem:
    """Causal, and some queries stand before every key: they see nothing, others one key."""
    problem = pose(rng, *gaussians(rng, draw_shape(rng)._replace(batch=1), logits=log_uniform(rng, 0.1, 8.0)))
    keys, queries = problem.key.shape[1], problem.query.shape[1]
    places = np.sort(rng.integers(-max(1, keys // 4), keys, size=queries))
    everywhere = np.arange(keys, dtype=np.int32)[None]
    return replace(problem, is_causal=True, q_positions=places[None].astype(np.int32), kv_positions=everywhere)


HELD_OUT: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        mixed_scales, uneven_tokens, two_needles, equal_values, eight_tokens, coin_values, any_scale, below_zero,
        sink_ladder, chunk_offsets, staircase, one_loud_dim, rotated, column_scales, value_spikes, handful, long_row,
        hundreds_of_chunks, wide_heads, one_kv_head, packed, blind_rows,
    )
}  # fmt: skip
