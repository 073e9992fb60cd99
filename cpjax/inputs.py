"""The inputs of attention, checked in one place for all who take them: the exchanges, decode and the judge. No JAX."""

from typing import Any

import ml_dtypes
import numpy as np

from cpjax.errors import InputError
from cpjax.mask import Tokens, tokens


def check_inputs(
    query: Any, key: Any, value: Any, q_tokens: Tokens | None, kv_tokens: Tokens | None
) -> tuple[Tokens, Tokens]:
    """The places of the tokens, made up where they are None, after checking that everything fits together.

    Raises:
      InputError: shapes, dtypes, head counts or places that disagree.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise InputError(f"{name} has shape {x.shape}; it must be [batch, seq, heads, head_dim]")
        if not _is_floating(x.dtype):
            raise InputError(f"{name} is of dtype {x.dtype}; it must be a floating dtype, like float16 or float32")
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"dtypes differ: query {query.dtype}, key {key.dtype}, value {value.dtype}; cast them to one dtype"
        )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise InputError(
            f"batch sizes differ, query {query.shape[0]}, key {key.shape[0]}, value {value.shape[0]}: make them equal"
        )
    if key.shape[:3] != value.shape[:3]:
        raise InputError(f"key {key.shape} and value {value.shape} must agree in batch, length and heads")
    if query.shape[3] != key.shape[3]:
        raise InputError(f"query head_dim {query.shape[3]} and key head_dim {key.shape[3]} must be equal")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise InputError(
            f"{query.shape[2]} query heads cannot share {key.shape[2]} key/value heads evenly; "
            f"query heads must be a multiple of key/value heads"
        )
    if (q_tokens is None or kv_tokens is None) and query.shape[1] != key.shape[1]:
        raise InputError(
            f"query length {query.shape[1]} and key length {key.shape[1]} differ, so it is unknown where they are; "
            f"give q_tokens and kv_tokens (after a prefix of P tokens: cpjax.mask.tokens(batch, length, start=P))"
        )
    q_tokens = tokens(*query.shape[:2]) if q_tokens is None else q_tokens
    kv_tokens = tokens(*key.shape[:2]) if kv_tokens is None else kv_tokens
    for name, places, x in (("query", q_tokens, query), ("key", kv_tokens, key)):
        for field, array in zip(Tokens._fields, places, strict=True):
            if array.shape != x.shape[:2]:
                raise InputError(f"{field}s of the {name} have shape {array.shape}; they must be {x.shape[:2]}")
            if np.dtype(array.dtype).kind not in "iu":
                raise InputError(f"{field}s of the {name} are of dtype {array.dtype}; they must be integers")
    return _signed("query", q_tokens), _signed("key", kv_tokens)


def _signed(name: str, places: Tokens) -> Tokens:
    """Places whose differences do not wrap: 3 − 5 is 2^8 − 2 in uint8, and no key would be the future.

    Raises:
      InputError: uint32 or uint64, which int32 does not hold.
    """
    for field, array in zip(Tokens._fields, places, strict=True):
        if np.dtype(array.dtype).kind == "u" and np.dtype(array.dtype).itemsize >= 4:
            raise InputError(f"{field}s of the {name} are of dtype {array.dtype}; give them as int32")
    return Tokens(*(x.astype(np.int32) if np.dtype(x.dtype).kind == "u" else x for x in places))


def _is_floating(dtype: Any) -> bool:
    """NumPy does not count BF16 and FP8, which are ml_dtypes' types, among its own."""
    try:
        ml_dtypes.finfo(dtype)
    except ValueError:
        return False
    return True
