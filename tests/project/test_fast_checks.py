"""The checks of types and shapes that all tests run under refuse what jaxtyping's own would."""

from dataclasses import dataclass, make_dataclass

import fast_checks
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from fast_checks import checked
from jaxtyping import Float

from cpjax.dense import dense_attention
from cpjax.mask import Mask

Rows = Float[np.ndarray, "t d"]


@checked
def scaled(x: Rows, by: Float[np.ndarray, " t"], wrong: int = 0) -> Rows:
    return (x * by[:, None])[wrong:]


def closure(number):
    @checked
    def inner(x: Rows, y: Float[np.ndarray, " d"] | None = None) -> Float[np.ndarray, " t"]:
        return x[:, 0] * number if number else x[0]

    return inner


def test_the_packages_functions_are_checked():
    x = np.zeros((1, 2, 1, 4))
    with pytest.raises(BeartypeCallHintViolation):
        dense_attention(x, x, x[0], Mask(True), scale=1.0)
    with pytest.raises(BeartypeCallHintViolation):
        Mask("yes")


def test_a_length_is_the_same_in_all_arguments_and_in_the_result():
    assert scaled(np.ones((3, 2)), np.ones(3)).shape == (3, 2)
    assert scaled(np.ones((4, 2)), np.ones(4)).shape == (4, 2)
    with pytest.raises(BeartypeCallHintViolation):
        scaled(np.ones((3, 2)), np.ones(2))
    with pytest.raises(BeartypeCallHintViolation):
        scaled(np.ones((3, 2)), np.ones(3), wrong=1)
    with pytest.raises(BeartypeCallHintViolation):
        scaled(np.ones((3, 2), int), np.ones(3))


def test_every_closure_of_a_code_is_checked_and_keeps_its_own_variables():
    two, three, broken = closure(2), closure(3), closure(0)
    assert two(np.ones((3, 2))).tolist() == [2, 2, 2]
    assert three(np.ones((3, 2)), np.ones(2)).tolist() == [3, 3, 3]
    for inner in (two, three):
        assert inner.__name__ == "inner"
        assert inner.__wrapped__.__closure__[0].cell_contents in (2, 3)
        with pytest.raises(BeartypeCallHintViolation):
            inner(np.ones(3))
        with pytest.raises(BeartypeCallHintViolation):
            inner(np.ones((3, 2)), np.ones(3))
    with pytest.raises(BeartypeCallHintViolation):
        broken(np.ones((3, 2)))


def test_a_dataclass_checks_its_fields():
    @checked
    @dataclass
    class Pair:
        x: Rows
        y: Rows

    Pair(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(BeartypeCallHintViolation):
        Pair(np.ones((3, 2)), np.ones((3, 3)))
    with pytest.raises(BeartypeCallHintViolation):
        checked(make_dataclass("One", [("x", int)]))("1")


def test_what_the_hook_never_hands_over_is_an_error():
    with pytest.raises(TypeError, match="before any other decorator"):
        checked(property(len))


def test_shapes_are_found_inside_other_hints():
    assert fast_checks.names_a_shape(dict[str, tuple[Rows | None, int]])
    assert not fast_checks.names_a_shape(dict[str, tuple[np.ndarray, int]])
