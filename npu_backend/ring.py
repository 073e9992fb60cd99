"""Ring attention, for one rank. The queries stay; keys and values go round.

    step s:   start passing what I hold to rank r + 1, and receiving from rank r − 1
              compute my two query chunks against the two chunks I hold
              wait for the transfer; what has arrived is what I hold now

cp steps, cp − 1 transfers. The transfer runs while the blocks are computed, so it costs time only where it is longer.
The places of the tokens travel with them, and are compared with the schedule before they are used.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from npu_backend.errors import LinkError, RankError
from npu_backend.operators import Partial, ring_mla_block
from npu_backend.schedule import Block, blocks, held_chunks, source, tokens_in_chunk
from npu_backend.shard import PAD, Shard

Report = Callable[[str, int], None]
"""Called with what the rank begins to do ("compute", "wait") and at which step."""


class KeyValues(NamedTuple):
    """What travels: keys and values of one rank, and where their tokens are."""

    key: Tensor  # [B, t, K, 192] float16
    value: Tensor  # [B, t, K, 128] float16
    places: Tensor  # [2, B, t] int32: positions, segments


class Ring(NamedTuple):
    """Who I am, and the problem that all ranks share."""

    rank: int
    cp: int
    is_causal: bool
    scale: float
    lengths: tuple[int, ...]  # real tokens per request


def ring_attention(ring: Ring, shard: Shard, device: torch.device, report: Report) -> tuple[Partial, list[float]]:
    """Attention of the rank's queries over all keys: `out` `[B, t, N, 128]`, `lse` `[B, t, N]`; seconds per step.

    The default process group has cp ranks. Outputs of pads are arbitrary.

    Raises:
      RankError: a block arrived that the schedule does not say.
      LinkError: a transfer failed.
    """
    query, key, value, position, segment = (torch.from_numpy(x).to(device) for x in shard)
    held = KeyValues(key, value, torch.stack([position, segment]))
    query_chunks = dict(zip(held_chunks(ring.rank, ring.cp), query.chunk(2, dim=1), strict=True))
    carried: dict[int, Partial] = {}
    seconds = []
    for step in range(ring.cp):
        started = time.perf_counter()
        transfer = _start_transfer(ring, step, held) if step < ring.cp - 1 else None
        check_places(ring, step, held.places)
        for block in blocks(ring.rank, step, ring.cp, is_causal=ring.is_causal):
            report("compute", step)
            previous = None if block.first else carried[block.query_chunk]
            carried[block.query_chunk] = _attend(ring, step, block, query_chunks[block.query_chunk], held, previous)
        if transfer is not None:
            report("wait", step)
            held = _arrived(ring, step, transfer)
        torch.get_device_module(device).synchronize()
        seconds.append(time.perf_counter() - started)
    early, late = (carried[chunk] for chunk in query_chunks)
    return Partial(torch.cat([early.out, late.out], dim=1), torch.cat([early.lse, late.lse], dim=1)), seconds


def _attend(ring: Ring, step: int, block: Block, query: Tensor, held: KeyValues, previous: Partial | None) -> Partial:
    """One block: a query chunk against one of the two chunks that are held."""
    half = held_chunks(source(ring.rank, step, ring.cp), ring.cp).index(block.kv_chunk)
    key, value = held.key.chunk(2, dim=1)[half], held.value.chunk(2, dim=1)[half]
    # Causal: a pad comes after every real token, so no real query sees it. Otherwise it must not be passed at all.
    pads_hidden = ring.is_causal
    kv_lengths = None if pads_hidden else tokens_in_chunk(block.kv_chunk, key.shape[1], ring.lengths)
    is_triangle = block.mask == "triu"
    return ring_mla_block(
        query, key, value, is_causal=is_triangle, scale=ring.scale, kv_lengths=kv_lengths, previous=previous
    )


class _Transfer(NamedTuple):
    leaving: KeyValues  # must not be freed while it is sent
    arriving: KeyValues  # must not be read before the works are done
    works: list[dist.Work]


def _start_transfer(ring: Ring, step: int, held: KeyValues) -> _Transfer:
    """Begin to send what is held to the next rank and to receive from the previous one."""
    leaving = KeyValues(*(x.contiguous() for x in held))
    arriving = KeyValues(*(torch.empty_like(x) for x in leaving))
    send = [dist.P2POp(dist.isend, x, (ring.rank + 1) % ring.cp) for x in leaving]
    receive = [dist.P2POp(dist.irecv, x, (ring.rank - 1) % ring.cp) for x in arriving]
    try:
        return _Transfer(leaving, arriving, dist.batch_isend_irecv(send + receive))
    except RuntimeError as error:
        raise _link_error(ring, step, error) from error


def _arrived(ring: Ring, step: int, transfer: _Transfer) -> KeyValues:
    try:
        for work in transfer.works:
            work.wait()
    except RuntimeError as error:
        raise _link_error(ring, step, error) from error
    return transfer.arriving


def _link_error(ring: Ring, step: int, error: RuntimeError) -> LinkError:
    neighbours = f"from rank {(ring.rank - 1) % ring.cp} or to rank {(ring.rank + 1) % ring.cp}"
    return LinkError(f"step {step}: the transfer {neighbours} failed ({next(iter(str(error).splitlines()), '')})")


def check_places(ring: Ring, step: int, places: Tensor) -> None:
    """Compare the places that came with a block with those of the rank whose turn it is. Positions of pads are free.

    Raises:
      RankError: it names the step and the first difference.
    """
    position, segment = places.cpu()
    sender = source(ring.rank, step, ring.cp)
    chunk_length = position.shape[1] // 2
    index = torch.cat([torch.arange(c * chunk_length, (c + 1) * chunk_length) for c in held_chunks(sender, ring.cp)])
    real = index < torch.tensor(ring.lengths)[:, None]
    wrong = ((segment != PAD) != real) | (real & (position != index))
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        raise RankError(
            f"step {step}: a wrong block; its row {i} of request {b} is at position {position[b, i]} "
            f"(segment {segment[b, i]}), but rank {sender} holds position {index[i]} there"
        )
