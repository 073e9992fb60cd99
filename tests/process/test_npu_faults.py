"""Ranks that die, hang, or send the wrong thing, at every step: named in time, nothing half-written, nobody left.

Real processes. Faults are timed by what ranks report before they begin something; a fault that has to happen inside a
rank is put there by a pool of processes that replaces one function before it serves.
"""

import multiprocessing
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_strategies import problem, write_case, write_decode, write_pack
from safetensors.numpy import load_file

from npu_backend import workers as workers_module
from npu_backend.__main__ import main
from npu_backend.errors import RankError
from npu_backend.rank import Settings
from npu_backend.schedule import Exchange
from npu_backend.stamp import WORDS, Stamp, case_words, check_stamp
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
    assert re.fullmatch(rf"rank {victim}: was killed by signal 9 \(last heard: \w+, step \d\)", text)


@pytest.mark.parametrize(("what", "step"), STEPS)
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
    assert re.fullmatch(r"rank 1: was killed by signal 9 \(last heard: \w+, step \d\)", text)


def serve_with(fault, victim, rank, *arguments):
    """What a process of the pool runs, with one function replaced on the victim."""
    if rank == victim:
        fault()
    workers_module._serve(rank, *arguments)


class Faulty(Workers):
    """A pool in which one rank's code is broken: `fault` replaces something in its process."""

    def __init__(self, fault, victim, **options):
        super().__init__(CP, timeout=10, **options)
        self.fault, self.victim = fault, victim

    def _start(self):
        spawn = multiprocessing.get_context("spawn")
        real, fault, victim = spawn.Process, self.fault, self.victim

        def process(target, args, **options):
            return real(target=serve_with, args=(fault, victim, *args), **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(multiprocessing, "get_context", lambda name: _Context(spawn, process))
            super()._start()


class _Context:
    def __init__(self, real, process):
        self.Pipe, self.Process = real.Pipe, process


def sends_another_place():
    """The tokens that the victim sends are said to be one place further."""
    from npu_backend import ring

    real = ring.travel

    def wrong(exchange, link, mine):
        return real(exchange, link, mine._replace(places=mine.places + 1))

    ring.travel = wrong


def sends_a_permuted_block():
    """The victim's two chunks are exchanged, places and all."""
    from npu_backend import ring

    real = ring.travel

    def wrong(exchange, link, mine):
        half = mine.rows[0].shape[1] // 2
        moved = type(mine)(tuple(x.roll(half, dims=1) for x in mine.rows), mine.places.roll(half, dims=2))
        return real(exchange, link, moved)

    ring.travel = wrong


def goes_on_with_another_case():
    """It has met the others with the right case; then its inputs are those of another one, at the same places."""
    from npu_backend import rank

    right, real_read, real_meet = [], rank.read_case, rank._meet

    def read(path):
        case = real_read(path)
        right.append(case.digest)
        return case._replace(digest="f" * 64, rows=tuple(-x for x in case.rows))

    rank.read_case = read
    rank._meet = lambda case, cp: real_meet(case._replace(digest=right[-1]), cp)


def sends_what_it_sent_first():
    """Whatever it is to send later: a buffer that is not written again."""
    from npu_backend.exchange import Link

    real, first = Link._stamped, []

    def stale(self, held, step):
        first.append(real(self, held, step))
        return first[0]

    Link._stamped = stale


def stamps_as_its_neighbour():
    from npu_backend.exchange import Link

    real = Link._stamped

    def wrong(self, held, step):
        self.rank = (self.rank + 1) % self.cp
        try:
            return real(self, held, step)
        finally:
            self.rank = (self.rank - 1) % self.cp

    Link._stamped = wrong


def raises_while_it_computes():
    from npu_backend import ring

    def broken(*arguments):
        raise RuntimeError("a kernel failed")

    ring._attend = broken


def reads_another_case():
    from npu_backend import rank

    real = rank.read_case

    def other(path):
        return real(path)._replace(digest="f" * 64)

    rank.read_case = other


def exits():
    import os

    from npu_backend import ring

    ring._attend = lambda *arguments: os._exit(7)


FAULTS = [
    (sends_another_place, r"step \d+: a wrong block"),
    (sends_a_permuted_block, r"step \d+: a wrong block"),
    (raises_while_it_computes, r"rank 1: RuntimeError: a kernel failed \(last heard: compute, step 0\)"),
    (
        goes_on_with_another_case,
        r"step 0: a wrong block; rank 1 sent one of another case \(digest f{14}…, not \w{14}",
    ),
    (stamps_as_its_neighbour, r"step 0: a wrong block; rank 1 was to send that of step 0, but it is stamped by rank 2"),
    (reads_another_case, "ranks have read different files as case c"),
    (exits, r"rank 1: died with exit code 7 \(last heard: compute, step 0\)"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exchange", [Exchange("ring"), Exchange("gather")])
@pytest.mark.parametrize(("fault", "text"), FAULTS)
def test_a_rank_whose_code_is_broken_is_named_and_nothing_is_written(tmp_path, fault, text, exchange):
    case = write_case(tmp_path, small(), "c")
    with Faulty(fault, 1, settings=Settings(exchange)) as workers:
        with pytest.raises(RankError, match=text):
            workers.run(case, tmp_path / "r.safetensors")
        assert workers.pids == []
    assert [x.name for x in tmp_path.iterdir()] == ["c.safetensors"]


def makes_other(change):
    from npu_backend import ring

    real = ring.expand
    ring.expand = lambda latent, up: change(*real(latent, up))


def makes_other_keys():
    makes_other(lambda key, value: (-key, value))


def makes_other_values():
    makes_other(lambda key, value: (key, -value))


def makes_other_prefixes():
    makes_other(lambda key, value: (-key, value) if key.shape[1] == 300 else (key, value))


@pytest.mark.parametrize(
    ("fault", "whose"),
    [
        (makes_other_keys, r"rank \d's latents"),
        (makes_other_values, r"rank \d's latents"),
        (makes_other_prefixes, "the cached prefixes"),
    ],
)
@pytest.mark.parametrize("exchange", [Exchange("ring"), Exchange("gather")])
def test_a_rank_that_makes_other_keys_of_a_latent_is_named(tmp_path, exchange, fault, whose):
    """Its results would be those of other weights, and rank 0 writes its own keys only."""
    case = write_pack(tmp_path, (12,), (300,), cp=CP, is_causal=True, seed=0, latent=16)
    text = f"rank 1 has made other keys and values of {whose} than rank 0"
    with Faulty(fault, 1, settings=Settings(exchange)) as workers, pytest.raises(RankError, match=text):
        workers.run(case, tmp_path / "r.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["pack.safetensors"]


@pytest.mark.parametrize("exchange", [Exchange("ring"), Exchange("double-ring", 3)])
def test_a_block_that_was_sent_a_step_before_is_named(tmp_path, exchange):
    case = write_case(tmp_path, small(), "c")
    text = r"rank 2: step 1: a wrong block; rank 1 was to send that of step 1, but it is stamped by rank 1 at step 0"
    faulty_pool = Faulty(sends_what_it_sent_first, 1, settings=Settings(exchange))
    with faulty_pool as workers, pytest.raises(RankError, match=text):
        workers.run(case, tmp_path / "r.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_block_of_the_case_before_is_named(tmp_path):
    """Same shape, same places, same step: only the case is another."""
    first, second = (write_case(tmp_path, small(seed=seed), f"c{seed}") for seed in (1, 2))
    with Faulty(sends_what_it_sent_first, 1, settings=Settings(Exchange("gather"))) as workers:
        workers.run(first, tmp_path / "r1.safetensors")
        with pytest.raises(RankError, match=r"step 0: a wrong block; rank 1 sent one of another case"):
            workers.run(second, tmp_path / "r2.safetensors")
    assert {x.name for x in tmp_path.iterdir()} == {"c1.safetensors", "c2.safetensors", "r1.safetensors"}


def test_a_partial_of_another_case_is_named(tmp_path):
    case = write_decode(tmp_path, [300, 20], [1, 1], cp=CP)
    text = "step 0: a wrong block; rank 1 sent one of another case"
    with Faulty(goes_on_with_another_case, 1) as workers, pytest.raises(RankError, match=text):
        workers.run(case, tmp_path / "r.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["decode.safetensors"]


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**16), st.integers(0, 2**16), st.data())
def test_any_other_stamp_is_refused(digest, rank, step, data):
    places = torch.arange(12, dtype=torch.int32).view(2, 1, 6)
    mine = Stamp(case_words(digest.hex()), rank, step)
    stamped = mine.before(places)
    assert stamped.dtype == torch.int32
    assert (stamped[WORDS:].view(2, 1, 6) == places).all()
    check_stamp(stamped, mine, 7)
    stamped[data.draw(st.integers(0, WORDS - 1))] += data.draw(st.sampled_from((-1, 1)))
    with pytest.raises(RankError, match=rf"step 7: a wrong block; rank {rank} "):
        check_stamp(stamped, mine, 7)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_case_for_another_number_of_ranks_is_refused_by_every_rank(tmp_path, ranks):
    case = write_case(tmp_path, small(), "c")
    with Workers(ranks, timeout=10) as workers, pytest.raises(RankError, match=f"is for 3 ranks, there are {ranks}"):
        workers.run(case, tmp_path / "r.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["c.safetensors"]


def refusal(capsys, *arguments):
    assert main(["run", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_what_cannot_be_computed_is_refused_before_any_process_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Workers, "_start", lambda self: pytest.fail("a process was started"))
    case = write_case(tmp_path, small(), "c")
    assert "do not divide 3 ranks" in refusal(capsys, case, tmp_path / "r", "--exchange", "double-ring", "--inner", "2")
    assert "needs --inner" in refusal(capsys, case, tmp_path / "r", "--exchange", "double-ring")
    assert "has no nodes" in refusal(capsys, case, tmp_path / "r", "--inner", "3")
    assert "compute in fia_fp16" in refusal(capsys, case, tmp_path / "r", "--operators", "fia")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "is for 3 ranks but torchrun has started 2" in refusal(capsys, case, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_case_is_refused(tmp_path, capsys):
    case = write_case(tmp_path, small(1), "c")
    case.chmod(0)
    assert "c.safetensors" in refusal(capsys, case, tmp_path / "r")


def test_results_that_cannot_go_where_they_should_are_refused_before_any_process_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Workers, "_start", lambda self: pytest.fail("a process was started"))
    case = write_case(tmp_path, small(1), "c")
    assert "/proc cannot be made or written" in refusal(capsys, case, "/proc")  # read-only, for root too
    half = tmp_path / "r" / "c.safetensors"
    half.parent.mkdir()
    half.write_bytes(case.read_bytes()[:100])
    assert "is there and is no whole result" in refusal(capsys, case, half.parent)
    assert half.read_bytes() == case.read_bytes()[:100]


class Npu:
    """An NPU module of a host that has one."""

    def __init__(self, name, count=8):
        self.get_device_name, self.device_count = lambda index: name, lambda: count


@pytest.mark.parametrize(
    ("name", "count", "missing", "text"),
    [
        ("Ascend310P3", 8, (), "Ascend310P3 does not support atb::npu_ring_mla"),
        ("Ascend910B3", 2, (), "3 ranks need as many NPUs, this host has 2"),
        ("Ascend910B3", 8, ("atb::npu_ring_mla",), "the installed torch_npu does not have it"),
    ],
)
def test_an_npu_that_cannot_compute_is_refused(tmp_path, capsys, monkeypatch, name, count, missing, text):
    from npu_backend import runner, vendor

    monkeypatch.setattr(vendor, "TORCH_NPU_PROBLEM", None)
    monkeypatch.setattr(vendor, "DECLARED_HERE", frozenset(missing))
    monkeypatch.setattr(runner.torch, "get_device_module", lambda device: Npu(name, count))
    monkeypatch.setattr(runner.torch, "device", lambda kind: type("Device", (), {"type": kind}))
    assert text in refusal(capsys, write_case(tmp_path, small(), "c"), tmp_path / "r", "--device", "npu")
    assert not (tmp_path / "r").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    """Files of the pool may have 20 kB at most, as on a full disk."""
    case = write_case(tmp_path, problem(0, "normal", (2, 1), (120,), 120, is_causal=True, cp=CP), "c")
    with Faulty(fills_the_disk, 0) as workers, pytest.raises(RankError, match=r"rank 0: .*could not be written"):
        workers.run(case, tmp_path / "r.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["c.safetensors"]


def fills_the_disk():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_result_in_the_way_is_an_error_and_stays(tmp_path):
    case, result = write_case(tmp_path, small(), "c"), tmp_path / "r.safetensors"
    result.write_bytes(b"mine")
    with Workers(CP, timeout=10) as workers, pytest.raises(RankError, match=r"rank 0: .*no whole result"):
        workers.run(case, result)
    assert result.read_bytes() == b"mine"


@pytest.mark.parametrize("content", [b"", b"\0" * 64], ids=["empty", "zeros"])
def test_a_case_that_cannot_be_read_is_an_error_of_every_rank(tmp_path, content):
    case = tmp_path / "c.safetensors"
    case.write_bytes(content)
    with Workers(2, timeout=10) as workers, pytest.raises(RankError, match="not a whole safetensors file"):
        workers.run(case, tmp_path / "r.safetensors")
    assert [x.name for x in tmp_path.iterdir()] == ["c.safetensors"]
