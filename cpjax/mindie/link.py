"""How the KV cache of a prompt gets from a prefill instance to a decode instance.

    which ranks     d ↦ [⌊i·tp_p / sp_p⌋ for i in 0 … sp_p·cp_p − 1]                          if sp_p ≠ 1
                    d ↦ [base(d) + k·tp_p for k in 0 … cp_p − 1],  base(d) = d·tp_p / tp_d     otherwise

(generate_link_map in mindie_llm/model_wrapper/utils/config.py of Ascend/MindIE-LLM.) Every decode rank fetches the
whole prompt: DeepSeek's latent cache is the same for all heads. It fetches rank by rank, and stores what
comes in consecutive blocks of its own (request_router/router_impl.py), so its order of blocks is not the prompt's.
Attention does not mind: a key carries its rotary position in it, and a decode query may see every key. One thing must
hold: the block that is only partly filled has to be the last. It is, because a prompt's last block lives on the last
rank that has any (kv_cache.py). Whoever changes one of the two rules must change both.
"""

from pathlib import Path
from typing import NamedTuple

from cpjax.errors import InputError
from cpjax.mindie.deployment import Deployment, Sizes, read_deployment
from cpjax.mindie.text_file import printable
from cpjax.partition.kv_cache import BLOCK, block_ranks


class Transfer(NamedTuple):
    """One block of the prompt: where it is on the prefill side, and where a decode rank stores it."""

    block: int  # of the prompt
    source: int  # rank of the prefill instance
    slot: int  # its place among the prompt's blocks there
    target: int  # its place among the prompt's blocks on the decode rank
    tokens: int


def read_pair(prefill: Path, decode: Path | None, nodes: int | None = None) -> tuple[Deployment, Deployment]:
    """The two deployments: of two configs, or (decode None) of MindIE-Motor's user_config.json.

    Raises:
      InputError: what cannot be read; or the decode side has what only a prefill side may have, as when the two are
        exchanged.
    """
    p = read_deployment(prefill, nodes, "prefill")
    if decode is None and p.file.role is None:
        raise InputError(f"{printable(prefill)}: is the config of one instance; give that of the decode instance too")
    d = read_deployment(prefill if decode is None else decode, nodes, "decode")
    found = [f"{size} {getattr(d.sizes, size)}" for size in ("cp", "sp") if getattr(d.sizes, size) > 1]
    found += ["prefix_cache"] * ("prefix_cache" in d.plugins)
    if found:
        raise InputError(
            f"{printable(d.path)}: has {', '.join(found)}, which only a prefill node may have (context_parallel.md, "
            "sequence_parallel.md, prefix_cache.md); if the two configs are exchanged, give the prefill one first"
        )
    if p.is_distributed and not d.is_distributed:
        raise InputError(
            f"{printable(p.path)}: has distributedEnable, as decode nodes do, and {printable(d.path)} has not; if the "
            "two configs are exchanged, give the prefill one first"
        )
    return p, d


def link_map(tp_p: int, tp_d: int, sp_p: int = 1, cp_p: int = 1) -> dict[int, list[int]]:
    """Tp rank of the decode side → the ranks of the prefill side that it fetches from, in this order.

    >>> link_map(tp_p=4, tp_d=2)
    {0: [0], 1: [2]}

    Raises:
      InputError: sizes that do not fit; the server refuses them when it links.
    """
    for name, value in (("tp_p", tp_p), ("tp_d", tp_d), ("sp_p", sp_p), ("cp_p", cp_p)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if sp_p != 1:
        if tp_p % sp_p:
            raise InputError(f"the prefill node's tp is {tp_p} and its sp {sp_p}; sp must divide tp")
        return {d: [i * tp_p // sp_p for i in range(sp_p * cp_p)] for d in range(tp_d)}
    small, large = sorted((tp_p, tp_d))
    if large % small:
        raise InputError(f"tp is {tp_p} on the prefill node and {tp_d} on the decode node; one must divide the other")
    return {d: [d * tp_p // tp_d + k * tp_p for k in range(cp_p)] for d in range(tp_d)}


def inverted(links: dict[int, list[int]]) -> dict[int, list[int]]:
    """The same links as the prefill side has them: rank → the decode ranks that fetch from it.

    >>> inverted({0: [0], 1: [2]})
    {0: [0], 2: [1]}
    """
    found: dict[int, list[int]] = {}
    for d, sources in links.items():
        for p in sources:
            found.setdefault(p, []).append(d)
    return found


def transfers(prefill: Sizes, decode: Sizes, tokens: int, block: int = BLOCK) -> dict[int, list[Transfer]]:
    """For each tp rank of the decode side, what it fetches, in the order in which it stores it.

    Args:
      tokens: of the prompt. (The server counts ⌈(length − 1)/128⌉ blocks of a request that has its first new token.)

    Raises:
      InputError: sizes that cannot be linked.
    """
    links = link_map(prefill.tp, decode.tp, prefill.sp, prefill.cp)
    owners = block_ranks(tokens, prefill.cp * prefill.sp, block)
    held = [[b for b, owner in enumerate(owners) if owner == scp] for scp in range(prefill.cp * prefill.sp)]
    found: dict[int, list[Transfer]] = {}
    for d, sources in links.items():
        pulled = [(source, slot, b) for source, own in zip(sources, held, strict=True) for slot, b in enumerate(own)]
        found[d] = [
            Transfer(b, source, slot, target, min(block, tokens - b * block))
            for target, (source, slot, b) in enumerate(pulled)
        ]
    return found
