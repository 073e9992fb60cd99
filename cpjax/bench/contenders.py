"""Who computes it. Each function prepares a setting in the contender's best layout, and returns what is timed.

A contender that cannot compute a setting raises a ValueError, RuntimeError or ImportError that says why.
"""

from collections.abc import Callable
from typing import NamedTuple

from cpjax.bench.gloo_ring import GlooRing
from cpjax.bench.setting import Setting


class Prepared(NamedTuple):
    """A setting that is ready to be computed.

    Attributes:
      run: computes once, and returns the result when it is there.
      others: seconds of CPU time that processes other than this one have taken for it so far.
    """

    run: Callable[[], object]
    others: Callable[[], float] = lambda: 0.0


PRECISION = {"float32": "float32", "float16": "flash_fp16"}
"""Our profiles. In FP16, scores and sums are float32, and probabilities are rounded, as in PyTorch's kernel."""

QUERIES = 512
"""Queries whose products are made at once by `gemm`: it has to hold their scores."""


def cpjax(setting: Setting) -> Prepared:
    """Ours: the ring over simulated devices, one a core; shards lie in zigzag and are not moved.

    Decode: the query goes to every device's part of the cache, and the results are merged.
    """
    import jax

    from cpjax.decode import context_parallel_decode
    from cpjax.mask import Mask, tokens
    from cpjax.parallel import context_parallel_attention, cp_mesh, simulate_devices

    simulate_devices(setting.cores)
    mesh = cp_mesh(setting.cores)
    how = {"mesh": mesh, "precision": PRECISION[setting.dtype], "in_partition_order": True}

    def attention(query, key, value):
        return context_parallel_attention(query, key, value, mask=Mask(setting.is_causal), **how).out

    def decode(query, key, value):
        new, cache = tokens(1, 1, start=setting.tokens - 1), tokens(1, setting.tokens)
        return context_parallel_decode(query, key, value, new, cache, mask=Mask(setting.is_causal), **how).out

    def placed(x):
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "cp" if x.shape[1] > 1 else None)))

    compute = decode if setting.direction == "decode" else attention
    return _of_jax(compute, [placed(x) for x in setting.arrays()], setting)


def jax_dense(setting: Setting) -> Prepared:
    """`jax.nn.dot_product_attention` on one device."""
    import jax

    is_causal = _hides(setting)

    def attention(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)

    return _of_jax(attention, [jax.numpy.asarray(x) for x in setting.arrays()], setting)


def torch_sdpa(setting: Setting) -> Prepared:
    """PyTorch's fused `scaled_dot_product_attention`, `[B, N, T, H]` contiguous, one thread a core.

    Without a mask, query heads that share keys are rows of one head, which takes a fraction of the time of enable_gqa.
    """
    import torch

    torch.set_num_threads(setting.cores)
    query, key, value, dout = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in setting.arrays())
    backward = setting.direction == "both"
    inputs = [x.requires_grad_(backward) for x in (query, key, value)]
    is_causal = _hides(setting)
    heads = setting.heads if is_causal else setting.kv_heads

    def attention() -> torch.Tensor:
        rows = query.view(1, heads, -1, setting.head_dim)
        out = torch.nn.functional.scaled_dot_product_attention(
            rows, key, value, dropout_p=0.0, is_causal=is_causal, enable_gqa=heads != setting.kv_heads
        )
        return out.reshape(1, setting.heads, -1, setting.value_dim)

    return Prepared((lambda: torch.autograd.grad(attention(), inputs, dout)) if backward else attention)


def gemm(setting: Setting) -> Prepared:
    """The matrix products alone, by PyTorch, one thread a core: a mark, not a limit; a fused kernel can be faster.

    Forward q kᵀ and p v; both ways these, and q kᵀ again, dout vᵀ, ds k, dsᵀ q, pᵀ dout. Causal: of the keys that the
    last of 512 queries sees. In float32 always: kernels for CPUs widen FP16, and PyTorch's FP16 products are 20 times
    slower. Query heads that share a key/value head are rows of one product.
    """
    import torch

    torch.set_num_threads(setting.cores)
    arrays = [torch.from_numpy(x)[0].float().transpose(0, 1) for x in setting.arrays()]
    query, dout = (x.unflatten(0, (setting.kv_heads, -1)) for x in (arrays[0], arrays[3]))  # [K, G, T, H or V]
    key, value = (x.contiguous() for x in arrays[1:3])

    def tile(start: int) -> None:
        rows = slice(start, start + QUERIES)
        seen = slice(0, start + QUERIES if _hides(setting) else None)
        q, do = (x[:, :, rows].flatten(1, 2) for x in (query, dout))
        k, v = key[:, seen], value[:, seen]
        p = q @ k.transpose(1, 2)
        torch.matmul(p, v)
        if setting.direction == "both":
            s, dp = q @ k.transpose(1, 2), do @ v.transpose(1, 2)
            torch.matmul(dp, k)
            torch.matmul(dp.transpose(1, 2), q)
            torch.matmul(s.transpose(1, 2), do)

    return Prepared(lambda: [tile(start) for start in range(0, query.shape[2], QUERIES)])


def ring_attention_pytorch(setting: Setting) -> Prepared:
    """Another ring, in as many processes as there are cores (`gloo_ring.py`)."""
    ring = GlooRing(setting)
    return Prepared(ring.run, lambda: ring.cpu_seconds)


CONTENDERS: dict[str, Callable[[Setting], Prepared]] = {
    "cpjax": cpjax,
    "torch_sdpa": torch_sdpa,
    "gemm": gemm,
    "jax_dense": jax_dense,
    "ring_attention_pytorch": ring_attention_pytorch,
}
OURS = "cpjax"


def _hides(setting: Setting) -> bool:
    """Whether a mask is needed: the last token sees all keys."""
    return setting.is_causal and setting.direction != "decode"


def _of_jax(attention: Callable, arrays: list, setting: Setting) -> Prepared:
    import jax

    def both(query, key, value, dout):
        return jax.vjp(attention, query, key, value)[1](dout)

    backward = setting.direction == "both"
    program = jax.jit(both if backward else attention)
    arrays = arrays if backward else arrays[:3]
    return Prepared(lambda: jax.block_until_ready(program(*arrays)))
