"""Decode: a few new tokens per request over a KV cache that is cut by tokens. The cache stays; results are exchanged.

    every rank       attention of all queries over the cached tokens that it holds: (out, lse), (0, −inf) without any
    exchange         all gather the partials of all
    every rank       merges them, in the order of the ranks

Cache blocks of 128 tokens are where MindIE puts those of a prompt: block b on rank b mod cp, the last block on the last
rank if at least cp blocks stand before it (AllocateBlocksForTokenIdsSmallRankFirst; cp is here cp·sp of MindIE). The
new tokens are in the cache already and count as the prompt's; blocks that a long decode appends elsewhere are not
modelled.

vLLM-Ascend does both in another way (`engine`): token i of a request is on rank (i // interleave) mod cp, and its ranks
exchange by heads (decode_by_heads.py).

Of several new tokens each is passed as a request of its own, which sees the rank's tokens up to its own position: these
are the first so many of the rank, so no operator needs a mask.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from npu_backend.contracts.latent import LATENT
from npu_backend.decode_by_heads import check_tags, exchange_by_heads
from npu_backend.exchange import Held, Link, Report
from npu_backend.families import Family, merge_all
from npu_backend.files import Case
from npu_backend.operators import Partial, latent_decode
from npu_backend.operators.partial import nothing
from npu_backend.prefix import BLOCK

MERGES = ("attention-update", "without-maximum")
LSES = ("float32", "float16")
ENGINES = ("mindie", "vllm-ascend")


class Decoding(NamedTuple):
    """What is lost on the way; nothing by default. MindIE loses both."""

    lse: str = "float32"  # or "float16": how lse travels
    merge: str = "attention-update"  # or "without-maximum": Σ e^lse out / Σ e^lse, which overflows at lse 88.7
    engine: str = "mindie"  # or "vllm-ascend": whose cache and exchange
    interleave: int = 1  # vllm-ascend: tokens that follow each other on one rank, its cp_kv_cache_interleave_size


def held_tokens(length: int, rank: int, cp: int, decoding: Decoding = Decoding()) -> np.ndarray:  # noqa: B008
    """The positions of a request of so many tokens that a rank's cache holds, ascending.

    >>> [held_tokens(1305, rank, cp=8).size for rank in range(8)]
    [256, 256, 128, 128, 128, 128, 128, 153]
    >>> held_tokens(9, 1, 2, Decoding(engine="vllm-ascend", interleave=2))
    array([2, 3, 6, 7])
    """
    if decoding.engine == "vllm-ascend":
        return np.flatnonzero(np.arange(length) // decoding.interleave % cp == rank)
    blocks = -(-length // BLOCK)
    owner = np.arange(blocks) % cp
    if blocks > cp:
        owner[-1] = cp - 1
    return np.flatnonzero(np.repeat(owner == rank, BLOCK)[:length])


def seen_lengths(case: Case, rank: int, decoding: Decoding = Decoding()) -> tuple[int, ...]:  # noqa: B008
    """Of each query of the case, how many of the rank's tokens it sees: the first so many."""
    lengths = np.bincount(case.kv_segment[0])
    held = [held_tokens(int(n), rank, case.cp, decoding) for n in lengths]
    places = zip(case.q_segment[0], case.q_position[0], strict=True)
    return tuple(int(np.searchsorted(held[i], p, side="right")) for i, p in places)


