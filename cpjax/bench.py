"""Context-parallel attention beside others on this machine: the same inputs, interleaved, the median of several runs.

Contenders: `torch_sdpa` is PyTorch's fused scaled_dot_product_attention with as many threads as we have devices (if
torch is installed), `jax_dense` is `jax.nn.dot_product_attention` on one device.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cpjax.parallel import context_parallel_attention, cp_mesh

OURS = "cpjax"
PRECISION = {"float32": "float32", "float16": "flash_fp16"}


class Row(NamedTuple):
    """One setting: median `seconds` by contender, `ratio` ours to theirs, and why one is `unsupported` here."""

    tokens: int
    dtype: str
    causal: bool
    direction: str
    seconds: dict[str, float]
    ratio: dict[str, float]
    unsupported: dict[str, str]


def bench(
    tokens: int = 8192,
    heads: int = 4,
    head_dim: int = 64,
    cp: int = 2,
    repeats: int = 5,
    dtypes: tuple[str, ...] = ("float32", "float16"),
) -> list[Row]:
    """Forward pass, full and causal (zigzag), for each dtype.

    Args:
      cp: devices; on a CPU simulated ones, so as many cores should be there.
      repeats: runs of each contender after a first one that compiles.

    >>> [row.causal for row in bench(tokens=64, heads=1, head_dim=8, repeats=1, dtypes=("float32",))]
    [False, True]
    """
    return [_row(tokens, heads, head_dim, cp, repeats, dtype, causal) for dtype in dtypes for causal in (False, True)]


def contenders(arrays: list[np.ndarray], causal: bool, cp: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each returns when its result is there."""
    from cpjax.mask import Mask

    mesh, mask = cp_mesh(cp), Mask(causal)
    query, key, value = (jnp.asarray(x) for x in arrays)
    precision = PRECISION[str(arrays[0].dtype)]
    dense = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal))
    found: dict[str, Callable[[], object]] = {
        OURS: lambda: jax.block_until_ready(
            context_parallel_attention(query, key, value, mesh=mesh, mask=mask, precision=precision)
        ),
        "jax_dense": lambda: jax.block_until_ready(dense(query, key, value)),
    }
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(cp)
    q, k, v = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays)
    fused = torch.nn.functional.scaled_dot_product_attention
    return {**found, "torch_sdpa": lambda: fused(q, k, v, is_causal=causal)}


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'tokens':>7} {'dtype':8} {'mask':7} {'contender':12} {'seconds':>8} {'ours/theirs':>12}"]
    for row in rows:
        for name, seconds in row.seconds.items():
            ratio = "" if name == OURS else f"{row.ratio[name]:12.2f}"
            mask = "causal" if row.causal else "full"
            lines.append(f"{row.tokens:7} {row.dtype:8} {mask:7} {name:12} {seconds:8.3f} {ratio}")
        for name, reason in row.unsupported.items():
            lines.append(f"{row.tokens:7} {row.dtype:8} {'':7} {name:12} unsupported: {reason}")
    return "\n".join(lines)


def _row(tokens: int, heads: int, head_dim: int, cp: int, repeats: int, dtype: str, causal: bool) -> Row:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, tokens, heads, head_dim)).astype(dtype) for _ in range(3)]
    runs = contenders(arrays, causal, cp)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    unsupported = {}
    for name, run in list(runs.items()):  # the first run compiles, and is not counted
        try:
            run()
        except ValueError as error:  # jax.nn has no FP16 attention on some CPUs
            unsupported[name] = next(iter(str(error).splitlines()), "")
            del runs[name], taken[name]
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    ratio = {name: seconds[OURS] / theirs for name, theirs in seconds.items() if name != OURS}
    return Row(tokens, dtype, causal, "forward", seconds, ratio, unsupported)
