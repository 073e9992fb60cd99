"""Context-parallel attention, for one rank. The queries stay; keys and values come to them.

    for each step:   what the exchange brings at this step (the next is already on its way)
                     make keys and values of it, if it is a latent
                     compute my chunks of queries against the chunks of keys
    at last:         the cached prefix, which all queries of its request see whole

The places of the tokens travel with them, and are compared with the schedule before they are used; that a block is of
this case and step, the link has seen by its stamp.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from npu_backend.errors import RankError
from npu_backend.exchange import Held, Link, Report, travel
from npu_backend.families import FAMILIES, Family
from npu_backend.latent import PREFIX, Made, UpProjection, expand, latents_of
from npu_backend.operators import Partial
from npu_backend.packing import held_rows, indices
from npu_backend.schedule import Block, Exchange, blocks, chunk_count, held_chunks, source, tokens_in_chunk
from npu_backend.shard import PAD, Requests, Shard


class Ring(NamedTuple):
    """Who I am, and the problem that all ranks share."""

    rank: int
    cp: int
    is_causal: bool
    scale: float
    requests: Requests
    digest: str  # the case's: what travels is stamped with it
    exchange: Exchange = Exchange()
    family: Family = FAMILIES["ring_mla"]
    up: UpProjection | None = None  # if what travels are latents


class Clock(NamedTuple):
    """Seconds of each step: all of it, and of that computing and waiting for keys and values."""

    step: list[float]
    compute: list[float]
    waited: list[float]


def ring_attention(
    ring: Ring,
    shard: Shard,
    device: torch.device,
    report: Report,
    prefix: tuple[Tensor, ...] | None = None,
) -> tuple[Partial, Clock, Made]:
    """Attention of the rank's queries over all keys: `out` `[B, t, N, V]`, `lse` `[B, t, N]`; seconds per step.

    The default process group has cp ranks; `prefix` is of `gather_prefix`. Outputs of pads are arbitrary. Also returned
    is what was made of latents; nothing if keys and values travel.

    Raises:
      RankError: keys arrived that the schedule does not say, or of another case.
      LinkError: a transfer failed.
    """
    query = torch.from_numpy(shard.query).to(device)
    first, last, recovery = (torch.from_numpy(x).to(device) for x in indices(ring.requests.chunk_lengths, ring.cp)[:3])
    halves = (first, last)[: len(held_chunks(ring.rank, ring.cp))]
    queries = dict(zip(held_chunks(ring.rank, ring.cp), (query.index_select(1, half) for half in halves), strict=True))
    carried: dict[int, list[Any]] = {chunk: [None] * len(ring.requests.chunk_lengths) for chunk in queries}
    link, clock, made = Link(ring.rank, ring.cp, report, ring.digest), Clock([], [], []), Made()
    arrivals = travel(ring.exchange, link, held_by(shard, device))
    for step in range(ring.cp):
        started, waits = time.perf_counter(), len(link.waited)
        held = next(arrivals)
        check_places(ring, step, held.places)
        arrived = time.perf_counter()
        report("compute", step)
        key_value = _key_value(ring, held.rows, latents_of(source(ring.rank, step, ring.cp, ring.exchange)), made)
        for block in blocks(ring.rank, step, ring.cp, is_causal=ring.is_causal, exchange=ring.exchange):
            report("compute", step)
            _attend(ring, step, block, queries[block.query_chunk], key_value, halves, carried[block.query_chunk])
        if step == ring.cp - 1 and prefix is not None:
            cached = _key_value(ring, prefix, PREFIX, made)
            for chunk in queries:
                report("compute", step)
                _attend_prefix(ring, queries[chunk], cached, carried[chunk])
        torch.get_device_module(device).synchronize()
        ended = time.perf_counter()
        clock.step.append(ended - started)
        clock.compute.append(ended - arrived)
        clock.waited.append(sum(link.waited[waits:]))
    parts = [ring.family.finish(x) for chunk in queries for x in carried[chunk]]
    joined = (torch.cat(x, dim=1).index_select(1, recovery) for x in zip(*parts, strict=True))
    return type(parts[0])(*joined), clock, made


def held_by(shard: Shard, device: torch.device) -> Held:
    """What this rank gives to the others."""
    position, segment, *rows = (torch.from_numpy(x).to(device) for x in (shard.position, shard.segment, *shard.rows))
    return Held(tuple(rows), torch.stack([position, segment]))


def _key_value(ring: Ring, rows: tuple[Tensor, ...], of: str, made: Made) -> tuple[Tensor, ...]:
    """Keys and values: what travelled, or what is made of it, which is noted."""
    if ring.up is None:
        return rows
    made[of] = expand(rows[0], ring.up)
    return made[of]


def _attend(
    ring: Ring,
    step: int,
    block: Block,
    query: Tensor,
    key_value: tuple[Tensor, ...],
    halves: tuple[Tensor, ...],
    carried: list,
) -> None:
    """One block: a chunk of queries against one of the chunks that are held, for each request of the pack."""
    sender = source(ring.rank, step, ring.cp, ring.exchange)
    half = halves[held_chunks(sender, ring.cp).index(block.kv_chunk)]
    sizes = list(ring.requests.chunk_lengths)
    parts = (x.split(sizes, dim=1) for x in (query, *(x.index_select(1, half) for x in key_value)))
    for i, (q, k, v) in enumerate(zip(*parts, strict=True)):
        # Causal: a pad comes after every real token, so no real query sees it. Otherwise it must not be passed at all.
        kv_lengths = None if ring.is_causal else tokens_in_chunk(block.kv_chunk, sizes[i], ring.requests.lengths[i])
        is_triangle = block.mask == "triu"
        carried[i] = ring.family.attend(
            carried[i], q, k, v, is_causal=is_triangle, scale=ring.scale, kv_lengths=kv_lengths
        )


def _attend_prefix(ring: Ring, query: Tensor, prefix: tuple[Tensor, ...], carried: list) -> None:
    lengths = list(ring.requests.prefix_lengths)
    parts = (query.split(list(ring.requests.chunk_lengths), dim=1), *(x.split(lengths, dim=1) for x in prefix))
    for i, (q, k, v) in enumerate(zip(*parts, strict=True)):
        if k.shape[1]:
            carried[i] = ring.family.attend(carried[i], q, k, v, is_causal=False, scale=ring.scale, kv_lengths=None)


def check_places(ring: Ring, step: int, places: Tensor) -> None:
    """Compare the places that came with keys with those of the rank whose turn it is. Positions of pads are free.

    Raises:
      RankError: it names the step and the first difference.
    """
    position, segment = places.cpu().numpy()
    sender = source(ring.rank, step, ring.cp, ring.exchange)
    want_position, want_segment = _places(ring.requests, ring.cp)
    rows = held_rows(sender, ring.cp, ring.requests.chunk_lengths)
    want_position, want_segment = want_position[:, rows], want_segment[:, rows]
    # In a pack requests are told apart by their segments; one request a row may have any.
    is_pack = len(ring.requests.lengths) > 1
    same_segment = segment == want_segment if is_pack else (segment != PAD) == (want_segment != PAD)
    wrong = ~same_segment | ((want_segment != PAD) & (position != want_position))
    if wrong.any():
        b, i = np.argwhere(wrong)[0]
        raise RankError(
            f"step {step}: a wrong block; its row {i} of batch row {b} is at position {position[b, i]} (segment "
            f"{segment[b, i]}), but rank {sender} holds position {want_position[b, i]} "
            f"(segment {want_segment[b, i]}) there"
        )


def _places(requests: Requests, cp: int) -> tuple[np.ndarray, np.ndarray]:
    """Position and segment of every token of the case, `[B, T]` each."""
    positions, segments = [], []
    for i, (chunk, lengths) in enumerate(zip(requests.chunk_lengths, requests.lengths, strict=True)):
        index = np.broadcast_to(np.arange(chunk_count(cp) * chunk), (len(lengths), chunk_count(cp) * chunk))
        positions.append(index + requests.prefix_lengths[i])
        segments.append(np.where(index < np.array(lengths)[:, None], i, PAD))
    return np.concatenate(positions, axis=1), np.concatenate(segments, axis=1)
