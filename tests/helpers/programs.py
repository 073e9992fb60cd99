"""Compiled programs, each compiled once, and the comparison with the oracle."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import dense
from strategies import SCALE, Problem, Rule, largest, largest_logit, seen

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend
from cpjax.exchange.device import attention_on_device
from cpjax.partial import Partial
from cpjax.precision import profile


def attention(rule: Rule, precision: str = "float64") -> Attention:
    return Attention(rule.mask, SCALE, profile(precision), rule.softcap)


def mesh(cp: int | tuple[int, int]):
    shape = (cp,) if isinstance(cp, int) else cp
    names = ("cp",) if isinstance(cp, int) else ("outer", "inner")
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, devices=devices, axis_types=(AxisType.Auto,) * len(shape))


@functools.cache
def device_program(exchange: str, cp: int | tuple[int, int], rule: Rule, chunks: int, precision: str = "float64"):
    """The exchange on a mesh; arrays in the order in which ranks hold them, in and out."""
    axis_name = "cp" if isinstance(cp, int) else ("outer", "inner")

    def device(query, key, value, q_tokens, kv_tokens, sink):
        return attention_on_device(
            query,
            key,
            value,
            q_tokens,
            kv_tokens,
            attention(rule, precision),
            axis_name=axis_name,
            exchange=exchange,
            chunks=chunks,
            sink=sink,
        )

    shards = P(None, axis_name)
    specs = (shards, shards, shards, shards, shards, P(None))
    return jax.jit(jax.shard_map(device, mesh=mesh(cp), in_specs=specs, out_specs=shards))


@functools.cache
def block_program(rule: Rule, precision: str = "float64"):
    """One block on one device."""
    return jax.jit(functools.partial(attend, attention=attention(rule, precision)))


def oracle(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`dense` of tests/helpers/oracle.py, with the softcap by hand; a sink is one more key with value 0."""
    query, key, value, visible = p.query, p.key, p.value, seen(p.q_tokens, p.kv_tokens, p.rule)
    if p.rule.softcap is None and np.isneginf(p.sink).all():
        return dense(query, key, value, scale=SCALE, visible=visible)
    # The oracle knows neither: hand it logits as inner products with unit vectors, one key a dimension, head by head.
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    outs, lses = [], []
    for n in range(heads):
        logit = SCALE * np.einsum("bth,bsh->bts", query[:, :, n], key[:, :, n // group])
        if p.rule.softcap is not None:
            logit = p.rule.softcap * np.tanh(logit / p.rule.softcap)
        v, see = value[:, :, n // group], visible
        if not np.isneginf(p.sink[n]):
            logit = np.concatenate([logit, np.full((batch, length, 1), p.sink[n])], axis=2)
            v = np.concatenate([v, np.zeros((batch, 1, v.shape[2]))], axis=1)
            see = np.concatenate([see, np.ones((batch, length, 1), bool)], axis=2)
        unit = np.broadcast_to(np.eye(logit.shape[2])[None, :, None], (batch, logit.shape[2], 1, logit.shape[2]))
        out, lse = dense(logit[:, :, None], unit, v[:, :, None], scale=1.0, visible=see)
        outs.append(out)
        lses.append(lse)
    return np.concatenate(outs, axis=2), np.concatenate(lses, axis=2)


def assert_dense(result: Partial, p: Problem) -> None:
    """`result` is the oracle's to 1e-12 of what the inputs can make large. NaN is not."""
    out, lse = oracle(p)
    size = 1 + largest_logit(p)
    assert result.out.shape == out.shape
    assert result.lse.shape == lse.shape
    assert (np.abs(np.asarray(result.out) - out) <= 1e-12 * largest(p.value) * size).all()
    empty = np.isneginf(lse)
    np.testing.assert_array_equal(np.isneginf(result.lse), empty)
    np.testing.assert_array_equal(np.asarray(result.out)[empty], 0.0)
    assert (np.abs(np.asarray(result.lse)[~empty] - lse[~empty]) <= 1e-12 * size).all()


def equal_bits(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def exact(rng, *shape) -> np.ndarray:
    """Multiples of 1/8 up to 8: inner products of four of them are exact in float32, and more than FP16 can hold."""
    return (rng.integers(-64, 65, shape) / 8).astype(np.float32)


def same(found, expected) -> bool:
    return all(np.array_equal(np.asarray(x), y, equal_nan=True) for x, y in zip(found, expected, strict=True))
