"""What is computed and timed."""

from dataclasses import dataclass

import numpy as np

from cpjax.errors import InputError

DTYPES = ("float32", "float16")
DIRECTIONS = ("forward", "both", "decode")


@dataclass(frozen=True)
class Setting:
    """One problem: attention of `tokens` queries over as many keys, batch 1.

    Attributes:
      kv_heads: key/value heads. A latent that all heads share, absorbed, is one head of 576 and 512 numbers.
      direction: "forward"; "both": the forward pass and the derivatives of query, key and value; "decode": one query,
        the last token's, over all keys.
      cores: threads that each contender gets; ours simulates as many devices.

    Raises:
      InputError: for another dtype or direction than `DTYPES` and `DIRECTIONS`, for heads that key/value heads do not
        divide, and for tokens that zigzag cannot deal out: a multiple of 2·cores.
    """

    tokens: int
    heads: int
    kv_heads: int
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
            raise InputError(f"direction is {self.direction!r}; it is {', '.join(DIRECTIONS)}")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads; take a divisor")
        if self.tokens < 1 or self.tokens % (2 * self.cores):
            raise InputError(
                f"{self.tokens} tokens cannot be dealt to {self.cores} devices in zigzag; take a multiple of "
                f"{2 * self.cores}"
            )

    def arrays(self) -> list[np.ndarray]:
        """Query and dout `[1, T, N, H or V]`, key and value `[1, S, K, H or V]`, as (query, key, value, dout).

        Normally distributed, the same for every contender. T is S, or 1 in decode.
        """
        rng = np.random.default_rng(0)
        new = 1 if self.direction == "decode" else self.tokens
        shapes = (
            (new, self.heads, self.head_dim),
            (self.tokens, self.kv_heads, self.head_dim),
            (self.tokens, self.kv_heads, self.value_dim),
            (new, self.heads, self.value_dim),
        )
        return [rng.standard_normal((1, *shape)).astype(self.dtype) for shape in shapes]
