"""The NPU backend: `python -m npu_backend run`, a program of its own with one process per rank."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cpjax.crosscheck.files.case import Case, write_case
from cpjax.crosscheck.files.result import Result, read_result


class Npu:
    """What the operators of `ring_mla` take; the backend itself says what it does not."""

    def __init__(self):
        """Results live in a temporary folder until they are asked for."""
        self._folder = TemporaryDirectory(prefix="cpjax-npu-")
        self._written: dict[str, Case] = {}
        self._said = ""

    def supports(self, case: Case) -> str | None:
        """PyTorch is there, and the backend's own rules hold."""
        if importlib.util.find_spec("torch") is None:
            return "PyTorch is not installed; pip install 'cpjax[torch]'"
        if case.window is not None:
            return f"a sliding window of {case.window}; its operators have none"
        from npu_backend import files
        from npu_backend.errors import InputError
        from npu_backend.shard import check_computable

        q_places, kv_places = ([np.asarray(x) for x in places] for places in (case.q_tokens, case.kv_tokens))
        x = case.latent
        rows = (case.key, case.value) if x is None else files.latent_rows(x.c_kv, x.k_rope)
        theirs = files.Case(
            case.name, case.digest, case.query, rows, q_places[0], q_places[1], kv_places[0],
            kv_places[1], case.scale, case.is_causal, case.cp, case.precision, case.layout,
            None if x is None else (x.w_uk, x.w_uv),
        )  # fmt: skip
        try:
            check_computable(theirs)
        except InputError as error:
            return str(error).removeprefix(f"{case.name}: ")
        return None

    def prepare(self, cases: list[Case]) -> None:
        """Compute all of them: starting the ranks takes longer than most cases."""
        folder = Path(self._folder.name)
        for case in cases:
            self._written[case.name] = write_case(folder / "cases", case)
        line = [sys.executable, "-m", "npu_backend", "run", str(folder / "cases"), str(folder / "results")]
        # Its progress bar and its complaints go to this terminal.
        run = subprocess.run([*line, "--json"], stdout=subprocess.DEVNULL, stderr=None, text=True, check=False)
        self._said = f"npu_backend ended with status {run.returncode}; its message is above"

    def run(self, case: Case) -> Result:
        """The result that `prepare` left.

        Raises:
          RuntimeError: there is none.
          InputError: it is no result of this case.
        """
        folder = Path(self._folder.name)
        if case.name not in self._written:
            self.prepare([case])
        path = folder / "results" / f"{case.name}.safetensors"
        if not path.exists():
            raise RuntimeError(self._said)
        return read_result(path, self._written[case.name])
