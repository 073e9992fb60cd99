"""The vendor's operators by name: torch_npu's own where it is installed, declared here where it is not.

Either way CPU kernels of ours are registered for them, so `torch.ops.atb.npu_ring_mla` runs on tensors of any device
that is there. torch_npu has to be imported before anything is declared: it declares its operators itself, and a second
definition of a name aborts the process.
"""

import importlib
import importlib.util

import torch

from npu_backend import emulation

RING_MLA = (
    "npu_ring_mla(Tensor q_nope, Tensor q_rope, Tensor k_nope, Tensor k_rope, Tensor value, Tensor mask, "
    "Tensor seqlen, int head_num, int kv_head_num, *, Tensor? pre_out=None, Tensor? prev_lse=None, "
    "float qk_scale=1., str? kernel_type=None, str? mask_type=None, str? input_layout=None, "
    "str? calc_type=None) -> (Tensor, Tensor)"
)
"""The schema as torch_npu 2.13.0 declares it, in namespace atb."""


def _import_torch_npu() -> str | None:
    """Why torch_npu is not available, in one line; None if it is."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # a vendor package without its libraries may raise anything
        return f"torch_npu is installed but cannot be imported: {next(iter(str(error).splitlines()), repr(error))}"
    return None


def _register() -> list[torch.library.Library]:
    """Declare what is missing and register the CPU kernels. The libraries unregister when they are collected."""
    kernels = torch.library.Library("atb", "FRAGMENT")
    if not hasattr(torch.ops.atb, "npu_ring_mla"):
        kernels.define(RING_MLA)
    kernels.impl("npu_ring_mla", emulation.npu_ring_mla, "CPU")
    return [kernels]


TORCH_NPU_PROBLEM = _import_torch_npu()
_LIBRARIES = _register()
