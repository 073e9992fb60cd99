"""Everything about attention that is no array of tokens, in one value. No JAX."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float

from cpjax.errors import InputError
from cpjax.mask import Mask
from cpjax.partition.partition import Partition, check_order
from cpjax.precision import Precision


@dataclass(frozen=True)
class Attention:
    """What is computed: who sees whom, logits, roundings.

        logit = scale · q·k                                without softcap
        logit = softcap · tanh(scale · q·k / softcap)      with it (Gemma 2, arXiv 2408.00118, §2)

    `scale` may be an array without axes, traced or not: then it is an operand of a compiled program, no constant.

    Raises:
      InputError: a scale that is not finite, a softcap that is not positive and finite, a precision that tiles cannot
        compute in.
    """

    mask: Mask
    scale: float | Float[Any, ""]
    precision: Precision
    softcap: float | None = None

    def __post_init__(self):
        """Refuse numbers that would make every logit NaN."""
        if isinstance(self.scale, int | float | np.number):
            object.__setattr__(self, "scale", checked_scale(self.scale))
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise InputError(f"softcap is {self.softcap}; it must be a positive finite number (or None for no cap)")
        if self.precision.is_normalised:
            raise InputError(
                f"precision {self.precision.name!r} rounds probabilities that are divided by their sum, which "
                "attention in tiles knows at the end only; it is one to judge in. Name another, as 'flash_fp16'"
            )


def checked_scale(scale: Any) -> float:
    """The number as a float.

    >>> checked_scale(2)
    2.0

    Raises:
      InputError: it is not finite.
    """
    if not math.isfinite(scale):
        raise InputError(f"scale is {scale}; it must be a finite number, usually 1/sqrt(head_dim)")
    return float(scale)


@dataclass(frozen=True, eq=False)
class Computation:
    """What was computed, as one value for those who compute and those who judge. None: not said, the default applies.

    A program writes it once and hands it to `context_parallel_attention` and to `judge`, so they cannot disagree.

    Args:
      mask: who may see whom; None is causal.
      scale: multiplies q·k; None is 1/√H.
      softcap: logits become softcap · tanh(logit / softcap).
      sink: per query head, the logit of one more key with value 0, `[N]`.
      alibi: per query head, a slope: logits get −slope · |distance|, `[N]`.
      bias: added to the logits, broadcast to `[B, N, T, S]`.
      precision: a profile or its name; None follows from the dtype of the arrays.
      partition: who holds which tokens, a value or a name.
      order: in which order chunks were merged, a word of `cpjax.partition.ORDERS`.

    >>> said = Computation(scale=0.5, partition="zigzag")
    >>> said.with_words(scale=None, precision="float32")
    {'scale': 0.5, 'precision': 'float32'}

    Raises:
      InputError: an unknown order.
    """

    mask: Mask | None = None
    scale: float | Float[Any, ""] | None = None
    softcap: float | None = None
    sink: Float[Any, " N"] | None = None
    alibi: Float[Any, " N"] | None = None
    bias: Float[Any, "..."] | None = None
    precision: Precision | str | None = None
    partition: Partition | str | None = None
    order: str | None = None

    def __post_init__(self):
        """Refuse an unknown order; all else is checked by whoever uses it."""
        if self.order is not None:
            check_order(self.order)

    def with_words(self, **words: Any) -> dict[str, Any]:
        """Keywords of a function, filled from the fields of these names where they are None.

        Raises:
          InputError: something is said by a keyword and here.
        """
        for word, given in words.items():
            said = getattr(self, word)
            if said is not None and given is not None:
                raise InputError(f"{word} is said twice, as a keyword and in the computation; leave one of them out")
            words[word] = given if said is None else said
        return words

    def only(self, *words: str) -> None:
        """Refuse what is said but is not among these fields.

        >>> Computation(scale=1.0).only("scale")

        Raises:
          InputError: it names what cannot be computed.
        """
        for field in fields(self):
            if getattr(self, field.name) is not None and field.name not in words:
                raise InputError(f"{field.name} is said in the computation, but is not computed here; leave it None")
