"""Arrays as people have them, made NumPy's: torch's and JAX's, memory maps, DLPack's, lists."""

import sys
from typing import Any

import ml_dtypes
import numpy as np

from cpjax.errors import InputError

OF_TORCH = {
    "bfloat16": ("int16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("uint8", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("uint8", ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": ("uint8", ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": ("uint8", ml_dtypes.float8_e5m2fnuz),
}
"""Formats that torch has and NumPy has not: the integers under which their bytes travel, and their dtype."""


def as_array(x: Any, name: str) -> np.ndarray:
    """`x` as a NumPy array of the same numbers, in the same format, without a copy where none is needed.

    A torch tensor may require gradients, lie on a device, or be bfloat16 or float8.

    >>> as_array([[1.0, 2.0]], "query").shape
    (1, 2)
    >>> as_array([[1.0], [2.0, 3.0]], "query")
    Traceback (most recent call last):
    cpjax.errors.InputError: query is no array (a list with rows of different lengths); give numbers in one block

    Raises:
      InputError: a sparse, quantized or meta tensor, masked entries, Python objects, or what is no array at all.
    """
    if any(c.__name__ == "Tensor" and c.__module__.partition(".")[0] == "torch" for c in type(x).__mro__):
        return of_torch(x, name)
    if isinstance(x, np.ma.MaskedArray):
        if np.ma.is_masked(x):
            raise InputError(f"{name} has masked entries; fill them (.filled(…)) and mark pads by segment_ids")
        x = x.data
    try:
        array = np.asarray(x) if hasattr(x, "__array__") or not hasattr(x, "__dlpack__") else np.from_dlpack(x)
    # Whatever a foreign object raises when it is asked for its numbers, it has none for us.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if "inhomogeneous" in reason:
            reason = f"a {type(x).__name__} with rows of different lengths"
        raise InputError(f"{name} is no array ({reason[:120]}); give numbers in one block") from None
    if array.dtype.kind == "O":
        raise InputError(f"{name} is no array of numbers (a {type(x).__name__}); give numbers in one block")
    return np.asarray(array)


def of_torch(x: Any, name: str) -> np.ndarray:
    """The numbers of a torch tensor; see `as_array`."""
    torch = sys.modules["torch"]
    if x.layout is not torch.strided:
        raise InputError(f"{name} is a tensor of layout {x.layout}; give a dense one (.to_dense())")
    if x.is_meta:
        raise InputError(f"{name} is on the meta device, which holds no numbers; give the tensor itself")
    if x.is_quantized:
        raise InputError(f"{name} is quantized; give what it stands for (.dequantize())")
    try:
        plain = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
        dtype = str(plain.dtype).removeprefix("torch.")
        if dtype in OF_TORCH:
            integer, real = OF_TORCH[dtype]
            return plain.view(getattr(torch, integer)).numpy().view(real)
        return plain.numpy()
    # As above: subclasses may raise anything.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")[:120]
        raise InputError(f"{name} is a tensor that gives no numbers ({reason}); give a plain one") from None
