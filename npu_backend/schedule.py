"""Which pair of chunks a rank computes at which ring step. Integers only; the ring executes this value.

The sequence is cut into 2·cp chunks of equal length. Rank r holds chunk r and chunk 2·cp−1−r (zigzag: under a causal
mask an early and a late chunk cost the same together on every rank). At step s it meets the keys of rank
(r − s) mod cp.
The operator knows two masks only, "none" and "triu" (query i of the chunk sees key j of the chunk iff j ≤ i), and
that is all it takes: chunk q sees all of chunk k if k < q, a triangle of it if k = q, and nothing if k > q.
"""

from typing import Literal, NamedTuple


class Block(NamedTuple):
    """One call of the operator."""

    query_chunk: int
    kv_chunk: int
    mask: Literal["none", "triu"]
    first: bool  # nothing was computed for this query chunk before, so there is nothing to merge with


def held_chunks(rank: int, cp: int) -> tuple[int, int]:
    """The two chunks of a rank, in the order in which it holds them.

    >>> [held_chunks(rank, cp=3) for rank in range(3)]
    [(0, 5), (1, 4), (2, 3)]
    """
    return rank, 2 * cp - 1 - rank


def source(rank: int, step: int, cp: int) -> int:
    """The rank whose keys and values are at `rank` at `step`, if every rank r passes what it has to r + 1.

    >>> [source(0, step, cp=4) for step in range(4)]
    [0, 3, 2, 1]
    """
    return (rank - step) % cp


def blocks(rank: int, step: int, cp: int, *, is_causal: bool) -> tuple[Block, ...]:
    """The blocks that `rank` computes at `step`, in order; order "ring" of docs/formats.md.

    >>> for block in blocks(0, 0, cp=2, is_causal=True):
    ...     print(block)
    Block(query_chunk=0, kv_chunk=0, mask='triu', first=True)
    Block(query_chunk=3, kv_chunk=0, mask='none', first=True)
    Block(query_chunk=3, kv_chunk=3, mask='triu', first=False)
    """
    found: list[Block] = []
    for query_chunk in held_chunks(rank, cp):
        # Step 0 meets the rank's own chunks, the query chunk itself among them; so the first block is always there.
        first = step == 0
        for kv_chunk in held_chunks(source(rank, step, cp), cp):
            if is_causal and kv_chunk > query_chunk:
                continue
            mask = "triu" if is_causal and kv_chunk == query_chunk else "none"
            found.append(Block(query_chunk, kv_chunk, mask, first))
            first = False
    return tuple(found)


def tokens_in_chunk(chunk: int, chunk_length: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """How many real tokens of each request lie in a chunk, when request b has `lengths[b]` tokens and then pads.

    >>> [tokens_in_chunk(chunk, 4, (6, 16)) for chunk in range(4)]
    [(4, 4), (2, 4), (0, 4), (0, 4)]
    """
    return tuple(min(max(length - chunk * chunk_length, 0), chunk_length) for length in lengths)
