"""Who may see whom, decided by where tokens are in the text and never by where they lie in memory.

    visible[b, t, s]  =  q_segment[b, t] == kv_segment[b, s]                      same request, and neither is a pad
                      and q_position[b, t] >= kv_position[b, s]                   if is_causal
                      and |q_position[b, t] − kv_position[b, s]| < window         if window is given

Because a token carries its place with it, the same function is right for any layout, any ring step and any tile. A
cached prefix of P tokens needs no rule of its own: the new queries have positions P, P + 1, …
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from cpjax.errors import InputError

PAD = -1
"""The segment of a token that is only filling: it sees nothing and nobody sees it."""


MOST_WINDOW = 2**31 - 1
"""A window is compared with int32 positions; no text is longer."""


class Tokens(NamedTuple):
    """Where tokens are: `position` counts from 0 within a request, `segment` numbers the request in its batch row."""

    position: Int[Any, "B T"]
    segment: Int[Any, "B T"]


@dataclass(frozen=True)
class Mask:
    """The rule of visibility, besides segments, which always apply. `window` counts keys, the query's own included.

    >>> Mask(is_causal=True) & Mask(is_causal=False, window=3) & Mask(is_causal=False, window=8)
    Mask(is_causal=True, window=3)

    Raises:
      InputError: is_causal is no boolean; window is no whole number of at least 1.
    """

    is_causal: bool = True
    window: int | None = None

    def __post_init__(self):
        """Refuse what is no rule: "no" is true to Python, and a window of 0 would hide the query's own key."""
        if not isinstance(self.is_causal, bool | np.bool_):
            raise InputError(f"is_causal is {self.is_causal!r:.60}; it must be True or False")
        if self.window is None:
            return
        is_whole = isinstance(self.window, int | np.integer) and not isinstance(self.window, bool)
        if not is_whole or not 1 <= self.window <= MOST_WINDOW:
            raise InputError(
                f"window is {self.window!r:.60}; it must be at least 1, the query's own key, a whole number below 2^31 "
                f"(or None for no window)"
            )

    def __and__(self, other: "Mask") -> "Mask":
        """What both allow."""
        windows = [mask.window for mask in (self, other) if mask.window is not None]
        return Mask(self.is_causal or other.is_causal, min(windows, default=None))


def visible(mask: Mask, q: Tokens, kv: Tokens) -> Bool[Any, "B T S"]:
    """Which key each query may see, as booleans `[B, T, S]`; NumPy in, NumPy out.

    >>> t = tokens(1, 3)
    >>> visible(Mask(is_causal=True), t, t)[0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """
    ahead = q.position[:, :, None] - kv.position[:, None, :]
    seen = (q.segment[:, :, None] == kv.segment[:, None, :]) & (q.segment[:, :, None] != PAD)
    if mask.is_causal:
        seen = seen & (ahead >= 0)
    if mask.window is not None:
        seen = seen & (ahead < mask.window) & (ahead > -mask.window)
    return seen


def tokens(batch: int, length: int, *, start: int = 0, pads: int = 0) -> Tokens:
    """Tokens start … start+length−1 of one request per batch row, then `pads` pads; int32 arrays `[B, length + pads]`.

    >>> new = tokens(1, 2, start=5, pads=1)
    >>> new.position, new.segment
    (array([[5, 6, 7]], dtype=int32), array([[ 0,  0, -1]], dtype=int32))
    """
    index = np.broadcast_to(np.arange(length + pads, dtype=np.int32), (batch, length + pads))
    return Tokens(index + np.int32(start), np.where(index < length, 0, PAD).astype(np.int32))
