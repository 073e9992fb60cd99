"""Kernels that can be asked by name: PyTorch's and JAX's, the trial's emulators, and a function of yours.

torch:flash      PyTorch's scaled_dot_product_attention with one kernel: flash, efficient, cudnn, math; on --device
jax:xla          jax.nn.dot_product_attention with an implementation: xla, cudnn
emulator:NAME    an emulator of `python -m cpjax.trial`, by its precision profile
FILE.py:NAME     a function of yours: NAME(query, key, value, scale, is_causal), PyTorch's tensors `[B, T, N, H]`, gives
                 out `[B, T, N, V]`, or (out, lse) with lse `[B, T, N]`

Backends are asked in backend.py.
"""

import importlib.util
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from cpjax.crosscheck.backends import installed
from cpjax.errors import InputError
from cpjax.fingerprint.probe import Answer, Kernel, Probe

DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
SDPA = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


def kernel_of(name: str, dtype: str, device: str) -> Kernel:
    """The kernel of that name.

    Args:
      dtype: of query, key and value: float16, bfloat16 or float32.
      device: where PyTorch computes: cpu, cuda, npu, …

    Raises:
      InputError: the name, the dtype or the device is none, or what it needs is not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r:.40} must be one of {', '.join(DTYPES)}")
    family, _, rest = name.partition(":")
    if name.partition(":")[0].endswith(".py"):
        return _of_file(Path(family), rest, dtype, device)
    if family == "emulator" and rest:
        return _emulator_named(rest, dtype)
    if family == "torch" and rest in SDPA:
        _need("torch", name)
        return sdpa(rest, dtype, device)
    if family == "jax" and rest in ("xla", "cudnn"):
        return jax_nn(rest, dtype)
    known = [*(f"torch:{one}" for one in SDPA), "jax:xla", "jax:cudnn", "emulator:PROFILE", "FILE.py:FUNCTION"]
    raise InputError(f"kernel {name!r:.60} is not known; known are {', '.join([*known, *installed()])}")


def emulator(profile: str, **changes: Any) -> Kernel:
    """An emulator of `cpjax.trial`, one chunk of keys; `changes` are fields of its `Arithmetic`."""
    from cpjax.trial import emulators
    from cpjax.trial.problem import Problem

    if emulators.dtype_of(profile) not in DTYPES:
        raise InputError(f"emulator {profile} computes in {emulators.dtype_of(profile)}; known are {', '.join(DTYPES)}")
    arithmetic = replace(emulators.PROFILES[profile], **changes)
    dtype = DTYPES[emulators.dtype_of(profile)]

    def kernel(asked: Probe) -> Answer:
        query, key, value = (x.astype(dtype) for x in asked[:3])
        problem = Problem(query, key, value, asked.scale, is_causal=asked.is_causal)
        with np.errstate(all="ignore"):  # probes are made to overflow
            out, lse = emulators.attend(problem, arithmetic)
        return Answer(out.astype(np.float64), lse.astype(np.float64))

    return kernel


def _emulator_named(profile: str, dtype: str) -> Kernel:
    from cpjax.trial.emulators import PROFILES, dtype_of

    known = [one for one in PROFILES if one != "float64"]
    if profile not in known:
        raise InputError(f"emulator {profile!r:.40} is not known; known are {', '.join(known)}")
    if dtype_of(profile) != dtype:
        raise InputError(f"emulator {profile} computes in {dtype_of(profile)}; say --dtype {dtype_of(profile)}")
    return emulator(profile)


def sdpa(which: str, dtype: str, device: str = "cpu") -> Kernel:
    """PyTorch's fused attention by one of its kernels; it gives lse, except by math and where heads share keys."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from cpjax.trial.cuda import fused

    _check_device(device)
    flash = _flash_on_cpu if device == "cpu" else fused.flash
    with_lse = {"flash": flash, "efficient": fused.efficient, "cudnn": fused.cudnn}

    def kernel(asked: Probe) -> Answer:
        query, key, value = (_tensor(x, dtype, device) for x in asked[:3])
        shared = query.shape[1] != key.shape[1]
        with torch.no_grad():
            if which in with_lse and not shared:
                out, lse = with_lse[which](query, key, value, None, asked.is_causal, asked.scale)
                return Answer(_array(out), _array(lse))
            with sdpa_kernel(getattr(SDPBackend, SDPA[which])):
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, scale=asked.scale, is_causal=asked.is_causal, enable_gqa=shared
                )
        return Answer(_array(out), None)

    return kernel


