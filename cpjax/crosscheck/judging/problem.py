"""What the judge is asked, checked: the inputs of attention, and how it is said to have been computed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cpjax.crosscheck.exact.logits import PLAIN, Logits
from cpjax.crosscheck.judging.logit_checks import checked_alibi, checked_bias, checked_sink, checked_softcap
from cpjax.inputs import check_inputs
from cpjax.mask import PAD, Mask, Tokens
from cpjax.partition import packed, paged
from cpjax.partition.layout import chunks_per_rank
from cpjax.partition.merge_order import chunk_of, merge_orders
from cpjax.precision import PROFILES, Precision, profile, scale_in

Array = Any
"""NumPy's, or what NumPy makes one of: JAX's, a list."""

PROFILE_OF = {"float16": "flash_fp16", "float32": "float32", "float64": "float64", "bfloat16": "flash_bf16"}
"""The profile in which arrays of a dtype are judged when none is named."""

MOST_CP = 2**16
"""A larger number is taken for a mistake. No test pins it: none is meant to come near it."""


@dataclass(frozen=True)
class Problem:
    """The inputs of attention in global token order, and who computed what in which order and precision."""

    query: Float[np.ndarray, "B T N H"]
    key: Float[np.ndarray, "B S K H"]
    value: Float[np.ndarray, "B S K V"]
    q_tokens: Tokens
    kv_tokens: Tokens
    mask: Mask
    scale: float
    """As the profile rounds it: 192^-1/2 is 3.5e-4 less in FP16, and that is not an error of whoever computes."""
    precision: Precision
    cp: int
    layout: str
    order: str
    softcap: float | None = None
    sink: Float[np.ndarray, " N"] | None = None
    alibi: Float[np.ndarray, "B N"] | None = None
    bias: np.ndarray | None = None
    """Four axes, `[B, N, T, S]`; an axis of length 1 stands for all."""

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[2] // self.key.shape[2]

    def logits_of(self, b: int, at: Int[np.ndarray, " R"], head: Int[np.ndarray, " R"]) -> Logits:
        """What the logits of these rows are made of besides scale · q·k, over all keys."""
        if self.softcap is None and self.sink is None and self.alibi is None and self.bias is None:
            return PLAIN
        alibi = size = bias = None
        if self.alibi is not None:
            here, there = (np.asarray(x.position)[b].astype(np.float64) for x in (self.q_tokens, self.kv_tokens))
            slope, distance = self.alibi[b, head][:, None], np.abs(here[at][:, None] - there)
            # Causal kernels of FlashAttention add slope · kv_position to all rows alike.
            alibi, size = slope * distance, np.abs(slope) * np.maximum(distance, np.abs(there))
        if self.bias is not None:
            own = (x if length > 1 else 0 for x, length in zip((b, head, at), self.bias.shape, strict=False))
            bias = np.broadcast_to(self.bias[*own].astype(np.float64), (len(at), self.key.shape[1]))
        return Logits(self.softcap, alibi, size, bias, None if self.sink is None else self.sink[head])

    # Every tile of rows asks for these three again.

    @cached_property
    def q_chunk(self) -> Int[np.ndarray, " T"]:
        """The chunk of every query."""
        if self.layout == "packed":
            return self._pack_chunks[0]
        if self.layout == "decode":
            return np.asarray(self.q_tokens.segment)[0]
        return chunk_of(self.query.shape[1], self.layout, self.cp)

    @cached_property
    def kv_chunk(self) -> Int[np.ndarray, " S"]:
        """The chunk of every key."""
        if self.layout == "packed":
            return self._pack_chunks[1]
        if self.layout == "decode":
            return paged.chunks(np.asarray(self.kv_tokens.segment)[0], self.cp)
        return chunk_of(self.key.shape[1], self.layout, self.cp)

    @cached_property
    def _pack_chunks(self) -> tuple[np.ndarray, np.ndarray]:
        q_segment, kv_segment = (np.asarray(places.segment)[0] for places in (self.q_tokens, self.kv_tokens))
        return packed.chunks(q_segment, kv_segment, self.cp)

    @cached_property
    def merging(self) -> Int[np.ndarray, "Q C"] | None:
        """For each query chunk the order in which key/value chunks are merged; None if that is not known."""
        if self.order == "unknown":
            return None
        if self.layout == "packed":
            requests = len(packed.bounds(np.asarray(self.q_tokens.segment)[0], self.cp))
            return packed.merging(merge_orders(self.order, "zigzag", self.cp), requests)
        if self.layout == "decode":
            return paged.merging(int(np.asarray(self.kv_tokens.segment).max()) + 1, self.cp)
        return merge_orders(self.order, self.layout, self.cp)

    def merging_of(
        self, q_chunk: Int[np.ndarray, " R"], chunks: Int[np.ndarray, " C"]
    ) -> Int[np.ndarray, "R C"] | None:
        """For rows of these query chunks the order in which they merge these key/value chunks, and no others; the
        chunks are numbered as they stand in `chunks`.
        """
        if self.merging is None:
            return None
        number = np.full(self.merging.shape[1], -1)
        number[chunks] = np.arange(len(chunks))
        orders = number[self.merging[q_chunk]]
        return orders[orders >= 0].reshape(len(q_chunk), len(chunks))

    @property
    def is_judged(self) -> np.ndarray:
        """Which queries are judged, `[B, T]`: all but pads."""
        return np.asarray(self.q_tokens.segment) != PAD


def checked_problem(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    q_positions: Array | None = None,
    kv_positions: Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    window: int | None = None,
    cp: int = 1,
    layout: str = "zigzag",
    precision: str | Precision | None = None,
    order: str = "ascending",
    softcap: Any = None,
    sink: Array | None = None,
    alibi: Array | None = None,
    bias: Array | None = None,
) -> Problem:
    """The problem, checked; arguments as of `cpjax.crosscheck.judge`.

    Raises:
      ValueError: whatever does not fit, named with the rule and the fix.
    """
    query, key, value = (np.asarray(x) for x in (query, key, value))
    precision = _profile(query, precision)
    if not isinstance(cp, int) or not 1 <= cp <= MOST_CP:
        raise ValueError(f"cp is {cp!r}; it is a number of ranks, a whole number from 1 to {MOST_CP}")
    if layout not in ("packed", "decode"):
        chunks_per_rank(layout)
    if query.ndim == 4 and key.ndim == 4 and is_causal and query.shape[1] != key.shape[1]:
        for name, given in (("q_positions", q_positions), ("kv_positions", kv_positions)):
            if given is None:
                raise ValueError(
                    f"causal with {query.shape[1]} queries and {key.shape[1]} keys: nobody can say which keys are the "
                    f"future; give {name} (global positions, [batch, seq])"
                )
    q_tokens, kv_tokens = _tokens(query, key, q_positions, kv_positions, segment_ids)
    q_tokens, kv_tokens = check_inputs(query, key, value, q_tokens, kv_tokens)
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(f"query {query.shape}, key {key.shape}, value {value.shape}: nothing may be empty")
    if (np.asarray(q_tokens.segment) == PAD).all():
        raise ValueError("every query is a pad (segment -1); there is nothing to judge")
    _check_finite({"query": (query, q_tokens), "key": (key, kv_tokens), "value": (value, kv_tokens)})
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    if not np.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number")
    merge_orders(order, "zigzag" if layout in ("packed", "decode") else layout, 1)
    if layout == "packed":
        packed.check_pack(np.asarray(q_tokens.segment), np.asarray(kv_tokens.segment), cp)
    if layout == "decode":
        paged.check_decode(np.asarray(q_tokens.segment), np.asarray(kv_tokens.segment))
    mask = Mask(is_causal=is_causal, window=window)
    (batch, length, heads, _), keys = query.shape, key.shape[1]
    return Problem(
        query,
        key,
        value,
        q_tokens,
        kv_tokens,
        mask,
        scale_in(precision, scale),
        precision,
        cp,
        layout,
        order,
        softcap=checked_softcap(softcap),
        sink=checked_sink(sink, heads),
        alibi=checked_alibi(alibi, batch, heads),
        bias=checked_bias(bias, (batch, heads, length, keys)),
    )


def _check_finite(arrays: dict[str, tuple[np.ndarray, Tokens]]) -> None:
    """Pads may hold anything; a NaN or an infinity in a real token makes every answer right and wrong."""
    for name, (x, places) in arrays.items():
        bad = ~np.isfinite(x).all(axis=(2, 3)) & (np.asarray(places.segment) != PAD)
        if bad.any():
            b, t = np.argwhere(bad)[0]
            raise ValueError(f"{name} holds a NaN or an infinity, first at batch {b}, token {t}; inputs must be finite")


def _profile(query: np.ndarray, precision: str | Precision | None) -> Precision:
    if isinstance(precision, Precision):
        return precision
    if precision is None:
        name = PROFILE_OF.get(query.dtype.name)
        if name is None or name not in PROFILES:
            raise ValueError(f"query is {query.dtype}; name a precision, one of {', '.join(PROFILES)}")
        precision = name
    return profile(precision)


def _tokens(
    query: np.ndarray,
    key: np.ndarray,
    q_positions: Array | None,
    kv_positions: Array | None,
    segment_ids: Array | tuple[Array, Array] | None,
) -> tuple[Tokens | None, Tokens | None]:
    """Places as given, or 0, 1, 2, … of one request."""
    if query.ndim != 4 or key.ndim != 4:
        return None, None  # refused by check_inputs
    q_segment, kv_segment = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    return (
        _places(query.shape[0], query.shape[1], q_positions, q_segment),
        _places(key.shape[0], key.shape[1], kv_positions, kv_segment),
    )


def _places(batch: int, length: int, positions: Array | None, segments: Array | None) -> Tokens:
    natural = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    position = natural if positions is None else np.asarray(positions)
    segment = np.zeros_like(natural) if segments is None else np.asarray(segments)
    for name, x in (("positions", position), ("segment_ids", segment)):
        if x.dtype.kind not in "iu":
            raise ValueError(f"{name} are {x.dtype}; they must be whole numbers")
    return Tokens(position, segment)
