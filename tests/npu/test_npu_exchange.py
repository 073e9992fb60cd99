"""Every exchange and family through real processes, against dense and against the specification, whose schedule it is.

Drawn shapes are judged against dense. What the specification computes too comes from few shapes (a new one costs it
seconds of compilation), with drawn data, lengths, pads, exchanges and families.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from npu_crosscheck import computed, crosschecked, specified
from npu_strategies import exact_problem, problem, problems, write_case, write_pack
from strategies import examples

import cpjax.partition.packing
import cpjax.partition.schedule
from cpjax.crosscheck.run.compare import compare
from cpjax.precision import profile
from npu_backend import packing, prefix
from npu_backend.errors import InputError
from npu_backend.families import FAMILIES
from npu_backend.rank import Settings
from npu_backend.schedule import Exchange, blocks, check_exchange, source

CP = (1, 2, 3, 4)
PRECISION = {name: family.precision for name, family in FAMILIES.items()}


def exchanges(cp):
    """Every way in which cp ranks can exchange."""
    rings = [Exchange("double-ring", inner) for inner in range(1, cp + 1) if cp % inner == 0]
    return [Exchange("ring"), Exchange("gather"), *rings]


@given(st.integers(1, 8), st.sampled_from(("ring", "gather")), st.booleans())
def test_the_schedule_is_the_specifications(cp, name, is_causal):
    wanted = cpjax.partition.schedule.schedule(name, "zigzag", cp, is_causal=is_causal)
    for rank in range(cp):
        mine = [
            (step, *block)
            for step in range(cp)
            for block in blocks(rank, step, cp, is_causal=is_causal, exchange=Exchange(name))
        ]
        assert mine == [tuple(block) for block in wanted[rank]]
        assert len(mine) == (1 if cp == 1 else 2 * cp + 1 if is_causal else 4 * cp)


@given(st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_a_double_ring_computes_the_mask_once_and_meets_its_own_node_first(nodes, inner, is_causal):
    cp, exchange = nodes * inner, Exchange("double-ring", inner)
    for rank in range(cp):
        met = [source(rank, step, cp, exchange) for step in range(cp)]
        assert sorted(met) == list(range(cp))
        assert met[0] == rank
        assert {x // inner for x in met[:inner]} == {rank // inner}
        ring = {b[:3] for s in range(cp) for b in blocks(rank, s, cp, is_causal=is_causal)}
        own = [b[:3] for s in range(cp) for b in blocks(rank, s, cp, is_causal=is_causal, exchange=exchange)]
        assert set(own) == ring
        assert len(own) == len(ring)


@pytest.mark.parametrize("exchange", [Exchange("star"), Exchange("double-ring", 3), Exchange("double-ring", 0)])
def test_an_exchange_that_is_none_is_refused(exchange):
    with pytest.raises(InputError, match=r"none of|do not divide"):
        check_exchange(exchange, 4)


@pytest.mark.parametrize("cp", CP)
@pytest.mark.parametrize("operators", FAMILIES)
def test_every_exchange_and_family_agrees_with_dense_and_the_specification(pools, tmp_path, cp, operators):
    for i, exchange in enumerate(exchanges(cp)):
        p = problem(cp, "needle" if i % 2 else "normal", (2, 1), (30, 24), 48, is_causal=i != 1, cp=cp)
        case = write_case(tmp_path, p, f"c{i}", precision={"npu": PRECISION[operators]})
        crosschecked(pools[cp], case, Settings(exchange, operators))


@pytest.mark.parametrize("cp", CP)
@examples(0.08)
@given(data=st.data())
def test_drawn_problems_agree_with_dense(pools, cp, data):
    p = data.draw(problems(cp, max_tokens=40))
    chosen = Settings(data.draw(st.sampled_from(exchanges(cp))), data.draw(st.sampled_from(sorted(FAMILIES))))
    with tempfile.TemporaryDirectory() as folder:
        case = write_case(Path(folder), p, precision={"npu": PRECISION[chosen.operators]})
        computed(pools[cp], case, chosen)


@pytest.mark.parametrize("cp", CP)
@examples(0.12)
@given(data=st.data())
def test_drawn_problems_agree_with_the_specification(pools, cp, data):
    lengths = tuple(data.draw(st.lists(st.integers(1, 48), min_size=2, max_size=2)))
    seed, kind = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.sampled_from(("normal", "needle", "mean")))
    p = problem(seed, kind, (2, 1), lengths, 48, is_causal=data.draw(st.booleans()), cp=cp)
    chosen = Settings(data.draw(st.sampled_from(exchanges(cp))), data.draw(st.sampled_from(sorted(FAMILIES))))
    with tempfile.TemporaryDirectory() as folder:
        crosschecked(pools[cp], write_case(Path(folder), p, precision={"npu": PRECISION[chosen.operators]}), chosen)


SAME_STAGES = 0.25
"""Limit of z where both implement the same roundings in the same order.

