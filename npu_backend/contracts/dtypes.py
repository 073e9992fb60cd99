"""Dtypes as the vendor's operators take them: as numbers, which PyTorch makes of a torch.dtype that is given."""

import torch

NUMBERS = {
    1: torch.int8,
    3: torch.int32,
    5: torch.float16,
    6: torch.float32,
    12: torch.qint8,
    15: torch.bfloat16,
}
"""c10::ScalarType of those that are computed here; torch_npu 2.13.0 counts them alike (utils/_dtype)."""


def dtype_of(number: int | None, default: torch.dtype) -> torch.dtype | None:
    """The dtype of a number; the default for None; None for one that is not computed here.

    >>> dtype_of(5, torch.int8), dtype_of(None, torch.int8), dtype_of(44, torch.int8)
    (torch.float16, torch.int8, None)
    """
    return default if number is None else NUMBERS.get(number)
