"""What is computed and timed."""

from dataclasses import dataclass

import numpy as np

from cpjax.errors import InputError

DTYPES = ("float32", "float16")
DIRECTIONS = ("forward", "both")


@dataclass(frozen=True)
class Setting:
    """One problem: attention of `tokens` queries over as many keys, batch 1, as many key/value heads as query heads.

    Attributes:
      direction: "forward", or "both": the forward pass and the derivatives of query, key and value.
      cores: threads that each contender gets; ours simulates as many devices.

    Raises:
      InputError: for another dtype or direction than `DTYPES` and `DIRECTIONS`, and for tokens that zigzag cannot deal
        out: a multiple of 2·cores.
    """

    tokens: int
    heads: int
    head_dim: int
    value_dim: int
    dtype: str
    is_causal: bool
    direction: str
    cores: int

    def __post_init__(self):
        """Refuse what no contender computes."""
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; the bench knows {' and '.join(DTYPES)}")
        if self.direction not in DIRECTIONS:
            raise InputError(f"direction is {self.direction!r}; it is {' or '.join(DIRECTIONS)}")
        if self.tokens < 1 or self.tokens % (2 * self.cores):
            raise InputError(
                f"{self.tokens} tokens cannot be dealt to {self.cores} devices in zigzag; take a multiple of "
                f"{2 * self.cores}"
            )

    def arrays(self) -> list[np.ndarray]:
        """Query, key, value and dout, `[1, T, N, H or V]`, normally distributed; the same for every contender."""
        rng = np.random.default_rng(0)
        dims = self.head_dim, self.head_dim, self.value_dim, self.value_dim
        return [rng.standard_normal((1, self.tokens, self.heads, dim)).astype(self.dtype) for dim in dims]
