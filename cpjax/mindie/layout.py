"""Where each card stands: its coordinates, the groups it is in, the heads, tokens and cache blocks that it holds.

Two constructors make all groups (mapping.py of Ascend/MindIE-LLM): a contiguous group of size g is g neighbours, a
strided one is every (W/g)-th rank, W the number of cards.

    attn_tp, attn_inner_sp, moe_tp      contiguous      share the heads, the cache, the experts' matrices
    attn_dp, attn_cp, moe_ep            strided         share the requests, the sequence, the experts
    mlp_tp, lm_head_tp                  all ranks       share the dense layers' matrices, the vocabulary
    attn_prefix_cache_cp                all ranks       fetch a cached prefix from each other

With backend torch (parallel_info_manager.py) mlp_tp and lm_head_tp are tp neighbours. Not here: the other lm_head_tp
that atb_llm makes where DP_PARTITION_UP_ENABLE is set, which no config says.
"""

import math
from typing import NamedTuple

from cpjax.errors import InputError
from cpjax.mindie.deployment import Deployment, Sizes
from cpjax.mindie.models import local_heads
from cpjax.partition.kv_cache import block_ranks
from cpjax.partition.zigzag import Zigzag

Groups = list[list[int]]


class Card(NamedTuple):
    """One rank. Coordinates count from 0; ranges are `(start, end)`."""

    rank: int
    pp: int
    dp: int
    cp: int
    tp: int
    sp: int
    moe_ep: int
    moe_tp: int
    scp: int  # place among the cp·sp ranks that share one cache
    heads: tuple[int, int] | None  # None: the model is not known here
    tokens: tuple[tuple[int, int], ...]  # the two zigzag chunks, or the whole prompt without cp
    blocks: tuple[int, ...]  # of the prompt, 128 tokens each


class Layout(NamedTuple):
    """A deployment laid out for one prompt of `tokens` tokens, of which `padded` are computed."""

    sizes: Sizes
    groups: dict[str, Groups]
    cards: list[Card]
    tokens: int
    padded: int
    block: int  # tokens of a cache block


def contiguous(world: int, size: int) -> Groups:
    """Groups of neighbouring ranks.

    >>> contiguous(4, 2)
    [[0, 1], [2, 3]]
    """
    return [list(range(start, start + size)) for start in range(0, world, size)]


def strided(world: int, size: int) -> Groups:
    """Groups of every (world/size)-th rank.

    >>> strided(4, 2)
    [[0, 2], [1, 3]]
    """
    return [list(range(start, world, world // size)) for start in range(world // size)]


def groups(sizes: Sizes, is_torch: bool = False) -> dict[str, Groups]:
    """All groups of each kind; each kind partitions the world. Every rank creates them in this order, kind by kind."""
    world = sizes.world_size
    dense = sizes.tp if is_torch else world
    return {
        "attn_dp": strided(world, sizes.dp),
        "attn_tp": contiguous(world, sizes.tp),
        "attn_cp": strided(world, sizes.cp),
        "attn_inner_sp": contiguous(world, sizes.sp),
        "moe_ep": strided(world, sizes.moe_ep),
        "moe_tp": contiguous(world, sizes.moe_tp),
        "mlp_tp": contiguous(world, dense),
        "lm_head_tp": contiguous(world, dense),
        "attn_prefix_cache_cp": contiguous(world, world),
    }


def lay_out(deployment: Deployment, tokens: int, heads: int | None = None, block: int = 128) -> Layout:
    """What each card of a deployment holds of one prompt.

    Args:
      deployment: its sizes must fit together (rules.py); cp may be above 2.
      tokens: of the prompt; it is padded to a multiple of 2·cp.
      heads: query heads of the model; None: not known.

    Raises:
      InputError: sizes that cannot be laid out, or heads that tp does not divide.
    """
    sizes = deployment.sizes
    _refuse_misfits(sizes)
    share = None if heads is None else local_heads(heads, sizes.tp)
    if tokens < 1:
        raise InputError(f"tokens is {tokens}; a prompt has at least 1")
    padded = -(-tokens // (2 * sizes.cp)) * 2 * sizes.cp if sizes.cp > 1 else tokens
    owners = block_ranks(tokens, sizes.cp * sizes.sp, block)
    cards = [_card(sizes, rank, share, padded, owners) for rank in range(sizes.world_size)]
    return Layout(sizes, groups(sizes, deployment.is_torch), cards, tokens, padded, block)


def _refuse_misfits(sizes: Sizes) -> None:
    world, hint = sizes.world_size, "see cpjax mindie check"
    if min(sizes) < 1:
        raise InputError(f"{sizes._fields[sizes.index(min(sizes))]} is {min(sizes)}; it must be at least 1; {hint}")
    if sum(size > 1 for size in (sizes.cp, sizes.dp, sizes.pp)) > 1:
        raise InputError(f"cp is {sizes.cp}, dp {sizes.dp} and pp {sizes.pp}; only one may be above 1; {hint}")
    moe = ("moe_ep", "moe_tp")
    for names in (("cp", "dp", "tp"), moe) if sizes.pp == 1 else (("pp", "tp"), moe[:1], moe[1:]):
        product = math.prod(getattr(sizes, name) for name in names)
        if world % product or (product != world and len(names) > 1):
            given = " · ".join(f"{name} {getattr(sizes, name)}" for name in names)
            raise InputError(f"{given} is {product} but worldSize is {world}; they must fit; {hint}")
    if sizes.sp > 1 and sizes.sp != sizes.tp:
        raise InputError(f"sp is {sizes.sp} and tp is {sizes.tp}; sp must be tp, or 1; {hint}")


def _card(sizes: Sizes, rank: int, share: int | None, padded: int, owners: list[int]) -> Card:
    world = sizes.world_size
    cp, tp, sp = rank // (world // sizes.cp), rank % sizes.tp, rank % sizes.sp
    scp, chunk = cp * sizes.sp + sp, padded // (2 * sizes.cp)
    chunks = Zigzag(sizes.cp).held_chunks(cp) if sizes.cp > 1 else ()
    return Card(
        rank=rank,
        pp=rank // sizes.tp if sizes.pp > 1 else 0,
        dp=rank // (world // sizes.dp),
        cp=cp,
        tp=tp,
        sp=sp,
        moe_ep=rank // (world // sizes.moe_ep),
        moe_tp=rank % sizes.moe_tp,
        scp=scp,
        heads=None if share is None else (tp * share, (tp + 1) * share),
        tokens=tuple((c * chunk, (c + 1) * chunk) for c in chunks) or ((0, padded),),
        blocks=tuple(number for number, owner in enumerate(owners) if owner == scp),
    )


def as_json(layout: Layout) -> list[dict]:
    """One object per rank: `{"rank": …, "groups": {kind: [ranks]}, "index": {kind: place in that group}}`."""
    home: dict[str, dict[int, list[int]]] = {
        kind: {rank: group for group in found for rank in group} for kind, found in layout.groups.items()
    }
    return [
        {
            "rank": card.rank,
            "groups": {kind: home[kind][card.rank] for kind in home},
            "index": {kind: home[kind][card.rank].index(card.rank) for kind in home},
        }
        for card in layout.cards
    ]


def short(numbers: tuple[int, ...], most: int) -> str:
    """Numbers with commas, the middle left out where there are more than `most`.

    >>> short((0, 8, 16, 24, 32), 3)
    '0, 8 … 32 (5)'
    """
    if len(numbers) <= most:
        return ", ".join(map(str, numbers)) or "none"
    return f"{', '.join(map(str, numbers[: most - 1]))} … {numbers[-1]} ({len(numbers)})"
