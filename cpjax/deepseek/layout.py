"""Where the new tokens of several requests lie in a prefill: a row for each request, or one row for all of them.

    rows      each request is filled up to the longest, and to a multiple of 2·cp        as many rows as requests
    packed    each request is filled up to a multiple of 2·cp for itself; they lie one   one row
              behind the other, as in MindIE (`cpjax.partition.packing`)

Either way each request is cut in zigzag for itself, so that every rank gets a part of it. A token has its index among
the request's new tokens, and the request's number as its segment: attention and positions follow from these two, and
from how many tokens the request has in the cache. So the layout changes no result but in the last bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from cpjax.errors import InputError
from cpjax.mask import PAD, Tokens
from cpjax.partition import Zigzag
from cpjax.partition.packing import packed_order, packed_tokens, padded_lengths


class Layout(NamedTuple):
    """Of B requests in R rows of n tokens, in the order of the ranks, int32. Its numbers are operands of a program."""

    tokens: Tokens
    """`[R, n]`: index of each token among the new ones of its request, and the request; `PAD` where it is filling."""
    row: Int[Any, "B 1"]
    """In which of the R rows a request lies, and"""
    column: Int[Any, "B t"]
    """where in it each of its tokens lies; of tokens that it does not have, any place."""

    def laid(self, x: Shaped[Any, "B T *x"]) -> Shaped[Any, "R n *x"]:
        """What each request has of its tokens, in the order of the ranks; pads get what another token has.

        >>> layout_of([3, 2], 3, cp=1, is_packed=True).laid(np.array([[1, 2, 3], [4, 5, 0]]))
        array([[1, 2, 3, 3, 4, 5]])
        """
        return x[self.request, self.tokens.position.clip(0, x.shape[1] - 1)]

    def back(self, x: Shaped[Any, "R n *x"]) -> Shaped[Any, "B t *x"]:
        """The inverse: a row for each request.

        >>> layout_of([3, 2], 3, cp=1, is_packed=True).back(np.array([[1, 2, 3, 3, 4, 5]]))[:, :3]
        array([[1, 2, 3],
               [4, 5, 5]])
        """
        return x[self.row, self.column]

    @property
    def request(self) -> Int[Any, "R n"]:
        """The number of each token's request; of a pad, any."""
        return self.tokens.segment.clip(0)


def layout_of(lengths: Sequence[int] | Int[np.ndarray, " B"], width: int, cp: int, *, is_packed: bool) -> Layout:
    """The layout of so many new tokens of each request.

    Args:
      width: a row for each request has room for so many; at least the largest length. t is the next multiple of 2·cp.

    >>> layout_of([3, 2], 3, cp=1, is_packed=True).tokens
    Tokens(position=array([[0, 1, 2, 3, 0, 1]], dtype=int32), segment=array([[ 0,  0,  0, -1,  1,  1]], dtype=int32))
    >>> layout_of([3, 2], 3, cp=1, is_packed=False).tokens.segment
    array([[ 0,  0,  0, -1],
           [ 1,  1, -1, -1]], dtype=int32)

    Raises:
      InputError: a length that is negative or larger than the width, or no token at all.
    """
    counts = np.asarray(lengths)
    if not counts.size or not 0 <= counts.min() <= counts.max() <= width or counts.max() == 0:
        raise InputError(
            f"requests have {counts.tolist()} new tokens of rows of {width}; give 0 to {width} for each, not 0 for all"
        )
    zigzag, number = Zigzag(cp), np.arange(len(counts))[:, None]
    width = padded_lengths([width], cp)[0]
    if not is_packed:
        order = np.broadcast_to(zigzag.order(width), (len(counts), width))
        tokens = Tokens(order, np.where(order < counts[:, None], number, PAD))
        return _int32(Layout(tokens, number, np.argsort(order, axis=1)))
    order, places = packed_order(zigzag, counts.tolist(), cp), packed_tokens(counts.tolist(), cp)
    padded = np.array(padded_lengths(counts.tolist(), cp))
    place = (np.cumsum(padded) - padded)[:, None] + np.arange(width)
    column = np.argsort(order)[np.minimum(place, len(order) - 1)]
    return _int32(Layout(Tokens(*(x[:, order] for x in places)), 0 * number, column))


def _int32(layout: Layout) -> Layout:
    tokens, *where = layout
    return Layout(Tokens(*(x.astype(np.int32) for x in tokens)), *(x.astype(np.int32) for x in where))
