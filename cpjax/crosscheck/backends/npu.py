"""The NPU backend: `python -m npu_backend run`, a program of its own with one process per rank."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cpjax.crosscheck.files.case import Case, write_case
from cpjax.crosscheck.files.result import Result, read_result


class Npu:
    """What the operators of a family take, `ring_mla` or a subclass's; the backend itself says what it does not."""

    name, operators = "npu", "ring_mla"

    def __init__(self):
        """Results live in a temporary folder until they are asked for."""
        self._folder = TemporaryDirectory(prefix="cpjax-npu-")
        self._written: dict[str, Case] = {}
        self._said = ""

    def supports(self, case: Case) -> str | None:
        """PyTorch is there, and the backend's own rules hold of the case as it reads it from a file.

        What is shared with the other half is the file, and the sentence with which it refuses (docs/design.md).
        """
        if importlib.util.find_spec("torch") is None:
            return "PyTorch is not installed; pip install 'cpjax[torch]'"
        absent = [*(["window"] if case.window is not None else []), *case.logit_options]
        if absent:
            return f"{', '.join(absent)}; its operators are called without"
        from npu_backend.errors import InputError
        from npu_backend.families import FAMILIES
        from npu_backend.files import read_case
        from npu_backend.shard import check_computable

        if case.name not in self._written:
            # What a case wants of this backend; the program knows itself by one name, whatever its operators.
            wanted = {"npu": case.precision[self.name]} if self.name in case.precision else {}
            asked = replace(case, precision=wanted)
            self._written[case.name] = write_case(Path(self._folder.name) / "asked", asked)
        try:
            check_computable(read_case(self._asked(case)), FAMILIES[self.operators])
        except InputError as error:
            return str(error).removeprefix(f"{case.name}: ")
        return None

    def prepare(self, cases: list[Case]) -> None:
        """Compute all of them: starting the ranks takes longer than most cases."""
        folder = Path(self._folder.name)
        (folder / "cases").mkdir(exist_ok=True)
        for case in cases:
            os.link(self._asked(case), folder / "cases" / f"{case.name}.safetensors")
        line = [sys.executable, "-m", "npu_backend", "run", str(folder / "cases"), str(folder / "results")]
        # Its progress bar and its complaints go to this terminal.
        line += ["--operators", self.operators, "--json"]
        run = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=None, text=True, check=False)
        self._said = f"npu_backend ended with status {run.returncode}; its message is above"

    def run(self, case: Case) -> Result:
        """The result that `prepare` left.

        Raises:
          RuntimeError: there is none.
          InputError: it is no result of this case.
        """
        path = Path(self._folder.name) / "results" / f"{case.name}.safetensors"
        if not path.exists():
            raise RuntimeError(self._said)
        return read_result(path, self._written[case.name])

    def _asked(self, case: Case) -> Path:
        """The file of a case that was asked about."""
        return Path(self._folder.name) / "asked" / f"{case.name}.safetensors"


class NpuFia(Npu):
    """The operators that vLLM-Ascend calls."""

    name, operators = "npu-fia", "fia"


class NpuFusion(Npu):
    """The operators that MindSpeed calls."""

    name, operators = "npu-fusion", "fusion"
