"""From a deployment to a case of decode: one new token over the KV cache that its cp·sp ranks share (kv_cache.py).

The case holds what MindIE's ranks compute with: the queries of all heads, absorbed into the latent's space and gathered
over sp, and as keys and values the cached latent itself, c_kv and k_rope, one head for all queries.
"""

from typing import Any

import numpy as np

from cpjax.crosscheck.files.case import Case
from cpjax.deepseek.config import KNOWN
from cpjax.mask import Tokens
from cpjax.mindie.models import Geometry

LATENT = KNOWN["DeepSeek-V3"].kv_lora_rank
"""Width of c_kv (kv_lora_rank), the same in all DeepSeek models that have a name here."""

PRECISION = {"spec": "decode_fp16_lse", "npu": "decode_fp16_lse"}


def decode_case(name: str, geometry: Geometry, tokens: int, ranks: int, seed: int, about: dict[str, Any]) -> Case:
    """A new token each of two requests, which have `tokens` and half as many tokens with it; inputs are normal.

    >>> case = decode_case("d", Geometry(16, 128, 64, 128), tokens=300, ranks=4, seed=0, about={})
    >>> case.query.shape, case.key.shape, case.value.shape, case.cp
    ((1, 2, 16, 576), (1, 450, 1, 576), (1, 450, 1, 512), 4)
    """
    lengths = (tokens, (tokens + 1) // 2)
    width = LATENT + geometry.rope
    rng = np.random.default_rng(seed)
    query, key = (
        rng.standard_normal((1, count, heads, width), dtype=np.float32).astype(np.float16)
        for count, heads in ((len(lengths), geometry.heads), (sum(lengths), 1))
    )
    new = Tokens(np.array(lengths, np.int32)[None] - 1, np.arange(len(lengths), dtype=np.int32)[None])
    cached = Tokens(
        np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None],
        np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[None],
    )
    value = np.ascontiguousarray(key[..., :LATENT])
    return Case(
        name, query, key, value, new, cached, geometry.scale, True, ranks, PRECISION, about | {"seed": seed},
        layout="decode",
    )  # fmt: skip
