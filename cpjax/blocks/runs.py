"""A block for kernels with a static mask: queries and keys are runs of the text, so three masks are enough.

    the queries' run is before the keys'       nothing is seen, and nothing is computed
    both are the same run                      the causal triangle
    the queries' run is behind the keys'       every pair

A zigzag shard is two runs, so two shards make four pairs of runs. Which of the three a pair is depends on the rank and
the step; it is chosen when the program runs, by the places of the runs' first tokens; a kernel is compiled for each.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.tiles import rounded_scale
from cpjax.mask import Tokens
from cpjax.partial import Partial, empty

Kernel = Callable[[Array, Array, Array, bool], tuple[Array, Array]]
"""scale · query `[B, s, N, H]`, key `[B, s, K, H]`, value `[B, s, K, V]`, is_causal → out `[B, s, N, V]` in the dtype
of the inputs, lse `[B, s, N]` in float32, the natural logarithm."""


def attend_runs(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
    kernel: Kernel,
) -> Partial:
    """As `cpjax.blocks.tiles.attend`, of keys that are one run, and queries that are whole runs of the same length.

    The kernel is handed scale · query as a tensor of its own, in the dtype of the inputs. Runs that see nothing are
    (0, −inf); in the others each query sees a key.

    Args:
      query, key, value: in one dtype.
      q_tokens, kv_tokens: positions of a run are consecutive, and a run of queries is a run of keys, or disjoint from
        it; the same in all rows of the batch. No pads, one request.
      attention: its mask is causal or full, without a window; no softcap.
      kernel: computes one pair of runs.

    >>> from dataclasses import replace
    >>> from cpjax.blocks.tiles import attend
    >>> from cpjax.mask import Mask, tokens
    >>> from cpjax.precision import profile
    >>> attention, run = Attention(Mask(), 1.0, profile("float32")), tokens(1, 2)
    >>> places, x = tokens(1, 4), jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> def kernel(query, key, value, is_causal):  # the readable block, as if it were one
    ...     return attend(query, key, value, run, run, replace(attention, mask=Mask(is_causal)))
    >>> last = Tokens(*(part[:, 2:] for part in places))
    >>> found = attend_runs(0 * x, x[:, 2:], x[:, 2:], places, last, attention, kernel)
    >>> found.out.ravel().tolist(), found.lse.ravel().tolist()[:2]
    ([0.0, 0.0, 2.0, 2.5], [-inf, -inf])
    """
    compute, length = attention.precision.compute, key.shape[1]
    scaled = (query.astype(compute) * rounded_scale(attention)).astype(query.dtype)

    def seen(is_causal: bool) -> Callable[..., Partial]:
        def computed(query: Array, key: Array, value: Array) -> Partial:
            out, lse = kernel(query, key, value, is_causal)
            return Partial(out.astype(compute), lse.astype(compute))

        return computed

    def hidden(query: Array, key: Array, value: Array) -> Partial:
        return empty(jnp.zeros((*query.shape[:3], value.shape[3]), compute))

    parts = []
    for start in range(0, query.shape[1], length):
        pair = scaled[:, start : start + length], key, value
        if attention.mask.is_causal:
            ahead = jnp.asarray(q_tokens.position)[0, start] - jnp.asarray(kv_tokens.position)[0, 0]
            parts.append(lax.switch(jnp.sign(ahead) + 1, [hidden, seen(True), seen(False)], *pair))
        else:
            parts.append(seen(False)(*pair))
    return Partial(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
