"""A cached prefix is attended last (docs/npu-backend.md): the bits are those of the operators called in that order.

Attended first, the result is as near to dense attention, and no tolerance tells the two apart. So the test folds blocks
itself, in the claimed order and with the prefix first, and compares bits.
"""

from functools import cache

import numpy as np
import pytest
import torch
from npu_strategies import write_pack
from safetensors.numpy import load_file

from npu_backend import ring
from npu_backend.families import FAMILIES
from npu_backend.files import Case, read_case
from npu_backend.latent import Made
from npu_backend.packing import held_rows
from npu_backend.rank import Settings
from npu_backend.ring import Ring, held_by, ring_attention
from npu_backend.schedule import Exchange, source
from npu_backend.shard import requests_of, shard

LENGTHS, PREFIXES = (16, 40), (150, 300)
"""Tokens of each request, a multiple of 2·cp, so that there are no pads; and those of it that are cached."""


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    @cache
    def written(cp: int, is_causal: bool, family: str):
        folder = tmp_path_factory.mktemp("pack")
        precision = FAMILIES[family].precision
        return write_pack(folder, LENGTHS, PREFIXES, cp=cp, is_causal=is_causal, seed=7, precision=precision)

    return written


def chunks_met(query_chunk: int, cp: int, exchange: str, is_causal: bool) -> list[int]:
    """The chunks of keys in the order in which a chunk of queries meets them, as docs/formats.md has it."""
    rank = min(query_chunk, 2 * cp - 1 - query_chunk)
    ranks = [(rank - step) % cp for step in range(cp)] if exchange == "ring" else list(range(cp))
    met = [chunk for other in ranks for chunk in (other, 2 * cp - 1 - other)]
    return [chunk for chunk in met if chunk <= query_chunk or not is_causal]


def folded(case: Case, family: str, exchange: str, *, prefix_first: bool) -> tuple[np.ndarray, np.ndarray]:
    """`out` and `lse` of all queries, in the order of the row: the family's operators, called block by block."""
    cp, attend, outs, lses = case.cp, FAMILIES[family].attend, [], []
    query, key, value = (torch.from_numpy(x) for x in (case.query, *case.rows))
    begin, cached = 0, sum(LENGTHS)
    for length, prefix in zip(LENGTHS, PREFIXES, strict=True):
        size = length // (2 * cp)
        for chunk in range(2 * cp):
            mine = slice(begin + chunk * size, begin + (chunk + 1) * size)
            blocks: list[tuple[slice, bool]] = []
            for other in chunks_met(chunk, cp, exchange, case.is_causal):
                theirs = slice(begin + other * size, begin + (other + 1) * size)
                blocks.append((theirs, case.is_causal and other == chunk))
            last = (slice(cached, cached + prefix), False)
            blocks = [last, *blocks] if prefix_first else [*blocks, last]
            carried = None
            for keys, is_triangle in blocks:
                lengths = None if case.is_causal or keys == last[0] else (keys.stop - keys.start,)
                carried = attend(
                    carried, query[:, mine], key[:, keys], value[:, keys],
                    is_causal=is_triangle, scale=case.scale, kv_lengths=lengths,
                )  # fmt: skip
            out, lse = FAMILIES[family].finish(carried)
            outs.append(out)
            lses.append(lse)
        begin, cached = begin + length, cached + prefix
    return torch.cat(outs, dim=1).numpy(), torch.cat(lses, dim=1).numpy()


def in_one_process(case: Case, family: str, monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """What the ranks compute, one after the other; what others hold is handed over, in the ring's order."""
    cpu, chunks = torch.device("cpu"), requests_of(case)
    prefix = tuple(torch.from_numpy(x[:, sum(LENGTHS) :]) for x in case.rows)
    outs, lses, rows = [], [], []
    for rank in range(case.cp):
        me = Ring(rank, case.cp, case.is_causal, case.scale, chunks, case.digest, family=FAMILIES[family])
        arrivals = [held_by(shard(case, source(rank, step, case.cp)), cpu) for step in range(case.cp)]
        monkeypatch.setattr(ring, "travel", lambda *_, held=arrivals: iter(held))
        (out, lse), _, made = ring_attention(me, shard(case, rank), cpu, lambda what, step: None, prefix)
        assert made == Made()
        outs.append(out.numpy())
        lses.append(lse.contiguous().numpy())
        rows.append(held_rows(rank, case.cp, chunks.chunk_lengths))
    back = np.argsort(np.concatenate(rows))
    return np.concatenate(outs, axis=1)[:, back], np.concatenate(lses, axis=1)[:, back]


def same_bits(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> bool:
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_is_attended_last(pack, monkeypatch, family, is_causal):
    case = read_case(pack(2, is_causal, family))
    last, first = (folded(case, family, "ring", prefix_first=x) for x in (False, True))
    assert not same_bits(last, first)  # else these data would tell nothing
    assert same_bits(in_one_process(case, family, monkeypatch), last)


@pytest.mark.parametrize(
    ("family", "exchange"), [("ring_mla", "ring"), ("ring_mla", "gather"), ("fia", "ring"), ("fusion", "gather")]
)
def test_the_prefix_is_attended_after_all_that_the_ranks_hold(pack, pools, tmp_path, family, exchange):
    path = pack(2, True, family)
    case, result = read_case(path), tmp_path / "result.safetensors"
    pools[2].run(path, result, settings=Settings(Exchange(exchange), family))
    got = load_file(result)
    last, first = (folded(case, family, exchange, prefix_first=x) for x in (False, True))
    assert not same_bits(last, first)
    for rank in range(2):
        at = held_rows(rank, 2, tuple(length // 4 for length in LENGTHS))
        assert same_bits((got[f"out.{rank}"], got[f"lse.{rank}"]), (last[0][:, at], last[1][:, at]))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backend_that_attends_the_prefix_first_has_other_bits(pack, monkeypatch, family):
    """The fault that this file is about: what it changes is what the tests above compare."""
    case = read_case(pack(2, True, family))
    prefix = tuple(torch.from_numpy(x[:, sum(LENGTHS) :]) for x in case.rows)
    attend, attend_prefix = ring._attend, ring._attend_prefix

    def prefix_first(me, step, block, query, key_value, halves, carried):
        if all(x is None for x in carried):
            attend_prefix(me, query, prefix, carried)
        attend(me, step, block, query, key_value, halves, carried)

    monkeypatch.setattr(ring, "_attend", prefix_first)
    monkeypatch.setattr(ring, "_attend_prefix", lambda *_: None)
    wrong = in_one_process(case, family, monkeypatch)
    assert not same_bits(wrong, folded(case, family, "ring", prefix_first=False))
    assert same_bits(wrong, folded(case, family, "ring", prefix_first=True))
