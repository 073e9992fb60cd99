"""With its card alone, a kernel's bits are predicted; a card with a wrong line predicts fewer; sums in their order."""

import json
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint import last_bits, parts
from cpjax.fingerprint.card import Card, card_of
from cpjax.fingerprint.computes import LAST_BITS, Arithmetic, arithmetic_of, compute, with_code
from cpjax.fingerprint.exponentials import EXP, EXP_2, LOG
from cpjax.fingerprint.kernels import emulator, sdpa
from cpjax.fingerprint.predict import Prediction, drawn, predicted
from cpjax.fingerprint.probe import Kernel, Line, answered
from cpjax.fingerprint.sums import ROW_SUMS, Order, added, fused, parts_of, row_sum, within
from cpjax.trial.emulators import PROFILES, dtype_of

RUNNER = CliRunner()


def small(kernel: Kernel, dtype: str) -> dict:
    """A few new inputs of no more than 200 keys."""
    return {name: asked for name, asked in drawn(dtype, 14).items() if asked.key.shape[1] <= 200}


def prediction(card: Card, kernel: Kernel) -> Prediction:
    new = small(kernel, card.dtype)
    return predicted(card, new, *answered(kernel, new))


CASES = {
    "flash_fp16": {"tile": 64, "summation": "sequential"},
    "float32": {"tile": 128, "summation": "pairwise", "base_two": True},
    "softmax_bf16": {"summation": "pairwise"},
}


@cache
def card_and_kernel(name: str) -> tuple[Card, Kernel]:
    kernel = emulator(name, **CASES[name])
    return card_of(kernel, dtype_of(name)), kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_emulators_bits_are_predicted_from_its_card(name):
    card, kernel = card_and_kernel(name)
    found = prediction(card, kernel)
    assert len(found.inputs) >= 8
    assert not found.failures
    assert [(one.out, one.within_one, one.lse) for one in found.inputs] == [(1.0, 1.0, 1.0)] * len(found.inputs)


@pytest.mark.parametrize(
    ("name", "line", "code"),
    [
        ("flash_fp16", "key tile", "16"),
        ("flash_fp16", "p as the factor of v", "bfloat16"),
        ("flash_fp16", "p in the row sum", "rounded"),
        ("flash_fp16", "scores", "float16"),
        ("flash_fp16", "order within q·k", "in pairs, halves added to halves"),
        ("float32", "order within p·v, 64 keys", "one after the other"),
        ("float32", "base of exp, bit for bit", "e"),
        ("float32", "order of the row sum", "sequential"),
    ],
)
def test_a_card_with_a_wrong_line_predicts_fewer_bits(name, line, code):
    card, kernel = card_and_kernel(name)
    assert card.line(line).code not in ("", code), "the line is told, and another value is put in its place"
    lines = tuple(one._replace(code=code) if one.name == line else one for one in card.lines)
    found = prediction(replace(card, lines=lines), kernel)
    right = prediction(card, kernel)
    shares = [(found.share(what), right.share(what)) for what in ("out", "lse")]
    assert any(wrong is not None and told is not None and wrong < told - 0.01 for wrong, told in shares), shares


def test_what_a_card_does_not_tell_is_assumed_and_said():
    card, kernel = card_and_kernel("flash_fp16")
    lines = tuple(Line(one.name, "cannot be told", "") if one.name == "key tile" else one for one in card.lines)
    found = prediction(replace(card, lines=lines), kernel)
    assert ("key tile", "whole") in found.assumed
    nearest = tuple(one._replace(nearest="64") if one.name == "key tile" else one for one in lines)
    assert ("key tile", "64") in prediction(replace(card, lines=nearest), kernel).assumed
    assert ("key tile", "64") not in prediction(card, kernel).assumed


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorchs_flash_kernel_has_this_arithmetic(dtype):
    """What its card says (docs/fingerprint.md): all bits of out and of lse, from 4 queries and 33 keys on."""
    pytest.importorskip("torch")
    half = dtype != "float32"
    arithmetic = Arithmetic(
        dtype,
        factor=dtype,
        tile=512,
        weighted=Order(part=192, has_halves=True),
        division="out by 1/l",
        exp="bits" if half else "polynomial",
        row_sum="2 x 16 lanes" if half else "16 lanes",
        is_sum_fused=True,
        log="libm",
    )
    kernel = sdpa("flash", dtype)
    if not _has_avx512():
        pytest.skip("PyTorch's kernel adds as many numbers side by side as its vectors have: 16 with AVX-512")
    for name, asked in drawn(dtype, 14).items():
        if asked.query.shape[1] < 4 or asked.key.shape[1] < 33:
            continue
        answer, found = kernel(asked), compute(arithmetic, asked)
        assert found.lse is not None
        assert answer.lse is not None
        np.testing.assert_array_equal(answer.out, found.out, err_msg=name)
        assert (answer.lse == found.lse).mean() > 0.99, name  # another C library has another logf


