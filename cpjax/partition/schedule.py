"""Which rank computes which pair of chunks when, as a value. Integers only; it can be printed, drawn and compared.

A chunk is a part of the sequence that is computed and merged as one piece: cp of them for contiguous and striped, 2·cp
for zigzag (one with a single rank). The exchanges in `cpjax.exchange` decide by positions and need no schedule; a
kernel takes slices and flags and does. That both say the same is tested: results are equal bit for bit to those of the
schedule, executed.
"""

from collections.abc import Iterator
from typing import NamedTuple

from cpjax.errors import InputError
from cpjax.partition.names import sequence_of
from cpjax.partition.partition import Partition
from cpjax.partition.sequence import BlockMask, SequencePartition


class Block(NamedTuple):
    """One call of a kernel; `first` if nothing was computed for this query chunk before: nothing to merge with."""

    step: int
    query_chunk: int
    kv_chunk: int
    mask: BlockMask
    first: bool


def schedule(
    exchange: str, partition: str | Partition, cp: int, *, is_causal: bool, inner: int = 1
) -> tuple[tuple[Block, ...], ...]:
    """For each rank the blocks that it computes, in order.

    Args:
      exchange: a name of `cpjax.exchange.device.EXCHANGES`.
      partition: one of `cpjax.partition.SEQUENCES`, by name or as a value.
      cp: ranks over which the tokens are sharded.
      inner: for "all_to_all_ring": ranks of a node, of which the cp ranks are made up.

    Raises:
      InputError: unknown exchange or partition, cp < 1, or inner not a divisor of cp.

    >>> print(show(schedule("gather", "zigzag", 2, is_causal=True)))
    rank 0   step 0: q0·k0◣first q3·k0■first q3·k3◣   step 1: q3·k1■ q3·k2■
    rank 1   step 0: q1·k0■first q2·k0■first   step 1: q1·k1◣ q2·k1■ q2·k2◣
    """
    one = sequence_of(partition, cp)
    if inner < 1 or cp % inner:
        raise InputError(f"inner is {inner}; it must divide the {cp} ranks")
    return tuple(tuple(_of_rank(exchange, one, inner, rank, is_causal)) for rank in range(cp))


def show(ranks: tuple[tuple[Block, ...], ...]) -> str:
    """The schedule as text, a rank a line: ■ whole block, ◣ triangle, ◺ triangle without its diagonal.

    >>> print(show(schedule("ring", "striped", 2, is_causal=True)))
    rank 0   step 0: q0·k0◣first   step 1: q0·k1◺
    rank 1   step 0: q1·k1◣first   step 1: q1·k0◣
    """
    sign = {"none": "■", "triu": "◣", "strict": "◺"}
    lines = []
    for rank, blocks in enumerate(ranks):
        line = f"rank {rank}"
        for step in sorted({block.step for block in blocks}):
            calls = [
                f"q{b.query_chunk}·k{b.kv_chunk}{sign[b.mask]}{'first' if b.first else ''}"
                for b in blocks
                if b.step == step
            ]
            line += f"   step {step}: {' '.join(calls)}"
        lines.append(line)
    return "\n".join(lines)


def _of_rank(exchange: str, one: SequencePartition, inner: int, rank: int, is_causal: bool) -> Iterator[Block]:
    begun: set[int] = set()
    for step, queries, keys in _meetings(exchange, one.cp, inner, rank):
        for query_chunk in (chunk for holder in queries for chunk in one.held_chunks(holder)):
            for kv_chunk in (chunk for holder in keys for chunk in one.held_chunks(holder)):
                mask = one.block_mask(query_chunk, kv_chunk) if is_causal else "none"
                if mask is None:
                    continue
                # Travelling queries come with a result: at home, at step 0, their own chunk at least was visible.
                first = query_chunk not in begun and not (exchange == "pass_query" and step > 0)
                begun.add(query_chunk)
                yield Block(step, query_chunk, kv_chunk, mask, first)


def _meetings(exchange: str, cp: int, inner: int, rank: int) -> list[tuple[int, list[int], list[int]]]:
    """For each step the ranks whose queries and whose keys meet at `rank`, in order."""
    steps, node = range(cp), rank // inner
    nodes = cp // inner

    def of_node(n: int) -> list[int]:
        return list(range(n % nodes * inner, (n % nodes + 1) * inner))

    match exchange:
        case "ring":
            return [(s, [rank], [(rank - s) % cp]) for s in steps]
        case "ring_both_ways":
            both = [[(rank - s) % cp, (rank + s) % cp] for s in range(cp // 2 + 1)]
            return [(s, [rank], list(dict.fromkeys(keys))) for s, keys in enumerate(both)]
        case "gather":
            return [(s, [rank], [s]) for s in steps]
        case "pass_query":
            return [(s, [(rank - s) % cp], [rank]) for s in steps]
        case "all_to_all":
            return [(0, list(steps), list(steps))]
        case "all_to_all_ring":
            return [(s, of_node(node), of_node(node - s)) for s in range(nodes)]
    raise InputError(f"unknown exchange {exchange!r}; see cpjax.exchange.device.EXCHANGES")
