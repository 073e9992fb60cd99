"""Attention over *some* of the keys, and how two such results combine. Start reading here.

    s[t, j]  =  scale · q[t] · k[j]                  for the keys j that query t may see
    lse[t]   =  log Σⱼ exp s[t, j]                   how much weight these keys have together
    out[t]   =  Σⱼ exp(s[t, j] − lse[t]) v[j]        their weighted mean

`Partial = (out, lse)` over the keys of A and over the keys of B determine the one over A ∪ B (`merge`); a query that
has seen no key is `(0, −inf)`, and merging that changes nothing. So partials are a commutative monoid, and all of
context parallelism is a fold over it: every device may compute its blocks wherever and whenever it likes.

Letters, here and everywhere, as in `jax.nn.dot_product_attention`: B batch, T queries, S keys, N query heads,
K key/value heads (N = K·G), H query/key head dim, V value head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from cpjax.precision import Precision
from cpjax.rounding import rounded


class Partial(NamedTuple):
    """Attention over some keys. `lse` is the natural logarithm; `(0, −inf)` where a query saw no key; never +inf."""

    out: Float[jax.Array | np.ndarray, "B T N V"]
    lse: Float[jax.Array | np.ndarray, "B T N"]


def empty(out: Float[jax.Array, "B T N V"]) -> Partial:
    """The partial over no key, shaped like `out`: the identity of `merge`.

    >>> empty(jnp.ones((1, 1, 1, 2))).lse
    Array([[[-inf]]], dtype=float32)
    """
    return Partial(jnp.zeros_like(out), jnp.full_like(out[..., 0], -jnp.inf))


def merge(a: Partial, b: Partial, precision: Precision) -> Partial:
    """Attention over the union of two disjoint sets of keys.

        m    =  max(a.lse, b.lse)
        lse  =  m + log(exp(a.lse − m) + exp(b.lse − m))
        out  =  (exp(a.lse − m) a.out + exp(b.lse − m) b.out) / (exp(a.lse − m) + exp(b.lse − m))

    (FlashAttention-2, arXiv 2307.08691, eq. of §2.3.1; Ring Attention, arXiv 2310.01889.) `out` is rounded to
    `precision.carry`, because that is the tensor which is carried from one merge to the next.

    Both may be stored in any float dtype; the result is in the profile's compute dtype.

    >>> from cpjax.precision import profile
    >>> one = Partial(jnp.full((1, 1, 1, 1), 4.0), jnp.zeros((1, 1, 1)))
    >>> two = Partial(jnp.full((1, 1, 1, 1), 8.0), jnp.zeros((1, 1, 1)))
    >>> merge(one, two, profile("float32")).out.item()
    6.0
    """
    a, b = (Partial(*(jnp.asarray(x).astype(precision.compute) for x in part)) for part in (a, b))
    # The result does not depend on m, so neither do its derivatives; told so, they are finite where nothing was seen.
    m = lax.stop_gradient(finite(jnp.maximum(a.lse, b.lse)))
    weight_a, weight_b = jnp.exp(a.lse - m), jnp.exp(b.lse - m)
    total = weight_a + weight_b
    out = weight_a[..., None] * a.out + weight_b[..., None] * b.out
    return Partial(rounded(out / divisor(total)[..., None], precision.carry), log_sum(m, total))


def sink_partial(sink: Float[jax.Array, " N"], like: Partial) -> Partial:
    """An attention sink: a key that every query sees, with logit `sink[n]` in head n and value 0.

    A learned logit in the denominator (gpt-oss; arXiv 2309.17453). Being one more key, it is merged like one: once.

    >>> nothing = empty(jnp.ones((1, 1, 1, 2)))
    >>> sink_partial(jnp.array([0.5]), nothing).lse.item()
    0.5
    """
    return Partial(jnp.zeros_like(like.out), jnp.broadcast_to(sink.astype(like.lse.dtype), like.lse.shape))


def finite(m: jax.Array) -> jax.Array:
    """A maximum that may be subtracted: exp(−inf − (−inf)) is NaN, exp(−inf − 0) is the 0 that is meant.

    >>> finite(jnp.array([-jnp.inf, -2.0])).tolist()
    [0.0, -2.0]
    """
    return jnp.where(jnp.isneginf(m), jnp.zeros_like(m), m)


def divisor(total: jax.Array) -> jax.Array:
    """A sum of weights that may be divided by: where nothing was seen the numerator is 0 and the answer is 0.

    >>> divisor(jnp.array([0.0, 3.0])).tolist()
    [1.0, 3.0]
    """
    return jnp.where(total == 0, jnp.ones_like(total), total)


def log_sum(m: jax.Array, total: jax.Array) -> jax.Array:
    """m + ln total, and −inf where total is 0; written so that the derivative there is 0 and not NaN.

    >>> log_sum(jnp.array([0.0, 3.0]), jnp.array([0.0, 1.0])).tolist()
    [-inf, 3.0]
    """
    return jnp.where(total == 0, -jnp.inf, m + jnp.log(divisor(total)))
