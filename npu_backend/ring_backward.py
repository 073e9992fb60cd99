"""The gradient of context-parallel attention, for one rank: family 3, exchange "ring".

    for each step:   keys and values as in the forward ring (the next are already on their way)
                     compute what my queries give to them: a part of dq, dk, dv
                     add dk and dv to what came with them, and pass the sum on, while the next step computes
    at last:         the sums of my own keys come home from the rank that had them last

npu_fusion_attention_grad is called for the same blocks as npu_fusion_attention was, each time with the out, maximum and
sum over all keys, so that the parts add up (flash_backward.py). The sums of keys travel with the places of their
tokens, which are compared with the schedule as those of the keys are.

MindSpeed (AttentionWithCp.backward of ring_context_parallel.py, as in Ascend/MindSpeed-Core-MS, commit 100185d1526f)
walks the ring the other way round from where its forward ended, which spares it the last transfer, joins the two
halves of a chunk pair in one call where it can, and sums in the dtype of the inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from npu_backend.errors import InputError
from npu_backend.exchange import Held, Link, Report, Transfer, travel
from npu_backend.operators import BlockGradients, Carried, fusion_block_backward
from npu_backend.packing import indices
from npu_backend.ring import Ring, check_places, held_by, ring_attention
from npu_backend.schedule import Block, blocks, held_chunks, source, tokens_in_chunk
from npu_backend.shard import PAD, Shard


def ring_forward(ring: Ring, shard: Shard, device: torch.device, report: Report) -> Carried:
    """`ring_attention`, with what the gradient needs of it: out, maximum and sum of the rank's queries."""
    _check(ring)
    carries = ring.family._replace(finish=lambda carried: carried)
    carried, _, _ = ring_attention(ring._replace(family=carries), shard, device, report)
    assert isinstance(carried, Carried)
    return carried


def ring_backward(
    ring: Ring,
    shard: Shard,
    carried: Carried,
    dy: Tensor,
    device: torch.device,
    report: Report,
    *,
    sums: torch.dtype = torch.float32,
) -> BlockGradients:
    """Gradients of the rank's queries, keys and values, `[B, t, …]` in the dtype of the inputs; of pads 0.

    Args:
      ring, shard, device, report: as the forward got them.
      carried: of `ring_forward`.
      dy: gradient of the output, `[B, t, N, V]`; what it holds for pads does not count.
      sums: in which the parts are added. float32 rounds once, at the end; MindSpeed has the dtype of the inputs.

    Raises:
      InputError: another family or exchange, latents, a cached prefix.
      RankError: keys or sums arrived that the schedule does not say, or of another case.
      LinkError: a transfer failed.
    """
    _check(ring)
    real = torch.from_numpy(shard.segment != PAD).to(device)[..., None, None]
    mine = held_by(shard, device)
    query = torch.from_numpy(shard.query).to(device)
    side = _Queries(query, torch.where(real, dy, 0), carried)
    first, last, *_ = (torch.from_numpy(x).to(device) for x in indices(ring.requests.chunk_lengths, ring.cp))
    halves = first, last
    dq = torch.zeros_like(query, dtype=sums)
    link = Link(ring.rank, ring.cp, report, ring.digest)
    arrivals = travel(ring.exchange, link, mine)
    passed: Transfer | None = None
    for step in range(ring.cp):
        held = next(arrivals)
        check_places(ring, step, held.places)
        part = tuple(torch.zeros_like(x, dtype=sums) for x in held.rows)
        for block in blocks(ring.rank, step, ring.cp, is_causal=ring.is_causal, exchange=ring.exchange):
            report("compute", step)
            _differentiate(ring, step, block, side, held.rows, halves, (dq, *part))
        if passed is not None:
            came = link.wait(ring.cp + step, passed)
            check_places(ring, step, came.places)
            part = tuple(x + y for x, y in zip(came.rows, part, strict=True))
        if ring.cp == 1:
            return _finished(query, dq, *part)
        # Stamped with a step of its own: a sum must not be taken for keys.
        to, sender = ((ring.rank + shift) % ring.cp for shift in (1, -1))
        passed = link.start(ring.cp + step, Held(part, held.places), to=to, source=sender)
    assert passed is not None
    home = link.wait(2 * ring.cp, passed)
    check_places(ring, 0, home.places)
    return _finished(query, dq, *home.rows)


class _Queries(NamedTuple):
    """What belongs to the rank's queries, `[B, t, …]` each."""

    query: Tensor
    dy: Tensor
    carried: Carried

    def of(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.index_select(1, rows) for x in (self.query, self.dy, *self.carried))


def _differentiate(
    ring: Ring,
    step: int,
    block: Block,
    side: _Queries,
    key_value: tuple[Tensor, ...],
    halves: tuple[Tensor, ...],
    totals: tuple[Tensor, ...],
) -> None:
    """One block, for each request of the pack; dq, dk, dv are added to `totals`."""
    q_rows = halves[held_chunks(ring.rank, ring.cp).index(block.query_chunk)]
    kv_rows = halves[held_chunks(source(ring.rank, step, ring.cp, ring.exchange), ring.cp).index(block.kv_chunk)]
    sizes = list(ring.requests.chunk_lengths)
    tensors = (*side.of(q_rows), *(x.index_select(1, kv_rows) for x in key_value))
    requests = zip(*(x.split(sizes, dim=1) for x in tensors), strict=True)
    parts = []
    for i, (query, dy, out, maximum, total, key, value) in enumerate(requests):
        lengths = None if ring.is_causal else tokens_in_chunk(block.kv_chunk, sizes[i], ring.requests.lengths[i])
        carried = Carried(out, maximum, total)
        parts.append(
            fusion_block_backward(
                query, key, value, dy, carried,
                is_causal=block.mask == "triu", scale=ring.scale, kv_lengths=lengths,
            )
        )  # fmt: skip
    for total, rows, grads in zip(totals, (q_rows, kv_rows, kv_rows), zip(*parts, strict=True), strict=True):
        total.index_add_(1, rows, torch.cat(grads, dim=1).to(total.dtype))


def _finished(query: Tensor, *grads: Tensor) -> BlockGradients:
    return BlockGradients(*(x.to(query.dtype) for x in grads))


def _check(ring: Ring) -> None:
    if ring.family.name != "fusion":
        raise InputError(
            f"operators {ring.family.name} have no gradient; fusion has one (npu_fusion_attention_grad): choose it"
        )
    if ring.exchange.name != "ring":
        raise InputError(f"exchange {ring.exchange.name!r}; the gradient is written for exchange ring: choose it")
    if ring.up is not None or any(ring.requests.prefix_lengths):
        raise InputError("latents and cached prefixes belong to inference; the gradient takes keys and values of a row")
