"""What computed: versions, device, operators, and the choices that decide which bits come out."""

import importlib
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from npu_backend import vendor
from npu_backend.families import Family
from npu_backend.schedule import Exchange

SOCS = ("Ascend910B", "Ascend910_93")
"""What names of the NPUs begin with that have these operators: Atlas 800I A2 and A3."""


def provenance(device: torch.device, family: Family, exchange: Exchange) -> dict[str, Any]:
    """As JSON can hold it; None for what is not there."""
    return host(device) | {
        "operators": list(family.operators),
        "kernel_type": family.kernel_type if device.type == "npu" else f"{family.kernel_type}, emulated",
        "exchange": exchange.name,
        "inner": exchange.inner,
    }


def host(device: torch.device) -> dict[str, Any]:
    """Versions and the device, whatever is computed."""
    torch_npu = importlib.import_module("torch_npu") if vendor.TORCH_NPU_PROBLEM is None else None
    soc = torch.get_device_module(device).get_device_name(device) if device.type == "npu" else None
    return {
        "torch": torch.__version__,
        "torch_npu": getattr(torch_npu, "__version__", None),
        "cann": cann_version(),
        "python": sys.version.split()[0],
        "device": f"{device.type} ({soc or platform.machine()})",
        "soc": soc,
    }


def cann_version(environment: dict[str, str] | None = None) -> str | None:
    """The version that the CANN toolkit states in its own files; None if none is found.

    It is looked for where the toolkit's set_env.sh points, ASCEND_TOOLKIT_HOME or ASCEND_HOME_PATH.
    """
    environment = dict(os.environ) if environment is None else environment
    for variable in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        home = environment.get(variable)
        for path in () if not home else (*Path(home).glob("*/ascend_toolkit_install.info"), Path(home, "version.cfg")):
            try:
                text = path.read_text(errors="replace")
            except OSError:
                continue
            found = re.search(r"version\s*=\s*\[?(?:[^:\]\n]*:)?([\w.]+)", text, re.IGNORECASE)
            if found:
                return found[1]
    return None
