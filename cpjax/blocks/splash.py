"""The block as JAX's own kernel for TPUs: Splash attention, in Pallas (jax.experimental.pallas.ops.tpu).

It computes scores, maximum and sum in float32, and rounds `out`, divided by the sum, to the dtype of its inputs, as
FlashAttention-2 does. It is handed scale · query. In bfloat16 a product is one pass of the matrix units, which take the
probabilities as bfloat16: profile `scaled_query_bf16`. For float32 the kernel is compiled with products of the highest
precision, which JAX's default on a TPU is not: profile `float32`.

On a CPU it runs in Pallas's interpret mode: the same steps, far slower, and probabilities are not rounded. On a TPU it
was never run; it is compiled for TPUs in a test.
"""

from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float

from cpjax.attention import Attention
from cpjax.blocks.runs import attend_runs
from cpjax.mask import Tokens
from cpjax.partial import Partial

LANES = 128
"""Numbers side by side in a register of a TPU; the kernel takes keys in multiples of it."""
TILES = (512, 256, LANES)
"""Queries and keys that the kernel takes at a time: the largest that divides a run."""


def attend_splash(
    query: Float[Array, "B t N H"],
    key: Float[Array, "B s K H"],
    value: Float[Array, "B s K V"],
    q_tokens: Tokens,
    kv_tokens: Tokens,
    attention: Attention,
) -> Partial:
    """As `cpjax.blocks.runs.attend_runs`; s is a multiple of 128. Inside a `shard_map` it needs `check_vma=False`.

    >>> import jax.numpy as jnp
    >>> from cpjax.mask import Mask, tokens
    >>> from cpjax.precision import profile
    >>> places, x = tokens(1, 128), jnp.ones((1, 128, 1, 64))
    >>> attend_splash(x, x, x, places, places, Attention(Mask(), 0.0, profile("float32"))).out[0, 7, 0, 0].item()
    1.0
    """
    return attend_runs(query, key, value, q_tokens, kv_tokens, attention, _kernel)


def _kernel(
    query: Float[Array, "B s N H"], key: Float[Array, "B s K H"], value: Float[Array, "B s K V"], is_causal: bool
) -> tuple[Float[Array, "B s N V"], Float[Array, "B s N"]]:
    heads_first = [x.swapaxes(1, 2) for x in (query, key, value)]
    here = partial(_compiled, is_causal=is_causal)
    out, lse = lax.platform_dependent(
        *heads_first, tpu=partial(here, interpret=False), cpu=partial(here, interpret=True)
    )
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def _compiled(
    query: Float[Array, "B N s H"],
    key: Float[Array, "B K s H"],
    value: Float[Array, "B K s V"],
    *,
    is_causal: bool,
    interpret: bool,
) -> tuple[Float[Array, "B N s V"], Float[Array, "B N s"]]:
    # Imported here, for it takes a while and only those need it who choose this block.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, length = query.shape[1:3]
    tile = next(size for size in TILES if length % size == 0)
    mask = (masks.CausalMask if is_causal else masks.FullMask)((length, length))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(block_q=tile, block_kv=tile, block_kv_compute=tile),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=interpret,
    )
    products = "highest" if query.dtype == "float32" else "default"
    with jax.default_matmul_precision(products):
        out, (lse,) = jax.vmap(kernel)(query, key, value)
    return out, lse
