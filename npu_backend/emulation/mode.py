"""How the CPU kernels compute: rounded where the vendor's kernels round, or in float64 with one cast at the end.

    with arithmetic("exact"):
        out, lse = torch.ops.atb.npu_ring_mla(...)

staged is the default. exact keeps the contract (shapes, dtypes, masks, refusals) and drops every rounding but the last,
so what is left of a difference between two operators is a difference of their mathematics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

Mode = Literal["staged", "exact"]
_MODE: ContextVar[Mode] = ContextVar("npu_backend arithmetic", default="staged")


@contextmanager
def arithmetic(mode: Mode) -> Iterator[None]:
    """Within it every CPU kernel of this thread computes in this mode.

    Raises:
      ValueError: for a mode that does not exist.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"arithmetic {mode!r}; it is one of {', '.join(get_args(Mode))}")
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)


def is_exact() -> bool:
    """Whether float64 is asked for."""
    return _MODE.get() == "exact"
