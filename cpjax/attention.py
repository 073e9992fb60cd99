"""Everything about attention that is no array, in one value."""

import math
from dataclasses import dataclass

from cpjax.errors import InputError
from cpjax.mask import Mask
from cpjax.precision import Precision


@dataclass(frozen=True)
class Attention:
    """What is computed: who sees whom, logits, roundings.

        logit = scale · q·k                                without softcap
        logit = softcap · tanh(scale · q·k / softcap)      with it (Gemma 2, arXiv 2408.00118, §2)

    Raises:
      InputError: a scale that is not finite, a softcap that is not positive and finite, a precision that tiles cannot
        compute in.
    """

    mask: Mask
    scale: float
    precision: Precision
    softcap: float | None = None

    def __post_init__(self):
        """Refuse numbers that would make every logit NaN."""
        if not math.isfinite(self.scale):
            raise InputError(f"scale is {self.scale}; it must be a finite number, usually 1/sqrt(head_dim)")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise InputError(f"softcap is {self.softcap}; it must be a positive finite number (or None for no cap)")
        if self.precision.is_normalised:
            raise InputError(
                f"precision {self.precision.name!r} rounds probabilities that are divided by their sum, which "
                "attention in tiles knows at the end only; it is one to judge in. Name another, as 'flash_fp16'"
            )
