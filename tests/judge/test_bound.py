"""The bound's worst cases: what is reached of them by inputs that are chosen for it, and arithmetic that is correct.

A correct result of ordinary data does not come near the bound, so a bound that is twice as large would not be noticed.
tests/helpers/adversary.py has inputs on which roundings conspire, one for each part of the bound; what they reach is
pinned here. Where that is much less than 1 the bound is generous, and the comment says of what.
"""

from functools import partial

import adversary
import pytest
import regimes
from power import Edge, Pin, constants, of_constant, of_text, unchecked

BOUND = "cpjax.crosscheck.error_model.bound"

REACHED = {
    # Nothing is missing but what the sums add, and that a number above the middle is not quite at it.
    "probabilities above the middle": (adversary.probabilities_above_the_middle, 0.997),
    "probabilities above half the least": (adversary.probabilities_above_half_the_least, 0.992),
    "sums that round one way": (adversary.sums_that_round_one_way, 0.3987),
    "chunks above the middle": (adversary.chunks_above_the_middle, 0.992),
    "chunks above half the least": (adversary.chunks_above_half_the_least, 0.9985),
    "merges that round up": (adversary.merges_that_round_up, 0.9076),
    "merges of the least numbers": (adversary.merges_of_the_least_numbers, 0.894),
    "weights of lse in FP16": (adversary.weights_of_lse_in_fp16, 0.975),
    "scores of a long product": (adversary.scores_of_a_long_product, 0.8215),
    # Values +1 and −1 are at most as far from the output as |v| + |o|; a maximum in FP16 is exact here.
    "scores in FP16": (adversary.scores_in_fp16, 0.837),
    # One rounding of the eight of a softcap; half a one of the six of a bias, and 8 (1 + |lse|) besides.
    "logits of a softcap": (adversary.logits_of_a_softcap, 0.1502),
    "logits with a bias": (adversary.logits_with_a_bias, 0.03447),
    "exponents in FP16": (adversary.exponents_in_fp16, 0.62),
    # The rest of D: 8 (1 + |lse|), for all that multiplies a weight later.
    "scores of two roundings": (adversary.scores_of_two_roundings, 0.1487),
    # The same, and 512 additions, which this exponent has not.
    "exponents of distant keys": (adversary.exponents_of_distant_keys, 0.0522),
    # Four roundings of |lse| + 4 a chunk and a weight, of which one is that of lse.
    "weights at a large lse": (adversary.weights_at_a_large_lse, 0.1243),
    # One rounding of each addition, of the two that the bound has, and D besides.
    "lse of such a sum": (adversary.lse_of_such_a_sum, 0.1643),
    "merges of a large lse": (adversary.merges_of_a_large_lse, 0.425),
    "merges of an lse of 1": (adversary.merges_of_an_lse_of_1, 0.02787),
}
"""The share of the bound, or of its part, that is reached."""


def is_not_judged(score: float) -> bool:
    return not regimes.large_logits(score).verdict().judgeable


def product_is_not_judged(below: float) -> bool:
    """q·k is less than the largest number of FP16 by the fraction 1/`below`."""
    return not regimes.large_products(65504 / (1 + 1 / below)).verdict().judgeable


PINS = {
    **{name: Pin(reached, share * 0.97, share * 1.03) for name, (reached, share) in REACHED.items()},
    # The worst of 400: exponentials of another library differ in their last bits.
    "weights at lse 0": Pin(adversary.weights_at_lse_0, 0.04, 0.06),
    # e^50 is the cap, and the key has the weight e^-52: where its exponent may be off by 60, the row is still judged.
    "an impossible key": Pin(partial(adversary.distortion_of_an_impossible_key, 52.0), 0.13, 0.14),
    "weights that may be off": Edge(is_not_judged, 414.5),
    "products near the largest": Edge(product_is_not_judged, 1024),
}

GUARDS = (
    of_constant(BOUND, "OF_SCORE", "scores of two roundings"),
    of_constant(BOUND, "OF_DISTANCE", "exponents of distant keys"),
    of_constant(BOUND, "OF_LOG", "scores of two roundings"),
    of_constant(BOUND, "MOST_OF_TANH", "logits of a softcap"),
    of_constant(BOUND, "MOST_OF_ADDED", "logits with a bias"),
    of_constant(BOUND, "OF_SUMS", "sums that round one way"),
    of_constant(BOUND, "OF_WEIGHT", "weights at a large lse"),
    of_constant(BOUND, "WEIGHT_SIZE", "weights at lse 0"),
    of_constant(BOUND, "LSE_SUMS", "lse of such a sum"),
    of_constant(BOUND, "LSE_LOGS", "merges of a large lse"),
    of_constant(BOUND, "LSE_SIZE", "merges of an lse of 1"),
    of_constant(BOUND, "MOST_DISTORTION", "weights that may be off"),
    of_constant(BOUND, "OVERFLOW_ROOM", "products near the largest"),
    of_constant(BOUND, "LARGEST_EXPONENT", "an impossible key"),
    of_constant("cpjax.precision", "KEY_TILE", "sums that round one way"),
    *(
        of_text(BOUND, old, old.replace(factor, f"2 * {factor}"), old.replace(factor, f"0.5 * {factor}"), *pins)
        for old, factor, *pins in (
            ("(a.head_dim * rows.norms", "a.head_dim", "scores of a long product"),
            ("fmt.u * x / a.scale_size", "fmt.u", "scores in FP16"),
            ("fmt.u * (x + spill)", "fmt.u", "scores in FP16"),
            ("a.score.u * (below_top", "a.score.u", "exponents in FP16"),
            ("a.chunk_lse_spacing / 2", "a.chunk_lse_spacing", "weights of lse in FP16"),
            ("a.probability.u * rows.weight", "a.probability.u", "probabilities above the middle"),
            ("a.probability.tiny / 2", "a.probability.tiny", "probabilities above half the least"),
            ("(a.out.u * chunk_out", "a.out.u", "chunks above the middle"),
            ("a.out.tiny / 2", "a.out.tiny", "chunks above half the least"),
            ("several_chunks * merges *", "merges", "merges that round up"),
            ("(a.carry.u * a.largest_running", "a.carry.u", "merges that round up"),
            ("a.carry.tiny / 2", "a.carry.tiny", "merges of the least numbers"),
        )
    ),
)


@pytest.fixture(autouse=True)
def _unchecked():
    with unchecked():
        yield


@pytest.mark.parametrize("name", PINS)
def test_so_much_of_the_bound_is_reached_and_no_more(name):
    one = PINS[name]
    assert one.holds(), one.measure() if isinstance(one, Pin) else one


@pytest.mark.parametrize("name", REACHED)
def test_correct_arithmetic_never_reaches_more_than_all_of_it(name):
    assert 0 < REACHED[name][0]() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["twice", "half"])
@pytest.mark.parametrize("guard", GUARDS, ids=[guard.name for guard in GUARDS])
def test_twice_or_half_of_a_constant_is_noticed(guard, direction):
    with guard.twice() if direction == "twice" else guard.half():
        assert not all(PINS[name].holds() for name in guard.pins)


def test_every_constant_of_the_bound_is_pinned():
    assert {f"bound.{name}" for name in constants(BOUND)} <= {guard.name for guard in GUARDS}
