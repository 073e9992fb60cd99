"""Gradients of kernels that are not ours: PyTorch's SDPA (flash and math kernel) on a CPU, JAX's derivative of its own.

Queries as many as keys, no other mask than a causal one: what all of them take. dq, dk and dv are those of
`(out * dout).sum()`; out is what the kernel gave, for whoever hands it to its backward pass.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cpjax.trial.gradient_emulators import Gradients
from cpjax.trial.problem import Problem

Computed = tuple[np.ndarray | None, Gradients]
"""out, if the backward pass is given it, and the gradients."""


class Kernel(NamedTuple):
    """Who computes it, in which dtypes."""

    compute: Callable[[Problem, np.ndarray], Computed]
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")


def _torch(problem: Problem, dout: np.ndarray, name: str) -> Computed:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from cpjax.arrays import of_torch

    dtype = getattr(torch, problem.query.dtype.name)

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.astype(np.float32)).to(dtype).transpose(1, 2)

    query, key, value = (tensor(x).requires_grad_() for x in (problem.query, problem.key, problem.value))
    is_grouped = problem.query.shape[2] != problem.key.shape[2]
    with sdpa_kernel(getattr(SDPBackend, name)):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=problem.is_causal, scale=problem.scale, enable_gqa=is_grouped
        )
    grads = torch.autograd.grad(out, (query, key, value), tensor(dout))
    found = [of_torch(x.detach().transpose(1, 2).contiguous(), "a gradient") for x in (out, *grads)]
    # The math kernel is differentiated operation by operation, and never sees its rounded out.
    return (found[0] if name == "FLASH_ATTENTION" else None), Gradients(*found[1:])


def flash(problem: Problem, dout: np.ndarray) -> Computed:
    """PyTorch's flash kernel."""
    return _torch(problem, dout, "FLASH_ATTENTION")


def math(problem: Problem, dout: np.ndarray) -> Computed:
    """PyTorch's math kernel."""
    return _torch(problem, dout, "MATH")


def of_jax(problem: Problem, dout: np.ndarray) -> Computed:
    """jax.grad of jax.nn.dot_product_attention."""
    import jax
    import jax.numpy as jnp

    def loss(query, key, value):
        out = jax.nn.dot_product_attention(query, key, value, scale=problem.scale, is_causal=problem.is_causal)
        return (out.astype(jnp.float32) * jnp.asarray(dout.astype(np.float32))).sum()

    with jax.default_matmul_precision("highest"):
        grads = jax.grad(loss, (0, 1, 2))(*(jnp.asarray(x) for x in (problem.query, problem.key, problem.value)))
    return None, Gradients(*map(np.asarray, grads))


KERNELS = {"torch flash": Kernel(flash), "torch math": Kernel(math), "jax.nn": Kernel(of_jax)}
