"""Results of the wrappers against float64: inside what rounding explains, and (0, −inf) where no key was seen."""

import numpy as np
import torch
from npu_strategies import FORMATS, BlockProblem, real, rounding_bound
from oracle import dense


def assert_near_dense(p: BlockProblem, got, merges: int = 0, lse_unit: float = 0.0) -> None:
    """`got` has out `[B, t, N, V]` and lse `[B, t, N]`, rounded to a format of this unit roundoff; NaN fails."""
    query, key, value = real(p)
    out, lse = dense(query, key, value, scale=p.scale, visible=p.visible)
    name = str(p.query.dtype).removeprefix("torch.")
    bound_out, bound_lse = rounding_bound(query, key, value, p.visible, p.scale, merges, FORMATS[name])
    bound_lse = bound_lse * (1 + lse_unit) + lse_unit * abs(np.where(np.isinf(lse), 0, lse))
    saw = p.visible.any(-1)
    assert (got.out.shape, got.lse.shape) == (out.shape, lse.shape)
    assert (abs(got.out.double().numpy()[saw] - out[saw]) <= bound_out[saw]).all()
    assert (abs(got.lse.double().numpy()[saw] - lse[saw]) <= bound_lse[saw]).all()
    assert (got.out.double().numpy()[~saw] == 0).all()
    assert np.isneginf(got.lse.numpy()[~saw]).all()


def assert_rounded_once(got: torch.Tensor, exact: np.ndarray, slack: float = 2.0**-23) -> None:
    """`got` is some number within float32 rounding of `exact`, rounded to its dtype: rounding is monotonic."""
    low, high = (torch.from_numpy(exact + sign * slack * (abs(exact) + 1e-7)).to(got.dtype) for sign in (-1, 1))
    assert bool(((low <= got) & (got <= high)).all())


def assert_same_bits(a: torch.Tensor, b: np.ndarray) -> None:
    """Bit for bit, so that −0 is not 0 and a NaN is itself."""
    kind = {2: np.int16, 4: np.int32}[b.dtype.itemsize]
    np.testing.assert_array_equal(a.contiguous().numpy().view(kind), np.ascontiguousarray(b).view(kind))
