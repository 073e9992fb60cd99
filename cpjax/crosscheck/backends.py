"""Who computes a case: the specification in this process, the NPU backend in processes of its own."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cpjax.crosscheck.case import Case
from cpjax.crosscheck.result import Result, write_result
from cpjax.errors import InputError
from cpjax.precision import profile


class BackendError(RuntimeError):
    """A backend failed to compute; the message says what it said."""


def run_spec(case: Case, folder: Path) -> Result:
    """Ring attention by `cpjax`, on as many simulated CPU devices as there are ranks; the result is written.

    Raises:
      InputError: JAX was used before, and has fewer devices than the case has ranks.
    """
    if case.layout != "zigzag":
        raise InputError(f"{case.name} has layout {case.layout!r}; the specification runs cases of layout zigzag only")
    import jax

    from cpjax.mask import Mask
    from cpjax.parallel import context_parallel_attention, cp_mesh

    with contextlib.suppress(RuntimeError):  # JAX has begun; cp_mesh says what to do if there are too few devices
        jax.config.update("jax_num_cpu_devices", case.cp)
    try:
        mesh = cp_mesh(case.cp)
    except ValueError as error:
        raise InputError(str(error)) from None
    precision = case.precision["spec"]
    out, lse = context_parallel_attention(
        case.query,
        case.key,
        case.value,
        case.q_tokens,
        case.kv_tokens,
        mesh=mesh,
        mask=Mask(is_causal=case.is_causal),
        scale=case.scale,
        precision=profile(precision),
    )
    about = {"jax": jax.__version__, "device": f"cpu ({jax.local_device_count()} simulated)"}
    result = Result(
        "spec", precision, "ring", np.asarray(out).astype(np.float16), np.asarray(lse).astype(np.float32), about
    )
    write_result(folder, case, result)
    return result


def npu_missing() -> str | None:
    """Why the NPU backend cannot run here, or None."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed; pip install 'cpjax[torch]'"
    return None


def run_npu(cases: Path, results: Path, *, timeout: float = 600.0) -> list[dict[str, Any]]:
    """`python -m npu_backend run`: its report, one object a case. Its progress bar goes to this terminal.

    Raises:
      InputError: PyTorch is missing, or the backend refuses a case.
      BackendError: it failed; what is finished is kept.
    """
    reason = npu_missing()
    if reason is not None:
        raise InputError(reason)
    line = [sys.executable, "-m", "npu_backend", "run", str(cases), str(results), "--json", "--timeout", str(timeout)]
    run = subprocess.run(line, stdout=subprocess.PIPE, stderr=None, text=True, check=False)
    if run.returncode == 2:
        raise InputError("the NPU backend refuses the case; its message is above")
    if run.returncode != 0:
        raise BackendError(f"the NPU backend ended with status {run.returncode}; its message is above")
    return json.loads(run.stdout)
