"""The kernels on trial: who takes what, and what an honest user says of it."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from cpjax.trial.cuda import compiled, fused
from cpjax.trial.foreign_kernels import HALVES

EVERY = ("float16", "bfloat16", "float32")
HALF = ("float16", "bfloat16")


class Kernel(NamedTuple):
    """How to call it, which problems it takes."""

    call: Callable[..., Any] | None
    """One of `fused` or `compiled`; None is called by name."""
    takes: Literal["square", "positions", "any"] = "any"
    """Masks: a causal one of as many queries as keys; keys 0 … p of each query's own p; whatever is seen."""
    dtypes: tuple[str, ...] = EVERY
    profile: str = ""
    """Of FP16 and BF16, less its suffix; "" is none said."""
    one_head_dim: bool = False
    """Takes values of the keys' head dim only."""
    is_grouped: bool = False
    """Takes heads that share keys; for others the keys are repeated."""
    how: Literal["torch", "triton", "jax"] = "torch"
    implementation: str = ""
    """Of jax.nn."""
    is_compiled: bool = False
    """For each shape anew, in seconds."""
    has_backward: bool = False
    ds: str = "plain"
    """What the backward pass rounds, as of `judge_gradients`."""
    saves_out: bool = True
    """Its backward pass is given the rounded out."""
    on_cpu: bool = False

    def precision(self, dtype: str) -> str | None:
        """The profile that the judge is told."""
        return f"{self.profile}_{HALVES[dtype]}" if self.profile and dtype in HALVES else None


KERNELS: dict[str, Kernel] = {
    "SDPA flash": Kernel(
        fused.flash, takes="square", dtypes=HALF, one_head_dim=True, is_grouped=True, has_backward=True
    ),
    "SDPA efficient": Kernel(fused.efficient, has_backward=True, ds="of_rounded_p"),
    "SDPA cuDNN": Kernel(fused.cudnn, takes="square", dtypes=HALF, has_backward=True, ds="scaled"),
    "SDPA math": Kernel(fused.math, has_backward=True, saves_out=False, on_cpu=True),
    "Triton": Kernel(None, takes="positions", is_grouped=True, how="triton"),
    "eager": Kernel(fused.eager, profile="eager", on_cpu=True),
    "eager, float32 sums": Kernel(fused.eager_without_half_sums, profile="eager", dtypes=HALF),
    "flex_attention": Kernel(compiled.flex, takes="square", is_grouped=True, is_compiled=True),
    "jax.nn cuDNN": Kernel(
        None, takes="square", dtypes=HALF, is_grouped=True, how="jax", implementation="cudnn", is_compiled=True
    ),
    "jax.nn XLA": Kernel(
        None,
        takes="square",
        dtypes=HALF,
        profile="softmax",
        is_grouped=True,
        how="jax",
        implementation="xla",
        is_compiled=True,
    ),
}


def missing(device: str) -> dict[str, str]:
    """Kernels that cannot run on "cuda" or "cpu", and why."""
    said = {}
    for name, kernel in KERNELS.items():
        needs = {"torch": "torch", "triton": "triton", "jax": "jax"}[kernel.how]
        if not find_spec(needs):
            said[name] = f"{needs} is not installed"
        elif device == "cpu" and not kernel.on_cpu:
            said[name] = "it needs a CUDA device"
    return said
