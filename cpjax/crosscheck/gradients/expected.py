"""What correct arithmetic explains of dq, dk and dv: all roundings carried to the results (docs/gradients.md §3–§5)."""

from collections.abc import Collection

import numpy as np
from jaxtyping import Float

from cpjax.crosscheck.gradients.asked import Asked
from cpjax.crosscheck.gradients.directions import directions
from cpjax.crosscheck.gradients.exact import RIGHT, Tile, Variant, tiles
from cpjax.crosscheck.gradients.roundings import Roundings
from cpjax.crosscheck.gradients.sums import Models, Part, Sums


def expected(asked: Asked, variant: Variant = RIGHT, without: Collection[str] = ()) -> Models:
    """An `Expected` for each of dq, dk, dv; `without` leaves terms out by name, to see what they are for."""
    p = asked.problem
    counts = (asked.keys_seen, asked.queries_seen, asked.queries_seen)
    scales = (p.scale, p.scale, 1.0)
    every = zip((p.query, p.key, p.value), scales, counts, strict=True)
    dq, dk, dv = (Sums(asked, x.shape, scale, count, without) for x, scale, count in every)
    of_key, of_query, of_dout = (
        [directions(x[b], p.key.shape[2]) for b in range(len(x))] for x in (p.key, p.query, asked.dout)
    )
    with np.errstate(invalid="ignore", over="ignore"):
        for t in tiles(asked, variant):
            b, rows, keys = t.batch, t.rows, t.keys
            roundings = Roundings(asked, t)
            of_ds, of_p, shared = _parts(t, roundings, without, of_key[b].size[keys, t.kv_head])
            dq.add(b, rows, t.head, of_ds)
            for in_ds, variance in shared:
                dq["common"][b, rows, t.head] += (in_ds @ t.key) ** 2 * variance[:, None]
            # What the keys of a query share is independent from query to query, so in dk and dv it is as all else.
            more_ds, more_p = _of_rows(roundings, without)
            to_k = _turned(of_ds, more_ds, t.query, of_query[b].size[rows, t.head])
            to_v = _turned(of_p, more_p, t.dout, of_dout[b].size[rows, t.head])
            for sums, part in ((dk, to_k), (dv, to_v)):
                sums.add(b, keys, t.kv_head, part)
                sums.carry(b, keys, t.kv_head, t.head, part, rows.start, t.seen.T)
                if asked.over_ranks is not None:
                    sums.of_chunks(b, keys, t.kv_head, part, p.q_chunk[rows], t.seen.T)
            if asked.over_ranks is not None:
                dq.of_chunks(b, rows, t.head, of_ds, p.kv_chunk[keys], t.seen)
    if asked.over_ranks is not None:
        dq.over_ranks(asked.rank_of[p.q_chunk], -1)
        for sums in (dk, dv):
            sums.over_ranks(asked.rank_of[p.kv_chunk], 1)
    alike = [np.stack([one.alike for one in some]) for some in (of_key, of_query, of_dout)]
    alike[0] = np.repeat(alike[0], p.group, axis=1)
    return Models(*(sums.expected(one) for sums, one in zip((dq, dk, dv), alike, strict=True)))


Shared = list[tuple[Float[np.ndarray, "R S"], Float[np.ndarray, " R"]]]


def _parts(
    t: Tile, roundings: Roundings, without: Collection[str], sizes: Float[np.ndarray, " S"]
) -> tuple[Part, Part, Shared]:
    """ds with the keys, p with nothing yet, and what the keys of each query share."""
    variances = {}
    for kind, terms in (("stored", roundings.stored_terms()), ("pairs", roundings.computed_terms())):
        some = [term for term in terms if term.name not in without]
        for of in ("of_ds", "of_p"):
            variances[kind, of] = sum((getattr(term, of) for term in some), np.zeros_like(t.p))
    known_p, known_ds = (None, None) if roundings.stored is None else roundings.stored_errors()
    most_p, most_ds = roundings.most()
    of_ds = Part(t.ds, variances["stored", "of_ds"], variances["pairs", "of_ds"], known_ds, most_ds, t.key, sizes)
    of_p = Part(t.p, variances["stored", "of_p"], variances["pairs", "of_p"], known_p, most_p, t.key, sizes)
    shared = [(term.in_ds, term.variance) for term in roundings.row_terms() if term.name not in without]
    return of_ds, of_p, shared


def _of_rows(
    roundings: Roundings, without: Collection[str]
) -> tuple[Float[np.ndarray, "R S"], Float[np.ndarray, "R S"]]:
    """Variance of ds and of p by what the keys of a query share."""
    of_ds, of_p = np.zeros_like(roundings.tile.p), np.zeros_like(roundings.tile.p)
    for term in roundings.row_terms():
        if term.name not in without:
            of_ds += term.in_ds**2 * term.variance[:, None]
            of_p += np.asarray(term.in_p) ** 2 * term.variance[:, None]
    return of_ds, of_p


def _turned(part: Part, more: Float[np.ndarray, "R S"], vectors: Float[np.ndarray, "R D"], sizes: np.ndarray) -> Part:
    """The part of the keys: summed over the queries."""
    known = None if part.known is None else part.known.T
    return Part(part.factor.T, part.stored.T, (part.pairs + more).T, known, part.most.T, vectors, sizes)