def _has_avx512() -> bool:
    import torch

    return "AVX512" in torch.backends.cpu.get_cpu_capability()


# Lines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("summation", "tile", "code"), [("sequential", 48, "48"), ("sequential", 2048, "0"), ("pairwise", 128, "")]
)
def test_parts_of_the_keys(summation, tile, code):
    fmt = FORMATS["float16"]
    asked = parts.probes(fmt)
    kernel = emulator("flash_fp16", summation=summation, tile=tile)
    (line,) = parts.read(fmt, asked, {name: kernel(one) for name, one in asked.items()})
    assert line.code == code


CHANGES = [
    ("order of the row sum", "8 lanes"),
    ("division by the row sum", "out by 1/l"),
    ("division by the row sum", "p"),
    ("exp, bit for bit", "cephes"),
    ("place of the scale, in float32", "root"),
    ("products and sums", "rounded"),
]


@pytest.mark.parametrize(("line", "code"), CHANGES)
def test_a_line_of_the_last_bits_is_told(line, code):
    """Of a kernel that computes as `compute` does, with one line other than assumed."""
    arithmetic = with_code(Arithmetic("float32", factor="float32", log="libm"), line, code)
    fmt = FORMATS["float32"]
    asked = {name: one for name, one in last_bits.probes(fmt).items() if name not in ("bits-tiles", "bits-many")}
    answers = {name: compute(arithmetic, one) for name, one in asked.items()}
    known = {
        "p as the factor of v": "float32",
        "p in the row sum": "float32",
        "scale": "score",
        "scores": "float32",
        "order within q·k": "one after the other",
        "order within p·v, 64 keys": "one after the other",
        "parts of p·v": "0",
        "lse": "natural",
        "key tile": "whole",
    }
    lines = {name: Line(name, "", "", value) for name, value in known.items()}
    found = {one.name: one for one in last_bits.read(fmt, lines, asked, answers)}
    assert found[line].code == code, found[line]
    assert found["fewest queries"].code == "1"
    assert found["fewest keys"].code == "2"
    assert found["other numbers of keys"].code == "alike"


def test_an_exp_that_is_none_of_the_known_is_not_told():
    """And what comes near is said as what it is: assumed."""
    fmt = FORMATS["float32"]
    asked = {name: one for name, one in last_bits.probes(fmt).items() if name in ("bits", "bits-ragged")}
    right = {name: compute(Arithmetic("float32", factor="float32"), one) for name, one in asked.items()}
    noise = np.random.default_rng(0)
    answers = {
        name: one._replace(out=fmt.round(one.out * (1 + 2.0**-20 * noise.standard_normal(one.out.shape))))
        for name, one in right.items()
    }
    lines = {"p as the factor of v": Line("", "", "", "float32"), "lse": Line("", "", "", "natural")}
    for one in last_bits.read(fmt, lines, asked, answers):
        assert one.code == "", one
    arithmetic, assumed = arithmetic_of("float32", lines)
    assert arithmetic.exp == next(iter(LAST_BITS["exp, bit for bit"]))
    assert "exp, bit for bit" in {one.line for one in assumed}


# Arithmetic ----------------------------------------------------------------------------------------------------------

floats = st.floats(-4, 4, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-30)


