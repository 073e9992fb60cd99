"""What a fault would have made of the sampled rows: out, lse, and the judge's own variance of them."""

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.diagnosis.dictionary import RIGHT, Block, Fault
from cpjax.crosscheck.diagnosis.guards import LARGEST_LOG, LEAST_SUM
from cpjax.crosscheck.diagnosis.masks import mask_of, thresholds
from cpjax.crosscheck.diagnosis.sample import Sample
from cpjax.crosscheck.error_model.model import ErrorModel
from cpjax.crosscheck.exact.attention import Rows, attention_rows
from cpjax.crosscheck.exact.logits import Logits
from cpjax.crosscheck.judging.problem import Problem
from cpjax.mask import Tokens, visible
from cpjax.precision import query_in, scale_in

HALVINGS = 8
"""Of ALiBi: the last head's slope is 2^-8."""


def exact_model(sample: Sample, problem: Problem, fault: Fault = RIGHT) -> ErrorModel:
    """The error model of the rows as the fault would have computed them."""
    precision = fault.precision or problem.precision
    pieces = _pieces(sample, problem, fault)
    index = np.concatenate([keys for keys, _, _, _ in pieces])
    seen = np.concatenate([mask for _, mask, _, _ in pieces], axis=1)
    slot = np.concatenate([np.full(len(keys), slot) for keys, _, slot, _ in pieces])
    log_weight = np.concatenate([np.full(len(keys), np.log(weight)) for keys, _, _, weight in pieces])
    keys, values = _data(sample, problem, fault)
    if fault.run:
        index, seen, log_weight = _with_run(fault, index, seen, log_weight)
    query, key, scale = (
        scaled_query(sample, problem, fault),
        keys[index],
        scale_in(precision, sample.scale) * fault.scale,
    )
    logits = changed_logits(sample, problem, fault).of_keys(index)
    if log_weight.any():  # a bias
        bias = log_weight if logits.bias is None else logits.bias + log_weight
        logits = replace(logits, bias=np.broadcast_to(bias, seen.shape))
    rows = attention_rows(query, key, values[index], seen, slot, scale, logits)
    merging = problem.merging_of(np.full(len(query), sample.q_chunk), rows.key_chunks)
    return ErrorModel(rows, precision, merging, problem.query.shape[3], scale)


def scaled_query(sample: Sample, problem: Problem, fault: Fault) -> Float[np.ndarray, "R H"]:
    """The queries as they are rounded with the scale that the fault has, where the profile rounds scale · q."""
    if fault.scale == 1.0 or not problem.precision.query:
        return sample.query
    with np.errstate(over="ignore"):
        query = problem.query[sample.batch, sample.position, sample.head]
        query = query_in(problem.precision, query, problem.scale * fault.scale)
    return query if np.isfinite(query).all() else sample.query  # infinite: no number to judge


