"""Numbers in words: the examples in the docstrings hold."""

import doctest

from cpjax import wording


def test_examples_of_numbers_in_words():
    found = doctest.testmod(wording)
    assert found.attempted == 4
    assert found.failed == 0
