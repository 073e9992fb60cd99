"""Every fault of the dictionary put into correct results, anywhere: named by kind, place and number, or not at all."""

from dataclasses import replace

import numpy as np
import pytest
from broken import (
    CHUNK,
    FLASH,
    bleeding,
    block_otherwise,
    index,
    of_ranks,
    packed,
    posed,
    rescaled_except,
    said_of,
    shifted,
    shifted_on_the_diagonal,
    triangle,
    weighted,
    with_prefix,
    without_keys,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import examples

from cpjax.crosscheck.diagnosis.words import UNKNOWN
from cpjax.trial.emulators import PROFILES, attend
from cpjax.trial.faults import changes
from cpjax.trial.problem import Problem, Result

pytestmark = pytest.mark.slow


@st.composite
def problems(draw, is_causal=None, heads=((1, 1), (2, 1), (2, 2))):
    """cp 2 or 3, logits from flat to peaked, with or without a group of query heads."""
    return posed(
        draw(st.integers(0, 2**32 - 1)),
        cp=draw(st.sampled_from([2, 3])),
        is_causal=draw(st.booleans()) if is_causal is None else is_causal,
        logits=draw(st.sampled_from([0.5, 1.0, 2.0, 4.0])),
        heads=draw(st.sampled_from(heads)),
    )


def everywhere(said):
    """The equals that explain all query chunks; there must be some. A chunk that is wrong alone has a cause alone."""
    assert not said.passed
    found = said.explanation
    named = found.common or (found.causes[0].faults if len(found.causes) == 1 else ())
    assert named, said.diagnosis
    return named


nonzero = st.integers(1, 40).flatmap(lambda k: st.sampled_from([k, -k]))


@given(problems(is_causal=True), nonzero, st.booleans())
@examples(0.08)
def test_by_how_much_the_causal_mask_is_shifted(p, k, with_lse):
    said = said_of(p, shifted(p, k), with_lse=with_lse)
    assert {(f.kind, f.number) for f in everywhere(said)} == {("causal mask shifted", k)}, said.diagnosis


@given(problems(is_causal=True), st.integers(1, CHUNK - 2).flatmap(lambda k: st.sampled_from([k, -k])), st.booleans())
@examples(0.08)
def test_a_mask_that_is_shifted_on_the_diagonal_only(p, k, with_lse):
    wrong = shifted_on_the_diagonal(p, k)
    said = said_of(p, wrong, with_lse=with_lse)
    named = {(f.kind, f.mask, f.number) for f in everywhere(said)}
    same = not changes(wrong, shifted(p, k))
    assert named <= {("causal mask shifted", mask, k) for mask in ("diagonal", *["shift"] * same)}, said.diagnosis


@given(problems(), st.booleans(), st.sampled_from(["absent or applied", "in every chunk"]))
@examples(0.06)
def test_a_mask_where_there_should_be_none_and_none_where_there_should_be(p, with_lse, kind):
    assume(kind != "in every chunk" or not p.is_causal)
    if kind == "in every chunk":
        own = index(p) % CHUNK
        wrong = attend(replace(p, is_causal=True, q_positions=own, kv_positions=own), FLASH, "ring")
    else:
        wrong = attend(replace(p, is_causal=not p.is_causal), FLASH, "ring")
        kind = "absent" if p.is_causal else "applied"
    said = said_of(p, wrong, with_lse=with_lse)
    assert {f.kind for f in everywhere(said)} == {f"causal mask {kind}"}, said.diagnosis


@given(problems(), st.data())
@examples(0.1)
def test_where_a_chunk_was_masked_like_the_diagonal(p, data):
    rank = data.draw(st.integers(0, p.cp - 1))
    last = 2 * p.cp - 1
    whole = [c for c in range(last + 1) if not p.is_causal or (c < last - rank and c != rank)]
    chunk = data.draw(st.sampled_from(whole))
    said = said_of(p, triangle(p, chunk, rank), with_lse=data.draw(st.booleans()))
    mine = {q for q in (rank, last - rank) if not p.is_causal or chunk < q}
    assert {cause.query_chunk for cause in said.explanation.causes} == mine
    for cause in said.explanation.causes:
        assert ("masked", (chunk,)) in {(f.kind, f.chunks) for f in cause.faults}, said.diagnosis
    assert f"rank {rank}, step {(rank - min(chunk, last - chunk)) % p.cp}" in said.diagnosis[0]


@given(problems(is_causal=None), st.integers(1, 60), st.sampled_from([None, 7, 20]))
@examples(0.08)
def test_a_window_of_another_size(p, size, asked):
    assume(size != asked and size < p.key.shape[1] - 1)
    problem_of = replace(p, window=asked)
    said = said_of(problem_of, attend(replace(p, window=size), FLASH, "ring"))
    assert {(f.kind, f.number) for f in everywhere(said)} == {("window", size)}, said.diagnosis


def test_a_window_that_was_not_applied():
    p = replace(posed(0), window=20)
    said = said_of(p, attend(replace(p, window=None), FLASH, "ring"))
    assert "the window was not applied" in said.diagnosis[0]


@given(problems(), st.floats(-2.0, 2.0), st.booleans())
@examples(0.08)
def test_the_scale_is_fitted(p, log_factor, with_lse):
    factor = float(np.exp(log_factor))
    assume(abs(factor - 1) > 0.005)
    said = said_of(p, attend(replace(p, scale=p.scale * factor), FLASH, "ring"), with_lse=with_lse)
    named = everywhere(said)
    assert all(f.kind.startswith("scale") for f in named), said.diagnosis
    assert abs(named[0].scale / factor - 1) < 2e-3 * max(1.0, abs(log_factor)), said.diagnosis


@given(problems(heads=((4, 2), (2, 2))), st.data())
@examples(0.08)
def test_exchanged_heads_chunks_and_ranks_are_found(p, data):
    right = attend(p, FLASH, "ring")
    kind = data.draw(st.sampled_from(["heads", "kv heads", "chunks"]))
    count = {"heads": p.query.shape[2], "kv heads": p.key.shape[2], "chunks": 2 * p.cp}[kind]
    order = np.array(data.draw(st.permutations(range(count))))
    moved = np.flatnonzero(order != np.arange(count))
    assume(len(moved))
    if kind == "heads":
        wrong = Result(right.out[:, :, order], right.lse[:, :, order])
        expected = f"head {moved[0]} has the outputs of head {order[moved[0]]}"
    elif kind == "kv heads":
        wrong = attend(replace(p, key=p.key[:, :, order], value=p.value[:, :, order]), FLASH, "ring")
        group = p.query.shape[2] // count
        expected = f"head {group * moved[0]} attends to key/value head {order[moved[0]]} instead of {moved[0]}"
    else:
        rows = (order[:, None] * CHUNK + np.arange(CHUNK)).ravel()
        wrong = Result(right.out[:, rows], right.lse[:, rows])
        expected = f"chunk {moved[0]} (rank {min(moved[0], count - 1 - moved[0])}) has the outputs of chunk "
        expected += f"{order[moved[0]]} "
    said = said_of(p, wrong)
    assert expected in said.diagnosis[0], said.diagnosis


LSE = {
    "lse log2": lambda lse: lse / np.log(2),
    "lse log10": lambda lse: lse / np.log(10),
    "lse negated": lambda lse: -lse,
    "lse off by a constant": lambda lse: lse + 0.37,
    "lse zero": lambda lse: 0 * lse,
}


@given(problems(), st.sampled_from(sorted(LSE)))
@examples(0.06)
def test_what_was_handed_over_as_lse(p, kind):
    out, lse = attend(p, FLASH, "ring")
    said = said_of(p, Result(out, LSE[kind](lse).astype(np.float32)))
    assert [f.kind for f in everywhere(said)] == [kind], said.diagnosis


PRECISIONS = {
    "probabilities rounded to BF16": {"probability": "bfloat16"},
    "chunk results stored in BF16": {"carry": "bfloat16"},
    "probabilities rounded to BF16 and chunk results stored in BF16": {"probability": "bfloat16", "carry": "bfloat16"},
    "scores rounded to FP16": {"score": "float16"},
    "probabilities rounded to FP16": {"probability": "float16"},
    "probabilities rounded to FP16 and chunk results stored in FP16": {"probability": "float16", "carry": "float16"},
}


@given(problems(), st.sampled_from(sorted(PRECISIONS)))
@examples(0.08)
def test_which_precision_fits_better(p, name):
    claimed = "float32" if name.endswith("FP16") and not name.startswith("scores") else "flash_fp16"
    if claimed == "float32":
        p = p.cast("float32")
    wrong = attend(p, replace(PROFILES[claimed], **PRECISIONS[name]), "ring")
    said = said_of(p, wrong, precision=claimed)
    assume(not said.passed)
    assert f"precision: {name}" in {f.kind for f in everywhere(said)}, said.diagnosis


@given(problems(), st.integers(3, 30), st.data())
@examples(0.06)
def test_pads_that_leaked(p, pads, data):
    """As a kernel that rounds the length up shows some of them."""
    length = p.key.shape[1] - pads
    leaked = data.draw(st.integers(1, pads))
    p = packed(p, [length])
    wrong = attend(replace(p, segments=np.where(index(p) < length + leaked, 0, -1)), FLASH, "ring")
    said = said_of(p, wrong, with_lse=data.draw(st.booleans()))
    number = np.inf if leaked == pads else leaked
    assert {(f.kind, f.number) for f in everywhere(said)} == {("pads leaked", number)}, said.diagnosis


def test_pads_before_a_request_that_leaked_by_their_place():
    p = packed(posed(4), [25, 30], pads=4)
    far = np.where(p.segments < 0, 10**6, p.kv_positions).astype(np.int32)
    p = replace(p, kv_positions=far)
    own = p.segments.copy()
    own[0, 25:29] = 1
    wrong = attend(replace(p, segments=own, q_positions=index(p), kv_positions=index(p)), FLASH, "ring")
    said = said_of(p, wrong)
    assert "pads leaked: the keys of the first 4 pads were seen (by the place in the row)" in said.diagnosis[0] or (
        "pads leaked: the keys of pad tokens were seen (by the place in the row)" in said.diagnosis[0]
    ), said.diagnosis


def test_numbers_in_pads_that_are_none_do_not_hide_another_fault():
    p = packed(posed(5), [50])
    wrong = attend(replace(p, scale=p.scale * 1.01), FLASH, "ring")
    is_pad = (p.segments < 0)[..., None, None]
    poison = {name: np.where(is_pad, np.float16(np.nan), getattr(p, name)) for name in ("query", "key", "value")}
    assert said_of(replace(p, **poison), wrong).diagnosis == said_of(p, wrong).diagnosis
    assert "scale is 1.01" in said_of(p, wrong).diagnosis[0]


@given(problems(is_causal=True), st.data())
@examples(0.08)
def test_the_first_request_of_a_pack_bleeds_into_the_second(p, data):
    total = p.key.shape[1]
    first, second = data.draw(st.integers(5, total // 2)), data.draw(st.integers(5, total // 2 - 4))
    p = packed(p, [first, second, total - first - second][: data.draw(st.sampled_from([2, 3]))])
    count = data.draw(st.one_of(st.just(first), st.integers(1, first)))
    said = said_of(p, bleeding(p, count), with_lse=data.draw(st.booleans()))
    number = np.inf if count == first else count
    assert {(f.kind, f.mask, f.number) for f in everywhere(said)} == {("requests mixed", "request 1", number)}


@given(problems(), st.sampled_from(["in place", "by position"]))
@examples(0.04)
def test_requests_that_see_each_other(p, how):
    p = packed(p, [20, 17, p.key.shape[1] - 37])
    places = {"q_positions": index(p), "kv_positions": index(p)} if how == "in place" else {}
    said = said_of(p, attend(replace(p, segments=0 * p.segments, **places), FLASH, "ring"))
    mask = "requests by position" if how == "by position" and p.is_causal else "requests"
    assert [(f.kind, f.mask, f.number) for f in everywhere(said)] == [("requests mixed", mask, np.inf)]


@given(problems(), st.data())
@examples(0.06)
def test_a_dropped_prefix(p, data):
    length = data.draw(st.integers(4, p.key.shape[1] - 4))
    p = with_prefix(p, length)
    left = data.draw(st.one_of(st.just(0), st.integers(1, length - 1)))
    said = said_of(p, without_keys(p, np.arange(length - left)), with_lse=data.draw(st.booleans()))
    # Of a prefix that misses its first key only, that key was lost: the simpler of two names for the same.
    named = {("prefix dropped", left)} | ({("key lost", 0.0)} if left == length - 1 else set())
    found = everywhere(said)
    assert named & {(f.kind, f.number) for f in found}, said.diagnosis
    assert all(f.key == 0 for f in found if f.kind == "key lost")


@given(problems(is_causal=True), st.data())
@examples(0.06)
def test_the_merge_that_did_not_rescale(p, data):
    step = data.draw(st.integers(1, 3))
    said = said_of(p, rescaled_except(p, step))
    named = [cause.faults for cause in said.explanation.causes if cause.query_chunk == 2 * p.cp - 1]
    assert [(f.kind, f.unrescaled) for f in named[0]][:1] == [("not rescaled", (step,))], said.diagnosis


@given(problems(is_causal=False), st.data())
@examples(0.05)
def test_what_cannot_be_told_apart_is_a_set(p, data):
    """From out alone only the ratio of two weights can be seen."""
    p = replace(posed(data.draw(st.integers(0, 999)), logits=1.0), is_causal=True)
    weight = data.draw(st.sampled_from([0.5, 0.9, 3.0]))
    said = said_of(p, weighted(p, {(1, 0): weight}), with_lse=False)
    (faults,) = [cause.faults for cause in said.explanation.causes if cause.query_chunk == 1]
    ratio = {f.chunks: 2.0 if f.kind == "doubled" else f.number for f in faults}
    assert set(ratio) == {(0,), (1,)}, said.diagnosis
    assert abs(ratio[(0,)] - weight) < 0.01
    assert abs(ratio[(1,)] * weight - 1) < 0.01
    assert "cannot tell apart" in " ".join(said.diagnosis)


@given(problems(), st.data())
@examples(0.08)
def test_of_two_faults_in_one_place_none_is_named(p, data):
    rank = data.draw(st.integers(0, p.cp - 1))
    last = 2 * p.cp - 1
    kind = data.draw(st.sampled_from(["two chunks", "scale and chunk", "mask and chunk", "lse and chunk"]))
    chunk = min(rank, 1)
    weight = data.draw(st.sampled_from([1e-9, 0.9, 2.0]))
    if kind == "two chunks":
        wrong = weighted(p, {(rank, 0): 0.7, (rank, 1): 3.0})
        truth = {("weight", (0,)), ("weight", (1,))}
    elif kind == "scale and chunk":
        wrong = weighted(replace(p, scale=1.02 * p.scale), {(rank, chunk): weight})
        truth = {("scale", ())}
    elif kind == "mask and chunk":
        p = replace(p, is_causal=True)
        wrong = weighted(replace(p, q_positions=index(p) + np.int32(1)), {(rank, chunk): weight})
        truth = {("causal mask shifted", ())}
    else:
        out, lse = weighted(p, {(rank, chunk): weight})
        wrong = Result(out, (lse / np.log(2)).astype(np.float32))
        truth = {("lse log2", ())}
    said = said_of(p, wrong)
    assert not said.passed
    assert not said.explanation.common, said.diagnosis
    both = [c for c in said.explanation.causes if min(c.query_chunk, last - c.query_chunk) == rank]
    both = [c for c in both if not p.is_causal or c.query_chunk > 1]
    assert both
    assert all(not cause.faults for cause in both), said.diagnosis
    assert all(not c.faults or (c.faults[0].kind, c.faults[0].chunks) in truth for c in said.explanation.causes)
    assert any(sentence.startswith(UNKNOWN) for sentence in said.diagnosis)


def test_two_faults_in_two_places_are_both_named():
    p = posed(3, cp=3, is_causal=False)
    said = said_of(p, weighted(p, {(0, 4): 0.8, (2, 1): 2.0}))
    text = " ".join(said.diagnosis)
    assert "rank 0, step 2: key/value chunk 4 (of rank 1) entered query chunk 0, 5 with weight 0.8" in text, text
    assert "rank 2, step 1: key/value chunk 1 (of rank 1) entered query chunk 2, 3 twice" in text, text


def _other_data(p: Problem, rank: int) -> Result:
    other = posed(77, cp=p.cp, is_causal=p.is_causal, heads=(p.query.shape[2], p.key.shape[2]))
    return block_otherwise(p, replace(p, key=other.key, value=other.value), 0, of_ranks(p, rank))


STRANGE = {
    "a block of another request": lambda p: _other_data(p, 1),
    "every second of some keys lost": lambda p: without_keys(p, np.array([1, 3, 5, 7])),
    "values of other keys": lambda p: attend(replace(p, value=np.roll(p.value, 3, axis=1)), FLASH, "ring"),
    "a head dim lost": lambda p: attend(replace(p, query=p.query * (np.arange(32) > 0).astype("f2")), FLASH, "ring"),
}


@given(problems(), st.sampled_from(sorted(STRANGE)), st.booleans())
@examples(0.08)
def test_what_is_in_no_dictionary_is_refused(p, kind, with_lse):
    said = said_of(p, STRANGE[kind](p), with_lse=with_lse)
    assert not said.passed
    assert not said.explanation.common, said.diagnosis
    named = [cause for cause in said.explanation.causes if cause.faults]
    assert not named, said.diagnosis
    assert said.diagnosis[0].startswith(UNKNOWN)
