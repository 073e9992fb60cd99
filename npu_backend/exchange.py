"""How what the ranks hold travels: one generator per exchange, which gives what is at hand step by step.

    for step, held in enumerate(exchange(link, mine)):
        compute my queries against what is held

A transfer is started before the block is given out and awaited when the next one is asked for, so it runs while the
caller computes. The tensors' device chooses the transport: gloo for a CPU, HCCL for an NPU, where transfers run on a
stream of their own. Each rank r of a ring sends to one neighbour and receives from another in one batch; even ranks
name the send first, odd ranks the receive, so that a transport that works through them in turn cannot lock up.

What is sent is stamped (stamp.py): a block of another case, rank or step is an error, however well it fits.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from npu_backend.errors import LinkError
from npu_backend.schedule import Exchange
from npu_backend.stamp import WORDS, Stamp, case_words, check_stamp

Report = Callable[[str, int], None]
"""Called with what the rank begins to do ("compute", "wait", …) and at which step."""


class Held(NamedTuple):
    """What travels: what one rank holds of its tokens, and where they are."""

    rows: tuple[Tensor, ...]  # [B, t, …] each: keys and values, or the latent that they are made of
    places: Tensor  # [2, B, t] int32: positions, segments


class Transfer(NamedTuple):
    """One under way; what travels is stamped."""

    step: int  # at which it was started
    source: int
    shape: torch.Size  # of the places, without the stamp
    leaving: tuple[Tensor, ...]  # places, then rows; must not be freed while it is sent
    arriving: tuple[Tensor, ...]  # must not be read before the works are done
    works: list[dist.Work]
    neighbours: str


class Link:
    """One rank's connection to the others; it tells what it waits for, and counts the seconds."""

    def __init__(self, rank: int, cp: int, report: Report, digest: str):
        """The default process group has cp ranks; with one rank nothing is ever sent. `digest` is the case's."""
        self.rank, self.cp, self.report, self.case = rank, cp, report, case_words(digest)
        self.waited: list[float] = []
        """Seconds in which the rank did nothing but wait for a transfer, one entry a wait."""

    def start(self, step: int, held: Held, *, to: int, source: int) -> Transfer:
        """Begin to send what is held to rank `to`, and to receive as much from rank `source`."""
        leaving = self._stamped(held, step)
        arriving = tuple(torch.empty_like(x) for x in leaving)
        send = [dist.P2POp(dist.isend, x, to) for x in leaving]
        receive = [dist.P2POp(dist.irecv, x, source) for x in arriving]
        neighbours = f"from rank {source} or to rank {to}"
        try:
            works = dist.batch_isend_irecv(receive + send if self.rank % 2 else send + receive)
        except RuntimeError as error:
            raise _link_error(step, neighbours, error) from error
        return Transfer(step, source, held.places.shape, leaving, arriving, works, neighbours)

    def wait(self, step: int, transfer: Transfer) -> Held:
        """What has arrived.

        Raises:
          RankError: it is of another case, rank or step.
          LinkError: the transfer failed.
        """
        self.report("wait", step)
        started = time.perf_counter()
        try:
            for work in transfer.works:
                work.wait()
        except RuntimeError as error:
            raise _link_error(step, transfer.neighbours, error) from error
        torch.get_device_module(transfer.arriving[0].device).synchronize()
        self.waited.append(time.perf_counter() - started)
        return self._opened(transfer.arriving, transfer.shape, step, sender=transfer.source, sent=transfer.step)

    def gather(self, mine: Held) -> list[Held]:
        """What every rank holds, by rank; errors as of `wait`."""
        self.report("wait", 0)
        started = time.perf_counter()
        everybody = []
        try:
            for x in self._stamped(mine, 0):
                parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.cp)]
                dist.all_gather(parts, x)
                everybody.append(parts)
        except RuntimeError as error:
            raise _link_error(0, "of all ranks", error) from error
        torch.get_device_module(mine.places.device).synchronize()
        self.waited.append(time.perf_counter() - started)
        found = enumerate(zip(*everybody, strict=True))
        return [self._opened(x, mine.places.shape, 0, sender=rank, sent=0) for rank, x in found]

    def deal(self, parts: list[Held]) -> list[Held]:
        """Give `parts[r]` to rank r, all of one shape; what each rank had for this one. Errors: as of `wait`."""
        self.report("wait", 0)
        started = time.perf_counter()
        arrived = []
        try:
            for same in zip(*(self._stamped(part, 0) for part in parts), strict=True):
                leaving = torch.stack(same)
                arriving = torch.empty_like(leaving)
                dist.all_to_all_single(arriving, leaving)
                arrived.append(arriving)
        except RuntimeError as error:
            raise _link_error(0, "of all ranks", error) from error
        torch.get_device_module(parts[0].places.device).synchronize()
        self.waited.append(time.perf_counter() - started)
        found = enumerate(zip(*arrived, strict=True))
        return [self._opened(x, parts[0].places.shape, 0, sender=rank, sent=0) for rank, x in found]

    def _stamped(self, held: Held, step: int) -> tuple[Tensor, ...]:
        return Stamp(self.case, self.rank, step).before(held.places), *(x.contiguous() for x in held.rows)

    def _opened(self, found: tuple[Tensor, ...], shape: torch.Size, step: int, *, sender: int, sent: int) -> Held:
        """What arrived at `step`, its places in their `shape` again: it must be what `sender` sent at step `sent`."""
        places, *rows = found
        check_stamp(places, Stamp(self.case, sender, sent), step)
        return Held(tuple(rows), places[WORDS:].view(shape))


def travel(exchange: Exchange, link: Link, mine: Held) -> Iterator[Held]:
    """Of every rank what it holds, cp times, in the order of `schedule.source`.

    Raises:
      RankError: what arrived is of another case, rank or step.
      LinkError: a transfer failed.
    """
    return {"ring": _ring, "gather": _gather, "double-ring": _double_ring}[exchange.name](exchange, link, mine)


def _ring(exchange: Exchange, link: Link, mine: Held) -> Iterator[Held]:
    held, rank, cp = mine, link.rank, link.cp
    for step in range(cp - 1):
        transfer = link.start(step, held, to=(rank + 1) % cp, source=(rank - 1) % cp)
        yield held
        held = link.wait(step, transfer)
    yield held


def _gather(exchange: Exchange, link: Link, mine: Held) -> Iterator[Held]:
    yield from link.gather(mine) if link.cp > 1 else [mine]


def _double_ring(exchange: Exchange, link: Link, mine: Held) -> Iterator[Held]:
    """What a node began its round with goes to the next node while it goes round within this one."""
    begun, rank, cp, inner = mine, link.rank, link.cp, exchange.inner
    node = rank - rank % inner
    for start in range(0, cp, inner):
        is_last = start + inner == cp
        far = None if is_last else link.start(start, begun, to=(rank + inner) % cp, source=(rank - inner) % cp)
        held = begun
        for step in range(start, start + inner - 1):
            to, source = (node + (rank + shift) % inner for shift in (1, -1))
            transfer = link.start(step, held, to=to, source=source)
            yield held
            held = link.wait(step, transfer)
        yield held
        if far is not None:
            begun = link.wait(start + inner - 1, far)


def _link_error(step: int, neighbours: str, error: RuntimeError) -> LinkError:
    first = next(iter(str(error).splitlines()), "")
    return LinkError(f"step {step}: the transfer {neighbours} failed ({first})")
