"""Latent attention (MLA): what travels is a latent that all heads share, and each rank makes keys and values of it.

    k[n] = [c_kv W_UK[n] ; k_rope]        v[n] = c_kv W_UV[n]        DeepSeek-V2, arXiv 2405.04434, §2.1

576 numbers a token travel in one row (512 + 64 of DeepSeek-V3), where 16 heads' keys and values are 5,120. The product
is one, in FP16, with both weights beside each other, as MindIE's kv_b, and k_rope is repeated over the heads. MindIE
multiplies all gathered tokens at once; here those of a rank are multiplied when it is their turn, alike in every
exchange, and those of cached prefixes at last.

A float32 sum that lies near the middle between two FP16 numbers may come out as either, and which of them is the
kernel's business. So a result says with which keys and values it was computed, and all ranks must have made the same.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from npu_backend.errors import RankError

PREFIX = "the cached prefixes"


class UpProjection(NamedTuple):
    """From the latent to keys (without their rotary part, D wide) and values of N heads."""

    weight: Tensor  # [N (D + V), C] float16, as torch.nn.functional.linear takes it
    heads: int
    nope: int  # D


def up_projection(w_uk: Tensor, w_uv: Tensor) -> UpProjection:
    """Of W_UK `[C, N, D]` and W_UV `[C, N, V]`."""
    weight = torch.cat([w_uk, w_uv], dim=2).flatten(1).T.contiguous()
    return UpProjection(weight, *w_uk.shape[1:])


def expand(latent: Tensor, up: UpProjection) -> tuple[Tensor, Tensor]:
    """Keys `[B, t, N, D + R]` and values `[B, t, N, V]` of all heads, from latents `[B, t, 1, C + R]`; all float16.

    >>> up = up_projection(torch.ones(2, 3, 4).half(), torch.full((2, 3, 5), 2).half())
    >>> key, value = expand(torch.tensor([1.0, 2.0, 7.0]).half().view(1, 1, 1, 3), up)
    >>> key[0, 0, 2], value[0, 0, 2]
    (tensor([3., 3., 3., 3., 7.], dtype=torch.float16), tensor([6., 6., 6., 6., 6.], dtype=torch.float16))
    """
    width = up.weight.shape[1]
    c_kv, k_rope = latent.split((width, latent.shape[3] - width), dim=3)
    product = torch.nn.functional.linear(c_kv[:, :, 0], up.weight).unflatten(2, (up.heads, -1))
    key, value = product.split((up.nope, product.shape[3] - up.nope), dim=3)
    return torch.cat([key, k_rope.expand(-1, -1, up.heads, -1)], dim=3), value.contiguous()


Made = dict[str, tuple[Tensor, ...]]
"""Keys and values that a rank has made, by whose latents they were: `latents_of` a rank, or `PREFIX`."""


def latents_of(rank: int) -> str:
    """A rank's latents, in words."""
    return f"rank {rank}'s latents"


def digests(made: Made) -> dict[str, str]:
    """SHA-256 of each, so that ranks can compare what they have made without sending it."""
    return {of: hashlib.sha256(b"".join(_bytes(x) for x in key_value)).hexdigest() for of, key_value in made.items()}


def _bytes(x: Tensor) -> bytes:
    return x.cpu().contiguous().numpy().tobytes()


def check_same(of_ranks: list[dict[str, str]]) -> None:
    """All ranks must have made the same keys and values, to the last bit; given are their `digests`, by rank.

    Raises:
      RankError: two have not; the message names both, and whose latents they were.
    """
    for rank, made in enumerate(of_ranks):
        for of, digest in made.items():
            if digest != of_ranks[0][of]:
                raise RankError(
                    f"rank {rank} has made other keys and values of {of} than rank 0: one product of the same numbers "
                    f"must have the same bits on every device"
                )


def in_order(made: Made, places: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All keys `[B, S, N, H]` and values `[B, S, N, V]` that were made; `places` are those of their tokens."""
    tokens = sum(len(places[of]) for of in made)
    first = next(iter(made.values()))
    key, value = (np.empty((x.shape[0], tokens, *x.shape[2:]), np.float16) for x in first)
    for of, parts in made.items():
        key[:, places[of]], value[:, places[of]] = (x.cpu().numpy() for x in parts)
    return key, value
