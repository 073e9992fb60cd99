"""Correct results of kernels that are not ours: what PyTorch, JAX and a ring of others compute, and plain NumPy loops.

Each takes a problem whose rows all see a key, as one chunk, and gives `out` and, where it has one, `lse`. The loops are
written apart from the emulators, for one head at a time, with an accumulator in float32 and a mask as an array.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from cpjax.trial.problem import Problem, visible
from cpjax.trial.summation import product

Given = tuple[np.ndarray, np.ndarray | None]
"""out `[B, T, N, V]` in the dtype of the inputs, lse `[B, T, N]` or None."""

F = np.float32

HALVES = {"float16": "fp16", "bfloat16": "bf16"}


class Kernel(NamedTuple):
    """Who computes it, and what an honest user says of it: no precision, or the profile that its authors name."""

    compute: Callable[[Problem, np.random.Generator], Given]
    profile: str = ""
    """Of FP16 and BF16, less its suffix; "" is none said. In float32 none is needed."""
    needs: str = ""
    """The package that it is in."""
    one_head_dim: bool = False
    """Takes values of the keys' head dim only."""
    is_plain: bool = False
    """Takes no mask but a causal one of as many queries as keys, no heads that share keys, and no scale."""
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")

    def precision(self, dtype: str) -> str | None:
        """The profile that the judge is told."""
        return f"{self.profile}_{HALVES[dtype]}" if self.profile and dtype in HALVES else None


def seen_by(problem: Problem) -> np.ndarray:
    """Who sees whom, `[B, T, S]`."""
    return visible(problem, np.arange(problem.key.shape[1]))


