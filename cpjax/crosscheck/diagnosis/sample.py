"""A few rows of each query chunk, with everything that a fault model needs to predict what they would have become."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.diagnosis.guards import LARGEST_LOG
from cpjax.crosscheck.exact.logits import PLAIN, Logits
from cpjax.crosscheck.judging.evidence import RowTable
from cpjax.crosscheck.judging.problem import Problem
from cpjax.crosscheck.judging.statistic import SLACK, RowErrors, spread_z_score, z_score
from cpjax.mask import Tokens, visible

ROWS = 12
"""Most rows of a query chunk that are looked at."""

MORE_ROWS = 48
"""Rows besides, where a run of keys is looked for."""

ELEMENTS = 2**21
"""Most scores of a query chunk that are looked at; with very long keys fewer rows."""

LEAST_ROWS = 4
"""But at least so many."""

REQUEST_ROWS, MOST_REQUESTS = 4, 4
"""Rows of a request, and requests, that are looked at besides."""

SUSPECT = 4.0
"""A row or a chunk whose errors have a larger z-score is taken to be wrong."""

Extent = Literal["visible", "all", "triangle"]
"""Which keys of a chunk entered: those that the mask shows, all, or those up to the query's own index in its chunk."""


@dataclass(frozen=True)
class Sample:
    """R rows of one query chunk, one batch row and one key/value head. All float64; what is no number in pads is 0."""

    q_chunk: int
    own: int
    """The key/value chunk of the same tokens; −1 where there is none (a decode step)."""
    batch: int
    kv_head: int
    position: Int[np.ndarray, " R"]
    """Index in the sequence."""
    head: Int[np.ndarray, " R"]
    query: Float[np.ndarray, "R H"]
    key: Float[np.ndarray, "S H"]
    value: Float[np.ndarray, "S V"]
    seen: Bool[np.ndarray, "R S"]
    triangle: Bool[np.ndarray, "R S"]
    chunk: Int[np.ndarray, " S"]
    out: Float[np.ndarray, "R V"]
    """As it was handed over; finite."""
    lse: Float[np.ndarray, " R"] | None
    scale: float
    is_wrong: bool
    logits: Logits = PLAIN

    @cached_property
    def score(self) -> Float[np.ndarray, "R S"]:
        """The logits of all keys, hidden ones too."""
        return self.score_with(1.0, self.query)

    def score_with(self, factor: float, query: Float[np.ndarray, "R H"]) -> Float[np.ndarray, "R S"]:
        """The same with the scale times `factor`, and with queries that are rounded for it."""
        capped = self.logits.capped(factor * self.scale * (query @ self.key.T))
        return (self.logits.shifted(capped) or [capped])[-1]

    @cached_property
    def base(self) -> Float[np.ndarray, " R"]:
        """The largest visible score, the sink's too; 0 where nothing is visible."""
        top = np.where(self.seen, self.score, -np.inf).max(axis=1)
        top = top if self.logits.sink is None else np.maximum(top, self.logits.sink)
        return np.where(np.isneginf(top), 0.0, top)

    @property
    def sink_mass(self) -> Float[np.ndarray, " R"] | float:
        """exp(sink − base); 0 where there is none."""
        return 0.0 if self.logits.sink is None else np.exp(self.logits.sink - self.base)

    @property
    def visible_chunks(self) -> Int[np.ndarray, " C"]:
        """The chunks of which at least one row sees something."""
        return np.unique(self.chunk[self.seen.any(axis=0)])

    def mask(self, extent: Extent) -> Bool[np.ndarray, "R S"]:
        """The mask of that extent, over all keys."""
        return {"visible": self.seen, "all": np.ones_like(self.seen), "triangle": self.triangle}[extent]

    @cached_property
    def sums(self) -> dict[Extent, tuple[Float[np.ndarray, "R C"], Float[np.ndarray, "R C V"]]]:
        """For each extent and chunk Σ exp(s − base) and Σ exp(s − base) v."""
        weight = np.exp(np.minimum(self.score - self.base[:, None], LARGEST_LOG))
        found: dict[Extent, tuple[np.ndarray, np.ndarray]] = {}
        count = int(self.chunk.max()) + 1
        for extent in ("visible", "all", "triangle"):
            masked = np.where(self.mask(extent), weight, 0.0)
            mass = np.stack([masked[:, self.chunk == c].sum(axis=1) for c in range(count)], axis=1)
            part = np.stack([masked[:, self.chunk == c] @ self.value[self.chunk == c] for c in range(count)], axis=1)
            found[extent] = (mass, part)
        return found


