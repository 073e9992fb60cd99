"""How a contract says no."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """Refuses in the name of one operator.

    >>> Refusal("npu_x").require(False, "head_num must > 0, but got 0")
    Traceback (most recent call last):
    RuntimeError: npu_x: head_num must > 0, but got 0
    """

    operator: str

    def require(self, holds: bool, phrase: str) -> None:
        """Refuse unless it holds.

        Raises:
          RuntimeError: with the phrase.
        """
        if not holds:
            raise RuntimeError(f"{self.operator}: {phrase}")

    def parameter(self, holds: bool, phrase: str) -> None:
        """Refuse as the vendor's aclnn layer does at run time: error 161002, a bad parameter."""
        self.require(holds, f"161002 (bad parameter): {phrase}")

    def not_implemented(self, holds: bool, what: str) -> None:
        """Refuse what the vendor computes and the CPU kernel does not."""
        self.require(holds, f"not implemented in the emulation: {what}")

    def only_defaults(self, given: Mapping[str, Any]) -> None:
        """Refuse each of these arguments that is not at its default (None, 0 or an empty string)."""
        for name, value in given.items():
            is_default = value is None or (not hasattr(value, "shape") and value in (0, ""))
            self.not_implemented(is_default, name)
