"""From errors to z-scores: held against scipy's distributions and against drawn errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cpjax.crosscheck.judging.statistic import (
    LEAST_PROBABILITY,
    RowErrors,
    binomial_z_score,
    distinct_rows,
    effective_dof,
    expected_maximum,
    z_score,
)


@given(trials=st.integers(1, 300), share=st.floats(0, 1), probability=st.floats(0.001, 0.999))
def test_successes_of_a_binomial(trials, share, probability):
    """At least so many; also one success, one trial, and all of them."""
    successes = max(1, round(share * trials))
    want = stats.norm.isf(stats.binom.sf(successes - 1, trials, probability))
    assert binomial_z_score(successes, trials, probability) == pytest.approx(
        min(want, stats.norm.isf(LEAST_PROBABILITY)), abs=1e-3
    )


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (0, 0)])
def test_no_success_is_no_surprise(successes, trials):
    assert binomial_z_score(successes, trials, 0.5) == -np.inf


@given(dof=st.floats(1, 1e4), z=st.floats(0, 8))
def test_a_mean_square_is_a_chi_square(dof, z):
    """Wilson and Hilferty's cube root is good to 0.05 up to 3; far out it gives less: 5.4 for 6 at one degree."""
    mean_square = stats.chi2.isf(stats.norm.sf(z), dof) / dof
    found = float(z_score(np.array(mean_square), np.array(dof)))
    assert z - (0.05 if z < 3 else 1.25 / np.sqrt(dof)) <= found <= z + 0.02


def test_no_degree_of_freedom_is_no_evidence():
    assert z_score(np.array(9.0), np.array(0.0)) == -np.inf


@pytest.mark.parametrize(("distinct", "share", "dof"), [(8, 0.0, 8.0), (8, 1.0, 1.0), (1, 1.0, 1.0), (0, 0.3, 0.0)])
def test_errors_that_are_common_count_once(distinct, share, dof):
    assert effective_dof(np.array([distinct]), np.array([share])) == dof


def test_as_many_as_make_the_variance_of_the_mean_square():
    """Errors of which a share of the variance is common: the mean of their squares varies as χ²_ν/ν does."""
    rng, distinct, share = np.random.default_rng(0), 16, 0.4
    common, own = rng.standard_normal((200_000, 1)), rng.standard_normal((200_000, distinct))
    mean_square = ((np.sqrt(share) * common + np.sqrt(1 - share) * own) ** 2).mean(axis=1)
    (dof,) = effective_dof(np.array([distinct]), np.array([share]))
    assert mean_square.var() == pytest.approx(2 / dof, rel=0.03)


def test_equal_rows_are_one_row_with_their_mean():
    errors = RowErrors(np.array([1.0, 3.0, 5.0, 7.0]), np.array([4.0, 2.0, 6.0, 0.0]), np.array([9, 9, 2, 5]))
    one = distinct_rows(errors)
    assert one.same.tolist() == [2, 9]  # a row without any dof is left out
    assert one.mean_square.tolist() == [5.0, 2.0]
    assert one.dof.tolist() == [6.0, 3.0]


def test_the_largest_of_many():
    """√(2 ln n) is an upper bound of what is expected, by a sixth at a thousand."""
    largest = np.random.default_rng(1).standard_normal((2000, 1000)).max(axis=1).mean()
    assert largest < expected_maximum(1000) < 1.2 * largest
    assert expected_maximum(1) == expected_maximum(0) == 0
