"""Integers of quantised products: roundings, exact sums, and the scales as the hardware reads them.

Sums of products of int8 are exact in int32 for k below 2¹⁷, and in float64, which multiplies faster on a CPU.
"""

import numpy as np
import torch
from torch import Tensor


def to_int8(x: Tensor) -> Tensor:
    """To the nearest integer, of two the even one, clipped to −128 … 127.

    >>> to_int8(torch.tensor([0.5, 1.5, -2.5, 300.0])).tolist()
    [0, 2, -2, 127]
    """
    return x.round().clamp(-128, 127).to(torch.int8)


def product(a: Tensor, weight: Tensor) -> Tensor:
    """Σₖ a·w of integers, `[…, m, k]` by `[k, n]`, exact, as int32.

    >>> product(torch.full((1, 9), -128, dtype=torch.int8), torch.full((9, 1), -128, dtype=torch.int8)).tolist()
    [[147456]]
    """
    return (a.double() @ weight.double()).to(torch.int32)


def scale_of_bits(scale: Tensor) -> Tensor:
    """The float32 whose bits an int64 has in its low half, as a scale of an FP16 product is stored.

    >>> scale_of_bits(torch.tensor([0x3F800000]))
    tensor([1.])
    """
    low = (scale.numpy() & np.int64(0xFFFFFFFF)).astype(np.uint32)
    return torch.from_numpy(low.view(np.float32).copy())


def top_19_bits(scale: Tensor) -> Tensor:
    """Sign, exponent and 10 bits of the fraction of a float32: what npu_trans_quant_param keeps of a scale.

    >>> (top_19_bits(torch.tensor([1 + 2**-10 + 2**-11])) == 1 + 2**-10).item()
    True
    """
    bits = scale.numpy().view(np.uint32) & np.uint32(0xFFFFE000)
    return torch.from_numpy(bits.view(np.float32).copy())


def unpack_int4(packed: Tensor) -> Tensor:
    """Eight numbers of 4 bits from each int32 of `[…, n/8]`, the lowest bits first: `[…, n]` int8, −8 … 7.

    >>> unpack_int4(torch.tensor([[0x8765432F - 2**32]], dtype=torch.int32)).tolist()
    [[-1, 2, 3, 4, 5, 6, 7, -8]]
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    nibbles = (packed[..., None] >> shifts) & 15
    return (nibbles - 16 * (nibbles > 7)).to(torch.int8).flatten(-2)