def suspects(table: RowTable) -> Bool[np.ndarray, " R"]:
    """The rows whose own errors are too large."""
    lse = z_score(table.lse_square / SLACK, table.lse_dof) > SUSPECT
    return out_suspects(table) | ((lse | ~(table.lse_ratio <= 1.0)) & ~table.unjudged)


def out_suspects(table: RowTable) -> Bool[np.ndarray, " R"]:
    """The rows whose errors of `out` are too large, whatever their lse."""
    wrong = (z_score(table.mean_square / SLACK, table.dof) > SUSPECT) | (table.outside > 0)
    return wrong & ~table.unjudged


def samples(problem: Problem, table: RowTable, out: np.ndarray, lse: np.ndarray | None) -> list[Sample]:
    """One sample for each query chunk that has judged rows, in ascending order.

    Rows with a NaN or an infinity are left out: they show where it happened, but not what.
    """
    usable = _is_finite(table, out, lse)
    chunk, wrong = problem.q_chunk[table.position], suspects(table)
    kv_head = table.head // problem.group
    best = _most(table.batch, kv_head, wrong & usable)
    found = []
    for q_chunk in np.unique(chunk[usable]):
        of_chunk = usable & (chunk == q_chunk)
        here = of_chunk & (table.batch == best[0]) & (kv_head == best[1])
        if not (here & wrong).any() and (of_chunk & wrong).any():
            batch, k = _most(table.batch, kv_head, of_chunk & wrong)
            here = of_chunk & (table.batch == batch) & (kv_head == k)
        if not here.any():
            continue
        size = table.mean_square + table.lse_square
        rows = _pick(np.flatnonzero(here), table.head, size, wrong, problem.key.shape[1])
        is_wrong = bool((of_chunk & wrong).any()) or _stands_out(table, of_chunk)
        found.append(_sample(problem, table, rows, out, lse, int(q_chunk), is_wrong=is_wrong))
    return found


def samples_of_requests(
    problem: Problem, table: RowTable, out: np.ndarray, lse: np.ndarray | None, others: list[Sample]
) -> list[Sample]:
    """A few wrong rows of each request and batch row of which the other samples have none: what is said must hold.

    Of the key/value head of the other samples, where it has wrong rows.
    """
    wrong = suspects(table) & _is_finite(table, out, lse)
    segment = np.asarray(problem.q_tokens.segment)[table.batch, table.position]
    looked_at = {(one.batch, int(at)) for one in others for at in one.position}
    places = set(zip(table.batch[wrong].tolist(), table.position[wrong].tolist(), strict=True)) & looked_at
    known = {(b, int(np.asarray(problem.q_tokens.segment)[b, at])) for b, at in places}
    found: list[Sample] = []
    for b, request in sorted(set(zip(table.batch[wrong].tolist(), segment[wrong].tolist(), strict=True)) - known):
        rows = np.flatnonzero(wrong & (table.batch == b) & (segment == request))
        kv_head = table.head[rows] // problem.group
        best = others[0].kv_head if others and (kv_head == others[0].kv_head).any() else kv_head[0]
        rows = rows[kv_head == best]
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), REQUEST_ROWS)).astype(int)]
        chunk = int(problem.q_chunk[table.position[rows[-1]]])
        rows = rows[problem.q_chunk[table.position[rows]] == chunk]
        found.append(_sample(problem, table, rows, out, lse, chunk, is_wrong=True))
        if len(found) == MOST_REQUESTS:
            break
    return found


