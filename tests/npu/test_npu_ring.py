"""The ring over real processes: equal to dense attention within rounding, and to the staged twin bit for bit."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_strategies import (
    HEADS,
    Problem,
    exact_problem,
    hard_bound,
    joined,
    problem,
    problems,
    staged_ring_row,
    write_case,
)
from oracle import dense
from strategies import examples

from npu_backend.errors import RankError
from npu_backend.files import read_case
from npu_backend.ring import Ring, check_places, ring_attention
from npu_backend.schedule import chunk_count, held_chunks
from npu_backend.shard import Requests, requests_of, shard
from npu_backend.workers import Workers

CP = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def pools():
    """One persistent pool of processes per cp; they start when they are first used."""
    found = {cp: Workers(cp, timeout=30) for cp in CP}
    yield found
    for workers in found.values():
        workers.close()


def ring(workers: Workers, p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`out` and `lse` of the backend in global order, through files and processes."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.safetensors")
        workers.run(write_case(Path(folder), p), result)
        return joined(result, p)


def assert_dense(p: Problem, out: np.ndarray, lse: np.ndarray):
    real = p.segment == 0
    zeroed = [np.where(real[..., None, None], x, 0) for x in p[:3]]
    want_out, want_lse = dense(*zeroed, scale=p.scale, visible=p.visible)
    bound_out, bound_lse = hard_bound(p, merges=2 * p.cp - 1)
    assert (abs(out.astype(np.float64) - want_out) <= bound_out)[real].all()
    assert (abs(lse.astype(np.float64) - want_lse) <= bound_lse)[real].all()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kind", ["normal", "needle"])
@pytest.mark.parametrize("cp", CP)
def test_ring_is_dense_attention_on_one_problem(pools, cp, kind, is_causal):
    p = problem(cp, kind, (4, 2), (46, 31), 48, is_causal=is_causal, cp=cp)
    assert_dense(p, *ring(pools[cp], p))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("cp", CP)
def test_bits_are_those_of_the_staged_fold_in_the_rings_order(pools, cp, is_causal):
    p = exact_problem(cp, (2, 1), (72, 72), 72, is_causal=is_causal, cp=cp, chunks=chunk_count(cp))
    out, lse = ring(pools[cp], p)
    compared = 0
    for b, i, n in np.ndindex(2, 72, 2):
        row = staged_ring_row(p, b, i, n)
        if row.exact:
            np.testing.assert_array_equal(out[b, i, n].view(np.int16), row.out.view(np.int16))
            np.testing.assert_array_equal(lse[b, i, n].view(np.int32), row.lse.view(np.int32))
            compared += 1
    assert compared >= 250


@pytest.mark.parametrize("cp", CP)
@examples(0.3)
@given(data=st.data())
def test_ring_is_dense_attention(pools, cp, data):
    p = data.draw(problems(cp))
    assert_dense(p, *ring(pools[cp], p))


@pytest.mark.parametrize("cp", [2, 3])
@examples(0.12)
@given(seed=st.integers(0, 2**32 - 1), heads=st.sampled_from(HEADS), is_causal=st.booleans(), units=st.integers(1, 6))
def test_bits_hold_for_drawn_problems(pools, cp, seed, heads, is_causal, units):
    total = 2 * cp * units
    p = exact_problem(seed, heads, (total,), total, is_causal=is_causal, cp=cp, chunks=chunk_count(cp))
    out, lse = ring(pools[cp], p)
    for i, n in np.ndindex(total, heads[0]):
        row = staged_ring_row(p, 0, i, n)
        if row.exact:
            np.testing.assert_array_equal(out[0, i, n], row.out)
            np.testing.assert_array_equal(lse[0, i, n], row.lse)


def test_ring_of_eight_is_dense_attention():
    with Workers(8, timeout=60) as workers:
        for is_causal in (True, False):
            p = problem(8, "needle", (2, 1), (77, 80), 80, is_causal=is_causal, cp=8)
            assert_dense(p, *ring(workers, p))


def test_chunks_longer_than_a_tile(pools):
    p = problem(7, "mean", (1, 1), (2500,), 2560, is_causal=True, cp=2)
    assert_dense(p, *ring(pools[2], p))


def test_more_pads_than_tokens(pools):
    for is_causal in (True, False):
        p = problem(1, "normal", (2, 1), (1, 3), 24, is_causal=is_causal, cp=4)
        assert_dense(p, *ring(pools[4], p))


def test_one_rank_sends_nothing(tmp_path):
    """There is no process group here at all, so anything sent would raise."""
    p = problem(3, "normal", (2, 1), (20,), 20, is_causal=True, cp=1)
    case = read_case(write_case(tmp_path, p))
    alone = Ring(0, 1, p.is_causal, p.scale, requests_of(case), case.digest)
    assert not torch.distributed.is_initialized()
    (out, lse), clock, made = ring_attention(alone, shard(case, 0), torch.device("cpu"), lambda what, step: None)
    assert_dense(p, out.numpy(), lse.numpy())
    assert made == {}
    assert len(clock.step) == 1


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_a_block_from_any_other_place_is_refused_with_its_step(cp, chunk, data):
    rank, step = data.draw(st.integers(0, cp - 1)), data.draw(st.integers(0, cp - 1))
    length = data.draw(st.integers(1, chunk_count(cp) * chunk))
    me = Ring(rank, cp, True, 1.0, Requests((chunk,), ((length,),), (0,)), "0" * 64)
    sender = (rank - step) % cp
    starts = [c * chunk for c in held_chunks(sender, cp)]
    position = torch.cat([torch.arange(s, s + chunk, dtype=torch.int32) for s in starts])[None]
    segment = torch.where(position < length, 0, -1).int()
    check_places(me, step, torch.stack([position, segment]))
    wrong = data.draw(st.sampled_from(("position", "segment", "exchanged")))
    i = data.draw(st.integers(0, len(starts) * chunk - 1))
    if wrong == "position":
        if segment[0, i] < 0:
            return  # the position of a pad means nothing
        position[0, i] += 1
    elif wrong == "segment":
        segment[0, i] = -1 - segment[0, i]
    else:
        position, segment = (x.roll(chunk, dims=1) for x in (position, segment))
        if starts[0] >= length or cp == 1:
            return  # two chunks of pads, or none to exchange
    with pytest.raises(RankError, match=re.escape(f"step {step}: a wrong block")):
        check_places(me, step, torch.stack([position, segment]))
