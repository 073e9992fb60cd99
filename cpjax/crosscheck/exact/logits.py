"""What stands between scale · q·k and the softmax: softcap, ALiBi, an additive bias, an attention sink.

x = scale · q·k
x = softcap · tanh(x / softcap)                       softcap (Gemma 2, arXiv 2408.00118, §2)
x = x − slope · |q_position − kv_position|            ALiBi (arXiv 2108.12409), the distance as FlashAttention takes it
x = x + bias                                          additive bias; −inf hides the key
sink                                                  one more key of value 0 with that logit (arXiv 2309.17453)
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Logits:
    """These for R rows over S keys, in float64; None: there is none of it.

    >>> Logits(softcap=2.0).capped(np.array([[0.0, 1e9]]))
    array([[0., 2.]])
    """

    softcap: float | None = None
    alibi: Float[np.ndarray, "R S"] | None = None
    """slope · |q_position − kv_position|, which is taken off."""
    alibi_size: Float[np.ndarray, "R S"] | None = None
    """The largest number that a kernel may add in its place: slope · kv_position, where that is more."""
    bias: Float[np.ndarray, "R S"] | None = None
    sink: Float[np.ndarray, " R"] | None = None

    def capped(self, product: Float[np.ndarray, "R S"]) -> Float[np.ndarray, "R S"]:
        """The logits after the softcap; the same array if there is none."""
        return product if self.softcap is None else self.softcap * np.tanh(product / self.softcap)

    def shifted(self, capped: Float[np.ndarray, "R S"]) -> list[Float[np.ndarray, "R S"]]:
        """The logits after each number that is added; empty if none is."""
        sums = []
        for part in (None if self.alibi is None else -self.alibi, self.bias):
            if part is not None:
                sums.append((sums[-1] if sums else capped) + np.where(np.isneginf(part), 0.0, part))
        return sums

    def added_size(self, capped: Float[np.ndarray, "R S"]) -> Float[np.ndarray, "R S"] | None:
        """Σ of the magnitudes of the numbers that are added; None if none is."""
        sizes = [x for x in (self.alibi_size, self.bias) if x is not None]
        if not sizes:
            return None
        return sum((np.where(np.isneginf(x), 0.0, np.abs(x)) for x in sizes), np.abs(capped))

    def of_keys(self, index: np.ndarray) -> "Logits":
        """The same for some of the keys."""
        alibi, size, bias = (None if x is None else x[:, index] for x in (self.alibi, self.alibi_size, self.bias))
        return Logits(self.softcap, alibi, size, bias, self.sink)


PLAIN = Logits()
"""Nothing of all this: logits are scale · q·k."""
