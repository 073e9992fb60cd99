"""A task's result, as NumPy arrays. The only file that calls a kernel: it runs in the process that has the GPU."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from cpjax.trial.cuda import compiled
from cpjax.trial.cuda.kernels import KERNELS, Kernel
from cpjax.trial.cuda.planted import FAULTS
from cpjax.trial.cuda.problems import SETTINGS, some_rows
from cpjax.trial.cuda.tasks import Task, problem_of
from cpjax.trial.foreign_kernels import Given, seen_by
from cpjax.trial.problem import Problem


@dataclass(frozen=True)
class Job:
    """What goes to a judging process: the question and the result, `out` `[B, T, N, V]`, `lse` `[B, T, N]` or None."""

    seed: int
    task: Task
    problem: Problem
    precision: str | None
    out: np.ndarray | None
    lse: np.ndarray | None
    dout: np.ndarray | None = None
    gradients: tuple[np.ndarray, ...] = ()
    """dq, dk, dv of a backward pass."""
    rounded_every: int | None = None
    ds: str = "plain"
    """As of `judge_gradients`."""


def computed(seed: int, task: Task, device: str) -> Job | None:
    """The task's result; None if this is no task for the kernel (no lse to plant a fault in).

    Raises:
      Exception: whatever the kernel raises that refuses the problem.
    """
    kernel = KERNELS[task.kernel]
    problem, dout = problem_of(seed, task)
    precision = kernel.precision(task.dtype)
    if dout is not None:
        return _backward(seed, task, kernel, problem, dout, device)
    if task.fault in FAULTS:
        out, lse = FAULTS[task.fault].plant(lambda p: forward(kernel, p, device), problem)
        if lse is None and FAULTS[task.fault].needs_lse:
            return None
    else:
        out, lse = forward(kernel, problem, device)
    if task.stage == "long" and (step := SETTINGS[task.data].step) > 1:
        start = int(np.random.default_rng([seed, task.number]).integers(step))
        problem, rows = some_rows(problem, step, start)
        out, lse = out[:, rows], None if lse is None else lse[:, rows]
    return Job(seed, task, problem, precision, out, lse)


def forward(kernel: Kernel, problem: Problem, device: str) -> Given:
    """out `[B, T, N, V]`, lse `[B, T, N]` or None."""
    if kernel.how == "jax":
        return _jax(problem, kernel.implementation, device), None
    query, key, value = _tensors(problem, device)
    out, lse = _call(kernel, problem, query, key, value, device)
    return _array(out.transpose(1, 2)), None if lse is None else _array(lse.float().transpose(1, 2))


def _jax(problem: Problem, implementation: str, device: str) -> np.ndarray:
    import jax

    found = jax.devices()[0].platform
    if device == "cuda" and found not in ("gpu", "cuda"):
        raise RuntimeError(f"JAX has no CUDA device, its first is {found}")
    arrays = (problem.query, problem.key, problem.value)
    return compiled.jax_nn(*arrays, problem.is_causal, problem.scale, implementation)


def _call(kernel: Kernel, problem: Problem, query: Any, key: Any, value: Any, device: str) -> tuple[Any, Any]:
    """The kernel on tensors `[B, N, T, H]`, `[B, K, S, H]`, `[B, K, S, V]`."""
    import torch

    group = query.shape[1] // key.shape[1]
    if group > 1 and not kernel.is_grouped:
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    if kernel.how == "triton":
        from cpjax.trial.cuda import triton_flash

        positions = torch.from_numpy(_positions(problem)).to(device)
        return triton_flash.attention(query, key, value, positions, problem.scale)
    call: Any = kernel.call
    length, keys = problem.query.shape[1], problem.key.shape[1]
    has_mask = problem.window is not None or problem.segments is not None or problem.q_positions is not None
    is_square = problem.is_causal and not has_mask and length == keys
    seen = None
    if not is_square and (problem.is_causal or has_mask):
        seen = torch.from_numpy(np.array(seen_by(problem))).to(device)[:, None]
    return call(query, key, value, seen, is_square, problem.scale)


def _positions(problem: Problem) -> np.ndarray:
    """The last key that each query sees, `[B, T]` int32."""
    batch, length = problem.query.shape[:2]
    if not problem.is_causal:
        return np.full((batch, length), problem.key.shape[1] - 1, np.int32)
    here = np.arange(length)[None] if problem.q_positions is None else problem.q_positions
    return np.array(np.broadcast_to(here, (batch, length)), np.int32)


def _backward(seed: int, task: Task, kernel: Kernel, problem: Problem, dout: np.ndarray, device: str) -> Job:
    import torch

    query, key, value = (x.requires_grad_() for x in _tensors(problem, device))
    # The flash kernel sums heads that share keys itself, as autograd does for those that are repeated.
    out, lse = _call(kernel, problem, query, key, value, device)
    grads = torch.autograd.grad(out, (query, key, value), _tensor(dout, device))
    found = tuple(_array(x.transpose(1, 2)) for x in grads)
    given = (_array(out.transpose(1, 2)), None if lse is None else _array(lse.float().transpose(1, 2)))
    # dk and dv of each head are tensors in the dtype of the inputs before those of a group are added up.
    is_shared = problem.query.shape[2] != problem.key.shape[2] and task.dtype != "float32"
    every = problem.query.shape[1] if is_shared else None
    out_given, lse_given = given if kernel.saves_out else (None, None)
    return Job(seed, task, problem, None, out_given, lse_given, dout, found, every, kernel.ds)


def _tensors(problem: Problem, device: str) -> list[Any]:
    return [_tensor(x, device) for x in (problem.query, problem.key, problem.value)]


def _tensor(x: np.ndarray, device: str) -> Any:
    """`[B, N, T, H]`, a view of `[B, T, N, H]`."""
    import torch

    wide = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    return wide.to(getattr(torch, x.dtype.name)).to(device).transpose(1, 2)


def _array(x: Any) -> np.ndarray:
    from cpjax.arrays import of_torch

    return of_torch(x, "a result")
