"""Is there a CUDA device; which, and which versions of what runs on it."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def missing() -> str | None:
    """Why nothing can run on CUDA, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def described(device: str) -> dict[str, Any]:
    """The card, its driver, versions and the settings of PyTorch that decide about roundings; never raises."""
    said: dict[str, Any] = {"device": device, "python": platform.python_version()}
    for name in ("torch", "triton", "jax", "jaxlib", "numpy", "scipy", "ml_dtypes"):
        try:
            said[name] = version(name)
        except PackageNotFoundError:
            said[name] = None
    questions = {
        "cudnn": lambda torch: torch.backends.cudnn.version(),
        "cuda": lambda torch: torch.version.cuda,
        "card": lambda torch: torch.cuda.get_device_name(0) if device == "cuda" else None,
        "float32_matmul_precision": lambda torch: torch.get_float32_matmul_precision(),
        "allow_tf32": lambda torch: torch.backends.cuda.matmul.allow_tf32,
        "half_sums_in_matmul": lambda torch: (
            f"fp16 {torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction}, "
            f"bf16 {torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction}"
        ),
        "half_in_math_sdp": lambda torch: torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
    }
    for name, question in questions.items():
        try:
            import torch

            said[name] = question(torch)
        # A report without one of these is better than none.
        except Exception as error:
            said[name] = f"not known: {first_line(error)}"
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        said["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said["nvidia_smi"] = f"not known: {first_line(error)}"
    return said


def first_line(error: BaseException) -> str:
    """The type and the first line of what it says."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said[:240]}"
