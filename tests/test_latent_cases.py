"""Cases of a latent: keys and values that a backend made itself are judged, number by number, apart from attention."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from strategies import examples
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.crosscheck.backends.compute import checked
from cpjax.crosscheck.backends.spec import Spec
from cpjax.crosscheck.files.case import gaussian_case, latent_case, read_case, write_case
from cpjax.crosscheck.files.latent import Latent, expanded
from cpjax.crosscheck.files.result import read_result, write_result
from cpjax.crosscheck.judging.expansion import check_expanded
from cpjax.crosscheck.run.compare import compare
from cpjax.crosscheck.run.session import judge_result
from cpjax.errors import InputError
from cpjax.mindie.crosscheck import cases_of

PLAIN = gaussian_case("c", (61, 2, 2, 48, 32), cp=2, precision={}, seed=3, about={})
CASE = latent_case(PLAIN, 64, nope=32, seed=4)
REAL = np.asarray(CASE.kv_tokens.segment) >= 0


def latent(rng, width, batch=2, tokens=6, heads=3, dims=(5, 2, 4)) -> Latent:
    nope, rope, value_dim = dims
    shapes = (batch, tokens, width), (batch, tokens, rope), (width, heads, nope), (width, heads, value_dim)
    return Latent(*(rng.normal(size=x).astype(np.float16) for x in shapes))


def made(x: Latent, product) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values by `product(c_kv, weight) -> float16`."""
    key, value = product(x.c_kv, x.w_uk), product(x.c_kv, x.w_uv)
    rope = np.broadcast_to(x.k_rope[:, :, None], (*key.shape[:3], x.k_rope.shape[2]))
    return np.concatenate([key, rope], axis=3), value


def terms(c_kv, weight) -> np.ndarray:
    """`[C, B, S, N, D]` float32; exact."""
    return np.einsum("bsc,cnd->cbsnd", c_kv.astype(np.float32), weight.astype(np.float32))


@examples(0.5)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from((1, 2, 7, 64, 300)), st.sampled_from(("forwards", "shuffled", "pairs"))
)
def test_float32_sums_in_any_order_are_right(seed, width, how):
    rng = np.random.default_rng(seed)
    x = latent(rng, width)

    def product(c_kv, weight):
        summands = terms(c_kv, weight)
        if how == "shuffled":
            summands = rng.permutation(summands)
        if how == "pairs":
            return summands.sum(axis=0, dtype=np.float32).astype(np.float16)
        total = np.zeros(summands.shape[1:], np.float32)
        for summand in summands:
            total += summand
        return total.astype(np.float16)

    found = check_expanded(x, *made(x, product), np.ones((2, 6), bool))
    assert found.reasons == []
    assert found.differing < 0.1


def truncated(x):
    """Towards zero, to float16."""
    near = x.astype(np.float16)
    return np.where(np.abs(near.astype(x.dtype)) > np.abs(x), np.nextafter(near, np.float16(0)), near).astype(
        np.float16
    )


def in_float16(c_kv, weight):
    total = np.zeros(terms(c_kv, weight).shape[1:], np.float16)
    for summand in terms(c_kv, weight):
        total = (total + summand.astype(np.float16)).astype(np.float16)
    return total


def exact(c_kv, weight):
    return np.einsum("bsc,cnd->bsnd", c_kv.astype(np.float64), weight.astype(np.float64))


def as_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


WRONG_PRODUCTS = {
    "truncated": lambda c, w: truncated(exact(c, w)),
    "summed in float16": in_float16,
    "weights in bfloat16": lambda c, w: exact(c, as_bfloat16(w)).astype(np.float16),
    "result in bfloat16": lambda c, w: as_bfloat16(exact(c, w)).astype(np.float16),
    "one term lost": lambda c, w: exact(c[..., 1:], w[1:]).astype(np.float16),
    "heads exchanged": lambda c, w: exact(c, w[:, ::-1]).astype(np.float16),
    "tokens exchanged": lambda c, w: exact(c[:, ::-1], w).astype(np.float16),
    "of the batch's other row": lambda c, w: exact(c[::-1], w).astype(np.float16),
    "one number lost": lambda c, w: _with(exact(c, w).astype(np.float16), np.float16(0)),
    "one NaN": lambda c, w: _with(exact(c, w).astype(np.float16), np.float16(np.nan)),
}


