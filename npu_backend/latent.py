"""Latent attention (MLA): what travels is a latent that all heads share, and each rank makes keys and values of it.

    k[n] = [c_kv W_UK[n] ; k_rope]        v[n] = c_kv W_UV[n]        DeepSeek-V2, arXiv 2405.04434, §2.1

576 numbers a token travel in one row (512 + 64 of DeepSeek-V3), where 16 heads' keys and values are 5,120. The product
is one, in FP16, with both weights beside each other, as MindIE's kv_b, and k_rope is repeated over the heads. MindIE
multiplies all gathered tokens at once; here those of a rank are multiplied when it is their turn, in 1/cp of the
memory, and alike in every exchange.

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


class Made:
    """The keys and values that this rank has made of each rank's latents, and of the prefixes'."""

    def __init__(self, *, keep: bool):
        """Their digests are always kept, they themselves if asked for: they are many times the latent."""
        self.keep = keep
        self.digests: dict[str, str] = {}
        self.kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, of: str, key_value: tuple[Tensor, ...]) -> None:
        """What was made of the latents of `of`, as `latents_of` names them."""
        key, value = (x.cpu().contiguous().numpy() for x in key_value)
        self.digests[of] = hashlib.sha256(key.tobytes() + value.tobytes()).hexdigest()
        if self.keep:
            self.kept[of] = key, value


def latents_of(rank: int) -> str:
    """A rank's latents, in words."""
    return f"rank {rank}'s latents"


def check_same(digests: list[dict[str, str]]) -> None:
    """All ranks must have made the same keys and values, to the last bit; `digests` are theirs, by rank.

    Raises:
      RankError: two have not; the message names both, and whose latents they were.
    """
    for rank, made in enumerate(digests):
        for of, digest in made.items():
            if digest != digests[0][of]:
                raise RankError(
                    f"rank {rank} has made other keys and values of {of} than rank 0: one product of the same numbers "
                    f"must have the same bits on every device"
                )
