"""The masks that faults apply, of the sampled rows: decided by global positions, or by what a broken kernel goes by."""

import numpy as np
from jaxtyping import Bool

from cpjax.crosscheck.diagnosis.dictionary import first_query
from cpjax.crosscheck.diagnosis.sample import Sample
from cpjax.crosscheck.question import Question


def mask_of(sample: Sample, question: Question, name: str) -> Bool[np.ndarray, "R S"]:
    """The mask of a fault, `[R, S]`."""
    b, word, number = sample.batch, name.partition(" ")[0], name.rpartition(" ")[2]
    position, segment = (np.asarray(x)[b, sample.position] for x in question.q_tokens)
    kv_position, kv_segment = (np.asarray(x)[b] for x in question.kv_tokens)
    ahead = position[:, None].astype(int) - kv_position[None]
    same = (segment[:, None] == kv_segment[None]) & (segment[:, None] >= 0)
    index = sample.position[:, None] - np.arange(len(kv_position))[None]
    causal = ahead >= 0 if question.mask.is_causal else np.ones_like(same)
    window = question.mask.window
    inside = np.ones_like(same) if window is None else np.abs(ahead) < window
    if name == "no causal":
        return same & inside
    if word == "shift":
        return same & inside & (ahead + int(number) >= 0)
    if name == "causal":
        return same & inside & (ahead >= 0)
    if word == "window":
        return same & causal & ((np.abs(ahead) < max(window or 1, 1) + int(number)) if number != "0" else True)
    if name == "pads":
        by_index = index >= 0 if question.mask.is_causal else np.ones_like(same)
        return (same & causal & inside) | ((kv_segment < 0)[None] & by_index)
    if name == "requests":
        by_index = index >= 0 if question.mask.is_causal else np.ones_like(same)
        return by_index & (kv_segment >= 0)[None]
    return sample.seen & (kv_position >= first_query(question)[b])[None]  # no prefix
