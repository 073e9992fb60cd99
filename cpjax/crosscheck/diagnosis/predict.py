"""What a fault would have made of the sampled rows, with the judge's own standard deviation; and how well that fits."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.attention64 import Rows, attention_rows
from cpjax.crosscheck.diagnosis.dictionary import RIGHT, Block, Fault, first_query
from cpjax.crosscheck.diagnosis.sample import Sample
from cpjax.crosscheck.error_model import ErrorModel
from cpjax.crosscheck.formats import FORMATS
from cpjax.crosscheck.question import Question
from cpjax.crosscheck.statistic import effective_freedom

MOST_Z = 2.0
"""A fault whose residual is larger than this many standard deviations explains nothing."""

EVEN = 0.1
"""More noise is in every row: if half of the rows have less than this share of the variance, it was not that."""


@dataclass(frozen=True)
class Fit:
    """How well a fault explains a sample."""

    fault: Fault
    deviance: float
    """−2 ln(likelihood), up to a constant of the sample, plus the cost of the fault."""
    z: float
    """RMS(residual / σ) of out and lse, the larger."""
    freedom: float
    """Effective number of independent residuals."""
    lse_is_right: bool = False
    """lse is that of the correct result, only out is not."""

    @property
    def explains(self) -> bool:
        """No residual is left."""
        return self.z <= MOST_Z


def exact_model(sample: Sample, question: Question, fault: Fault = RIGHT) -> ErrorModel:
    """The error model of the rows as the fault would have computed them."""
    pieces = _pieces(sample, question, fault)
    index = np.concatenate([keys for keys, _, _, _ in pieces])
    seen = np.concatenate([mask for _, mask, _, _ in pieces], axis=1)
    slot = np.concatenate([np.full(len(keys), slot) for keys, _, slot, _ in pieces])
    log_weight = np.concatenate([np.full(len(keys), np.log(weight)) for keys, _, _, weight in pieces])
    query, key, scale = sample.query, sample.key[index], sample.scale * fault.scale
    if log_weight.any():  # one more dimension of the scores: scale · 1 · (log_weight / scale)
        query = np.column_stack([query, np.ones(len(query))])
        key = np.column_stack([key, log_weight / scale])
    rows = attention_rows(query, key, sample.value[index], seen, slot, scale)
    merging = question.merging
    if merging is not None:
        number = np.full(max(merging.shape[1], int(rows.chunks.max()) + 1), -1)
        number[rows.chunks] = np.arange(len(rows.chunks))
        order = number[merging[sample.q_chunk]]
        merging = np.broadcast_to(order[order >= 0], (len(query), int((order >= 0).sum())))
    return ErrorModel(rows, question.precision, merging, question.query.shape[3], scale)


def _pieces(sample: Sample, question: Question, fault: Fault) -> list[tuple[np.ndarray, np.ndarray, int, float]]:
    """Keys, their mask, the slot in which they enter, and their weight."""
    seen = mask_of(sample, question, fault.mask) if fault.mask else sample.seen
    changed = dict(fault.changes)
    pieces = []
    for slot in range(int(sample.chunk.max()) + 1):
        block = changed.get(slot, Block(slot, "visible"))
        keys = np.flatnonzero(sample.chunk == block.source)
        mask = (seen if block.extent == "visible" else sample.mask(block.extent))[:, keys]
        if block.weight > 0:
            pieces.append((keys, mask, slot, block.weight))
    if fault.key >= 0:
        pieces = [(keys, mask & (keys != fault.key), slot, weight) for keys, mask, slot, weight in pieces]
        if fault.number > 0:
            own = np.array([fault.key])
            pieces.append((own, seen[:, own], int(sample.chunk[fault.key]), fault.number))
    return pieces or [(np.zeros(1, int), np.zeros((len(sample.query), 1), bool), 0, 1.0)]


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


class Measured:
    """A sample with the model of the correct result; scores faults."""

    def __init__(self, sample: Sample, question: Question):
        """Computes the correct result once."""
        self.sample, self.question = sample, question
        self.model = exact_model(sample, question)
        self.expected = self.model.expected()
        distinct = 1 + (np.diff(np.sort(self.model.rows.out, axis=1), axis=1) != 0).sum(axis=1)
        self.freedom = np.maximum(effective_freedom(distinct, self.expected.coherent), 1.0)
        self.right = self.fit(RIGHT)

    def fit(self, fault: Fault) -> Fit:
        """Exactly, by the error model of the changed computation."""
        plain = not (fault.changes or fault.mask or fault.scale != 1.0 or fault.key >= 0)
        model = self.model if plain else exact_model(self.sample, self.question, fault)
        expected = self.expected if plain else model.expected()
        out, lse, variance = model.rows.out, model.rows.lse, expected.sigma**2
        if fault.unrescaled:
            out = unrescaled(model, self.question, fault.unrescaled)
            variance = variance * np.maximum(1.0, (out / np.where(model.rows.out == 0, 1, model.rows.out)) ** 2)
        if fault.noise:
            variance = noisier(model, fault)
        if fault.lse:
            lse = changed_lse(model.rows, fault)
        return self._score(fault, out, variance, lse, expected.lse_sigma)

    def screen(self, faults: list[Fault]) -> list[Fault]:
        """The faults in the order of how well they fit, roughly: by sums over chunks, without touching a key."""
        sums = self.sample.sums
        mass, part = (x.sum(axis=1) for x in sums["visible"])
        rough = []
        for fault in faults:
            m, p = mass.copy(), part.copy()
            for slot, block in fault.changes:
                m += block.weight * sums[block.extent][0][:, block.source] - sums["visible"][0][:, slot]
                p += block.weight * sums[block.extent][1][:, block.source] - sums["visible"][1][:, slot]
            m = np.maximum(m, 1e-300)
            out = np.clip(p / m[:, None], -1e100, 1e100)  # a row that loses all its keys is no output at all
            with np.errstate(over="ignore"):
                growth = np.minimum(np.maximum(1.0, mass / m), 1e6)
            step = FORMATS[self.question.precision.out].spacing(out)
            variance = (self.expected.sigma * growth[:, None]) ** 2 + step**2 / 6
            lse = self.sample.base + np.log(m)
            rough.append(self._score(fault, out, variance, lse, self.expected.lse_sigma * growth).deviance)
        return [faults[i] for i in np.argsort(rough, kind="stable")]

    def weight_of(self, chunks: tuple[int, ...]) -> float:
        """The weight, common to these chunks, that fits best (linear least squares, weighted by 1/σ)."""
        sums, sample = self.sample.sums["visible"], self.sample
        mass, part = sums[0].sum(axis=1), sums[1].sum(axis=1)
        a, b = sums[0][:, list(chunks)].sum(axis=1), sums[1][:, list(chunks)].sum(axis=1)
        # The sums are in units of exp(base), so the deviation of Σ w (B − a out′) is that of out times the whole mass.
        sigma = np.maximum(self.expected.sigma, self._floor) * np.maximum(mass, 1e-300)[:, None]
        x = ((b - a[:, None] * sample.out) / sigma).ravel()
        y = ((mass[:, None] * sample.out - part) / sigma).ravel()
        if sample.lse is not None:
            total = np.exp(np.minimum(sample.lse - sample.base, 600.0))
            of_lse = np.maximum(self.expected.lse_sigma, 1e-9) * total
            x, y = np.append(x, a / of_lse), np.append(y, (total - mass) / of_lse)
        square = float(x @ x)
        return 1.0 + float(x @ y) / square if square > 0 else 1.0

    @property
    def _floor(self) -> np.ndarray:
        """Outputs that must be exact still get a deviation, a thousandth of a spacing."""
        return FORMATS[self.question.precision.out].spacing(self.model.rows.out) * 1e-3

    def _score(self, fault: Fault, out: np.ndarray, variance: np.ndarray, lse: np.ndarray, sigma: np.ndarray) -> Fit:
        sample = self.sample
        variance = np.maximum(variance, self._floor**2)
        with np.errstate(over="ignore"):
            square = (sample.out - out) ** 2 / variance
        square = np.where(square < 1e18, square, 1e18)  # a NaN explains nothing either
        each = (square + np.log(variance)).mean(axis=1)
        deviance = float((self.freedom * each).sum()) + fault.cost
        z = float(np.sqrt((self.freedom * square.mean(axis=1)).sum() / self.freedom.sum()))
        if fault.noise and np.median(square.mean(axis=1)) < EVEN:
            z = float("inf")
        if sample.lse is None:
            return Fit(fault, deviance, z, float(self.freedom.sum()))
        choices = []
        for is_right, expected, s in ((False, lse, sigma), (True, self.model.rows.lse, self.expected.lse_sigma)):
            s = np.maximum(s, 2.0**-24)
            with np.errstate(invalid="ignore"):
                off = np.where(sample.lse == expected, 0.0, sample.lse - expected)
            of_lse = np.minimum(np.nan_to_num((off / s) ** 2, nan=1e18), 1e18)
            choices.append((float((of_lse + 2 * np.log(s)).sum()) + 2.0 * is_right, of_lse.mean() ** 0.5, is_right))
        best = min(choices if not fault.lse else choices[:1])
        return Fit(fault, deviance + best[0], max(z, float(best[1])), float(self.freedom.sum()), bool(best[2]))


def unrescaled(model: ErrorModel, question: Question, merges: tuple[int, ...]) -> Float[np.ndarray, "R V"]:
    """The output if these merges add the new part without scaling the running output down."""
    rows = model.rows
    order = model.merging if model.merging is not None else np.tile(np.arange(len(rows.chunks)), (len(rows.lse), 1))
    a = np.take_along_axis(rows.chunk_weight, order, axis=1)
    part = np.take_along_axis(rows.chunk_part, order[..., None], axis=1)
    done = np.zeros(len(a))
    out = np.zeros_like(rows.out)
    for k in range(a.shape[1]):
        total = done + a[:, k]
        share = np.divide(a[:, k], total, out=np.zeros_like(total), where=total > 0)[:, None]
        own = part[:, k] / np.where(a[:, k] > 0, a[:, k], 1.0)[:, None]
        keep = 1.0 if k in merges else 1 - share
        out = np.where((a[:, k] > 0)[:, None], keep * out + share * own, out)
        done = total
    return out


def noisier(model: ErrorModel, fault: Fault) -> Float[np.ndarray, "R V"]:
    """The variance of another precision. A BF16 number has three bits less than an FP16 number: variance times 64."""
    variance = model.expected().sigma ** 2
    if fault.noise == "inexact exponentials":
        rows = model.rows
        square = rows.weight**2
        spread = square @ rows.value**2 - 2 * rows.out * (square @ rows.value)
        return variance + fault.number**2 * np.maximum(spread + rows.out**2 * square.sum(axis=1, keepdims=True), 0.0)
    if "probabilities" in fault.noise:
        variance = variance + 63 * model.probability_variance
    if "stored" in fault.noise:
        variance = variance + 63 * (model.chunk_variance + model.carry_variance)
    return variance


def changed_lse(rows: Rows, fault: Fault) -> Float[np.ndarray, " R"]:
    """What is handed over instead of lse."""
    top = rows.chunk_max.max(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        changed = {
            "log2": rows.lse / np.log(2.0),
            "negated": -rows.lse,
            "maximum only": top,
            "without its maximum": rows.lse - top,
            "sum itself": np.exp(rows.lse - top),
            "zero": np.zeros_like(rows.lse),
            "off": rows.lse + fault.number,
        }
    return changed[fault.lse]


def with_weight(fault_kind: str, chunks: tuple[int, ...], weight: float, cost: float) -> Fault:
    """The fault that these chunks enter with this weight."""
    changes = tuple((c, Block(c, "visible", max(weight, 0.0))) for c in chunks)
    return Fault(fault_kind, chunks, changes=changes, number=weight, cost=cost)


def lse_off(sample: Sample, model: ErrorModel) -> Fault | None:
    """lse off by a constant, the median of its errors."""
    if sample.lse is None:
        return None
    with np.errstate(invalid="ignore"):
        off = sample.lse - model.rows.lse
    if not np.isfinite(off).any():
        return None
    return Fault("lse off by a constant", lse="off", number=float(np.median(off[np.isfinite(off)])), cost=6.0)


def scaled(sample: Sample, factor: float) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, " R"]]:
    """Exact out and lse with the scale times `factor`."""
    score = np.where(sample.seen, sample.score * factor, -np.inf)
    top = score.max(axis=1, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)
    p = np.exp(score - top)
    total = p.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[:, 0]
    return p @ sample.value / np.maximum(total, 1e-300), lse


def numbers(x: Int[np.ndarray, " n"]) -> str:
    """Whole numbers as a person writes them.

    >>> numbers(np.array([0, 1, 2, 5]))
    '0–2, 5'
    """
    x = np.unique(x)
    if len(x) == 0:
        return "none"
    runs = np.split(x, np.flatnonzero(np.diff(x) != 1) + 1)
    return ", ".join(
        f"{run[0]}" if len(run) == 1 else f"{run[0]}{'–' if len(run) > 2 else ', '}{run[-1]}" for run in runs
    )