Between two roundings to FP16 each computes in float32, with an error of up to k · 2^-24 of the number: the two differ
by up to k · 2^-12 of a spacing h. With that probability a rounding boundary lies between them, and they come out one h
apart: a mean square of k · 2^-12 · h² for each rounding, where z = 1 is 2 · h² / 12. So z = √(6k · 2^-12), and 0.25 is
k = 43.
"""


@pytest.mark.parametrize("operators", ["ring_mla", "fusion"])
@pytest.mark.parametrize("name", ["ring", "gather"])
def test_the_same_stages_in_the_same_order_round_alike(pools, tmp_path, operators, name):
    """`fia` is not among them: it merges all blocks at once, so nothing is rounded between merges."""
    p = problem(7, "normal", (2, 1), (48, 40), 48, is_causal=True, cp=4)
    case = write_case(tmp_path, p, precision={"npu": PRECISION[operators]})
    found = crosschecked(pools[4], case, Settings(Exchange(name), operators))
    assert found.agreement.z < SAME_STAGES
    other = compare(found.case, found.npu, specified(found.case, found.npu, "ring" if name == "gather" else "gather"))
    assert other.agrees
    assert other.z > SAME_STAGES  # another order is right too, and is told apart


@pytest.mark.parametrize("operators", ["ring_mla", "fusion"])
@pytest.mark.parametrize("name", ["ring", "gather"])
def test_where_float32_sums_are_exact_only_exp_and_log_differ(pools, tmp_path, operators, name):
    """Then k of `SAME_STAGES` is a few units, of PyTorch's and XLA's exp, log and division: nearly all bits agree.

    For each output at most 32 numbers are rounded: the outs of 8 chunks, 7 merges, and two probabilities a chunk. Each
    comes out otherwise with probability k · 2^-12: at k = 2, one output in 64 may. In another order one in four does.
    """
    p = exact_problem(7, (2, 1), (60,), 64, is_causal=True, cp=4, chunks=8)
    case = write_case(tmp_path, p, precision={"npu": PRECISION[operators]})
    found = crosschecked(pools[4], case, Settings(Exchange(name), operators))
    assert found.differing < 1 / 64
    other = specified(found.case, found.npu, "ring" if name == "gather" else "gather")
    assert found._replace(spec=other).differing > 0.1


def bits(workers, case: Path, chosen: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Of out and lse; the verdict, which knows the order, has passed."""
    _, found = computed(workers, case, chosen)
    return found.out.view(np.int16), found.lse.view(np.int32)


def test_gathered_bits_do_not_depend_on_who_computes_and_the_rings_do(pools, tmp_path):
    """cp ranks and a double ring over all nodes of one rank walk other orders; a gather's is absolute.

    The same chunks (8 of them) on 4 ranks, and by one process that walks the schedule of every rank itself.
    """
    import torch

    from npu_backend.operators import ring_mla_block

    p = problem(5, "normal", (2, 1), (64,), 64, is_causal=True, cp=4)
    case = write_case(tmp_path, p, precision={"npu": "ring_mla_fp16"})
    gathered = bits(pools[4], case, Settings(Exchange("gather")))
    ring = bits(pools[4], case, Settings(Exchange("ring")))
    query, key, value = (torch.from_numpy(x) for x in p[:3])
    for rank in range(4):
        carried = {}
        for step in range(4):
            for block in blocks(rank, step, 4, is_causal=True, exchange=Exchange("gather")):
                q, k = (slice(8 * c, 8 * c + 8) for c in (block.query_chunk, block.kv_chunk))
                carried[block.query_chunk] = ring_mla_block(
                    query[:, q],
                    key[:, k],
                    value[:, k],
                    is_causal=block.mask == "triu",
                    scale=p.scale,
                    previous=carried.get(block.query_chunk),
                )
        for chunk, (out, lse) in carried.items():
            rows = slice(8 * chunk, 8 * chunk + 8)
            np.testing.assert_array_equal(gathered[0][:, rows], out.numpy().view(np.int16))
            np.testing.assert_array_equal(gathered[1][:, rows], lse.contiguous().numpy().view(np.int32))
    assert (gathered[0] != ring[0]).any()  # else this would not tell the orders apart