def changed_logits(sample: Sample, problem: Problem, fault: Fault) -> Logits:
    """Softcap, ALiBi, bias and sink as the fault has them; `fault.number` is a softcap that nobody stated."""
    given = sample.logits
    if fault.logits == "softcap applied":
        return replace(given, softcap=fault.number)
    if fault.logits == "alibi applied":
        heads, at = problem.query.shape[2], sample.position
        here, there = (
            np.asarray(x.position)[sample.batch].astype(float) for x in (problem.q_tokens, problem.kv_tokens)
        )
        alibi = alibi_slopes(heads)[sample.head][:, None] * np.abs(here[at][:, None] - there)
        return replace(given, alibi=alibi, alibi_size=alibi)
    if fault.logits == "sink fitted":
        fitted = dict(fault.extra)
        stated = np.zeros(len(sample.head)) if given.sink is None else given.sink
        sinks = [fitted.get(int(n), x) for n, x in zip(sample.head, stated, strict=True)]
        return replace(given, sink=np.array(sinks))
    if fault.logits.startswith("sink ") and fault.logits != "sink dropped":
        assert problem.sink is not None  # only then is it tried
        return replace(given, sink=_sinks(problem.sink.astype(float), fault.logits, problem.scale)[sample.head])
    times = {"twice": 2.0, "scaled": problem.scale}.get(fault.logits.partition(" ")[2], 1.0)
    changes: dict[str, dict[str, Any]] = {
        "": {},
        "softcap ignored": {"softcap": None},
        "sink dropped": {"sink": None},
        "alibi ignored": {"alibi": None, "alibi_size": None},
        "alibi negated": {"alibi": None if given.alibi is None else -given.alibi},
        "bias ignored": {"bias": None},
        "bias a mask only": {
            "bias": None if given.bias is None else np.where(np.isneginf(given.bias), given.bias, 0.0)
        },
    }
    for factor in ("twice", "scaled"):
        changes[f"bias {factor}"] = {"bias": None if given.bias is None else times * given.bias}
        if given.alibi is not None and given.alibi_size is not None:
            changes[f"alibi {factor}"] = {"alibi": times * given.alibi, "alibi_size": times * given.alibi_size}
    return replace(given, **changes[fault.logits])


def _sinks(sink: Float[np.ndarray, " N"], name: str, scale: float) -> Float[np.ndarray, " N"]:
    """The sinks that a fault has in the place of those stated."""
    others = {
        "sink twice": sink + np.log(2.0),
        "sink of the head after": np.roll(sink, -1),
        "sink of the head before": np.roll(sink, 1),
        "sink of head 0": np.full_like(sink, sink[0]),
        "sink scaled": sink * scale,
        "sink times log2(e)": sink * np.log2(np.e),
        "sink negated": -sink,
    }
    return others[name]


def alibi_slopes(heads: int) -> Float[np.ndarray, " N"]:
    """The slopes of the paper (arXiv 2108.12409, §3) for a power of two of heads: 2^(−8 / N), its square, …

    >>> alibi_slopes(8)[:3]
    array([0.5  , 0.25 , 0.125])
    """
    return 2.0 ** (-HALVINGS / heads * np.arange(1, heads + 1))


def _data(sample: Sample, problem: Problem, fault: Fault) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values that really entered: of another head, or shifted against each other."""
    keys, values = sample.key, sample.value
    if fault.keys_of >= 0:
        keys = np.nan_to_num(problem.key[sample.batch, :, fault.keys_of].astype(np.float64), posinf=0.0, neginf=0.0)
    if fault.values_of >= 0:
        values = np.nan_to_num(
            problem.value[sample.batch, :, fault.values_of].astype(np.float64), posinf=0.0, neginf=0.0
        )
    return keys, np.roll(values, -fault.value_shift, axis=0) if fault.value_shift else values


def _with_run(
    fault: Fault, index: np.ndarray, seen: np.ndarray, log_weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A run lost, counted twice, or filled with other keys, which are then seen where the run's own should be."""
    start, stop = fault.run
    inside: np.ndarray = np.logical_and(index >= start, index < stop)
    if fault.kind == "run lost":
        return index, seen & ~inside, log_weight
    if fault.kind == "run doubled":
        return index, seen, np.where(inside, np.log(fault.number), log_weight)
    return np.where(inside, index - start + int(fault.number), index), seen, log_weight


def _seen(sample: Sample, problem: Problem, fault: Fault) -> np.ndarray:
    if fault.logits == "bias ignored":  # what it hid, too
        b, at = sample.batch, sample.position
        q_tokens = Tokens(*(np.asarray(x)[b : b + 1, at] for x in problem.q_tokens))
        kv_tokens = Tokens(*(np.asarray(x)[b : b + 1] for x in problem.kv_tokens))
        return np.asarray(visible(problem.mask, q_tokens, kv_tokens))[0]
    if fault.mask:
        return mask_of(sample, problem, fault.mask, fault.number)
    if not fault.limits:
        return sample.seen
    limits = dict(fault.limits)
    number = np.array([limits.get((sample.batch, int(at)), np.nan) for at in sample.position])
    shown = thresholds(sample, problem, "limit") <= number[:, None]
    return np.where(np.isnan(number)[:, None], sample.seen, shown)


