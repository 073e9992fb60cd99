"""Softcap, sink, ALiBi slopes and bias, checked."""

from typing import Any

import numpy as np
from jaxtyping import Float

from cpjax.errors import InputError


def checked_softcap(softcap: Any) -> float | None:
    """The softcap as a float.

    Raises:
      InputError: it is no positive finite number.

    >>> checked_softcap(50)
    50.0
    """
    if softcap is None:
        return None
    is_number = isinstance(softcap, int | float | np.integer | np.floating) and not isinstance(softcap, bool)
    if not is_number or not 0 < float(softcap) < float("inf"):
        raise InputError(f"softcap is {softcap!r}; it must be a positive finite number (or None for no cap)")
    return float(softcap)


def checked_sink(sink: Any, heads: int) -> Float[np.ndarray, " N"] | None:
    """One finite logit a query head, in float64.

    Raises:
      InputError: wrong shape or dtype, or not finite.
    """
    if sink is None:
        return None
    sink = _numbers("sink", sink)
    if sink.shape != (heads,):
        raise InputError(
            f"sink has shape {sink.shape}; it has one logit for each of the {heads} query heads: [{heads}]"
        )
    return _finite("sink", sink).astype(np.float64)


def checked_alibi(alibi: Any, batch: int, heads: int) -> Float[np.ndarray, "B N"] | None:
    """One finite slope a query head (and batch row), as float64 `[B, N]`.

    Raises:
      InputError: wrong shape or dtype, or not finite.
    """
    if alibi is None:
        return None
    alibi = _numbers("alibi", alibi)
    if alibi.shape not in ((heads,), (batch, heads)):
        raise InputError(
            f"alibi has shape {alibi.shape}; it has one slope for each query head: [{heads}], or [{batch}, {heads}]"
        )
    return np.broadcast_to(_finite("alibi", alibi).astype(np.float64), (batch, heads))


def checked_bias(bias: Any, shape: tuple[int, int, int, int]) -> np.ndarray | None:
    """As given, with four axes; −inf hides a key.

    Raises:
      InputError: it does not broadcast to `shape`, `[B, N, T, S]`; wrong dtype; a NaN or +inf.
    """
    if bias is None:
        return None
    bias = _numbers("bias", bias)
    fits = bias.ndim <= len(shape) and all(
        have in (1, want) for have, want in zip(bias.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise InputError(f"bias has shape {bias.shape}; it must broadcast to [batch, heads, queries, keys], {shape}")
    if np.isnan(bias).any() or np.isposinf(bias).any():
        raise InputError("bias holds a NaN or +inf; it must be finite, or -inf where a key is hidden")
    return bias.reshape((1,) * (len(shape) - bias.ndim) + bias.shape)


def _numbers(name: str, given: Any) -> np.ndarray:
    """An array of floats (NumPy's, or bfloat16) or whole numbers."""
    try:
        x = np.asarray(given)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} is no array ({str(error).splitlines()[0]}); give numbers") from None
    if x.dtype.kind not in "iuf" and x.dtype.name != "bfloat16":
        raise InputError(f"{name} has dtype {x.dtype}; it must hold floating-point or whole numbers")
    return x.astype(np.float32) if x.dtype.name == "bfloat16" else x


def _finite(name: str, x: np.ndarray) -> np.ndarray:
    if not np.isfinite(x).all():
        raise InputError(f"{name} holds a NaN or an infinity; it must be finite")
    return x
