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

from npu_backend.families import FAMILIES
from npu_backend.files import Case, read_case
from npu_backend.latent import Made
from npu_backend.packing import held_rows
from npu_backend.rank import Settings
from npu_backend.ring import Ring, ring_attention
from npu_backend.schedule import Exchange, chunk_count
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
    if cp == 1:
        return [0]
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
        size = length // chunk_count(cp)
        for chunk in range(chunk_count(cp)):
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


def alone(case: Case, family: str) -> tuple[np.ndarray, np.ndarray]:
    """What one rank computes without any exchange."""
    me = Ring(0, 1, case.is_causal, case.scale, requests_of(case), case.digest, family=FAMILIES[family])
    prefix = tuple(torch.from_numpy(x[:, sum(LENGTHS) :]) for x in case.rows)
    (out, lse), _, made = ring_attention(me, shard(case, 0), torch.device("cpu"), lambda what, step: None, prefix)
    assert made == Made()
    return out.numpy(), lse.contiguous().numpy()


def same_bits(one: tuple[np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray]) -> bool:
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))


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
