"""The settings in which reported faults are put: profile, ranks, mask, who shares keys, packed, decode."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cpjax.trial.emulators import dtype_of
from cpjax.trial.problem import Problem

TOKENS, DIM = 128, 32

REQUESTS = (40, 40, 40)
"""Lengths of the packed requests; the 8 tokens before them are pads. Two are as long, so that they can be exchanged."""

PREFIX = 80
"""Cached tokens before the queries."""

DRAFTS = 4
"""Queries of a decode step that drafts."""

LENGTHS = (128, 97, 120, 66)
"""Tokens of each request of the decode step."""


class Setting(NamedTuple):
    """A kind of problem. `one_head`: a fault happens in one head only."""

    name: str
    cp: int = 1
    is_causal: bool = True
    layout: str = "text"
    """text, packed, prefix (cached tokens before the queries), decode."""
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    profile: str = "flash_fp16"
    one_head: bool = False

    @property
    def order(self) -> str:
        """In which order chunks are merged."""
        return "ring" if self.cp > 1 and self.layout == "text" else "ascending"


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("text"),
        Setting("full", is_causal=False),
        Setting("cp 2", cp=2),
        Setting("cp 2, full", cp=2, is_causal=False),
        Setting("cp 4", cp=4),
        Setting("cp 8", cp=8, heads=2, kv_heads=2),
        Setting("packed", layout="packed"),
        Setting("prefix", layout="prefix"),
        Setting("decode", layout="decode", batch=4, heads=8, kv_heads=2),
        Setting("GQA, batch of 3", batch=3, heads=8, kv_heads=2),
        Setting("one head of 16", heads=16, kv_heads=16, one_head=True),
        Setting("scores in FP16, cp 2", cp=2, profile="ring_mla_fp16"),
        Setting("scaled queries in FP16", profile="scaled_query_fp16"),
        Setting("float32", profile="float32"),
        Setting("BF16, full", is_causal=False, profile="flash_bf16"),
    )
}


def problem_of(setting: Setting, rng: np.random.Generator) -> Problem:
    """Normal data; logits of deviation 1, 2 or 4."""
    queries = {"text": TOKENS, "packed": TOKENS, "prefix": TOKENS - PREFIX, "decode": DRAFTS}[setting.layout]
    query = rng.standard_normal((setting.batch, queries, setting.heads, DIM)) * rng.choice([1.0, 2.0, 4.0])
    key, value = (rng.standard_normal((setting.batch, TOKENS, setting.kv_heads, DIM)) for _ in range(2))
    problem = Problem(query, key, value, DIM**-0.5, setting.is_causal, cp=setting.cp)
    there = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (setting.batch, TOKENS))
    if setting.layout == "packed":
        numbers = np.repeat(np.arange(-1, len(REQUESTS)), (TOKENS - sum(REQUESTS), *REQUESTS))
        problem = replace(problem, segments=np.broadcast_to(numbers.astype(np.int32), (setting.batch, TOKENS)))
    if setting.layout == "prefix":
        problem = replace(problem, q_positions=there[:, PREFIX:], kv_positions=there)
    if setting.layout == "decode":
        last = np.array(LENGTHS[: setting.batch], np.int32)[:, None]
        problem = replace(problem, q_positions=last - DRAFTS + np.arange(DRAFTS, dtype=np.int32), kv_positions=there)
    return problem.cast(dtype_of(setting.profile))