def decode_attention(
    case: Case, rank: int, family: Family, decoding: Decoding, device: torch.device, report: Report
) -> tuple[Partial, float, float]:
    """Attention of all queries of the case, the same on every rank: out `[1, T, N, V]`; seconds computing and waiting.

    The default process group has cp ranks.

    Raises:
      RankError: a partial of another case, of another rank, or over other tokens than the rank's.
      LinkError: the exchange failed.
    """
    started = time.perf_counter()
    report("compute", 0)
    mine = partial_of(case, rank, family, device, decoding)
    computed = time.perf_counter()
    link = Link(rank, case.cp, report, case.digest)
    tags = [torch.tensor(_tag(case, r, decoding), dtype=torch.int32, device=device) for r in range(case.cp)]
    if decoding.engine == "vllm-ascend":
        merged = exchange_by_heads(link, mine, tags)
        by_token = Partial(merged.out.transpose(0, 1), merged.lse.transpose(0, 1))
        return by_token, computed - started, sum(link.waited)
    lse = mine.lse.half() if decoding.lse == "float16" else mine.lse
    sent = Held((mine.out, lse), tags[rank])
    arrived = link.gather(sent) if case.cp > 1 else [sent]
    check_tags(arrived, tags)
    merged = merge([Partial(out, lse.float()) for (out, lse), _ in arrived], decoding.merge)
    by_token = Partial(merged.out.transpose(0, 1), merged.lse.transpose(0, 1))
    return by_token, computed - started, sum(link.waited)


def _tag(case: Case, rank: int, decoding: Decoding) -> list[int]:
    """What travels with a partial: whose it is, and how many tokens each query saw there."""
    return [rank, *seen_lengths(case, rank, decoding)]


def merge(partials: list[Partial], how: str) -> Partial:
    """All partials in one, as FP16 out and float32 lse; `how` is one of MERGES.

    without-maximum is ATB's FaUpdate, which MindIE's decode calls and torch_npu does not offer: e^lse in float32 as it
    is, infinite above 88.72 and 0 below −103.97, so that out is NaN.
    """
    if how == "attention-update":
        return merge_all(tuple(partials))
    weights = torch.stack([p.lse for p in partials]).exp()
    total = weights.sum(dim=0)
    out = sum(w[..., None] / total[..., None] * p.out.float() for w, p in zip(weights, partials, strict=True))
    assert isinstance(out, Tensor)
    return Partial(out.half(), total.log())


def partial_of(
    case: Case,
    rank: int,
    family: Family,
    device: torch.device,
    decoding: Decoding = Decoding(),  # noqa: B008
) -> Partial:
    """Attention of all queries over the tokens that this rank holds, `[T, 1, N, V]`: each query a request."""
    query = torch.from_numpy(case.query[0][:, None]).to(device)
    seen = seen_lengths(case, rank, decoding)
    if not any(seen):
        return nothing(query, case.value_dim)
    starts = np.cumsum((0, *np.bincount(case.kv_segment[0])))
    counts = zip(starts, np.diff(starts), strict=False)
    rows = [start + held_tokens(int(n), rank, case.cp, decoding) for start, n in counts]
    if family.name == "ring_mla":
        return _over_pages(case, query, rows, seen)
    most = max(seen)
    index = np.zeros((len(seen), most), np.int64)  # what is beyond a query's length is not read
    for i, (request, n) in enumerate(zip(case.q_segment[0], seen, strict=True)):
        index[i, :n] = rows[request][:n]
    key, value = (torch.from_numpy(x[0][index]).to(device) for x in case.rows)
    carried = family.attend(None, query, key, value, is_causal=False, scale=case.scale, kv_lengths=seen)
    return family.finish(carried)


def _over_pages(case: Case, query: Tensor, rows: list[np.ndarray], seen: tuple[int, ...]) -> Partial:
    """By the operator over the paged latent: the tokens of each request in pages, the last one partly filled."""
    counts = [-(-len(mine) // BLOCK) for mine in rows]
    latent = case.rows[0]
    pages = np.zeros((sum(counts) * BLOCK, *latent.shape[2:]), np.float16)
    table = np.full((len(rows), max(counts)), -1, np.int32)
    first = 0
    for i, (mine, count) in enumerate(zip(rows, counts, strict=True)):
        pages[first * BLOCK :][: len(mine)] = latent[0, mine]
        table[i, :count] = first + np.arange(count)
        first += count
    cache = torch.from_numpy(pages).to(query.device).unflatten(0, (-1, BLOCK))
    return latent_decode(
        query,
        cache[..., :LATENT].contiguous(),
        cache[..., LATENT:].contiguous(),
        torch.from_numpy(table[case.q_segment[0]]).to(query.device),
        kv_lengths=seen,
        scale=case.scale,
    )
