"""Cases of a latent through their files: keys and values that a backend made itself are judged apart from attention."""

import json
from dataclasses import replace

import numpy as np
import pytest
from products import exact, terms
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.crosscheck.backends.compute import checked
from cpjax.crosscheck.backends.spec import Spec
from cpjax.crosscheck.files.case import gaussian_case, latent_case, read_case, write_case
from cpjax.crosscheck.files.latent import Latent
from cpjax.crosscheck.files.result import read_result, write_result
from cpjax.crosscheck.run.compare import compare
from cpjax.crosscheck.run.session import judge_result
from cpjax.errors import InputError
from cpjax.mindie.crosscheck import cases_of

PLAIN = gaussian_case("c", (61, 2, 2, 48, 32), cp=2, precision={}, seed=3, about={})
CASE = latent_case(PLAIN, 64, nope=32, seed=4)
REAL = np.asarray(CASE.kv_tokens.segment) >= 0


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


@pytest.mark.process
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