def _flash_on_cpu(query: Any, key: Any, value: Any, seen: None, is_causal: bool, scale: float) -> tuple[Any, Any]:
    """The operator that PyTorch has for CPUs, with the arguments and answers of `cpjax.trial.cuda.fused.flash`."""
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p=0.0, is_causal=is_causal, attn_mask=seen, scale=scale
    )


def jax_nn(implementation: str, dtype: str) -> Kernel:
    """`jax.nn.dot_product_attention`; it hands over no lse."""
    import jax

    def kernel(asked: Probe) -> Answer:
        arrays = [jax.numpy.asarray(x.astype(DTYPES[dtype])) for x in asked[:3]]
        with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
            out = jax.nn.dot_product_attention(
                *arrays, scale=asked.scale, is_causal=asked.is_causal, implementation=cast(Any, implementation)
            )
        return Answer(np.asarray(out).astype(np.float64), None)

    return kernel


def _of_file(path: Path, function: str, dtype: str, device: str) -> Kernel:
    """A function in a file, called with PyTorch's tensors `[B, T, N, H]`."""
    _need("torch", f"{path}:{function}")
    if not path.is_file():
        raise InputError(f"{path} is no file; write FILE.py:FUNCTION")
    # A name that no other module has, nor another file of the same name in another folder.
    name = f"_cpjax_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None  # a file that ends in .py has one
    module = importlib.util.module_from_spec(spec)
    # PyTorch's compiler, and dataclasses, look a function's module up by its name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from None
    compute = getattr(module, function, None)
    if not callable(compute):
        raise InputError(f"{path} has no function {function!r:.60}; write FILE.py:FUNCTION")
    _check_device(device)
    return _called(compute, dtype, device)


def _called(compute: Callable[..., Any], dtype: str, device: str) -> Kernel:
    def kernel(asked: Probe) -> Answer:
        tensors = [_tensor(x, dtype, device).transpose(1, 2).contiguous() for x in asked[:3]]
        given = compute(*tensors, scale=asked.scale, is_causal=asked.is_causal)
        out, lse = given if isinstance(given, tuple) else (given, None)
        batch, rows, heads, _ = asked.query.shape
        if tuple(out.shape) != (batch, rows, heads, asked.value.shape[3]):
            raise ValueError(f"out is {list(out.shape)}; it must be [B, T, N, V], as the query")
        if lse is not None and tuple(lse.shape) != (batch, rows, heads):
            raise ValueError(f"lse is {list(lse.shape)}; it must be [B, T, N]")
        return Answer(out.detach().double().cpu().numpy(), None if lse is None else lse.detach().double().cpu().numpy())

    return kernel


def _need(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{name} needs {package}, which is not installed; pip install 'cpjax[torch]'")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--device {device!r:.40}: PyTorch has no such device here ({reason:.120})") from None


def _tensor(x: np.ndarray, dtype: str, device: str) -> Any:
    """`[B, T, N, H]` to a tensor `[B, N, T, H]`."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.swapaxes(1, 2))).to(device, getattr(torch, dtype))


def _array(x: Any) -> np.ndarray:
    """A tensor `[B, N, T, …]` as float64 `[B, T, N, …]`."""
    return x.double().cpu().numpy().swapaxes(1, 2)
