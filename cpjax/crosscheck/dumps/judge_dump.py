"""A verdict on dumped tensors. What was not said is found out by trying, and said; what cannot be, is asked for."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpjax.crosscheck.diagnosis.diagnose import Diagnosis
from cpjax.crosscheck.diagnosis.precision_search import consistent_with
from cpjax.crosscheck.dumps.caches import CUT, in_one_row, is_cut, places_of, shared_once
from cpjax.crosscheck.dumps.dtypes import Candidate, candidates, with_stored_lse
from cpjax.crosscheck.dumps.layouts import Arrays, readable
from cpjax.crosscheck.dumps.lse import choose, read_lse, without_infinity
from cpjax.crosscheck.dumps.orders import that_fit
from cpjax.crosscheck.dumps.pages import gathered
from cpjax.crosscheck.dumps.places import places
from cpjax.crosscheck.dumps.question import Question
from cpjax.crosscheck.dumps.readers import WHOLE, Read, read
from cpjax.crosscheck.error_model.arithmetic import HALVES
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.crosscheck.files.profile import profile_named
from cpjax.crosscheck.judge import judge_problem
from cpjax.crosscheck.judging.problem import Problem, checked_problem
from cpjax.crosscheck.judging.verdict import Verdict
from cpjax.errors import InputError
from cpjax.partition import Packed, Partition, inverse, partition_of
from cpjax.partition.cached import Cached
from cpjax.partition.sequence import SequencePartition
from cpjax.wording import counted

JOINED = ("zigzag", "contiguous", "striped")
"""How ranks may lie in a folder, tried in this order."""

MERGED = ("ring", "gather", "ascending")
"""How partial results of ranks may have been merged, tried in this order; then that nothing was merged: a rank may
gather all keys first."""

FLAT = 1.2
"""A z up to here is that of a right result: beneath it no failure is told from another."""


class Dump(NamedTuple):
    """Tensors in global token order, `[B, S, N, D]`; lse by each of its readings, `[B, S, N]`."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray
    lse: dict[str, np.ndarray]
    layout: str
    partition: Partition | None
    """As ranks were joined; None where the files are whole."""
    places: dict[str, Any]
    dtypes: list[np.dtype]
    """Of query, key and value in the files: FP8 is scaled here."""


@dataclass(frozen=True, eq=False)
class Tried:
    """A reading of the dump, and its best verdict."""

    dump: Dump
    candidate: Candidate
    order: str
    problem: Problem
    out: np.ndarray
    lse: np.ndarray | None
    verdict: Verdict
    remarks: list[str]


@dataclass(frozen=True)
class Said:
    """The verdict, and what was found out on the way."""

    verdict: Verdict
    remarks: list[str]
    out: np.ndarray
    lse: np.ndarray | None
    problem: Problem
    """What the verdict answers."""
    about: dict[str, Any] = field(default_factory=dict)
    """The files with their SHA-256, what was taken for granted, versions, the date."""


