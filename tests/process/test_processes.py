"""A ring over 2 processes of 2 devices each, through gloo, gives the bits of one process with 4 devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import ring_process

from cpjax.parallel import cp_mesh

ROOT = Path(__file__).parents[2]
PROGRAM = Path(ring_process.__file__)


def test_two_processes_of_two_devices_give_the_same_bits(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROGRAM)]
    running = [
        subprocess.Popen(
            [*command, str(rank), "2", address, str(tmp_path / "result.npz")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=300)[0] for worker in running]
    finally:
        for worker in running:
            worker.kill()
    assert [worker.returncode for worker in running] == [0, 0], "\n".join(said)
    found, alone = np.load(tmp_path / "result.npz"), ring_process.results(cp_mesh(4))
    assert set(found) == set(alone)
    for name, expected in alone.items():
        assert np.abs(found[name]).max() > 0
        np.testing.assert_array_equal(found[name], np.asarray(expected), err_msg=name)
