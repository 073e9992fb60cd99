"""Where cards stand: groups partition the world, blocks lie where the vendor puts them, a mesh has the same order."""

import itertools
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mindie_build import build

from cpjax.errors import InputError
from cpjax.mindie.check import check, setting_of
from cpjax.mindie.config import ConfigFile
from cpjax.mindie.deployment import Deployment, Sizes, parse_deployment
from cpjax.mindie.layout import as_json, groups, lay_out
from cpjax.mindie.link import inverted, link_map, transfers
from cpjax.mindie.mesh import mesh
from cpjax.partition import Zigzag
from cpjax.partition.kv_cache import block_ranks, tokens_per_rank

SIXTEEN = Sizes(world_size=16, dp=1, cp=2, sp=8, tp=8, pp=1, moe_ep=16, moe_tp=1)
KINDS = [
    *("attn_dp", "attn_tp", "attn_cp", "attn_inner_sp", "moe_ep", "moe_tp", "mlp_tp", "lm_head_tp"),
    "attn_prefix_cache_cp",
]


def test_the_groups_of_the_vendors_sixteen_cards():
    found = groups(SIXTEEN)
    halves = [list(range(8)), list(range(8, 16))]
    assert list(found) == KINDS
    assert found["attn_tp"] == found["attn_inner_sp"] == halves
    assert found["attn_cp"] == [[rank, rank + 8] for rank in range(8)]
    assert found["moe_ep"] == found["attn_prefix_cache_cp"] == [list(range(16))]
    assert found["moe_tp"] == [[rank] for rank in range(16)]
    assert found["attn_dp"] == found["moe_tp"]
    assert found["mlp_tp"] == found["lm_head_tp"] == [list(range(16))]
    torch = groups(SIXTEEN._replace(dp=2, cp=1), is_torch=True)
    assert torch["mlp_tp"] == torch["lm_head_tp"] == torch["attn_tp"] == halves
    assert torch["attn_dp"] == [[rank, rank + 8] for rank in range(8)]
    two = groups(SIXTEEN._replace(moe_ep=8, moe_tp=2))
    assert two["moe_tp"] == [[rank, rank + 1] for rank in range(0, 16, 2)]
    assert two["moe_ep"] == [list(range(0, 16, 2)), list(range(1, 16, 2))]


def test_the_json_of_a_rank():
    nine = as_json(lay_out(in_memory({}), 2048, 128))[9]
    second, every = list(range(8, 16)), list(range(16))
    assert nine == {
        "rank": 9,
        "groups": dict(zip(KINDS, [[9], second, [1, 9], second, every, [9], every, every, every], strict=True)),
        "index": dict(zip(KINDS, [0, 1, 1, 1, 9, 0, 9, 9, 9], strict=True)),
    }


def test_a_card_holds_its_heads_its_two_chunks_and_its_blocks():
    card = lay_out(in_memory({}), 2046, 128).cards[9]
    assert (card.cp, card.tp, card.sp, card.moe_ep, card.moe_tp, card.scp) == (1, 1, 1, 9, 0, 9)
    assert (card.heads, card.tokens, card.blocks) == ((16, 32), ((512, 1024), (1024, 1536)), (9,))


@st.composite
def any_sizes(draw) -> dict[str, int]:
    """Sizes that fit, or nearly: each may be changed once."""
    dp, cp = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (4, 1), (2, 2)]))
    tp, pp = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 1, 1, 2]))
    world = dp * cp * tp * pp
    moe_ep = draw(st.sampled_from([size for size in range(1, world + 1) if world % size == 0]))
    sizes = {
        "worldSize": world, "dp": dp, "cp": cp, "sp": draw(st.sampled_from([1, tp])), "tp": tp, "pp": pp,
        "moe_ep": moe_ep, "moe_tp": world // moe_ep,
    }  # fmt: skip
    if draw(st.booleans()):
        sizes[draw(st.sampled_from(sorted(sizes)))] = draw(st.integers(0, 17))
    return {name: size for name, size in sizes.items() if name == "worldSize" or draw(st.integers(0, 9))}


def in_memory(changes: dict) -> Deployment:
    document = build(changes)[0]
    return parse_deployment(ConfigFile(Path("config.json"), "", document, ("ModelDeployConfig",)))


def accepted(sizes: dict[str, int]) -> Deployment:
    """The deployment, if check accepts it."""
    deployment = in_memory({field: ... for field in ("dp", "cp", "sp", "tp", "moe_ep", "moe_tp")} | sizes)
    assume(all(finding.level == "warning" for finding in check(setting_of(deployment))))
    return deployment