def judge_dump(question: Question) -> Said:
    """Judge one dumped call of attention.

    Raises:
      InputError: files that cannot be read or do not fit together; a problem that nobody could answer by trying.
    """
    tensors, options, files = _read(question)
    named = None if question.partition is None else partition_of(question.partition, 1)
    tensors = shared_once(tensors, named)
    scaled = _scaled(question, tensors)
    paths = {
        name: str(getattr(question, name)) if name in ("value", "out") else str(getattr(question, name)[0])
        for name in scaled
    }
    ranks = {len(read.parts) for reads in tensors.values() for read in reads if read.by_rank}
    cp = _cp(question, tensors, ranks)
    arrays, dropped = readable(scaled, paths, question.layout, paged=question.block_table is not None)
    dumps, reasons = _dumps(question, tensors, arrays, cp, bool(ranks))
    tried = []
    for dump in dumps:
        try:
            tried.append(_best(question, dump, cp, options))
        except ValueError as error:
            reasons.append(error)
    # A layout that needs another word may be the right one: nothing is called wrong before it was said.
    needs = reasons and question.layout is None and len(arrays) > 1
    if not tried or (needs and not any(one.verdict.passed for one in tried)):
        raise InputError(_worded(reasons[0], question)) from None
    wrong = (
        None if any(one.verdict.passed for one in tried) else _laid_otherwise(question, tensors, arrays, cp, options)
    )
    chosen, remarks = _chosen(question, tried, dropped, ranks, wrong)
    remarks += next(one.remarks for one in arrays if one.layout == chosen.dump.layout)
    if question.cp is None and ranks:
        remarks.insert(0, f"cp: {cp}, as the folders hold {counted(cp, 'rank')}")
    if chosen.verdict.passed:
        remarks += _computes(chosen, question.scale)
    about = {
        "tensors": {name: [f"{read.about}" for read in reads] for name, reads in tensors.items()},
        "files": files,
        "taken": remarks,
        "layout": chosen.dump.layout,
        "joined": chosen.dump.partition is not None,
        "versions": {name: version(name) for name in ("cpjax", "numpy")} | {"python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    verdict = chosen.verdict if wrong is None else _with_diagnosis(chosen, f"{wrong[0].upper()}{wrong[1:]}.")
    return Said(verdict, remarks, chosen.out, chosen.lse, chosen.problem, about)


def _read(question: Question) -> tuple[dict[str, list[Read]], dict[str, Any], dict[str, str]]:
    """The tensors by name, the options of attention as `judge` takes them, and all files with their SHA-256."""
    paths: dict[str, tuple[Path, ...]] = {
        "query": question.query, "key": question.key, "value": (question.value,), "out": (question.out,),
    }  # fmt: skip
    if question.lse is not None:
        paths["lse"] = (question.lse,)
    tensors = {name: [read(path, name) for path in some] for name, some in paths.items()}
    options: dict[str, Any] = {} if question.softcap is None else {"softcap": question.softcap}
    files = {file: digest for reads in tensors.values() for one in reads for file, digest in one.files.items()}
    for name in ("sink", "alibi", "bias"):
        path = getattr(question, name)
        if path is not None:
            found = read(path, name)
            if found.by_rank:
                raise InputError(f"--{name} {path}: is a folder; it must be one file for all ranks")
            options[name] = found.parts[0]
            files |= found.files
    for name in (
        "positions",
        "segments",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "cu_seqlens_padded",
        "block_table",
        "seq_lens",
    ):
        path = getattr(question, name)
        if path is not None:
            files |= read(path, name.replace("_", "-"), WHOLE).files
    return tensors, options, files


def _scaled(question: Question, tensors: dict[str, list[Read]]) -> dict[str, list[Read]]:
    """query, key, value and out; keys and values times the scale of their FP8 format, in float64, which holds it."""
    found = {name: tensors[name] for name in ("query", "key", "value", "out")}
    for name, scale in (("key", question.key_scale), ("value", question.value_scale)):
        for one in found[name]:
            if scale is None and one.parts[0].dtype.name.startswith("float8"):
                raise InputError(
                    f"--{name}: is {one.parts[0].dtype}; say --{name}-scale, by which its numbers are multiplied"
                )
        if scale is not None:
            found[name] = [one._replace(parts=[x.astype(np.float64) * scale for x in one.parts]) for one in found[name]]
    return found


def _cp(question: Question, tensors: dict[str, list[Read]], ranks: set[int]) -> int:
    whole = [name for name, reads in tensors.items() if not all(one.by_rank for one in reads)]
    if ranks and whole and not is_cut(tensors):
        raise InputError(f"--{whole[0]} is one file, others are folders of ranks; give all as one or the other")
    if len(ranks) > 1:
        raise InputError(f"folders have {', '.join(map(str, sorted(ranks)))} ranks; all must have as many")
    found = next(iter(ranks), None)
    if question.cp is not None and found is not None and question.cp != found:
        raise InputError(f"--cp {question.cp}, but the folders have {counted(found, 'rank')}; leave --cp out")
    return question.cp or found or 1


def _dumps(
    question: Question, tensors: dict[str, list[Read]], arrays: list[Arrays], cp: int, by_rank: bool
) -> tuple[list[Dump], list[Exception]]:
    """Every layout, joined in every partition; and why others dropped out."""
    names: list[str | None] = [None]
    if by_rank:
        ways = CUT if is_cut(tensors) else JOINED if cp > 1 else JOINED[1:2]
        names = [question.partition] if question.partition is not None else list(ways)
    found, reasons = [], []
    for one in arrays:
        for name in names:
            try:
                found.append(_joined(question, tensors, one, None if name is None else partition_of(name, cp)))
            except ValueError as error:
                reasons.append(error)
    return found, reasons


def _joined(question: Question, tensors: dict[str, list[Read]], arrays: Arrays, partition: Partition | None) -> Dump:
    query, key, value, out = (np.concatenate(x, axis=1) for x in arrays[:4])
    batch, length, heads = query.shape[:3]
    dtypes = [tensors[name][0].parts[0].dtype for name in ("query", "key", "value")]
    lse: dict[str, list[np.ndarray]] = {}
    if "lse" in tensors:
        shapes = [(len(x), x.shape[1], x.shape[2]) for x in arrays.query]
        lse = read_lse(tensors["lse"][0].parts, shapes, question.lse_layout, str(question.lse))
    summed = {word: np.concatenate(parts, axis=1) for word, parts in lse.items()}
    if question.block_table is not None:
        if partition is not None:
            raise InputError("--block-table is of one cache; judge every rank of a folder for itself")
        paged = gathered(question, key, value, batch, length)
        query, out = (x.reshape(1, batch * length, *x.shape[2:]) for x in (query, out))
        summed = {word: x.reshape(1, batch * length, heads) for word, x in summed.items()}
        key, value, offsets = paged.key, paged.value, (paged.q_offsets, paged.kv_offsets)
        where = places(question, 1, batch * length, key.shape[1], offsets)
        return Dump(query, key, value, out, summed, arrays.layout, None, where, dtypes)
    where = places(question, batch, length, key.shape[1], None)
    if partition is not None and is_cut(tensors):
        row = np.asarray(where["segment_ids"][1])[0] if "segment_ids" in where else np.zeros(key.shape[1], int)
        back = places_of(partition, [x.shape[1] for x in arrays.key], row)
        key, value = key[:, back], value[:, back]
    is_cache = isinstance(partition or partition_of(question.partition or "contiguous", question.cp or 1), Cached)
    if is_cache and batch > 1 and "segment_ids" not in where:
        where = in_one_row(where, batch, length, key.shape[1])
        query, key, value, out = (x.reshape(1, -1, *x.shape[2:]) for x in (query, key, value, out))
        summed = {word: x.reshape(1, batch * length, heads) for word, x in summed.items()}
    if partition is None or is_cut(tensors):
        return Dump(query, key, value, out, summed, arrays.layout, partition, where, dtypes)
    back = [_back(partition, x.shape[1], where, name) for name, x in (("q", query), ("kv", key))]
    query, out = query[:, back[0]], out[:, back[0]]
    summed = {word: x[:, back[0]] for word, x in summed.items()}
    return Dump(query, key[:, back[1]], value[:, back[1]], out, summed, arrays.layout, partition, where, dtypes)


def _back(partition: Partition, length: int, where: dict[str, Any], side: str) -> np.ndarray:
    """The permutation from ranks laid one after the other to the text."""
    if isinstance(partition, SequencePartition):
        return inverse(partition.order(length))
    if isinstance(partition, Packed) and "segment_ids" in where:
        segment = np.asarray(where["segment_ids"][0 if side == "q" else 1])[0]
        return inverse(partition.held(segment).ravel())
    raise InputError(
        f"--partition {partition.name}: folders of ranks are joined for {', '.join(JOINED)}, and for packed requests "
        f"with --segments; join them yourself and give whole files"
    )


def _best(question: Question, dump: Dump, cp: int, options: dict[str, Any]) -> Tried:
    """The first precision and order that pass; if none, the strictest precision, nearest order: a laxer one would
    only make the failure look smaller.
    """
    tried = []
    for one in _each(question, dump, cp, options):
        tried.append(one)
        if one.verdict.passed:
            break
    names = list(dict.fromkeys(one.candidate.name for one in tried))
    # Of a wrong result those who merge say more: a rank, a step.
    told = tried if tried[-1].verdict.passed else [one for one in tried if one.order != "together"] or tried
    best = min(told, key=lambda one: (not one.verdict.passed, names.index(one.candidate.name), _badness(one.verdict)))
    remarks = list(best.remarks)
    if question.precision is None:
        failed = [name for name in names if name != best.candidate.name]
        says = "passes" if best.verdict.passed else "is taken"
        more = (
            f"; {', '.join(failed)} {'does not' if best.verdict.passed else 'does not pass either'}" if failed else ""
        )
        remarks.append(f"precision: {best.candidate.name} {says}{more}")
    if question.order is None and len({one.order for one in tried}) > 1:
        remarks.append(f"order of merging: {best.order} {'passes' if best.verdict.passed else 'is nearest'}")
    return Tried(**{**vars(best), "remarks": remarks})


def _each(question: Question, dump: Dump, cp: int, options: dict[str, Any]) -> Iterator[Tried]:
    """The dump in every likely precision and order."""
    query_dtype, key_dtype, value_dtype = dump.dtypes
    named = None if question.precision is None else profile_named(question.precision)
    inputs = (dump.query, dump.key, dump.value)
    found, remark = candidates(query_dtype, key_dtype, value_dtype, dump.out, named, inputs)
    remarks = [] if remark is None else [remark]
    orders = [question.order] if question.order else (["ascending"] if cp == 1 else [*MERGED, "together"])
    stored = next((x.dtype.name for x in dump.lse.values()), "")
    if stored in HALVES:
        found = [with_stored_lse(one, stored) for one in found]
        remarks.append(f"lse: is {stored}, so one rounding to {stored} is taken for granted")
    lse = None
    for candidate in found:
        query = dump.query if candidate.query is None else _rounded(dump.query, candidate.query)
        for order in orders:
            problem = checked_problem(
                query, dump.key, dump.value, scale=question.scale, is_causal=question.is_causal, window=question.window,
                cp=cp, partition=dump.partition or question.partition, precision=candidate.precision, order=order,
                **dump.places, **options,
            )  # fmt: skip
            if lse is None and dump.lse:
                reading, says = choose(problem, dump.lse, question.lse_base, options)
                if stored in HALVES and reading.base == "2":
                    raise InputError(
                        f"--lse {question.lse}: is {stored} to base two, and how such a number was rounded is known "
                        "here of natural logarithms only; dump it in float32, or leave --lse out"
                    )
                lse, infinite = without_infinity(problem, np.asarray(_wide(reading.lse)))
                remarks += [x for x in (says, infinite) if x is not None]
            verdict = judge_problem(problem, dump.out, lse)
            yield Tried(dump, candidate, order, problem, dump.out, lse, verdict, remarks)


def _wide(lse: np.ndarray) -> np.ndarray:
    """lse in FP16 is judged as the numbers that it holds."""
    return lse if lse.dtype.name == "float64" else lse.astype(np.float32)


def _rounded(x: np.ndarray, fmt: str) -> np.ndarray:
    return x.astype(FORMATS[fmt].dtype)


def _badness(verdict: Verdict) -> float:
    """How far `out` is from passing, to choose which failure is shown; if it is right, the first that was tried."""
    return max(float(np.nan_to_num(verdict.z, nan=1e300)), FLAT)


def _laid_otherwise(
    question: Question, tensors: dict[str, list[Read]], arrays: list[Arrays], cp: int, options: dict[str, Any]
) -> str | None:
    """How folders of ranks must be laid together so that the result passes, if it does; in words.

    Only of whole texts, and with no other terms in the logits, so that a few rows tell which orders are worth judging.
    """
    said = (question.positions, question.segments, question.lengths, question.cu_seqlens_q, question.block_table)
    if cp == 1 or options or any(x is not None for x in said) or not tensors["query"][0].by_rank:
        return None
    partitions = [partition_of(name, cp) for name in JOINED]
    mask = {"scale": question.scale, "is_causal": question.is_causal, "window": question.window}
    for one in arrays:
        for partition, order in that_fit(one, partitions, **mask):
            query, key, value, out = ([x[file] for file in order] for x in one[:4])
            in_order = Arrays(query, key, value, out, one.layout, one.remarks)
            reads = dict(tensors)
            if "lse" in tensors:
                lse = tensors["lse"][0]
                reads["lse"] = [lse._replace(parts=[lse.parts[file] for file in order])]
            try:
                tried = _best(question, _joined(question, reads, in_order, partition), cp, options)
            except InputError:
                continue
            if tried.verdict.passed:
                return _of_order(question, partition, order)
    return None


def _of_order(question: Question, partition: Partition, order: tuple[int, ...]) -> str:
    others = question.partition is not None and partition.name != partition_of(question.partition, len(order)).name
    how = f"joined as {partition.name}" if others or question.partition is None else ""
    files = ", ".join(f"rank {rank} in file {file}" for rank, file in enumerate(order) if rank != file)
    which = f"with the files in another order ({files})" if files else ""
    why = "the numbers of the files are not those of the ranks" if files else "the ranks hold the text so"
    return f"{' '.join(x for x in (how, which) if x)} the result passes: {why}"


def _with_diagnosis(chosen: Tried, sentence: str) -> Verdict:
    """The verdict with one cause; the search would look for faults of a text that was laid wrongly together."""
    shape = (int(chosen.problem.q_chunk.max()) + 1, int(chosen.problem.kv_chunk.max()) + 1)
    return replace(chosen.verdict, search=lambda: Diagnosis([sentence], np.full(shape, np.nan)))


def _chosen(
    question: Question, tried: list[Tried], dropped: list[str], ranks: set[int], otherwise: str | None
) -> tuple[Tried, list[str]]:
    """The reading that is judged. A wrong result is wrong in every reading: then it is asked, not guessed.

    Args:
      otherwise: how the ranks of folders must be laid together so that the result passes.

    Raises:
      InputError: several layouts or partitions are as good as each other.
    """
    passing = [one for one in tried if one.verdict.passed]
    layouts = list(dict.fromkeys(one.dump.layout for one in passing or tried))
    if len(layouts) > 1:
        how = "the result passes" if passing else "the result is wrong"
        raise InputError(
            f"{' and '.join(layouts)} both fit the shapes and make sense, and {how} in both: say --layout-of "
            f"{' or --layout-of '.join(layouts)}{_if_sequence_first(question, (passing or tried)[0].dump)}"
        )
    partitions = [one.dump.partition.name for one in tried if one.dump.partition is not None]
    if not passing and len(partitions) > 1:
        raise InputError(
            f"ranks joined as {', '.join(partitions)}: the result is wrong in each, and "
            + (otherwise or "a wrong result does not tell how they were cut; say --partition")
            + _if_sequence_first(question, tried[0].dump)
        )
    chosen = (passing or tried)[0]
    remarks = list(chosen.remarks)
    if question.layout is None:
        others = [one for one in tried if one.dump.layout != chosen.dump.layout]
        why = [*dropped, *(f"as {x.dump.layout} it does not pass (z {x.verdict.z:.3g})" for x in others)]
        says = "; ".join(why) if why else "no other layout fits the shapes"
        hint = "" if passing else _if_sequence_first(question, chosen.dump)
        remarks.insert(0, f"layout: taken as {chosen.dump.layout}; {says}; say --layout-of{hint}")
    if question.partition is None and chosen.dump.partition is not None and len(partitions) > 1:
        fit = [one.dump.partition.name for one in passing if one is not chosen and one.dump.partition is not None]
        not_fit = [one.dump.partition.name for one in tried if one.dump.partition is not None and one not in passing]
        says = [f"{' and '.join(fit)} {'fits' if len(fit) == 1 else 'fit'} too"] if fit else []
        says += [f"{' and '.join(not_fit)} {'does' if len(not_fit) == 1 else 'do'} not fit"] if not_fit else []
        remarks.insert(
            0, f"partition: ranks joined as {chosen.dump.partition.name}; {'; '.join(says)}; say --partition"
        )
    elif question.partition is None and not ranks and chosen.problem.cp > 1:
        remarks.insert(0, f"partition: {chosen.problem.partition.name} is assumed; say --partition")
    return chosen, remarks


def _if_sequence_first(question: Question, dump: Dump) -> str:
    """A clause on sbnd, which is never guessed, where a layout reads few tokens of many texts; nothing elsewhere."""
    batch, tokens = dump.query.shape[:2]
    if question.layout is not None or batch <= tokens:
        return ""
    return f"; or --layout-of sbnd, if these are not {counted(batch, 'text')} of {counted(tokens, 'token')}"


def _computes(chosen: Tried, scale: float) -> list[str]:
    """What was computed, and with which precisions the result is consistent."""
    problem = chosen.problem
    names = consistent_with(problem, scale, chosen.out, chosen.lse)
    mask = "causal" if problem.mask.is_causal else "full"
    what = f"computes: {mask} attention, {counted(problem.query.shape[2], 'head')} on {problem.key.shape[2]}"
    return [f"{what}; consistent with {'; or '.join(names)}"] if names else [what]


def _worded(error: Exception, question: Question) -> str:
    """The error as of an option: what `judge` calls query came from a file."""
    line = next(iter(str(error).splitlines()), "")
    for name in ("query", "key", "value"):
        if line.startswith(f"{name} "):
            path = getattr(question, name)
            return f"--{name} {path[0] if isinstance(path, tuple) else path}: {line.removeprefix(f'{name} ')}"
    return line