def with_more_rows(problem: Problem, table: RowTable, out: np.ndarray, one: Sample) -> Sample:
    """Besides the sample's rows others of the same query chunk, heads and requests, right ones too; without their lse.

    The last key of a run is hidden from most rows, and in those that see it it may have no weight.
    """
    segment = np.asarray(problem.q_tokens.segment)[one.batch]
    mine = (table.batch == one.batch) & (problem.q_chunk[table.position] == one.q_chunk) & np.isin(table.head, one.head)
    mine &= np.isin(segment[table.position], segment[one.position]) & _is_finite(table, out, None)
    known = set(zip(one.position.tolist(), one.head.tolist(), strict=True))
    own = [pair in known for pair in zip(table.position.tolist(), table.head.tolist(), strict=True)]
    rows = np.flatnonzero(mine)
    some = min(len(rows), MORE_ROWS, max(LEAST_ROWS, ELEMENTS // problem.key.shape[1]))
    rows = rows[np.linspace(0, len(rows) - 1, some).astype(int)]
    return sample_of(problem, table, np.union1d(rows, np.flatnonzero(mine & np.array(own))), out)


def sample_of(problem: Problem, table: RowTable, rows: Int[np.ndarray, " n"], out: np.ndarray) -> Sample:
    """These rows, of one batch row, key/value head and query chunk; without their lse."""
    return _sample(problem, table, rows, out, None, int(problem.q_chunk[table.position[rows[0]]]), is_wrong=True)


def _is_finite(table: RowTable, out: np.ndarray, lse: np.ndarray | None) -> Bool[np.ndarray, " R"]:
    place = (table.batch, table.position, table.head)
    finite = np.isfinite(out[place]).all(axis=1)
    return ~table.unjudged & finite & (True if lse is None else np.isfinite(lse[place]))


def _most(batch: np.ndarray, kv_head: np.ndarray, rows: np.ndarray) -> tuple[int, int]:
    """The batch row and key/value head with the most of these rows."""
    pairs, count = np.unique(np.stack([batch[rows], kv_head[rows]], axis=1), axis=0, return_counts=True)
    return (int(pairs[count.argmax()][0]), int(pairs[count.argmax()][1])) if len(pairs) else (0, 0)


def _pick(rows: np.ndarray, head: np.ndarray, size: np.ndarray, wrong: np.ndarray, keys: int) -> np.ndarray:
    """The worst third, the rest evenly spread; heads that are right beside heads that are wrong are left out.

    Right rows of a wrong head stay: what explains the wrong rows must explain them too.
    """
    some = min(ROWS, max(LEAST_ROWS, ELEMENTS // keys))
    if wrong[rows].any():
        rows = rows[np.isin(head[rows], head[rows[wrong[rows]]])]
    if len(rows) <= some:
        return rows
    worst = rows[np.argsort(-size[rows], kind="stable")[: some // 3]]
    rest = np.setdiff1d(rows, worst)
    return np.sort(np.concatenate([worst, rest[np.linspace(0, len(rest) - 1, some - len(worst)).astype(int)]]))


def _stands_out(table: RowTable, rows: np.ndarray) -> bool:
    of_out = spread_z_score(RowErrors(table.mean_square[rows], table.dof[rows], table.same[rows]))
    of_lse = spread_z_score(RowErrors(table.lse_square[rows], table.lse_dof[rows], table.same[rows]))
    return not max(of_out, of_lse) <= SUSPECT


def _sample(
    problem: Problem,
    table: RowTable,
    rows: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray | None,
    q_chunk: int,
    *,
    is_wrong: bool,
) -> Sample:
    b, at, head = int(table.batch[rows[0]]), table.position[rows], table.head[rows]
    k = int(head[0]) // problem.group
    q_tokens = Tokens(*(np.asarray(x)[b : b + 1, at] for x in problem.q_tokens))
    kv_tokens = Tokens(*(np.asarray(x)[b : b + 1] for x in problem.kv_tokens))
    logits = problem.logits_of(b, at, head)
    seen = np.asarray(visible(problem.mask, q_tokens, kv_tokens))[0]
    index, own = index_in_chunk(problem.kv_chunk), index_in_chunk(problem.q_chunk)
    return Sample(
        q_chunk=q_chunk,
        own=-1 if (own_chunk := problem.partition.own(q_chunk)) is None else own_chunk,
        batch=b,
        kv_head=k,
        position=at,
        head=head,
        query=problem.queries(b, at, head),
        key=np.nan_to_num(problem.key[b, :, k].astype(np.float64), posinf=0.0, neginf=0.0),
        value=np.nan_to_num(problem.value[b, :, k].astype(np.float64), posinf=0.0, neginf=0.0),
        seen=seen if logits.bias is None else seen & ~np.isneginf(logits.bias),
        triangle=index[None] <= own[at][:, None],
        chunk=problem.kv_chunk,
        out=out[b, at, head].astype(np.float64),
        lse=None if lse is None else lse[b, at, head].astype(np.float64),
        scale=problem.scale,
        is_wrong=is_wrong,
        logits=logits,
    )


def index_in_chunk(chunk: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """The index of each token among those of its chunk.

    >>> index_in_chunk(np.array([0, 0, 1, 1, 0]))
    array([0, 1, 0, 1, 2])
    """
    index = np.zeros(len(chunk), int)
    for c in np.unique(chunk):
        index[chunk == c] = np.arange((chunk == c).sum())
    return index