def _pieces(sample: Sample, problem: Problem, fault: Fault) -> list[tuple[np.ndarray, np.ndarray, int, float]]:
    """Keys, their mask, the slot in which they enter, and their weight."""
    seen = _seen(sample, problem, fault)
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


def glance(
    sample: Sample, problem: Problem, fault: Fault
) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """Exact out, Σ exp(s − base) and lse with another mask, scale, or weight of a key; without an error model."""
    seen = mask_of(sample, problem, fault.mask, fault.number) if fault.mask else sample.seen
    score = np.where(seen, sample.score_with(fault.scale, scaled_query(sample, problem, fault)), -np.inf)
    top = score.max(axis=1, keepdims=True)
    sink = sample.logits.sink
    top = top if sink is None else np.maximum(top, sink[:, None])
    top = np.where(np.isneginf(top), 0.0, top)
    p = np.exp(score - top)
    if fault.key >= 0:
        p[:, fault.key] *= fault.number
    total = p.sum(axis=1) + (0.0 if sink is None else np.exp(sink - top[:, 0]))
    out = p @ sample.value / np.maximum(total, LEAST_SUM)[:, None]
    with np.errstate(divide="ignore", over="ignore"):
        return out, total * np.exp(np.minimum(top[:, 0] - sample.base, LARGEST_LOG)), top[:, 0] + np.log(total)


def unrescaled(model: ErrorModel, problem: Problem, merges: tuple[int, ...]) -> Float[np.ndarray, "R V"]:
    """The output if these merges add the new part without scaling the running output down."""
    rows = model.rows
    order = model.arithmetic.mergings[-1]
    order = np.tile(np.arange(len(rows.chunks)), (len(rows.lse), 1)) if order is None else order
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


def noisier(model: ErrorModel, variance: Float[np.ndarray, "R V"], size: float) -> Float[np.ndarray, "R V"]:
    """The variance if every exponential also errs by about `size`, relative to itself."""
    rows = model.rows
    square = rows.weight**2
    spread = square @ rows.value**2 - 2 * rows.out * (square @ rows.value)
    return variance + size**2 * np.maximum(spread + rows.out**2 * square.sum(axis=1, keepdims=True), 0.0)


def with_term(
    rows: Rows, head: np.ndarray, extra: tuple[tuple[int, float], ...]
) -> tuple[Float[np.ndarray, "R V"], Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
    """out and lse with the term, and the factor on out. A row that sees nothing has the term alone."""
    by_head = dict(extra)
    x = np.array([by_head.get(int(n), -np.inf) for n in head])
    lse = np.logaddexp(rows.lse, x)
    with np.errstate(invalid="ignore"):
        share = np.where(np.isneginf(rows.lse), 0.0, np.exp(np.where(np.isneginf(lse), 0.0, rows.lse - lse)))
    return rows.out * share[:, None], lse, share


def changed_lse(rows: Rows, fault: Fault) -> Float[np.ndarray, " R"]:
    """What is handed over instead of lse."""
    top = rows.chunk_max.max(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        changed = {
            "log2": rows.lse / np.log(2.0),
            "log10": rows.lse / np.log(10.0),
            "negated": -rows.lse,
            "maximum only": top,
            "without its maximum": rows.lse - top,
            "sum itself": np.exp(rows.lse - top),
            "whole sum": np.exp(rows.lse),
            "natural for base two": rows.lse * np.log(2.0),
            "with log2 of the sum": top + (rows.lse - top) / np.log(2.0),
            "zero": np.zeros_like(rows.lse),
            "off": rows.lse + fault.number,
        }
    return changed[fault.lse]
