"""The formats as the error model sees them, held against NumPy's own numbers."""

import doctest

import numpy as np
import pytest

from cpjax.crosscheck.exact import formats
from cpjax.crosscheck.exact.formats import FORMATS


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_the_spacing_is_numpys_own(name):
    fmt, some = FORMATS[name], np.random.default_rng(0)
    x = np.exp(some.uniform(np.log(fmt.tiny), np.log(fmt.largest) - 1, 500)).astype(name)
    x = np.concatenate([x, -x, np.array([0.0, -0.0, fmt.tiny, 1.0, np.nextafter(1, 0, dtype=name)], name)])
    np.testing.assert_array_equal(fmt.spacing(x.astype(np.float64)), np.spacing(np.abs(x)).astype(np.float64))


@pytest.mark.parametrize("name", FORMATS)
def test_zero_has_the_least_spacing_of_all(name):
    assert FORMATS[name].spacing(np.zeros(1)) == FORMATS[name].tiny


def test_examples_in_docstrings():
    found = doctest.testmod(formats)
    assert found.attempted
    assert not found.failed
