"""Which pair of chunks a rank computes at which step of which exchange. Integers only; the ranks execute this value.

The sequence is cut into 2·cp chunks of equal length. Rank r holds chunk r and chunk 2·cp−1−r (zigzag: under a causal
mask an early and a late chunk cost the same together on every rank). One rank alone cuts nothing. An exchange decides
whose keys a rank meets at step s:

    ring          rank (r − s) mod cp: every rank r passes what it has to r + 1
    gather        rank s, on every rank: all keys are gathered first and walked in absolute order, as MindIE does
    double-ring   cp = nodes · inner; rings within the nodes, whose shards go round between the nodes

The operators know two masks only, "none" and "triu" (query i of the chunk sees key j of the chunk iff j ≤ i), and that
is all it takes: chunk q sees all of chunk k if k < q, a triangle of it if k = q, and nothing if k > q.
"""

from typing import Literal, NamedTuple

from npu_backend.errors import InputError


class Exchange(NamedTuple):
    """How keys and values come to the queries; `inner` ranks make up a node of a double ring."""

    name: str = "ring"
    inner: int = 1

    @property
    def order(self) -> str:
        """The order of merging, as docs/formats.md names it."""
        return self.name if self.name in ("ring", "gather") else "unknown"


EXCHANGES = ("ring", "gather", "double-ring")


class Block(NamedTuple):
    """One call of the operator."""

    query_chunk: int
    kv_chunk: int
    mask: Literal["none", "triu"]
    first: bool  # nothing was computed for this query chunk before, so there is nothing to merge with


def check_exchange(exchange: Exchange, cp: int) -> None:
    """The exchange exists, and its nodes divide the ranks.

    Raises:
      InputError: it does not.
    """
    if exchange.name not in EXCHANGES:
        raise InputError(f"exchange {exchange.name!r} is none of {', '.join(EXCHANGES)}")
    if exchange.inner < 1 or cp % exchange.inner:
        raise InputError(f"nodes of {exchange.inner} ranks do not divide {cp} ranks; choose a divisor of cp as --inner")


def chunk_count(cp: int) -> int:
    """In how many chunks a request is cut.

    >>> chunk_count(1), chunk_count(3)
    (1, 6)
    """
    return 2 * cp if cp > 1 else 1


def held_chunks(rank: int, cp: int) -> tuple[int, ...]:
    """The chunks of a rank, in the order in which it holds them: two, or all there is.

    >>> [held_chunks(rank, cp=3) for rank in range(3)], held_chunks(0, cp=1)
    ([(0, 5), (1, 4), (2, 3)], (0,))
    """
    return (rank, 2 * cp - 1 - rank) if cp > 1 else (0,)


def source(rank: int, step: int, cp: int, exchange: Exchange = Exchange()) -> int:  # noqa: B008 a tuple
    """The rank whose keys and values are at `rank` at `step`.

    >>> [source(0, step, cp=4) for step in range(4)]
    [0, 3, 2, 1]
    >>> [source(0, step, 4, Exchange("double-ring", inner=2)) for step in range(4)]
    [0, 1, 2, 3]
    """
    if exchange.name == "gather":
        return step
    if exchange.name == "ring":
        return (rank - step) % cp
    inner = exchange.inner
    node, place = (rank // inner - step // inner) % (cp // inner), (rank - step) % inner
    return node * inner + place


def blocks(
    rank: int,
    step: int,
    cp: int,
    *,
    is_causal: bool,
    exchange: Exchange = Exchange(),  # noqa: B008 a tuple
) -> tuple[Block, ...]:
    """The blocks that `rank` computes at `step`, in order.

    >>> for block in blocks(0, 0, cp=2, is_causal=True):
    ...     print(block)
    Block(query_chunk=0, kv_chunk=0, mask='triu', first=True)
    Block(query_chunk=3, kv_chunk=0, mask='none', first=True)
    Block(query_chunk=3, kv_chunk=3, mask='triu', first=False)
    """
    found: list[Block] = []
    for query_chunk in held_chunks(rank, cp):
        # Step 0 always has a block: a ring begins with the rank's own chunks, a gather with chunk 0, which all see.
        first = step == 0
        for kv_chunk in held_chunks(source(rank, step, cp, exchange), cp):
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