def per_head(problem: Problem, one: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Given:
    """`one(query, key, value, seen, scale)` of every head, in float32; its out is rounded to the inputs' dtype."""
    batch, length, heads, _ = problem.query.shape
    group, seen = heads // problem.key.shape[2], seen_by(problem)
    out = np.empty((batch, length, heads, problem.value.shape[3]), problem.query.dtype)
    lse = np.empty((batch, length, heads), F)
    for b, n in np.ndindex(batch, heads):
        query, key, value = problem.query[b, :, n], problem.key[b, :, n // group], problem.value[b, :, n // group]
        result = one(query.astype(F), key.astype(F), value.astype(F), seen[b], F(problem.scale))
        out[b, :, n], lse[b, :, n] = result[0].astype(out.dtype), result[1]
    return out, lse


def rounding(problem: Problem) -> Callable[[np.ndarray], np.ndarray]:
    """To the dtype of the inputs and back."""
    return lambda x: x.astype(problem.query.dtype).astype(F)


def tiled(problem: Problem, rng: np.random.Generator, *, base_two: bool = False, sums_rounded: bool = False) -> Given:
    """Tiles of 1 to 1,024 keys, a power of two or not; p is rounded as the factor of v."""
    tile, to = int(np.exp(rng.uniform(0, np.log(1024.99)))), rounding(problem)
    exp, factor = (np.exp2, F(np.log2(np.e))) if base_two else (np.exp, F(1))

    def one(query, key, value, seen, scale):
        m, total = np.full(len(query), -np.inf, F), np.zeros(len(query), F)
        acc = np.zeros((len(query), value.shape[1]), F)
        for start in range(0, len(key), tile):
            part = slice(start, start + tile)
            score = np.where(seen[:, part], (query @ key[part].T) * (scale * factor), F(-np.inf))
            new = np.maximum(m, score.max(axis=1))
            base = np.where(np.isneginf(new), F(0), new)
            p, shrink = exp(score - base[:, None]), exp(m - base)
            total = total * shrink + (to(p) if sums_rounded else p).sum(axis=1)
            acc = acc * shrink[:, None] + to(p) @ value[part]
            m = new
        return acc / total[:, None], (m + np.log2(total)) * F(np.log(2)) if base_two else m + np.log(total)

    return per_head(problem, one)


def matrix_units(problem: Problem, rng: np.random.Generator) -> Given:
    """Products as a GPU's matrix units add them: blocks of 8, cut off toward zero; tiles of 64 keys."""
    to = rounding(problem)

    def one(query, key, value, seen, scale):
        m, total = np.full(len(query), -np.inf, F), np.zeros(len(query), F)
        acc = np.zeros((len(query), value.shape[1]), F)
        score = product(query, np.ascontiguousarray(key.T), "cut") * scale
        for start in range(0, len(key), 64):
            part = slice(start, start + 64)
            seen_score = np.where(seen[:, part], score[:, part], F(-np.inf))
            new = np.maximum(m, seen_score.max(axis=1))
            base = np.where(np.isneginf(new), F(0), new)
            p, shrink = np.exp(seen_score - base[:, None]), np.exp(m - base)
            total = total * shrink + p.sum(axis=1)
            acc = product(to(p), value[part], "cut", start=acc * shrink[:, None])
            m = new
        return acc / total[:, None], m + np.log(total)

    return per_head(problem, one)


def base_two(problem: Problem, rng: np.random.Generator) -> Given:
    """As Triton's tutorial and FlashInfer: scale · log2(e) is one float32 number, lse is multiplied by ln 2."""
    return tiled(problem, rng, base_two=True)


def rounded_sum(problem: Problem, rng: np.random.Generator) -> Given:
    """The row sum takes the rounded probabilities."""
    return tiled(problem, rng, sums_rounded=True)


def split_kv(problem: Problem, rng: np.random.Generator) -> Given:
    """As flash_attn's split-KV: 2 to 16 parts in float32, weighed by exp(lse_i − lse), which is not normalised."""
    splits, to = int(rng.integers(2, 17)), rounding(problem)

    def one(query, key, value, seen, scale):
        outs, sums = [], []
        for part in np.array_split(np.arange(len(key)), min(splits, len(key))):
            score = np.where(seen[:, part], query @ key[part].T * scale, F(-np.inf))
            m = score.max(axis=1, keepdims=True)
            m = np.where(np.isneginf(m), F(0), m)
            p = np.exp(score - m)
            total = p.sum(axis=1, keepdims=True)
            outs.append(to(p) @ value[part] / np.where(total == 0, F(1), total))
            with np.errstate(divide="ignore"):  # a part of which a row sees nothing: −inf is meant
                sums.append((m + np.log(total))[:, 0])
        all_sums = np.stack(sums)
        top = all_sums.max(axis=0)
        lse = top + np.log(np.exp(all_sums - top).sum(axis=0))
        parts = [np.exp(s - lse)[:, None] * o for s, o in zip(sums, outs, strict=True)]
        return np.asarray(np.sum(parts, axis=0, dtype=F)), lse

    return per_head(problem, one)


def normalised_first(problem: Problem, rng: np.random.Generator) -> Given:
    """p / Σ p is rounded, then multiplied with v, 1 to 1,024 keys at a time."""
    tile, to = int(np.exp(rng.uniform(0, np.log(1024.99)))), rounding(problem)

    def one(query, key, value, seen, scale):
        score = np.where(seen, query @ key.T * scale, F(-np.inf))
        m = score.max(axis=1, keepdims=True)
        p = np.exp(score - m)
        total = p.sum(axis=1, keepdims=True)
        weight = to(p / total)
        parts = [weight[:, i : i + tile] @ value[i : i + tile] for i in range(0, len(key), tile)]
        return np.asarray(np.sum(parts, axis=0, dtype=F)), (m + np.log(total))[:, 0]

    return per_head(problem, one)


def scaled_query(problem: Problem, rng: np.random.Generator) -> Given:
    """scale · q is a tensor in the dtype of the inputs; then tiles."""
    query = (problem.query.astype(F) * F(problem.scale)).astype(problem.query.dtype)
    return tiled(replace(problem, query=query, scale=1.0), rng)


def _tensors(problem: Problem) -> list[Any]:
    import torch

    dtype = getattr(torch, problem.query.dtype.name)
    return [
        torch.from_numpy(x.astype(F)).to(dtype).transpose(1, 2) for x in (problem.query, problem.key, problem.value)
    ]


def _array(x: Any, problem: Problem) -> np.ndarray:
    return x.transpose(1, 2).contiguous().float().numpy().astype(problem.query.dtype)


def sdpa(backend: str) -> Callable[[Problem, np.random.Generator], Given]:
    """PyTorch's `scaled_dot_product_attention` on a CPU; it hands over no lse."""

    def compute(problem: Problem, rng: np.random.Generator) -> Given:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        query, key, value = _tensors(problem)
        seen = torch.from_numpy(np.array(seen_by(problem)))[:, None]
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(
                query, *_repeated(problem, key, value), attn_mask=seen, scale=problem.scale
            )
        return _array(out, problem), None

    return compute


def _repeated(problem: Problem, *arrays: Any) -> list[Any]:
    return [x.repeat_interleave(problem.query.shape[2] // problem.key.shape[2], dim=1) for x in arrays]


def eager(problem: Problem, rng: np.random.Generator) -> Given:
    """softmax(q @ k.T * scale) @ v, each a tensor in the dtype of the inputs; the softmax computes in float32."""
    import torch

    query, key, value = _tensors(problem)
    key, value = _repeated(problem, key, value)
    seen = torch.from_numpy(np.array(seen_by(problem)))[:, None]
    score = ((query @ key.transpose(2, 3)) * problem.scale).masked_fill(~seen, -torch.inf)
    weight = torch.softmax(score, dim=-1, dtype=torch.float32).to(query.dtype)
    return _array(weight @ value, problem), None


def jax_nn(problem: Problem, rng: np.random.Generator) -> Given:
    """`jax.nn.dot_product_attention`."""
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        out = jax.nn.dot_product_attention(
            *(jax.numpy.asarray(x) for x in (problem.query, problem.key, problem.value)),
            mask=seen_by(problem)[:, None],
            scale=problem.scale,
        )
    return np.asarray(out), None


def ring_pytorch(problem: Problem, rng: np.random.Generator) -> Given:
    """ring-attention-pytorch's flash attention, of one rank; its scale is head_dim^−1/2, and q is scaled first."""
    import torch

    with warnings.catch_warnings():  # of its type hints
        warnings.simplefilter("ignore")
        from ring_attention_pytorch import ring_flash_attn

    query, key, value = (x.transpose(1, 2).contiguous() for x in _tensors(problem))
    with torch.no_grad():
        out = ring_flash_attn(query, key, value, causal=problem.is_causal, bucket_size=int(rng.choice([16, 64, 512])))
    return out.float().numpy().astype(problem.query.dtype), None


KERNELS: dict[str, Kernel] = {
    "PyTorch SDPA, flash": Kernel(sdpa("FLASH_ATTENTION"), needs="torch", one_head_dim=True),
    "PyTorch SDPA, math": Kernel(sdpa("MATH"), needs="torch"),
    "PyTorch, eager": Kernel(eager, "eager", needs="torch"),
    "jax.nn": Kernel(jax_nn, "softmax", one_head_dim=True),
    "ring-attention-pytorch": Kernel(
        ring_pytorch, needs="ring_attention_pytorch", one_head_dim=True, is_plain=True, dtypes=("float32",)
    ),  # in FP16 it does not run: "expected m1 and m2 to have the same dtype"
    "NumPy, tiles": Kernel(tiled),
    "NumPy, base two": Kernel(base_two),
    "NumPy, split KV": Kernel(split_kv),
    "NumPy, matrix units": Kernel(matrix_units, dtypes=("float16", "bfloat16")),
    "NumPy, normalised first": Kernel(normalised_first, "softmax"),
    "NumPy, rounded sums": Kernel(rounded_sum, "rounded_sum"),
    "NumPy, scaled queries": Kernel(scaled_query, "scaled_query"),
}


def missing() -> list[str]:
    """Kernels whose package is not installed."""
    return [name for name, kernel in KERNELS.items() if kernel.needs and not find_spec(kernel.needs)]


def cases() -> Iterator[tuple[str, str]]:
    """Kernels and dtypes of which the packages are there."""
    absent = missing()
    for name, kernel in KERNELS.items():
        if name not in absent:
            yield from ((name, dtype) for dtype in kernel.dtypes)
