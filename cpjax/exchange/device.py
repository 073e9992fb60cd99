"""What one device does, with the exchange chosen by name: for use inside one's own `jax.shard_map`.

This is the function to differentiate. Its derivative is the ring backwards, whatever the exchange forwards. Only
reverse mode is there: `jax.jvp`, `jax.jacfwd` and `jax.hessian` raise JAX's TypeError about custom_vjp.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.chosen import DEFAULT, block_of
from cpjax.blocks.tiles import rounded_scale, without_pads
from cpjax.blocks.varying import varying
from cpjax.errors import InputError
from cpjax.exchange.all_to_all import all_to_all_attention
from cpjax.exchange.all_to_all_ring import all_to_all_ring_attention
from cpjax.exchange.blocks import finished
from cpjax.exchange.gather import gather_attention
from cpjax.exchange.pass_query import pass_query_attention
from cpjax.exchange.ring import ring_attention
from cpjax.exchange.ring_backward import ring_backward
from cpjax.exchange.ring_both_ways import ring_both_ways_attention
from cpjax.mask import Tokens
from cpjax.partial import Partial, merge, sink_partial

EXCHANGES = {
    "ring": ring_attention,
    "ring_both_ways": ring_both_ways_attention,
    "gather": gather_attention,
    "pass_query": pass_query_attention,
    "all_to_all": all_to_all_attention,
    "all_to_all_ring": all_to_all_ring_attention,
}
"""How keys meet queries: name → function of one device. docs/specification.md, §4, has the orders of merging."""

ORDERS = {exchange: "unknown" for exchange in EXCHANGES} | {"ring": "ring", "gather": "gather", "all_to_all": "gather"}
"""In which order an exchange merges chunks, a word of `cpjax.partition.ORDERS`."""

FEW_RUNS = ("ring", "ring_both_ways", "gather", "pass_query")
"""Exchanges of a platform's block. All-to-all brings every run of the text to every rank, and each pair of runs would
be a kernel of its own."""


def attention_on_device(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
    *,
    axis_name: str | tuple[str, ...],
    exchange: str = "ring",
    chunks: int = 1,
    sink: Float[Array, " N"] | None = None,
    attend: str = DEFAULT,
) -> Partial:
    """This device's `out` `[B, t, N, V]` and `lse` `[B, t, N]`, stored in the profile's compute dtype.

    Args:
      query, key, value, q_tokens, kv_tokens: this device's shards, and the places of their tokens.
      axis_name: the mesh axis over which tokens are sharded; (outer, inner) for "all_to_all_ring".
      exchange: a name of `EXCHANGES`.
      attention: its scale may be traced; it is differentiable, too.
      chunks: pieces of a shard that are computed and merged one after the other; 2 for zigzag.
      sink: per head of this device, the logit of one more key with value 0 that every query sees.
      attend: the block, a name of `cpjax.blocks.chosen.BLOCKS`. For another than "tiles" each of the `chunks` must be a
        run of one text, without pads, and the `shard_map` around needs `check_vma=False`. Derivatives are those of the
        readable block.

    Raises:
      InputError: for an unknown exchange or block; it lists the known ones; what the block cannot compute.

    >>> import jax.numpy as jnp
    >>> from cpjax.mask import Mask, tokens
    >>> from cpjax.parallel import cp_mesh
    >>> from cpjax.precision import profile
    >>> attention = Attention(Mask(), scale=1.0, precision=profile("flash_fp16"))
    >>> device = partial(attention_on_device, attention=attention, axis_name="cp")
    >>> shards, place = jax.P(None, "cp"), tokens(1, 4)
    >>> program = jax.jit(jax.shard_map(device, mesh=cp_mesh(2), in_specs=shards, out_specs=shards))
    >>> x = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> program(0 * x, x, x, place, place).out.ravel()
    Array([0. , 0.5, 1. , 1.5], dtype=float32)
    """
    if exchange not in EXCHANGES:
        raise InputError(f"unknown exchange {exchange!r}; known are {', '.join(EXCHANGES)}")
    check_block(attend, query, key, value, attention, exchange, chunks)
    scale = None
    if not isinstance(attention.scale, float):
        # It is an operand, which a program's constants cannot hold; on each device its own, so that derivatives add up.
        scale = varying(jnp.asarray(attention.scale), (query, key, value, q_tokens, kv_tokens))
        attention = replace(attention, scale=1.0)
    how = (exchange, attention, axis_name, chunks, attend)
    result: Any = _exchanged(how, scale, query, key, value, q_tokens, kv_tokens)
    if sink is None:
        return result
    return finished(merge(result, sink_partial(sink, result), attention.precision), attention)


def check_block(
    attend: str, query: Any, key: Any, value: Any, attention: Attention, exchange: str, chunks: int, cp: int = 1
) -> None:
    """Refuse what the block cannot compute, whatever the places of the tokens.

    Args:
      query, key, value: this device's; with `cp`, those of so many devices.

    Raises:
      InputError: it names the value, the rule and the fix.
    """
    block = block_of(attend)
    if not block.is_kernel:
        return
    block.check(query, key, value, attention)
    if exchange not in FEW_RUNS:
        raise InputError(
            f"exchange is {exchange!r}, which brings every run of the text to every rank, and attend={attend!r} is a "
            f"kernel for each pair of runs; use one of {', '.join(FEW_RUNS)}, or leave attend out"
        )
    if query.shape[1] != key.shape[1]:
        raise InputError(
            f"{query.shape[1]} queries and {key.shape[1]} keys; attend={attend!r} computes whole texts, whose runs of "
            f"queries are its runs of keys: leave attend out for a cached prefix"
        )
    block.check_run(key.shape[1], key.shape[1] // (cp * chunks), cp * chunks)
    if any(jax.typeof(x).manual_axis_type.varying for x in (query, key, value)):
        raise InputError(
            f"attend={attend!r} inside a jax.shard_map that checks over which axes arrays vary, which JAX's kernels do "
            f"not say; make it jax.shard_map(…, check_vma=False), or leave attend out"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(how, scale, query, key, value, q_tokens, kv_tokens) -> Partial:
    exchange, attention, axis_name, chunks, attend = how
    attention = _with_scale(attention, scale)
    run: Any = partial(EXCHANGES[exchange], attend=block_of(attend).attend)
    return run(query, key, value, q_tokens, kv_tokens, attention, axis_name=axis_name, chunks=chunks)


def _forwards(how, *inputs):
    result = _exchanged(how, *inputs)
    return result, (inputs, result)


def _backwards(how, kept, cotangent):
    (scale, query, key, value, q_tokens, kv_tokens), result = kept
    _, attention, axis_name, *_ = how
    attention = _with_scale(attention, scale)
    dq, dk, dv = ring_backward(
        query, key, value, q_tokens, kv_tokens, attention, result, cotangent, axis_name=axis_name
    )
    dscale = None if scale is None else _scale_derivative(query, dq, q_tokens, attention).astype(scale.dtype)
    dq, dk, dv = (d.astype(x.dtype) for d, x in ((dq, query), (dk, key), (dv, value)))
    return dscale, dq, dk, dv, None, None


def _with_scale(attention: Attention, scale: Array | None) -> Attention:
    return attention if scale is None else replace(attention, scale=scale)


def _scale_derivative(query: Array, dq: Array, q_tokens: Tokens, attention: Attention) -> Array:
    """Logits are scale · q·k, so scale · d/dscale = Σ q · d/dq: no second walk over the keys. NaN for a scale of 0."""
    scale = rounded_scale(attention)
    return (without_pads(query, q_tokens).astype(dq.dtype) * dq).sum() / scale


_exchanged.defvjp(_forwards, _backwards)
