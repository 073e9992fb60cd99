"""Wheels of torch_npu: downloaded and installed apart, so that the user's torch stays importable."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from npu_backend.errors import InputError
from npu_backend.sdk.cann import build_stand_ins, find_compiler

VERSION = "2.13.0"
"""The torch_npu whose schemas npu_backend/schemas.py holds; it goes with torch of the same version."""
DONE = "installed"
"""Name of the file that says which version a folder holds."""


def install(folder: Path, version: str = VERSION) -> dict[str, str]:
    """The wheel in `folder/site`, stand-ins for CANN in `folder/lib`; the environment that imports it.

    Raises:
      InputError: the folder is in use, the wheel cannot be had, or there is no C compiler.
    """
    if (folder / DONE).exists() and (folder / DONE).read_text() == version:
        return environment(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is neither empty nor a finished installation of {version}: remove it")
    find_compiler()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as partial:
        half_done = Path(partial) / "half_done"
        _pip("install", f"torch_npu=={version}", "--target", str(half_done / "site"))
        build_stand_ins(half_done / "site" / "torch_npu", half_done / "lib")
        (half_done / DONE).write_text(version)
        half_done.replace(folder)
    return environment(folder)


def environment(folder: Path) -> dict[str, str]:
    """This process's environment, changed so that Python finds torch_npu and the stand-ins."""
    variables = dict(os.environ)
    for name, place in (("PYTHONPATH", folder / "site"), ("LD_LIBRARY_PATH", folder / "lib")):
        variables[name] = os.pathsep.join(filter(None, [str(place.absolute()), variables.get(name)]))
    # torch would import torch_npu at its own first import; npu_backend imports it when torch is ready.
    return variables | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def download(folder: Path, version: str) -> Path:
    """The wheel of a version for this Python, in a folder.

    Raises:
      InputError: pip cannot find it.
    """
    pattern = f"torch_npu-{version}-*.whl"
    if not list(folder.glob(pattern)):
        _pip("download", f"torch_npu=={version}", "--dest", str(folder))
    return next(folder.glob(pattern))


def _pip(command: str, what: str, *options: str) -> None:
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps"]
    run = subprocess.run([*pip, "--only-binary", ":all:", what, *options], capture_output=True, text=True, check=False)
    if run.returncode:
        reason = next(iter(run.stderr.strip().splitlines()[-1:]), "no output")
        raise InputError(f"pip cannot {command} {what}: {reason}")
