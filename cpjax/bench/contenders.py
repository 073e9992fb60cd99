"""Who computes it. Each function prepares a setting in the contender's best layout, and returns what is timed.

A contender that cannot compute a setting raises a ValueError, RuntimeError or ImportError that says why.
"""

from collections.abc import Callable

from cpjax.bench.setting import Setting

Run = Callable[[], object]
"""Computes once, and returns when the result is there."""

PRECISION = {"float32": "float32", "float16": "flash_fp16"}
"""Our profiles. In FP16, scores and sums are float32, and probabilities are rounded, as in PyTorch's kernel."""

QUERIES = 512
"""Queries whose products are made at once by `gemm`: it has to hold their scores."""


def cpjax(setting: Setting) -> Run:
    """Ours: the ring over simulated devices, one a core; shards lie in zigzag and are not moved."""
    import jax

    from cpjax.mask import Mask
    from cpjax.parallel import context_parallel_attention, cp_mesh, simulate_devices

    simulate_devices(setting.cores)
    mesh = cp_mesh(setting.cores)
    arrays = [jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "cp"))) for x in setting.arrays()]

    def attention(query, key, value):
        how = {"mesh": mesh, "mask": Mask(setting.is_causal), "precision": PRECISION[setting.dtype]}
        return context_parallel_attention(query, key, value, in_partition_order=True, **how).out

    return _of_jax(attention, arrays, setting)


def jax_dense(setting: Setting) -> Run:
    """`jax.nn.dot_product_attention` on one device."""
    import jax

    def attention(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=setting.is_causal)

    return _of_jax(attention, [jax.numpy.asarray(x) for x in setting.arrays()], setting)


def torch_sdpa(setting: Setting) -> Run:
    """PyTorch's fused `scaled_dot_product_attention`, `[B, N, T, H]` contiguous, one thread a core."""
    import torch

    torch.set_num_threads(setting.cores)
    query, key, value, dout = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in setting.arrays())
    backward = setting.direction == "both"
    inputs = [x.requires_grad_(backward) for x in (query, key, value)]

    def attention() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=0.0, is_causal=setting.is_causal
        )

    return (lambda: torch.autograd.grad(attention(), inputs, dout)) if backward else attention


def gemm(setting: Setting) -> Run:
    """The matrix products alone, by PyTorch, one thread a core: a mark, not a limit; a fused kernel can be faster.

    Forward q kᵀ and p v; both ways these, and q kᵀ again, dout vᵀ, ds k, dsᵀ q, pᵀ dout. Causal: of the keys that the
    last of 512 queries sees.
    """
    import torch

    torch.set_num_threads(setting.cores)
    query, key, value, dout = (torch.from_numpy(x)[0].transpose(0, 1).contiguous() for x in setting.arrays())

    def tile(start: int) -> None:
        rows = slice(start, start + QUERIES)
        seen = slice(0, start + QUERIES if setting.is_causal else None)
        q, k, v, do = query[:, rows], key[:, seen], value[:, seen], dout[:, rows]
        p = q @ k.transpose(1, 2)
        torch.matmul(p, v)
        if setting.direction == "both":
            s, dp = q @ k.transpose(1, 2), do @ v.transpose(1, 2)
            torch.matmul(dp, k)
            torch.matmul(dp.transpose(1, 2), q)
            torch.matmul(s.transpose(1, 2), do)

    return lambda: [tile(start) for start in range(0, setting.tokens, QUERIES)]


CONTENDERS: dict[str, Callable[[Setting], Run]] = {
    "cpjax": cpjax,
    "torch_sdpa": torch_sdpa,
    "gemm": gemm,
    "jax_dense": jax_dense,
}
OURS = "cpjax"


def _of_jax(attention: Callable, arrays: list, setting: Setting) -> Run:
    import jax

    def both(query, key, value, dout):
        return jax.vjp(attention, query, key, value)[1](dout)

    backward = setting.direction == "both"
    program = jax.jit(both if backward else attention)
    arrays = arrays if backward else arrays[:3]
    return lambda: jax.block_until_ready(program(*arrays))