@given(floats, floats, floats)
def test_a_fused_sum_is_rounded_once(a, b, c):
    found = fused(np.float32(a), np.float32(b), np.float32(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    away = abs(Fraction(float(found)) - exact)
    for side in (-np.inf, np.inf):
        other = Fraction(float(np.nextafter(found, np.float32(side))))
        assert away <= abs(other - exact)


def test_a_fused_sum_near_the_middle_is_not_rounded_twice():
    """1 + 2⁻²⁴ + 2⁻⁶⁰: float64 loses the last term, and then the middle would be rounded to even, down."""
    a, b, c = np.float32(2.0**-30), np.float32(2.0**-30), np.float32(1)
    plain = np.array([1 + 2.0**-24])
    assert plain.astype(np.float32)[0] == 1
    x = np.float32(2.0**-12 + 2.0**-35)
    y = np.float32(2.0**-12 + 2.0**-35)
    exact = Fraction(float(x)) * Fraction(float(y)) + 1
    assert exact > 1 + Fraction(1, 2**24)
    assert float(fused(x, y, c)) == 1 + 2.0**-23
    assert float(fused(a, b, c)) == 1


@pytest.mark.parametrize("how", ROW_SUMS)
@pytest.mark.parametrize("count", [1, 5, 16, 61, 300])
def test_every_order_of_a_row_sum_is_the_sum(how, count):
    x = np.random.default_rng(count).integers(0, 100, (3, count)).astype(np.float32)
    np.testing.assert_array_equal(row_sum(x, how), x.sum(axis=1))


ORDERS = [
    Order(),
    Order(is_fused=False),
    Order("in pairs, halves added to halves"),
    Order("blocks of 8, each added at once to the sum so far", is_cut=False),
    Order("all 64 at once"),
    Order("4 sums of 16 terms (4 apart), each one after the other; then these: one after the other"),
    Order(part=7, has_halves=True),
    Order(part=7, goes_on=True),
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("count", [1, 3, 13, 64])
def test_every_order_of_a_product_is_the_product(order, count):
    rng = np.random.default_rng(count)
    a, b = (rng.integers(-9, 9, shape).astype(np.float32) for shape in ((2, 3, count), (2, count, 5)))
    start = rng.integers(-9, 9, (2, 3, 5)).astype(np.float32)
    np.testing.assert_array_equal(added(a, b, order, start), start + a @ b)
    np.testing.assert_array_equal(added(a, b, order), a @ b)
    assert sum(one.stop - one.start for one in parts_of(count, order)) == count


def test_an_order_within_tiles():
    one = "4 sums of 16 terms (neighbours), each in pairs, halves added to halves; then these: one after the other"
    assert within(one) == ("in pairs, halves added to halves", 16)
    assert within("sums of 16 to 48 neighbours, added one after the other to one sum") == ("one after the other", 48)


@pytest.mark.parametrize("name", EXP)
def test_every_exp_is_exp(name):
    x = -np.abs(np.random.default_rng(0).standard_normal(1000)).astype(np.float32) * 5
    error = EXP[name](x) / np.exp(x.astype(np.float64)) - 1
    assert np.abs(error).max() < (2**-13 if name == "bits" else 2**-21.5)
    assert EXP[name](np.float32([-np.inf, -200])).tolist() == [0, 0]


def test_every_log_is_log():
    x = np.linspace(1, 100, 999).astype(np.float32)
    for log in LOG.values():
        np.testing.assert_allclose(log(x), np.log(x.astype(np.float64)), rtol=3e-7)
    for exp in EXP_2.values():
        np.testing.assert_allclose(exp(-x), np.exp2(-x.astype(np.float64)), rtol=3e-7)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_predicts():
    result = RUNNER.invoke(app, ["fingerprint", "emulator:flash_fp16", "--predict", "8", "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["prediction"]
    assert len(said["inputs"]) == 8  # the first three are small
    assert said["within_one"] == 1
    assert said["assumed"]
    assert PROFILES[json.loads(result.stdout)["profile"]["name"]]


@pytest.mark.slow
def test_the_command_prints_shares_and_what_it_assumed():
    result = RUNNER.invoke(app, ["fingerprint", "emulator:flash_bf16", "--dtype", "bfloat16", "--predict", "2"])
    assert result.exit_code == 0, result.output
    assert "bits predicted from the card alone" in result.output
    assert "all but small ones" in result.output
    assert "assumed, for the card does not tell it: products and sums: fused" in result.output


def test_a_folder_cannot_be_asked_new_inputs(tmp_path):
    result = RUNNER.invoke(app, ["fingerprint", str(tmp_path), str(tmp_path), "--predict", "2"])
    assert result.exit_code == 2
    assert "a folder is not asked" in result.output
