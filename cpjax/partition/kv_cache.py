"""In which rank's KV cache each block of a prompt lives. S = cp·sp ranks share one cache.

    rank(b)     =  b mod S                    every block but the last
    rank(last)  =  S − 1                      where at least S blocks stand before it, else b mod S as well

(AllocateBlocksForTokenIdsSmallRankFirst in src/block_manager/block_table.cpp of Ascend/MindIE-LLM.) Only the last block
may be partly filled, and it is the last of the last rank: whoever fetches the ranks' blocks rank by rank gets it at the
very end, which is where a decode node must have it (link.py).
"""

from cpjax.errors import InputError

BLOCK = 128


def block_ranks(tokens: int, ranks: int, block: int = BLOCK) -> list[int]:
    """The rank (0 … S−1) of each block of a prompt, in the order of the prompt.

    >>> block_ranks(1305, 8)
    [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 7]

    Raises:
      InputError: no token, no rank, or no block.
    """
    for name, value in (("tokens", tokens), ("ranks", ranks), ("block", block)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    count = -(-tokens // block)
    owners = [number % ranks for number in range(count)]
    if count > ranks:
        owners[-1] = ranks - 1
    return owners


def tokens_per_rank(tokens: int, ranks: int, block: int = BLOCK) -> list[int]:
    """How many tokens of a prompt each rank's cache holds.

    >>> tokens_per_rank(1305, 8)
    [256, 256, 128, 128, 128, 128, 128, 153]
    """
    held = [0] * ranks
    owners = block_ranks(tokens, ranks, block)
    for number, owner in enumerate(owners):
        held[owner] += block if number + 1 < len(owners) else tokens - number * block
    return held
