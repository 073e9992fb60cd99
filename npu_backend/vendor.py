"""The vendor's operators by name: torch_npu's own where it is installed, declared here where it is not.

Either way CPU kernels of ours are registered for them, and their derivatives where there are any, so
`torch.ops.atb.npu_ring_mla` runs on tensors of any device that is there. torch_npu has to be imported before anything
is declared: it declares its operators itself, and a second definition of a name aborts the process.
"""

import importlib
import importlib.util

import torch

from npu_backend.emulation import KERNELS, autograd_kernel
from npu_backend.errors import InputError
from npu_backend.schemas import SCHEMAS


def _import_torch_npu() -> str | None:
    """Why torch_npu is not available, in one line; None if it is."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # a vendor package without its libraries may raise anything
        return f"torch_npu is installed but cannot be imported: {next(iter(str(error).splitlines()), repr(error))}"
    return None


def _is_declared(name: str) -> bool:
    """Whether the operator `namespace::name.overload` is known to PyTorch."""
    namespace, _, rest = name.partition("::")
    operator, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    return packet is not None and (overload or "default") in packet.overloads()


def _register() -> tuple[list[torch.library.Library], frozenset[str]]:
    """Declare what is missing, which is also returned, and register the CPU kernels.

    The libraries are returned because they unregister when they are collected.
    """
    libraries = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in ("atb", "npu")}
    missing = set()
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        library, local = libraries[name.partition("::")[0]], name.partition("::")[2]
        if not _is_declared(name):
            library.define(schema.partition("::")[2])
            missing.add(name)
        library.impl(local, KERNELS[name], "CPU")
        library.impl(local, autograd_kernel(name), "AutogradCPU")
    return list(libraries.values()), frozenset(missing)


TORCH_NPU_PROBLEM = _import_torch_npu()
_LIBRARIES, DECLARED_HERE = _register()


def require(name: str, device: torch.device) -> None:
    """The operator has a kernel for the device.

    Raises:
      InputError: it is not a CPU, and torch_npu, which alone has other kernels, does not know the operator.
    """
    if device.type != "cpu" and name in DECLARED_HERE:
        problem = TORCH_NPU_PROBLEM or "the installed torch_npu does not have it"
        raise InputError(f"{name} cannot run on {device.type}: {problem}; see docs/operators.md for the versions")