# Packs ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(2, 5))
def test_index_arrays_are_those_of_the_specification(lengths, cp):
    wanted = cpjax.partition.packing.mindie_indices(lengths, cp)
    h = tuple(int(n) for n in wanted.chunk_lengths)
    mine = packing.indices(h, cp)
    for name in ("first", "last", "out_recovery", "kv_recovery"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(wanted, name))
    gathered = np.concatenate([packing.held_rows(rank, cp, h) for rank in range(cp)])
    np.testing.assert_array_equal(gathered[mine.kv_recovery], np.arange(len(gathered)))


def test_one_rank_alone_holds_every_request_in_one_piece():
    mine = packing.indices((2, 3), 1)
    for everything in (mine.first, mine.out_recovery, mine.kv_recovery, packing.held_rows(0, 1, (2, 3))):
        assert everything.tolist() == [0, 1, 2, 3, 4]
    assert mine.last.tolist() == []


@given(st.lists(st.integers(0, 700), min_size=1, max_size=4).filter(any), st.integers(1, 5))
def test_prefix_blocks_are_dealt_out_and_come_back_in_order(lengths, cp):
    of_rank = [prefix.owned(tuple(lengths), rank, cp) for rank in range(cp)]
    assert sorted(np.concatenate(of_rank)) == list(range(sum(lengths)))
    most = max(map(len, of_rank))
    padded = np.concatenate([np.pad(x, (0, most - len(x)), constant_values=-1) for x in of_rank])
    np.testing.assert_array_equal(padded[prefix.recovery(tuple(lengths), cp)], np.arange(sum(lengths)))
    start = int(np.cumsum([0, *lengths])[int(np.argmax(np.array(lengths) > 0))])
    assert of_rank[0][0] == start  # block 0 is on rank 0


@pytest.mark.parametrize("cp", CP)
@examples(0.08)
@given(data=st.data())
def test_packs_with_prefixes_agree_with_dense(pools, cp, data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    prefixes = [data.draw(st.sampled_from((0, 0, 1, 128, 150, 300))) for _ in lengths]
    _packs(computed, pools[cp], cp, lengths, prefixes, data)


@pytest.mark.parametrize("cp", CP)
@examples(0.06)
@given(data=st.data())
def test_packs_with_prefixes_agree_with_the_specification(pools, cp, data):
    lengths, prefixes = data.draw(st.sampled_from((((7, 19), (0, 0)), ((9, 1, 20), (300, 0, 150)))))
    _packs(crosschecked, pools[cp], cp, lengths, prefixes, data)


def _packs(check, workers, cp, lengths, prefixes, data):
    # The specification hands over what is rounded, so it merges a prefix only where that is what is carried.
    rounded = {name for name, precision in PRECISION.items() if profile(precision).carry == profile(precision).out}
    families = sorted(rounded if check is crosschecked and any(prefixes) else FAMILIES)
    chosen = Settings(data.draw(st.sampled_from(exchanges(cp))), data.draw(st.sampled_from(families)))
    with tempfile.TemporaryDirectory() as folder:
        case = write_pack(
            Path(folder),
            lengths,
            prefixes,
            cp=cp,
            is_causal=data.draw(st.booleans()),
            seed=data.draw(st.integers(0, 2**32 - 1)),
            precision=PRECISION[chosen.operators],
        )
        check(workers, case, chosen)