@given(any_sizes(), st.integers(1, 3000))
def test_what_check_accepts_is_laid_out_without_conflict(sizes, tokens):
    layout = lay_out(accepted(sizes), tokens, 128)
    world = range(layout.sizes.world_size)
    for found in layout.groups.values():
        assert sorted(itertools.chain(*found)) == list(world)  # each rank in exactly one group of each kind
        assert len({len(group) for group in found}) == 1
    for entry, card in zip(as_json(layout), layout.cards, strict=True):
        assert entry["rank"] == card.rank
        for kind, group in entry["groups"].items():
            assert group[entry["index"][kind]] == card.rank
            assert group in layout.groups[kind]


@given(any_sizes(), st.integers(1, 3000))
def test_cards_are_in_a_group_together_exactly_if_their_coordinates_say_so(sizes, tokens):
    layout = lay_out(accepted(sizes), tokens, 128)
    same = {
        "attn_dp": lambda card: card.rank % (len(layout.cards) // layout.sizes.dp),
        "attn_tp": lambda card: (card.dp, card.cp, card.pp),
        "attn_cp": lambda card: (card.dp, card.tp, card.pp),
        "moe_ep": lambda card: (
            card.moe_tp if layout.sizes.pp == 1 else card.rank % (len(layout.cards) // layout.sizes.moe_ep)
        ),
        "moe_tp": lambda card: card.moe_ep if layout.sizes.pp == 1 else card.rank // layout.sizes.moe_tp,
    }
    for kind, key in same.items():
        for group in layout.groups[kind]:
            assert len({key(layout.cards[rank]) for rank in group}) == 1
        assert len({key(card) for card in layout.cards}) == len(layout.groups[kind])


@given(any_sizes(), st.integers(1, 3000))
def test_every_token_block_and_head_is_held_by_the_right_number_of_cards(sizes, tokens):
    layout = lay_out(accepted(sizes), tokens, 128)
    s = layout.sizes
    work = np.zeros((128, layout.padded), int)  # computed by: each head of each token once in each dp replica and stage
    cached = np.zeros(-(-tokens // 128), int)
    for card in layout.cards:
        for start, end in card.tokens:
            work[slice(*card.heads), start:end] += 1
        cached[list(card.blocks)] += 1
    assert (work == s.dp * s.pp).all()
    assert (cached == s.world_size // (s.cp * s.sp)).all()
    assert 0 <= layout.padded - tokens < 2 * s.cp


@given(st.integers(1, 4), st.integers(1, 200))
def test_tokens_of_a_cp_rank_are_those_of_the_zigzag_layout(cp, tokens):
    layout = lay_out(in_memory({"worldSize": 2 * cp, "cp": cp, "sp": 2, "tp": 2, "moe_ep": 2 * cp}), tokens)
    held = np.concatenate([np.arange(*chunk) for card in layout.cards if card.tp == 0 for chunk in card.tokens])
    expected = Zigzag(cp).order(layout.padded) if cp > 1 else np.arange(tokens)
    assert held.tolist() == expected.tolist()


def test_cp_3_is_laid_out_though_the_vendor_has_2():
    assert lay_out(in_memory({"worldSize": 24, "cp": 3, "moe_ep": 24}), 7, 128).padded == 12


MISFITS = {
    "cp 2 · dp 1 · tp 8 is 16 but worldSize is 32": {"worldSize": 32, "moe_ep": 32},
    "moe_ep 8 · moe_tp 1 is 8 but worldSize is 16": {"moe_ep": 8},
    "cp is 2, dp 2 and pp 1; only one may be above 1": {"dp": 2, "worldSize": 32},
    "sp is 4 and tp is 8": {"sp": 4},
}


@pytest.mark.parametrize("message", MISFITS)
def test_sizes_that_do_not_fit_are_not_laid_out(message):
    with pytest.raises(InputError, match=message):
        lay_out(in_memory(MISFITS[message]), 100)


def test_a_prompt_has_a_token_and_tp_divides_the_heads():
    with pytest.raises(InputError, match="tokens is 0"):
        lay_out(in_memory({}), 0)
    with pytest.raises(InputError, match="tp is 8, which does not divide the model's 12 heads"):
        lay_out(in_memory({}), 1, 12)


# The KV cache (closed form and examples of the vendor's block table)


@pytest.mark.parametrize(
    ("tokens", "ranks", "block", "held"),
    [
        (1305, 8, 128, [256, 256, 128, 128, 128, 128, 128, 153]),
        (380, 3, 128, [128, 128, 124]),
        (380, 5, 128, [128, 128, 124, 0, 0]),
        (5, 2, 4, [4, 1]),
        (128001, 2, 128, [64000, 64001]),
        (9 * 128, 8, 128, [128] * 7 + [256]),  # a full last block moves as well
    ],
)
def test_tokens_per_rank_of_the_vendors_examples(tokens, ranks, block, held):
    assert tokens_per_rank(tokens, ranks, block) == held


@given(st.integers(1, 5000), st.integers(1, 20), st.sampled_from([1, 16, 128]))
def test_blocks_are_dealt_out_in_turn_and_the_last_one_ends_the_last_rank(tokens, ranks, block):
    owners = block_ranks(tokens, ranks, block)
    assert len(owners) == math.ceil(tokens / block)
    assert owners[:-1] == [number % ranks for number in range(len(owners) - 1)]
    assert owners[-1] == max(owners) == min(len(owners), ranks) - 1
    assert sum(tokens_per_rank(tokens, ranks, block)) == tokens
    most = math.ceil(len(owners) / ranks)
    assert max(map(owners.count, range(ranks))) == most  # so a table of ⌈blocks/S⌉ columns holds all


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_there_is_a_token_a_rank_and_a_block(wrong):
    with pytest.raises(InputError, match="it must be at least 1"):
        block_ranks(*wrong)


# The link


def test_the_links_of_the_vendors_examples():
    assert link_map(tp_p=4, tp_d=2) == {0: [0], 1: [2]}
    assert inverted(link_map(tp_p=4, tp_d=2)) == {0: [0], 2: [1]}
    sixteen = list(range(16))
    assert link_map(tp_p=8, tp_d=1, sp_p=8, cp_p=2) == {0: sixteen}
    assert inverted(link_map(tp_p=8, tp_d=1, sp_p=8, cp_p=2)) == {rank: [0] for rank in sixteen}
    assert link_map(tp_p=8, tp_d=4, sp_p=8, cp_p=2) == dict.fromkeys(range(4), sixteen)
    assert link_map(tp_p=8, tp_d=8, sp_p=1, cp_p=2) == {d: [d, d + 8] for d in range(8)}
    assert link_map(tp_p=2, tp_d=4) == {0: [0], 1: [0], 2: [1], 3: [1]}
    for wrong in ({"tp_p": 4, "tp_d": 3}, {"tp_p": 8, "tp_d": 1, "sp_p": 3}, {"tp_p": 0, "tp_d": 1}):
        with pytest.raises(InputError):
            link_map(**wrong)


@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans(), st.integers(1, 5000)
)
def test_every_decode_rank_gets_every_block_once_and_the_partial_one_last(tp, tp_d, cp, has_sp, tokens):
    prefill = Sizes(tp * cp, 1, cp, tp if has_sp else 1, tp, 1, tp * cp, 1)
    decode = Sizes(tp_d, 1, 1, 1, tp_d, 1, tp_d, 1)
    pulled = transfers(prefill, decode, tokens)
    owners = block_ranks(tokens, prefill.cp * prefill.sp)
    assert pulled.keys() == set(range(tp_d))
    for found in pulled.values():
        assert sorted(transfer.block for transfer in found) == list(range(len(owners)))
        assert [transfer.target for transfer in found] == list(range(len(owners)))
        assert all(transfer.tokens == 128 for transfer in found[:-1])
        assert (found[-1].block, sum(transfer.tokens for transfer in found)) == (len(owners) - 1, tokens)
        for transfer in found:  # each comes from a rank that has it, from the place where it is there
            scp = transfer.source // tp * prefill.sp + (transfer.source % tp if has_sp else 0)
            assert owners[transfer.block] == scp
            assert transfer.slot == owners[: transfer.block].count(scp)


# The mesh


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 4, 2), (2, 1, 4), (1, 1, 8), (8, 1, 1)])
def test_a_group_is_a_line_of_the_mesh(sizes):
    dp, cp, tp = sizes
    s = Sizes(8, dp, cp, tp, tp, 1, 8, 1)
    found = mesh(s)
    ids = np.vectorize(lambda device: device.id)(found.devices)
    assert found.shape == {"dp": dp, "cp": cp, "tp": tp}
    assert ids.reshape(-1, tp).tolist() == groups(s)["attn_tp"]
    assert sorted(ids.transpose(0, 2, 1).reshape(-1, cp).tolist()) == groups(s)["attn_cp"]


def test_a_sum_over_an_axis_is_a_sum_over_the_vendors_group():
    """Each device holds its rank; after a sum over "cp" it holds the sum of its attn_cp group."""
    s = Sizes(8, 1, 2, 4, 4, 1, 8, 1)
    grid = jax.sharding.PartitionSpec(("dp", "cp", "tp"))
    for axis, kind in (("cp", "attn_cp"), ("tp", "attn_tp")):
        summed = jax.shard_map(
            lambda x, axis=axis: jax.lax.psum(x, axis), mesh=mesh(s), in_specs=grid, out_specs=grid, check_vma=False
        )
        expected = {rank: sum(group) for group in groups(s)[kind] for rank in group}
        assert summed(jax.numpy.arange(8)).tolist() == [expected[rank] for rank in range(8)]


def test_a_mesh_needs_its_devices():
    with pytest.raises(InputError, match="has 16 cards but JAX sees 8 device"):
        mesh(SIXTEEN)
    with pytest.raises(InputError, match=r"dp · cp · tp is 16 but worldSize is 8"):
        mesh(SIXTEEN._replace(world_size=8))
