"""A card computes: attention exactly as a card says, bit for bit as far as it says it.

`arithmetic_of` reads the card; where a line cannot be told it takes what the line has as `nearest`, or a default, and
says so. `compute` is the emulator. Tiles and maxima are as in `cpjax.trial.emulators`; here each sum has an order of
its own, and exp, log and division are chosen bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint import exponentials, sums
from cpjax.fingerprint.probe import Answer, Line, Probe, digits_of, toward_zero
from cpjax.fingerprint.sums import Order

single = np.float32


@dataclass(frozen=True)
class Arithmetic:
    """What the emulator needs to know.

    Attributes:
      dtype: of query, key, value and out.
      scale: multiplies the `score`, the `query` or by its `root` both, in float32; `rounded`, `rounded query` and
        `rounded root`: rounded to `dtype`.
      score, score_once, distance: formats of q·k and of the scaled score, of the scaled score alone, of s − m.
      factor, is_cut: format of p as the factor of v, and whether it is cut off.
      total: format of the p that the row sum takes.
      tile: keys before the maximum is raised; 0 is all of a part.
      parts: of the keys, with maxima of their own.
      division: `out` or `p` is divided by the row sum; `out by 1/l`, `p by 1/l`: multiplied with its reciprocal.
      exp, log: names in `exponentials`.
      row_sum: a name in `sums.ROW_SUMS`; `is_sum_fused`: l e^(m − m') + Σ p has one rounding.
      lse: `natural`, `base` two, `the` maximum alone, or `none`; `lse_format` is what it is rounded to.
      cuts_out, flushes: out is cut off to its format; subnormal numbers become 0.
    """

    dtype: str
    scale: str = "score"
    score: str = "float32"
    score_once: str = "float32"
    distance: str = "float32"
    is_tf32: bool = False
    factor: str = "float32"
    is_cut: bool = False
    total: str = "float32"
    tile: int = 0
    parts: int = 1
    products: Order = field(default_factory=Order)
    weighted: Order = field(default_factory=Order)
    division: str = "out"
    exp: str = "nearest"
    is_base_two: bool = False
    row_sum: str = "numpy"
    is_sum_fused: bool = False
    log: str = "nearest"
    lse: str = "natural"
    lse_format: str = "float32"
    cuts_out: bool = False
    flushes: bool = False


class Assumed(NamedTuple):
    """A line that was not told, and what was taken in its place."""

    line: str
    taken: str


ORDERS = "order within q·k, bit for bit", "order within p·v, bit for bit"
"""Asked where the tree is none that can be computed for any number of terms."""

LAST_BITS: dict[str, dict[str, dict[str, Any]]] = {
    "place of the scale, in float32": {
        "score": {"scale": "score"},
        "query": {"scale": "query"},
        "root": {"scale": "root"},
    },
    "products and sums": {"fused": {"fused": True}, "rounded": {"fused": False}},
    ORDERS[0]: {words: {"products": words} for words in (sums.SEQUENTIAL, sums.PAIRS)},
    ORDERS[1]: {words: {"weighted": words} for words in (sums.SEQUENTIAL, sums.PAIRS)},
    "rounding of s − m": {"float32": {}, "as the score": {"distance": "score"}},
    "exp, bit for bit": {name: {"exp": name} for name in exponentials.EXP},
    "base of exp, bit for bit": {"e": {"is_base_two": False}, "two": {"is_base_two": True}},
    "order of the row sum": {name: {"row_sum": name} for name in sums.ROW_SUMS},
    "row sum from tile to tile": {"rounded": {"is_sum_fused": False}, "fused": {"is_sum_fused": True}},
    "division by the row sum": {
        "out": {"division": "out"},
        "out by 1/l": {"division": "out by 1/l"},
        "p": {"division": "p"},
        "p by 1/l": {"division": "p by 1/l"},
    },
    "p·v from tile to tile": {"added": {"goes_on": False}, "goes on": {"goes_on": True}},
    "log of lse": {name: {"log": name} for name in ("libm", "nearest", "numpy")},
}
"""Line → code → fields of `Arithmetic` (`fused` and `goes_on` are of its orders): what `last_bits` tells. The first
code of each is what is assumed where there is no telling."""


def with_code(arithmetic: Arithmetic, line: str, code: str) -> Arithmetic:
    """The arithmetic with one line of `LAST_BITS`."""
    changes = dict(LAST_BITS[line][code])
    if "fused" in changes:
        is_fused = changes.pop("fused")
        changes["products"] = replace(arithmetic.products, is_fused=is_fused)
        changes["weighted"] = replace(arithmetic.weighted, is_fused=is_fused)
    if "goes_on" in changes:
        changes["weighted"] = replace(arithmetic.weighted, goes_on=changes.pop("goes_on"))
    for order in {"products", "weighted"} & {name for name, value in changes.items() if isinstance(value, str)}:
        changes[order] = replace(getattr(arithmetic, order), words=changes[order])
    if changes.get("distance") == "score":
        half = {arithmetic.score, arithmetic.score_once} - {"float32"}
        changes["distance"] = half.pop() if half else "float32"
    return replace(arithmetic, **changes)


def arithmetic_of(dtype: str, lines: Mapping[str, Line]) -> tuple[Arithmetic, tuple[Assumed, ...]]:
    """What the lines of a card say, and what was assumed because they do not say it.

    Args:
      dtype: of query, key and value.
      lines: by name.

    >>> arithmetic_of("float16", {"key tile": Line("key tile", "", "", "128")})[0].tile
    128
    """
    assumed: list[Assumed] = []

    def code(name: str, default: str) -> str:
        line = lines.get(name)
        if line is not None and line.code:
            return line.code
        taken = line.nearest if line is not None and line.nearest else default
        assumed.append(Assumed(name, taken))
        return taken

    half = dtype != "float32"
    factor = code("p as the factor of v", dtype)
    scale, score = code("scale", "score"), code("scores", "float32")
    formats = score.split()
    rounded = formats[0] if formats[0] in FORMATS else "float32"
    tile, splits = code("key tile", "whole"), code("splits of the keys", "1")
    how = code("digits of p·v, 64 keys", "24 to nearest")
    lse = lines.get("lse")
    kind = lse.code if lse is not None and lse.code else "none"
    found = Arithmetic(
        dtype,
        scale={"query": "rounded query", "root": "rounded root"}.get(scale, scale) if half else scale,
        score=rounded if len(formats) == 1 else "float32",
        score_once=rounded if formats[1:] == ["once"] else "float32",
        distance=rounded if formats[1:] == ["distance"] else "float32",
        is_tf32=score == "tf32",
        factor=factor.removeprefix("normalised ").split()[0],
        is_cut=factor.endswith("toward zero"),
        total=dtype if code("p in the row sum", "float32") == "rounded" else "float32",
        tile=int(tile) if tile.isdecimal() else 0,
        parts=int(splits),
        products=Order(_computable(code("order within q·k", sums.SEQUENTIAL), "order within q·k", assumed)),
        weighted=_weighted(lines, how, assumed),
        division="p" if factor.startswith("normalised") else "out",
        lse=kind,
        lse_format=_lse_format(lse),
        cuts_out=half and code("rounding of out", "nearest even") == "toward zero",
        flushes=code("subnormal numbers", "kept") == "flushed",
    )
    for name, codes in LAST_BITS.items():
        if is_asked(name, found, lines):
            found = with_code(found, name, code(name, default_of(name, found, lines) or next(iter(codes))))
    return found, tuple(assumed)


def default_of(line: str, arithmetic: Arithmetic, lines: Mapping[str, Line]) -> str:
    """What other lines of the card say of a line of `LAST_BITS`; "" if they say nothing."""
    if line == "base of exp, bit for bit":
        told = lines.get("base of exp")
        return told.code if told is not None else ""
    return arithmetic.division if line == "division by the row sum" else ""


def is_asked(line: str, arithmetic: Arithmetic, lines: Mapping[str, Line]) -> bool:
    """Whether the arithmetic and the lines that it was read from leave this open."""
    if line in ORDERS:
        tree = lines.get("order within q·k" if line == ORDERS[0] else "order within p·v, 64 keys")
        return tree is None or not sums.is_computable(sums.within(tree.code)[0])
    if line == "place of the scale, in float32":
        return arithmetic.scale in ("score", "query", "root")
    if line == "rounding of s − m":
        return {arithmetic.score, arithmetic.score_once} != {"float32"}
    if line == "log of lse":
        return arithmetic.lse in ("natural", "base")
    if line in ("row sum from tile to tile", "p·v from tile to tile"):
        return arithmetic.tile > 0
    return True


def _computable(words: str, line: str, assumed: list[Assumed]) -> str:
    if sums.is_computable(words):
        return words
    assumed.append(Assumed(line, sums.SEQUENTIAL))
    return sums.SEQUENTIAL


def _weighted(lines: Mapping[str, Line], digits: str, assumed: list[Assumed]) -> Order:
    """The order of p·v within a tile: of 64 keys, in parts if there are any."""
    name = "order within p·v, 64 keys"
    line, parts = lines.get(name), lines.get("parts of p·v")
    words, size = sums.within(line.code if line is not None else "")
    words = _computable(words, name, assumed)
    has_halves = False
    if parts is not None and parts.code:
        size, has_halves = int(parts.code.split()[0]) or size, parts.code.endswith("halves")
    elif words == sums.SEQUENTIAL and not size:
        assumed.append(Assumed("parts of p·v", "none"))
    return Order(words, part=size, has_halves=has_halves, is_cut=digits.endswith("toward zero"))


def _lse_format(line: Line | None) -> str:
    last = "" if line is None else line.value.rpartition(" ")[2]
    return last if last in FORMATS else "float32"


# The emulator --------------------------------------------------------------------------------------------------------


def compute(arithmetic: Arithmetic, asked: Probe, score: np.ndarray | None = None) -> Answer:
    """Out and lse of the probe, as the arithmetic gives them, in float64.

    Args:
      score: `scores(arithmetic, asked)`, if it is there already.

    >>> one = np.ones((1, 4, 1, 64), np.float32)
    >>> float(compute(Arithmetic("float16"), Probe(one, one, one)).out.max())
    1.0
    """
    with np.errstate(all="ignore"):
        return _compute(arithmetic, asked, scores(arithmetic, asked) if score is None else score)


def scores(arithmetic: Arithmetic, asked: Probe) -> Float[np.ndarray, "B N T S"]:
    """The scaled scores, −∞ where a key is hidden; they depend on the fields of `of_scores` alone."""
    length, keys = asked.query.shape[1], asked.key.shape[1]
    seen = np.tri(length, keys, dtype=bool) if asked.is_causal else np.ones((length, keys), bool)
    with np.errstate(all="ignore"):
        score = _scores(arithmetic, _by_head(asked.query, 1), _by_head(asked.key, _group(asked)), asked.scale)
    return np.where(seen, score, single(-np.inf))


def of_scores(arithmetic: Arithmetic) -> tuple[Any, ...]:
    """What scores depend on."""
    a = arithmetic
    return a.dtype, a.scale, a.score, a.score_once, a.is_tf32, a.is_base_two, a.products


def _by_head(x: np.ndarray, group: int) -> np.ndarray:
    """`[B, S, K, H]` as `[B, N, S, H]` float32."""
    return np.repeat(x.astype(single).swapaxes(1, 2), group, axis=1)


def _group(asked: Probe) -> int:
    return asked.query.shape[2] // asked.key.shape[2]


def _compute(a: Arithmetic, asked: Probe, score: np.ndarray) -> Answer:
    keys, value = asked.key.shape[1], _by_head(asked.value, _group(asked))
    size = -(-keys // a.parts)
    done = [_part(a, score[..., i : i + size], value[..., i : i + size, :]) for i in range(0, keys, size)]
    out, maximum, weight = done[0] if len(done) == 1 else _merged(a, done)
    if a.division.startswith("out"):
        out = _divided(out, weight[..., None], by_reciprocal=a.division.endswith("1/l"))
    return Answer(_handed_over(a, out), _lse(a, maximum, weight))


def _scores(a: Arithmetic, query: np.ndarray, key: np.ndarray, scale: float) -> np.ndarray:
    """Of `[B, N, T, H]` and `[B, N, S, H]`; times log2 e where exponentials are to base two."""
    fmt = FORMATS[a.dtype]
    if a.is_tf32:
        query, key = (digits_of(x, 11).astype(single) for x in (query, key))
    factor = single(np.float64(scale) * (np.log2(np.e) if a.is_base_two else 1.0))
    where = a.scale.split()[-1]
    if a.scale == "rounded":
        factor = _rounded(np.asarray(factor), a.dtype)
    elif where in ("query", "root"):
        one = single(np.sqrt(single(scale))) if where == "root" else single(scale)
        query = query * one
        key = key * one if where == "root" else key
        if a.scale.startswith("rounded"):
            query, key = (fmt.round(x).astype(single) for x in (query, key))
        factor = single(np.log2(np.e) if a.is_base_two else 1)
    is_exact = a.dtype != "float32" and a.scale not in ("query", "root")
    order = replace(a.products, is_fused=a.products.is_fused and not is_exact)  # of half numbers it makes no difference
    raw = _rounded(sums.added(query, key.swapaxes(-1, -2), order), a.score)
    return _rounded(_rounded(raw * factor if factor != 1 else raw, a.score), a.score_once)


Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Σ p v, divided if p was; the maximum; the row sum."""


def _part(a: Arithmetic, score: np.ndarray, value: np.ndarray) -> Part:
    keys = score.shape[-1]
    tile = a.tile or keys
    maximum, weight = np.full(score.shape[:-1], -np.inf, single), np.zeros(score.shape[:-1], single)
    is_exact = "float32" not in (a.dtype, a.factor)
    order = replace(a.weighted, is_fused=a.weighted.is_fused and not is_exact)
    out: np.ndarray | None = None
    for first in range(0, keys, tile):
        some = score[..., first : first + tile]
        before, maximum = maximum, np.maximum(maximum, some.max(axis=-1))
        base = np.where(np.isneginf(maximum), single(0), maximum)
        p = _exp(a, _rounded(some - base[..., None], a.distance))
        total = sums.row_sum(np.ascontiguousarray(_rounded(p, a.total)), a.row_sum)
        if first:
            shrink = _exp(a, _rounded(before - base, a.distance)[..., None], is_single=True)[..., 0]
            weight = sums.fused(weight, shrink, total) if a.is_sum_fused else weight * shrink + total
            assert out is not None  # there was a tile before
            out = out * shrink[..., None]
        else:
            weight = total
        if a.division.startswith("p"):
            p = _divided(p, weight[..., None], by_reciprocal=a.division.endswith("1/l"))
        factor = toward_zero(p, FORMATS[a.factor]).astype(single) if a.is_cut else _rounded(p, a.factor)
        out = sums.added(factor, value[..., first : first + tile, :], order, out)
    assert out is not None  # there is a key
    return out, maximum, weight


def _merged(a: Arithmetic, parts: list[Part]) -> Part:
    """Parts with maxima of their own, each weighted with exp(its maximum − the largest)."""
    maximum = np.max([part[1] for part in parts], axis=0)
    base = np.where(np.isneginf(maximum), single(0), maximum)
    shrink = [_exp(a, (part[1] - base)[..., None], is_single=True)[..., 0] for part in parts]
    out, weight = (np.zeros_like(x) for x in (parts[0][0], parts[0][2]))
    for part, one in zip(parts, shrink, strict=True):
        out, weight = out + part[0] * one[..., None], weight + part[2] * one
    return out, maximum, weight


def _exp(a: Arithmetic, x: np.ndarray, *, is_single: bool = False) -> np.ndarray:
    """Exponentials of rows; what is left of a row over whole vectors is the library's. `is_single`: one a row is."""
    known = exponentials.EXP_2 if a.is_base_two else exponentials.EXP
    of_vectors = known.get(a.exp, known["nearest"])
    if a.is_base_two or a.exp not in exponentials.BY_VECTORS:
        return of_vectors(x)
    whole = 0 if is_single else x.shape[-1] // sums.lanes_of(a.row_sum) * sums.lanes_of(a.row_sum)
    return np.concatenate([of_vectors(x[..., :whole]), exponentials.SINGLE(x[..., whole:])], axis=-1)


def _divided(x: np.ndarray, by: np.ndarray, *, by_reciprocal: bool) -> np.ndarray:
    by = np.where(by == 0, single(1), by)
    return x * (single(1) / by) if by_reciprocal else x / by


def _handed_over(a: Arithmetic, out: np.ndarray) -> Float[np.ndarray, "B T N V"]:
    fmt = FORMATS[a.dtype]
    given = toward_zero(out.astype(np.float64), fmt) if a.cuts_out else fmt.round(out)
    if a.flushes:
        given = np.where(np.abs(given) < fmt.least_normal, 0.0, given)
    return given.swapaxes(1, 2)


def _lse(a: Arithmetic, maximum: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    if a.lse not in ("natural", "base", "the"):
        return None
    if a.lse == "the":
        found = maximum
    elif a.is_base_two:
        found = maximum + exponentials.LOG_2[a.log](weight)
        found = found if a.lse == "base" else found * exponentials.LN_2
    else:
        found = maximum + exponentials.LOG[a.log](weight)
        found = found * exponentials.LOG2_E if a.lse == "base" else found
    return FORMATS[a.lse_format].round(found).swapaxes(1, 2)


def _rounded(x: np.ndarray, fmt: str) -> np.ndarray:
    return x if fmt == "float32" else FORMATS[fmt].round(np.asarray(x)).astype(single)
