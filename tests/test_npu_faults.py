"""Ranks that die, hang, or send the wrong thing, at every step: named in time, nothing half-written, nobody left.

Real processes; faults are timed by what ranks report before they begin something.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from npu_strategies import problem, write_case
from safetensors.numpy import load_file

from npu_backend.errors import RankError
from npu_backend.rank import Settings
from npu_backend.schedule import Exchange
from npu_backend.workers import Workers

CP = 3
TIMEOUT = 3.0


def small(cp=CP, seed=0):
    return problem(seed, "normal", (2, 1), (11,), 12, is_causal=True, cp=cp)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def faulty(tmp_path, signal_number, victim, what, step, exchange):
    """Run a case and send the victim a signal when it says that it begins something; the error's text."""
    case = write_case(tmp_path, small(), "c")
    sent = []
    with Workers(CP, timeout=TIMEOUT, settings=Settings(exchange)) as workers:

        def listen(rank, begun, at):
            if (rank, begun, at) == (victim, what, step) and not sent:
                sent.extend(workers.pids)
                os.kill(workers.pids[victim], signal_number)

        with pytest.raises(RankError) as caught:  # noqa: PT012
            # A rank may be past what it reported when the signal comes, even done; then the next case meets it.
            for number in range(2):
                workers.run(case, tmp_path / f"r{number}.safetensors", listen)
        ended = time.monotonic()
        assert workers.pids == []
    assert sent
    while any(map(alive, sent)) and time.monotonic() < ended + 10:
        time.sleep(0.05)
    assert not any(map(alive, sent))
    left = {x.name for x in tmp_path.iterdir()}
    assert left <= {"c.safetensors", "r0.safetensors", "r1.safetensors"}  # no unfinished file
    for name in left - {"c.safetensors"}:
        assert len(load_file(tmp_path / name)) == 4 * CP  # whole
    return str(caught.value)


STEPS = [("read", 0), ("wait", 0), ("compute", 0), ("compute", 1), ("compute", 2), ("wait", 1), ("wait", CP)]


@pytest.mark.parametrize(("what", "step"), STEPS)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_is_named(tmp_path, victim, what, step):
    text = faulty(tmp_path, signal.SIGKILL, victim, what, step, Exchange("ring"))
    assert text == f"rank {victim}: died (killed by signal 9)"


@pytest.mark.parametrize(("what", "step"), STEPS[:5])
def test_a_rank_that_hangs_is_named_with_its_step_within_the_timeout(tmp_path, what, step):
    started = time.monotonic()
    text = faulty(tmp_path, signal.SIGSTOP, 1, what, step, Exchange("ring"))
    assert time.monotonic() - started < 60
    assert text.startswith("rank ")
    assert f"silent for {TIMEOUT:g} s" in text
    assert "rank 1" in text
    assert "step" in text


@pytest.mark.parametrize("exchange", [Exchange("gather"), Exchange("double-ring", 3), Exchange("double-ring", 1)])
@pytest.mark.parametrize("step", [0, 1])
def test_a_rank_that_is_killed_in_any_exchange_is_named(tmp_path, exchange, step):
    text = faulty(tmp_path, signal.SIGKILL, 1, "compute", step, exchange)
    assert text == "rank 1: died (killed by signal 9)"
