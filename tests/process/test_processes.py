"""A ring over 2 processes of 2 devices each, through gloo, gives the bits of one process with 4 devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ring_process

from cpjax.parallel import cp_mesh

# Bits of this process are compared with those of processes of their own, which compile as users do.
pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[2]
PROGRAM = Path(ring_process.__file__)


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def said_together(program: Path, arguments: list[list[str]]) -> list[str]:
    """What processes print that run at the same time; all must end with 0."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, str(program), *some],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for some in arguments
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(said)
    return said


def test_two_processes_of_two_devices_give_the_same_bits(tmp_path):
    address, result = free_address(), str(tmp_path / "result.npz")
    said_together(PROGRAM, [[str(rank), "2", address, result] for rank in range(2)])
    found, alone = np.load(result), ring_process.results(cp_mesh(4))
    assert set(found) == set(alone)
    for name, expected in alone.items():
        assert np.abs(found[name]).max() > 0
        np.testing.assert_array_equal(found[name], np.asarray(expected), err_msg=name)


def test_the_example_of_several_hosts_passes():
    """Four processes with one device each; each makes its own tokens, as a host would."""
    line = ["--coordinator", free_address(), "--processes", "4", "--tokens", "256", "--rank"]
    said = said_together(ROOT / "examples" / "several_hosts.py", [[*line, str(rank)] for rank in range(4)])
    assert "4 processes, 4 devices, 256 tokens" in said[0]
    assert said[0].rstrip().endswith("passed")
