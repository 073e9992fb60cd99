"""input_layout: how query, key, value and the result lie in memory, by the vendor's letters.

B batch, S tokens of a padded batch, T tokens of all requests one after the other, N heads, D head dim, H = N·D.
"NAME_OTHER" is the layout of the inputs and that of the output.
"""

import torch
from torch import Tensor

PADDED = ("BSH", "SBH", "BSND", "BNSD")
PACKED = ("TND", "NTD")


def tokens_first(x: Tensor, layout: str, heads: int) -> Tensor:
    """`x` as `[B, S, N, D]` or, packed, `[T, N, D]`: a view where that is possible."""
    match layout:
        case "BSH":
            return x.unflatten(2, (heads, x.shape[2] // heads))
        case "SBH":
            return x.transpose(0, 1).unflatten(2, (heads, x.shape[2] // heads))
        case "BNSD":
            return x.transpose(1, 2)
        case "NTD":
            return x.transpose(0, 1)
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """`x`, `[B, S, N, D]` or `[T, N, D]`, in a layout, contiguous."""
    match layout:
        case "BSH":
            x = x.flatten(2)
        case "SBH":
            x = x.transpose(0, 1).flatten(2)
        case "BNSD":
            x = x.transpose(1, 2)
        case "NBSD":
            x = x.permute(2, 0, 1, 3)
        case "NTD":
            x = x.transpose(0, 1)
    return x.contiguous()


def ends_to_lengths(ends: list[int]) -> list[int]:
    """Lengths of sequences from where they end: cumulative, without a leading 0."""
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def to_sequence_order(x: Tensor, lengths: list[int]) -> Tensor:
    """Softmax statistics `[T, N, 8]` in the order in which the TND operators keep them in memory.

    The declared shape stays `[T, N, 8]`, but sequence i occupies its memory as a block `[N, S_i, 8]`.
    """
    blocks = [part.transpose(0, 1).flatten() for part in x.split(lengths)]
    return torch.cat(blocks).reshape(x.shape)


def from_sequence_order(x: Tensor, lengths: list[int]) -> Tensor:
    """The inverse: what lies in memory as above, as `[T, N, 8]` by token and head."""
    heads, copies = x.shape[1:]
    blocks = x.flatten().split([n * heads * copies for n in lengths])
    parts = [block.reshape(heads, n, copies).transpose(0, 1) for block, n in zip(blocks, lengths, strict=True)]
    return torch.cat(parts)
