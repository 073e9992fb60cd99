"""What the judge is asked, checked: the inputs of attention, and how it is said to have been computed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.arrays import as_array
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.exact.logits import PLAIN, Logits
from cpjax.crosscheck.judging.logit_checks import checked_alibi, checked_bias, checked_sink, checked_softcap
from cpjax.errors import InputError
from cpjax.inputs import check_inputs
from cpjax.mask import PAD, Mask, Tokens, visible
from cpjax.partition import Contiguous, Partition, Zigzag, partition_of
from cpjax.partition.partition import check_order
from cpjax.precision import PROFILE_OF, PROFILES, Precision, profile, query_in, scale_in
from cpjax.wording import counted

Array = Any
"""NumPy's, or what `cpjax.arrays.as_array` makes one of: torch's, JAX's, DLPack's, a list."""

FURTHEST = 2**61
"""Positions further from 0 are refused: their differences would leave int64."""

PAIRS = 2**24
"""Pairs of queries and keys that are looked at together: memory only, so no test pins it."""


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
    stated_scale: float
    """As it was given."""
    precision: Precision
    partition: Partition
    """Who holds which tokens, and into which chunks the keys were cut."""
    order: str
    """In which order the chunks' results were merged, one of `cpjax.partition.ORDERS`."""
    dtypes: tuple[str, ...] = ()
    """Of query, key and value as they were given; here they stand in one dtype that holds all of them."""
    softcap: float | None = None
    sink: Float[np.ndarray, " N"] | None = None
    alibi: Float[np.ndarray, "B N"] | None = None
    bias: np.ndarray | None = None
    """Four axes, `[B, N, T, S]`; an axis of length 1 stands for all."""

    @property
    def cp(self) -> int:
        """How many ranks computed."""
        return self.partition.cp

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[2] // self.key.shape[2]

    def queries(
        self, batch: int, position: Int[np.ndarray, " R"], head: Int[np.ndarray, " R"]
    ) -> Float[np.ndarray, "R H"]:
        """These queries as the profile rounds them, in float64."""
        return query_in(self.precision, self.query[batch, position, head], self.scale)

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
        return self.partition.q_chunks(*self._segments)

    @cached_property
    def kv_chunk(self) -> Int[np.ndarray, " S"]:
        """The chunk of every key."""
        return self.partition.kv_chunks(*self._segments)

    @property
    def _segments(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the first batch row: partitions in which segments matter have one."""
        return np.asarray(self.q_tokens.segment)[0], np.asarray(self.kv_tokens.segment)[0]

    @cached_property
    def merging(self) -> Int[np.ndarray, "Q C"] | None:
        """For each query chunk the order in which key/value chunks are merged; None if that is not known."""
        return None if self.order == "unknown" else self.partition.merging(self.order, *self._segments)

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
    partition: str | Partition | None = None,
    cp: int = 1,
    layout: str | None = None,
    precision: str | Precision | None = None,
    order: str = "ascending",
    softcap: Any = None,
    sink: Array | None = None,
    alibi: Array | None = None,
    bias: Array | None = None,
) -> Problem:
    """The problem, checked; arguments as of `cpjax.crosscheck.judge`.

    Raises:
      InputError: whatever does not fit, named with the rule and the fix.
    """
    query, key, value = (as_array(x, name) for x, name in ((query, "query"), (key, "key"), (value, "value")))
    precision = _profile((query, key, value), precision)
    dtypes = tuple(x.dtype.name for x in (query, key, value))
    query, key, value = in_one_dtype(query, key, value)
    mask = Mask(is_causal=is_causal, window=window)
    partition = said_partition(partition, cp, layout)
    if query.ndim == 4 and key.ndim == 4 and is_causal and query.shape[1] != key.shape[1]:
        for name, given in (("q_positions", q_positions), ("kv_positions", kv_positions)):
            if given is None:
                raise InputError(
                    f"causal with {counted(query.shape[1], 'query', 'queries')} and "
                    f"{counted(key.shape[1], 'key')}: nobody can say which keys are the "
                    f"future; give {name} (global positions, [batch, seq])"
                )
    q_tokens, kv_tokens = _tokens(query, key, q_positions, kv_positions, segment_ids)
    q_tokens, kv_tokens = check_inputs(query, key, value, q_tokens, kv_tokens)
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise InputError(f"query {query.shape}, key {key.shape}, value {value.shape}: nothing may be empty")
    if (np.asarray(q_tokens.segment) == PAD).all():
        raise InputError("every query is a pad (segment -1); there is nothing to judge")
    query = _finite("query", query, np.asarray(q_tokens.segment) != PAD)
    key, value = (_finite(n, x, _seen(mask, q_tokens, kv_tokens, x)) for n, x in (("key", key), ("value", value)))
    scale = number("scale", query.shape[-1] ** -0.5 if scale is None else scale)
    with np.errstate(over="ignore"):
        rounded = scale_in(precision, scale)
    if not np.isfinite(rounded):
        raise InputError(f"scale is {scale}, which {precision.score} does not hold; name another precision or scale")
    check_order(order)
    if order == "together":
        partition, order = Contiguous(1), "ascending"
    partition.check(np.asarray(q_tokens.segment), np.asarray(kv_tokens.segment))
    (batch, length, heads, _), keys = query.shape, key.shape[1]
    return Problem(
        query,
        key,
        value,
        q_tokens,
        kv_tokens,
        mask,
        rounded,
        scale,
        precision,
        partition,
        order,
        dtypes,
        softcap=checked_softcap(softcap),
        sink=checked_sink(sink, heads),
        alibi=checked_alibi(alibi, batch, heads),
        bias=checked_bias(bias, (batch, heads, length, keys)),
    )


def said_partition(partition: str | Partition | None, cp: int, layout: str | None) -> Partition:
    """What was said of who holds what. Nothing: one device is one chunk, and several ranks hold a zigzag.

    Raises:
      InputError: an unknown name, a cp that is no number of ranks, `partition` and `layout` both.
    """
    if partition is not None and layout is not None:
        raise InputError(f"partition is {partition} and layout {layout!r}; they are two words for the same, give one")
    said = layout if partition is None else partition
    if said is not None:
        return partition_of(said, cp)
    return Zigzag(cp) if Zigzag(cp).cp > 1 else Contiguous(1)


def number(name: str, x: Any) -> float:
    """A finite real number, as a float.

    >>> number("scale", 10**400)
    Traceback (most recent call last):
    cpjax.errors.InputError: scale is no number that float64 holds; give a finite one

    Raises:
      InputError: what is none, NaN and infinity among it.
    """
    is_real = isinstance(x, int | float | np.integer | np.floating) or (
        hasattr(x, "dtype") and getattr(x, "ndim", None) == 0 and not isinstance(x, np.bool_)
    )
    if isinstance(x, bool) or not is_real:
        raise InputError(f"{name} is {x!r:.60}; it must be a finite number")
    try:
        found = float(x)
    except (OverflowError, TypeError, ValueError):
        raise InputError(f"{name} is no number that float64 holds; give a finite one") from None
    if not np.isfinite(found):
        raise InputError(f"{name} is {found}; it must be a finite number")
    return found


def in_one_dtype(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same numbers in one dtype that holds all of them; what is no floating dtype stays, to be refused.

    >>> [x.dtype.name for x in in_one_dtype(np.ones(1, np.float32), np.ones(1, np.float16))]
    ['float32', 'float32']
    """
    names = {x.dtype.name for x in arrays}
    if len(names) == 1 and names <= FORMATS.keys():
        return arrays
    if not all(is_float(x.dtype) for x in arrays):
        return arrays
    common = np.float64 if "float64" in names else np.float32
    return tuple(x.astype(common) for x in arrays)


def is_float(dtype: np.dtype) -> bool:
    """Whether float32 or float64 holds all numbers of a dtype: NumPy's floats and ml_dtypes', FP8 too."""
    return dtype.name in FORMATS or dtype.name.startswith("float8_")


def _seen(mask: Mask, q: Tokens, kv: Tokens, x: np.ndarray) -> Bool[np.ndarray, "B S"]:
    """Of the tokens that hold a NaN or an infinity, those that any query sees; False for all others."""
    q, kv = (Tokens(*map(np.asarray, places)) for places in (q, kv))
    seen = np.zeros(x.shape[:2], bool)
    for b, bad in enumerate(~_is_finite(x)):
        where = np.flatnonzero(bad)
        step = max(1, PAIRS // q.position.shape[1])
        for some in (where[i : i + step] for i in range(0, len(where), step)):
            keys = Tokens(*(field[b : b + 1, some] for field in kv))
            seen[b, some] = visible(mask, Tokens(*(field[b : b + 1] for field in q)), keys)[0].any(axis=0)
    return seen


def _is_finite(x: np.ndarray) -> Bool[np.ndarray, "B T"]:
    return np.asarray(np.isfinite(x).all(axis=(2, 3)))


def _finite(name: str, x: np.ndarray, counts: Bool[np.ndarray, "B T"]) -> np.ndarray:
    """`x` with zeros in the tokens that hold a NaN or an infinity and do not count: pads, keys that no query sees.

    Raises:
      InputError: a NaN or an infinity in a token that counts makes every answer right and wrong.
    """
    bad = ~_is_finite(x)
    if not bad.any():
        return x
    if (bad & counts).any():
        b, t = np.argwhere(bad & counts)[0]
        n, h = np.argwhere(~np.isfinite(x[b, t]))[0]
        raise InputError(
            f"{name} holds a NaN or an infinity, first at batch {b}, token {t}, head {n}, component {h}; "
            f"inputs that are seen must be finite"
        )
    return np.where(bad[..., None, None], x.dtype.type(0), x)


def _profile(arrays: tuple[np.ndarray, ...], precision: str | Precision | None) -> Precision:
    if isinstance(precision, Precision):
        formats = ("compute", "score", "probability", "out", "carry", "lse")
        unknown = {name: getattr(precision, name) for name in formats if str(getattr(precision, name)) not in FORMATS}
        if unknown:
            raise InputError(f"precision {precision.name!r} has {unknown}; known formats are {', '.join(FORMATS)}")
        return precision
    if precision is None:
        names = {x.dtype.name for x in arrays}
        name = PROFILE_OF.get(arrays[0].dtype.name)
        if name is None or (len(names) > 1 and all(is_float(x.dtype) for x in arrays)):
            raise InputError(
                f"query, key and value are {', '.join(x.dtype.name for x in arrays)}; name a precision, one of "
                f"{', '.join(PROFILES)}, or a cpjax.precision.Precision"
            )
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
    if isinstance(segment_ids, tuple) and len(segment_ids) != 2:
        raise InputError(
            f"segment_ids is a tuple of {len(segment_ids)}; give one array, or a pair for queries and keys"
        )
    q_segment, kv_segment = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    return (
        _places(query.shape[0], query.shape[1], q_positions, q_segment),
        _places(key.shape[0], key.shape[1], kv_positions, kv_segment),
    )


def _places(batch: int, length: int, positions: Array | None, segments: Array | None) -> Tokens:
    natural = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    position = natural if positions is None else _whole("positions", positions)
    segment = np.zeros_like(natural) if segments is None else _whole("segment_ids", segments)
    return Tokens(position, segment)


def _whole(name: str, x: Array) -> Int[np.ndarray, "B T"]:
    """Whole numbers as int64, in which no difference of two wraps: 3 − 5 is 254 in uint8."""
    array = as_array(x, name)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} are {array.dtype}; they must be whole numbers")
    if array.size and (int(array.max()) > FURTHEST or int(array.min()) < -FURTHEST):
        raise InputError(f"{name} lie beyond ±2^61; count from 0 within each request")
    return array.astype(np.int64)
