"""Families of masks: with the number of the correct mask each of them is that mask."""

import numpy as np
import pytest

from cpjax.crosscheck import judge
from cpjax.crosscheck.diagnosis.masks import mask_of
from cpjax.crosscheck.diagnosis.sample import Sample, samples
from cpjax.crosscheck.diagnosis.words import requests
from cpjax.crosscheck.judging.evidence import collect
from cpjax.crosscheck.judging.problem import Problem, checked_problem
from cpjax.crosscheck.judging.sampling import chosen_rows

T = 48


def asked(**how) -> tuple[Problem, list[Sample]]:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, T, 1, 8)).astype(np.float32) for _ in range(3))
    problem = checked_problem(query, key, value, **how)
    out = np.zeros_like(value)
    return problem, samples(problem, collect(problem, out, None, chosen_rows(problem, 0)).rows, out, None)


def packed() -> dict:
    """Requests of 20, 17 and 7 tokens, and four pads."""
    lengths = np.array([20, 17, 7, 4])
    segment = np.repeat([0, 1, 2, -1], lengths)[None]
    position = np.concatenate([np.arange(n) for n in lengths])[None]
    return {"segment_ids": segment, "q_positions": position, "kv_positions": position}


@pytest.mark.parametrize("requests_are", ["one", "packed"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("family", "is_causal"),
    [
        *((family, True) for family in ("shift", "diagonal", "window", "prefix", "pads", "requests", "request 1")),
        *((family, False) for family in ("window", "pads", "requests", "request 1")),
    ],
)
def test_the_number_of_the_correct_mask(family, is_causal, window, requests_are):
    problem, some = asked(is_causal=is_causal, window=window, **(packed() if requests_are == "packed" else {}))
    right = float(window or T) if family == "window" else 0.0
    assert len(some)
    for one in some:
        np.testing.assert_array_equal(mask_of(one, problem, family, right), one.seen)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("number", [-3.0, -1.0, 1.0, 4.0])
def test_a_shifted_mask_shows_a_request_s_own_keys_only(number, window):
    problem, some = asked(window=window, **packed())
    position, segment = (np.asarray(x)[0] for x in problem.q_tokens)
    for one in some:
        at = one.position
        ahead = position[at][:, None] - position[None]
        seen = (segment[at][:, None] == segment[None]) & (ahead >= -number) & (segment >= 0)
        seen &= True if window is None else np.abs(ahead) < window
        np.testing.assert_array_equal(mask_of(one, problem, "shift", number), seen)


def test_requests_that_are_exchanged_are_told_and_no_others():
    said = requests({0: 2, 1: 1, 2: 0})
    assert said == (
        "Requests are exchanged: request 0 has the outputs of request 2, request 2 has the outputs of request 0."
    )


@pytest.mark.parametrize("prefix", [1, 16])
def test_a_mask_by_indices_is_told_with_the_shift_that_it_is(prefix):
    """With a prefix of one token it is a mask one key short; both are said, for both are true."""
    rng = np.random.default_rng(3)
    query, key, value = (rng.standard_normal((1, n, 2, 16)) for n in (40, 40 + prefix, 40 + prefix))
    score = np.einsum("btnh,bsnh->btns", query, key) / 4
    score = np.where(np.tri(40, 40 + prefix, dtype=bool)[:, None], score, -np.inf)
    p = np.exp(score - score.max(axis=-1, keepdims=True))
    out = np.einsum("btns,bsnv->btnv", p / p.sum(axis=-1, keepdims=True), value)
    arrays = [x.astype(np.float32) for x in (query, key, value, out)]
    places = {"q_positions": prefix + np.arange(40)[None], "kv_positions": np.arange(40 + prefix)[None]}
    (first, *_) = judge(*arrays, scale=0.25, **places).diagnosis
    assert first.startswith("the causal mask was aligned top-left: query i sees the first i + 1 keys, whatever"), first
    assert f"positions are (a shift by -{prefix} of the mask by positions)" in first