def _with(x, number):
    x[1, 3, 2, 1] = number
    return x


@pytest.mark.parametrize("fault", WRONG_PRODUCTS)
@pytest.mark.parametrize("width", [64, 512])
@examples(0.1)
@given(seed=st.integers(0, 2**32 - 1))
def test_another_product_is_named(fault, width, seed):
    x = latent(np.random.default_rng(seed), width, tokens=20, heads=3, dims=(32, 2, 32))
    found = check_expanded(x, *made(x, WRONG_PRODUCTS[fault]), np.ones((2, 20), bool))
    assert [reason.split(":")[0] for reason in found.reasons] == ["key", "value"]
    assert "c_kv·W_UK" in found.reasons[0]
    if fault in ("one number lost", "one NaN"):
        assert "1 of 3,840 numbers" in found.reasons[0]
        assert "batch 1, token 3, head 2, dim 1: " in found.reasons[0]


def others(x: Latent, product: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Of each product the other FP16 number that float32 sums could make of it, where there is one."""
    exact_product, near = exact(x.c_kv, weight), product
    room = (weight.shape[0] - 1) * 2.0**-24 * np.abs(terms(x.c_kv, weight)).astype(np.float64).sum(axis=0)
    low, high = ((exact_product + sign * room).astype(np.float16) for sign in (-1, 1))
    return np.where(low != near, low, high)


@pytest.mark.parametrize("where", ["in all", "of head 1", "of tokens 512 to 1023"])
def test_too_many_neighbours_are_named(where):
    """Each of them alone is possible, so many are not: in one head, in some tokens, everywhere."""
    x = latent(np.random.default_rng(3), 256, batch=1, tokens=1200, heads=3, dims=(8, 2, 8))
    key, value = expanded(x)
    wrong = others(x, value, x.w_uv)
    share = (wrong != value).mean()
    assert 0.5 < share < 1
    at = {"in all": (), "of head 1": np.s_[:, :, 1], "of tokens 512 to 1023": np.s_[:, 512:1024]}[where]
    value[at] = wrong[at]
    (reason,) = check_expanded(x, key, value, np.ones((1, 1200), bool)).reasons
    assert reason.startswith("value: ")
    assert f" numbers {where} are not the FP16 number next to the product, where float32 sums explain " in reason


def test_as_many_neighbours_as_sums_explain_are_right():
    """The limit is Σq; what lies nearest to a middle comes out otherwise first."""
    x = latent(np.random.default_rng(3), 256, batch=1, tokens=300, heads=1, dims=(8, 2, 8))
    key, value = expanded(x)
    wrong, product = others(x, value, x.w_uv), exact(x.c_kv, x.w_uv)
    size = np.abs(terms(x.c_kv, x.w_uv)).astype(np.float64).sum(axis=0)
    spacing = np.spacing(np.abs(value)).astype(np.float64)
    explained = np.minimum(1, 16 * 2.0**-24 * size / spacing).sum()
    nearest = np.argsort(np.abs(np.abs(product - value) / spacing - 0.5), axis=None)
    for share, count in ((0.9, 0), (1.6, 1)):
        some = value.copy()
        at = np.unravel_index(nearest[: int(share * explained)], value.shape)
        some[at] = wrong[at]
        assert len(check_expanded(x, key, some, np.ones((1, 300), bool)).reasons) == count


def test_one_term_is_exact_and_two_are_off_by_their_last_place():
    a, b = np.float16(1 + 2.0**-5), np.float16(1 + 2.0**-6)  # a·b = 1 + 2^-5 + 2^-6 + 2^-11: in the middle
    product = float(a) * float(b)
    even, odd = np.float16(product), np.nextafter(np.float16(product), np.float16(2))
    single = Latent(np.full((1, 1, 1), a), np.zeros((1, 1, 1), np.float16), *(np.full((1, 1, 1), b),) * 2)
    rope = np.zeros((1, 1, 1, 1), np.float16)

    def reasons(x, number):
        given = np.full((1, 1, 1, 1), number)
        return check_expanded(x, np.concatenate([given, rope], axis=3), given, np.ones((1, 1), bool)).reasons

    assert reasons(single, even) == []
    assert len(reasons(single, odd)) == 2  # no sum, so nothing can be off
    # A second term takes the sum below the middle: by less than a last place of float32, or by more.
    for power, count in ((-24, 0), (-22, 2)):
        c_kv = np.array([[[a, 2.0**-12]]], np.float16)
        w = np.array([b, -(2.0 ** (power + 12))], np.float16).reshape(2, 1, 1)
        assert len(reasons(Latent(c_kv, single.k_rope, w, w), odd)) == count


def test_equal_tokens_differ_together():
    """One sum that float32 gets otherwise is got otherwise in every token that has the same latent: that is one."""
    rng = np.random.default_rng(3)
    row = latent(rng, 256, batch=1, tokens=1, heads=1, dims=(8, 2, 8))
    x = replace(row, c_kv=np.repeat(row.c_kv, 2000, axis=1), k_rope=np.repeat(row.k_rope, 2000, axis=1))
    key, value = expanded(x)
    wrong = others(x, value, x.w_uv)
    assert (wrong != value)[..., :6].sum() > 4000
    value[..., :6] = wrong[..., :6]
    assert check_expanded(x, key, value, np.ones((1, 2000), bool)).reasons == []


def test_a_rotary_part_of_another_token_is_named_and_pads_are_not_looked_at():
    x = latent(np.random.default_rng(0), 16)
    key, value = expanded(x)
    assert check_expanded(x, key, value, np.ones((2, 6), bool)) == ([], 0.0)
    moved = key.copy()
    moved[1, 2, 1, 5:] = key[1, 3, 1, 5:]
    found = check_expanded(x, moved, value, np.ones((2, 6), bool))
    assert found.reasons == ["key: the last 2 of 1 keys are not k_rope, the first at batch 1, token 2, head 1"]
    seen = np.ones((2, 6), bool)
    seen[1, 2] = False
    value[1, 2] = np.nan
    for hidden in (np.nan, np.inf):
        x.c_kv[1, 2], x.k_rope[1, 2] = hidden, hidden
        assert check_expanded(x, moved, value, seen) == ([], 0.0)
        assert np.isfinite(expanded(x)[1][seen]).all()


# Through files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given_case(tmp_path_factory):
    """The case as it is read again, and the specification's result."""
    folder = tmp_path_factory.mktemp("cases")
    write_case(folder, CASE)
    case = read_case(folder / "c.safetensors")
    return case, checked(Spec().run(case), case)


def judged(folder, case, result):
    (folder / "results").mkdir(exist_ok=True)
    return judge_result(case, write_result(folder / "results", case, result))


def test_a_case_is_read_as_it_was_written(given_case):
    case, _ = given_case
    for name in ("query", "key", "value"):
        np.testing.assert_array_equal(getattr(case, name), getattr(CASE, name))
    for name, x in vars(CASE.latent).items():
        np.testing.assert_array_equal(getattr(case.latent, name), x)
    assert np.abs(np.std(case.key.astype(float)) - 1) < 0.1


def test_a_result_may_say_nothing_of_keys_or_state_its_own(given_case, tmp_path):
    case, result = given_case
    said = judged(tmp_path, case, result)
    assert said.passed, said.reasons
    assert said.remarks == ()
    stated = replace(result, key_value=(case.key, case.value))
    (tmp_path / "again").mkdir()
    said = judged(tmp_path / "again", case, stated)
    assert said.passed, said.reasons
    assert said.remarks == ("0.00% of its keys and values are not the FP16 number next to the exact product",)
    back = read_result(tmp_path / "again" / "results" / "c.safetensors", case)
    for mine, right in zip(back.key_value, (case.key, case.value), strict=True):
        np.testing.assert_array_equal(mine, right)


def neighbours(case):
    """Keys and values whose sums are off by what float32 does."""
    rng = np.random.default_rng(1)
    x = case.latent
    sums = [exact(x.c_kv, w) for w in (x.w_uk, x.w_uv)]
    spread = [np.sqrt(64) * 2.0**-24 * np.abs(terms(x.c_kv, w)).sum(0) for w in (x.w_uk, x.w_uv)]
    key, value = ((s + rng.normal(size=s.shape) * e / 4).astype(np.float16) for s, e in zip(sums, spread, strict=True))
    rope = np.broadcast_to(x.k_rope[:, :, None], (*key.shape[:3], x.k_rope.shape[2]))
    return np.concatenate([key, rope], axis=3), value


def test_attention_is_judged_on_the_keys_that_were_used(given_case, tmp_path):
    """Neighbours are right, and results of different neighbours agree with each other."""
    case, result = given_case
    own = neighbours(case)
    assert 0 < (own[0] != case.key).mean() < 0.01
    with_own = replace(Spec().run(replace(case, key=own[0], value=own[1])), key_value=own)
    path = judged(tmp_path, case, with_own)
    said = judge_result(case, tmp_path / "results" / "c.safetensors", draw=True)
    assert path.passed
    assert said.passed, said.reasons
    assert said.shown is not None
    found = compare(case, result, with_own)
    assert found.agrees
    assert found.lse_z < 0.5  # 1.3 if both were taken to have the same keys


def test_wrong_keys_and_wrong_attention_are_told_apart(given_case, tmp_path):
    case, result = given_case
    swapped = (case.key[:, :, ::-1], case.value[:, :, ::-1])
    right_on_wrong = replace(Spec().run(replace(case, key=swapped[0], value=swapped[1])), key_value=swapped)
    said = judged(tmp_path, case, right_on_wrong)
    assert said.verdict.failed_tests == ("expansion",)
    assert said.outcome == "fail"
    assert "c_kv·W_UK" in said.reasons[0]
    (tmp_path / "b").mkdir()
    said = judged(
        tmp_path / "b", case, replace(result, out=result.out[:, ::-1].copy(), key_value=(case.key, case.value))
    )
    assert not said.passed
    assert "expansion" not in said.verdict.failed_tests


def test_keys_that_are_no_numbers_fail(given_case, tmp_path):
    case, result = given_case
    key = case.key.copy()
    key[0, 5, 1, 3] = np.nan
    judged(tmp_path, case, replace(result, key_value=(key, case.value)))
    said = judge_result(case, tmp_path / "results" / "c.safetensors", draw=True)
    assert said.outcome == "fail"
    assert said.verdict.failed_tests == ("expansion", "form")
    assert "nan instead of" in said.reasons[0]
    assert said.shown is None


def test_a_product_beyond_the_range_fails_with_a_reason(tmp_path):
    """65,519.9987 is next to 65,504, but a float32 sum of it may be 65,520, which is infinite."""
    case = write_case(tmp_path, replace(CASE, latent=_beyond()))
    case = read_case(tmp_path / "c.safetensors")
    result = checked(Spec().run(case), case)
    key = case.key.copy()
    key[..., :32] = np.where(key[..., :32] == 65504, np.float16(np.inf), key[..., :32])
    assert np.isinf(key).any()
    said = judged(tmp_path, case, replace(result, key_value=(key, case.value)))
    assert said.outcome == "fail"
    assert said.reasons == ["its keys or values are infinite: the product leaves what FP16 can hold"]


def _beyond() -> Latent:
    c_kv, w_uk = np.zeros_like(CASE.latent.c_kv), np.zeros_like(CASE.latent.w_uk)
    c_kv[..., :3], w_uk[:3, 0, 0] = np.array([65504, 1, 1], np.float16), np.array([1, 16, -(2.0**-10)], np.float16)
    return replace(CASE.latent, c_kv=c_kv, w_uk=w_uk)


@pytest.mark.parametrize(
    ("edit", "rule"),
    [
        (lambda x: x.pop("value"), "'value' is missing; it must be F16"),
        (
            lambda x: x.update(key=x["key"][:, :8].copy()),
            r"'key' is F16 \[1, 8, 2, 48\]; it must be F16 \[1, 64, 2, 48\]",
        ),
        (lambda x: x.update(value=x["value"].astype(np.float32)), "'value' is F32"),
    ],
)
def test_other_forms_are_errors(given_case, tmp_path, edit, rule):
    case, result = given_case
    path = write_result(tmp_path, case, replace(result, key_value=(case.key, case.value)))
    tensors = load_file(path)
    edit(tensors)
    _save_like(path, tensors)
    with pytest.raises(InputError, match=rule):
        read_result(path, case)


def _save_like(path, tensors):
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


def test_keys_of_a_case_that_gives_them_itself_are_errors(tmp_path):
    case = write_case(tmp_path, PLAIN)
    result = replace(Spec().run(case), key_value=(case.key, case.value))
    with pytest.raises(ValueError, match="the case gives keys and values itself"):
        checked(result, case)
    latent_case = replace(case, latent=CASE.latent)
    for made, error in (
        ((case.key[:, :5], case.value), "key is float16"),
        ((case.key, case.value.astype(np.float32)), "value is float32"),
    ):
        with pytest.raises(ValueError, match=error):
            checked(replace(result, key_value=made), latent_case)
    (tmp_path / "results").mkdir()
    with pytest.raises(InputError, match="the case gives keys and values itself"):
        read_result(write_result(tmp_path / "results", case, result), case)


def test_the_command_computes_a_deployments_latent(tmp_path):
    arguments = ["--latent", "--geometry", "16,128,64,128", "--tokens", "45", "--keep", str(tmp_path / "kept")]
    said = CliRunner().invoke(app, ["crosscheck", *arguments, "--json"])
    assert said.exit_code == 0, said.stderr
    report = json.loads(said.stdout)
    assert report["passed"]
    case = read_case(tmp_path / "kept" / "cases" / "deepseek-r1-cp2-45-latent.safetensors")
    x = case.latent
    assert [y.shape for y in vars(x).values()] == [(1, 48, 512), (1, 48, 64), (512, 2, 128), (512, 2, 128)]
    assert case.about["latent"] == {"width": 512, "seed": 1}
    of = {row["backend"]: row for row in report["results"]}
    assert "not the FP16 number next to the exact product" in of["npu"]["remarks"][0]
    assert report["between"][0]["agrees"]


def test_each_share_of_the_heads_has_a_latent_of_its_own():
    cases, _ = cases_of(None, tokens=40, shares=2, latent=True)
    one, two = (case.latent for case in cases)
    assert not np.array_equal(one.c_kv, two.c_kv)
    assert not np.array_equal(one.w_uk, two.w_uk)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--geometry", "16,128,0,128"], "the geometry has no rotary part"),
        (["--cases", "cases"], "--cases says all; leave out"),
    ],
)
def test_what_does_not_go_with_a_latent_is_refused(arguments, rule):
    said = CliRunner().invoke(app, ["crosscheck", "--latent", *arguments])
    assert said.exit_code == 2
    assert rule in said.stderr
