"""Packed requests: each on its own, pads reach nothing, and MindIE's index arrays by brute force."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense
from strategies import examples

from cpjax.errors import InputError
from cpjax.parallel import context_parallel_attention, cp_mesh
from cpjax.partition import SEQUENCES
from cpjax.partition.packing import mindie_indices, pack, packed_order, packed_tokens, padded_lengths, unpack

REQUESTS = st.lists(st.integers(1, 20), min_size=1, max_size=4)
CP = st.sampled_from([1, 2, 3, 4, 8])


def test_the_worked_example_of_the_vendor():
    """cp 2, requests of 7 and 12 tokens."""
    found = mindie_indices((7, 12), cp=2)
    assert found.first.tolist() == [0, 1, 4, 5, 6]
    assert found.last.tolist() == [2, 3, 7, 8, 9]
    assert found.chunk_lengths.tolist() == [2, 3]
    assert found.out_recovery.tolist() == [0, 1, 5, 6, 2, 3, 4, 7, 8, 9]
    assert found.kv_recovery.tolist() == [0, 1, 10, 11, 12, 13, 2, 3, 4, 5, 6, 14, 15, 16, 17, 18, 19, 7, 8, 9]
    assert found.last_token.tolist() == [2, 9]


@given(REQUESTS, CP)
def test_mindie_indices_by_brute_force(lengths, cp):
    """Deal out (request, position) pairs as MindIE does, and look where they are."""
    padded = padded_lengths(lengths, cp)
    ranks = []
    for rank in range(cp):
        local = []
        for request, n in enumerate(padded):
            chunks = np.array_split(np.arange(n), 2 * cp)
            local += [(request, int(p)) for chunk in (rank, 2 * cp - 1 - rank) for p in chunks[chunk]]
        ranks.append(local)
    natural = [(request, p) for request, n in enumerate(padded) for p in range(n)]
    gathered = [token for local in ranks for token in local]
    found = mindie_indices(lengths, cp)
    assert [gathered[i] for i in found.kv_recovery] == natural
    assert [gathered[i] for i in found.last_token] == [(request, n - 1) for request, n in enumerate(lengths)]
    for rank, local in enumerate(ranks):
        first, last = [local[i] for i in found.first], [local[i] for i in found.last]
        assert all(p // (padded[r] // (2 * cp)) == rank for r, p in first)
        assert all(p // (padded[r] // (2 * cp)) == 2 * cp - 1 - rank for r, p in last)
        assert [(first + last)[i] for i in found.out_recovery] == local
    assert [int(h) * 2 * cp for h in found.chunk_lengths] == list(padded)


@given(st.sampled_from(list(SEQUENCES)), REQUESTS, CP)
def test_every_rank_holds_its_part_of_every_request(layout, lengths, cp):
    held, padded = packed_order(layout, lengths, cp), padded_lengths(lengths, cp)
    np.testing.assert_array_equal(np.sort(held), np.arange(sum(padded)))
    request = np.repeat(np.arange(len(padded)), padded)
    for shard in held.reshape(cp, -1):
        assert np.bincount(request[shard], minlength=len(padded)).tolist() == [n // cp for n in padded]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), CP, st.integers(0, 2**32 - 1))
def test_unpack_undoes_pack(lengths, cp, seed):
    rng = np.random.default_rng(seed)
    requests = [rng.normal(size=(n, 2)) for n in lengths]
    packed = pack(requests, cp)
    assert packed.shape == (1, *packed_tokens(lengths, cp).position.shape[1:], 2)
    for x, y in zip(requests, unpack(packed, lengths, cp), strict=True):
        np.testing.assert_array_equal(x, y)


@examples(0.2)
@given(
    st.sampled_from([(7, 12), (3, 3, 9), (1, 17)]),
    st.sampled_from(list(SEQUENCES)),
    st.sampled_from(["ring", "gather"]),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 2**32 - 1),
)
def test_each_request_gets_what_it_would_get_alone(lengths, layout, exchange, cp, seed):
    rng = np.random.default_rng(seed)
    parts = [[3 * rng.normal(size=(n, 2, 3)) for n in lengths] for _ in range(3)]
    packed = [pack(part, cp) for part in parts]
    pads = packed_tokens(lengths, cp).segment[0] == -1
    for x in packed:
        x[:, pads] = np.nan  # pads never reach a result
    with jax.enable_x64(True):
        result = context_parallel_attention(
            *packed,
            mesh=cp_mesh(cp),
            lengths=lengths,
            partition=layout,
            exchange=exchange,
            precision="float64",
            scale=1.0,
        )
    out = unpack(np.asarray(result.out), lengths, cp)
    for found, *qkv in zip(out, *parts, strict=True):
        alone, _ = dense(*(x[None] for x in qkv), scale=1.0, visible=np.tri(len(found), dtype=bool)[None])
        np.testing.assert_allclose(found, alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("lengths", "cp", "message"),
    [((), 2, "give at least one"), ((3, -1), 2, "none below 0"), ((3,), 0, "cp is 0")],
)
def test_misuse_is_refused(lengths, cp, message):
    with pytest.raises(InputError, match=message):
        packed_tokens(lengths, cp)


def test_an_empty_request_has_no_last_token():
    with pytest.raises(InputError, match="an empty request has no last token"):
        mindie_indices((4, 0), 2)
