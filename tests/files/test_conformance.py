"""The conformance set: the same bytes everywhere, verified when judged, and its diagnostic cases say what is wrong."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.crosscheck.backends.npu import Npu
from cpjax.crosscheck.backends.spec import Spec
from cpjax.crosscheck.conformance.cases import VERSION, conformance_cases, write_conformance
from cpjax.crosscheck.conformance.explain import read
from cpjax.crosscheck.files.case import read_case, write_case
from cpjax.crosscheck.files.folders import read_cases
from cpjax.crosscheck.files.result import Result
from cpjax.crosscheck.judge import judge_problem
from cpjax.crosscheck.run.session import problem_of
from cpjax.dense import dense_attention
from cpjax.errors import InputError
from cpjax.mask import Mask

CHECKSUMS = {2: "8be88d503434d357fd88ca245795b822ec8d5015c46058632a555c496b292e06"}
"""Of `SHA256SUMS`. If this fails although no case was meant to change, users no longer have the same cases; if one was
meant to, raise `VERSION`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "cases"
    assert CliRunner().invoke(app, ["cases", "--preset", "conformance", str(folder)]).exit_code == 0
    return folder


def test_the_bytes_are_those_of_the_version(folder):
    assert hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest() == CHECKSUMS[VERSION]
    files = sorted(folder.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) < 20e6
    kinds = [case.about.get("reading") for case in read_cases(folder)]
    first = kinds.index(None)
    assert first > 10
    assert not any(kinds[first:])


def test_nothing_is_overwritten(folder):
    said = CliRunner().invoke(app, ["cases", str(folder)])
    assert said.exit_code == 2
    assert "nothing is overwritten" in said.stderr
    assert CliRunner().invoke(app, ["cases", "--preset", "other", str(folder / "x")]).exit_code == 2


@pytest.mark.parametrize("change", ["altered", "missing", "extra", "garbled"])
def test_an_altered_set_is_not_judged(tmp_path, change):
    folder = tmp_path / "cases"
    write_conformance(folder)
    path = folder / "20-causal-gqa-cp1.safetensors"
    if change == "altered":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif change == "missing":
        path.unlink()
    elif change == "extra":
        (folder / "x.safetensors").write_bytes(path.read_bytes())
    else:
        (folder / "SHA256SUMS").write_text("nonsense\n")
    said = CliRunner().invoke(app, ["judge", str(folder), str(tmp_path)])
    assert said.exit_code == 2
    with pytest.raises(InputError):
        read_cases(path if change != "missing" else folder)


CASES = {case.name: case for case in conformance_cases()}
CODED = [case for case in CASES.values() if "reading" in case.about]


def exact(case, hidden_shown: int = 0, lost: int | None = None):
    """What a kernel gives that shows the next `hidden_shown` keys too, or has lost one."""
    q = case.q_tokens._replace(position=np.asarray(case.q_tokens.position) + np.int32(hidden_shown))
    kv = case.kv_tokens
    segment = np.array(kv.segment)
    if lost is not None:
        segment[0, lost] = -1
    real = (np.asarray(case.q_tokens.segment) >= 0)[..., None, None]
    query, key, value = (np.where(real, x, 0).astype(np.float64) for x in (case.query, case.key, case.value))
    out, lse = dense_attention(
        query, key, value, q, kv._replace(segment=segment), mask=Mask(is_causal=case.is_causal), scale=case.scale
    )
    return Result("x", "flash_fp16", "ascending", np.asarray(out, np.float16), np.asarray(lse, np.float32), {})


@pytest.mark.parametrize("case", CODED, ids=lambda case: case.name)
def test_a_right_result_is_not_remarked_upon(case):
    assert list(read(case, exact(case))) == []


@pytest.mark.parametrize("case", [case for case in CODED if case.is_causal], ids=lambda case: case.name)
def test_a_mask_that_shows_one_more_key_is_named(case):
    if case.about["reading"] == "one-hot":
        pytest.skip("its queries point at visible keys, so one more key of score 0 changes nothing")
    said = " ".join(read(case, exact(case, hidden_shown=1)))
    if case.about["reading"] == "seen":
        assert "query 0 of head 0 saw 1 of its 1 key, and 1 that it may not see (key 1)" in said
        assert "query 0 of head 0 counted 2 keys, 1 is visible" in said
    else:
        assert "saw what is hidden" in said


@pytest.mark.parametrize(
    "case", [case for case in CODED if case.about["reading"] == "seen"], ids=lambda case: case.name
)
def test_a_lost_key_is_named(case):
    said = list(read(case, exact(case, lost=5)))
    first = 5 if case.is_causal else 0
    count = 6 if case.is_causal else case.key.shape[1]
    assert said[0].startswith(f"out: query {first} of head 0 saw {count - 1} of its {count} keys (not key 5)")
    assert f"lse: query {first} of head 0 counted {count - 1} keys, {count} are visible" in said[1]


def test_exchanged_heads_and_nan_are_seen_and_hostile_files_read_nothing():
    case = CASES["09-seen-causal-mla-cp2"]
    right = exact(case)
    swapped = replace(right, out=right.out[:, :, ::-1])
    assert list(read(case, swapped))
    for name in ("out", "lse"):
        broken = getattr(right, name).copy()
        broken[0, 7] = np.nan
        assert "query 7" in next(iter(read(case, replace(right, **{name: broken}))))
    pointing = CASES["12-one-hot-causal-mla-cp2"]
    turned = replace(exact(pointing), out=np.roll(exact(pointing).out, 1, axis=1))
    assert "it points at key" in next(iter(read(pointing, turned)))
    plain = CASES["28-causal-gqa-cp8"]
    for reading in ("seen", "one-hot", "future", "nonsense", 3, None):
        list(read(replace(plain, about={"reading": reading}), exact(plain)))


# Softcap, sink, window, ALiBi, bias, caches -------------------------------------------------------------------------

ADDED = [case for case in CASES.values() if int(case.name[:2]) >= 42]
OPTIONS = ("softcap", "sink", "window", "alibi", "bias")


def plain(case, ignored=()):
    """A plain NumPy loop, row by row in float64; `ignored` options are left out. Nothing of the project is used."""
    told = {name: None if name in ignored else getattr(case, name) for name in OPTIONS}
    group = case.query.shape[2] // case.key.shape[2]
    out = np.zeros((*case.query.shape[:3], case.value.shape[3]))
    lse = np.full(case.query.shape[:3], -np.inf)
    q_position, q_segment = (np.asarray(x)[0] for x in case.q_tokens)
    kv_position, kv_segment = (np.asarray(x)[0] for x in case.kv_tokens)
    for t, n in np.ndindex(case.query.shape[1:3]):
        distance = q_position[t] - kv_position
        seen = (kv_segment == q_segment[t]) & (distance >= 0)
        if told["window"] is not None:
            seen &= np.abs(distance) < told["window"]
        score = case.key[0, :, n // group].astype(float) @ case.query[0, t, n].astype(float) * case.scale
        if told["softcap"] is not None:
            score = told["softcap"] * np.tanh(score / told["softcap"])
        if told["alibi"] is not None:
            score = score - float(told["alibi"][n]) * np.abs(distance)
        if told["bias"] is not None:
            score = score + told["bias"][0, n, t]
        weight = np.where(seen, np.exp(score), 0.0)
        total = weight.sum() + (0.0 if told["sink"] is None else np.exp(float(told["sink"][n])))
        out[0, t, n] = weight @ case.value[0, :, n // group].astype(float) / total
        lse[0, t, n] = np.log(total)
    return Result("plain", "flash_fp16", "unknown", out.astype(np.float16), lse.astype(np.float32), {})


@pytest.mark.parametrize("case", ADDED, ids=lambda case: case.name)
def test_a_plain_loop_passes_and_whoever_ignores_an_option_does_not(case, tmp_path):
    written = write_case(tmp_path, case)
    again = read_case(tmp_path / f"{case.name}.safetensors")
    assert again.digest == written.digest
    right = plain(again)
    assert judge_problem(problem_of(again, right), right.out, right.lse).passed
    options = [name for name in OPTIONS if getattr(case, name) is not None]
    assert options or case.partition.cp == 4
    for name in options:
        wrong = plain(again, ignored=(name,))
        verdict = judge_problem(problem_of(again, wrong), wrong.out, wrong.lse)
        assert verdict.judgeable, name
        assert not verdict.passed, name


@pytest.fixture(scope="module")
def npu():
    backend = Npu()
    yield backend
    backend._folder.cleanup()


@pytest.mark.parametrize("case", ADDED, ids=lambda case: case.name)
def test_backends_compute_it_or_say_that_they_do_not(case, npu):
    """The specification against the plain loop, by the judge; of the others, what they refuse."""
    lacking = {name for name in ("alibi", "bias") if getattr(case, name) is not None}
    reason = Spec().supports(case)
    if lacking:
        assert all(name in reason for name in lacking)
    else:
        assert reason is None
        result = Spec().run(case)
        assert judge_problem(problem_of(case, result), result.out, result.lse).passed
    # Its operators have none of the options, and in decode take MLA's latent only.
    refused = npu.supports(case)
    assert all(name in refused for name in OPTIONS if getattr(case, name) is not None)


def test_exchanged_key_heads_read_other_tokens():
    """Keys of the other head, values of the right one: v names another token (and GQA's order is seen)."""
    for case in CASES.values():
        if case.about.get("reading") == "one-hot":
            wrong = exact(replace(case, key=case.key[:, :, ::-1]))
            assert any("read key" in said or "no key" in said for said in read(case, wrong)), case.name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"softcap": -1.0}, "softcap"),
        ({"bias": np.zeros((1, 3, 192, 192), np.float32)}, "its N is 3, not 1 or 4"),
        ({"page_ranks": np.zeros((1, 2), np.int32)}, "belongs to layout 'pages:16'"),
        ({"layout": "pages:16"}, "must say tokens of a page"),
        ({"layout": "pages:0", "page_ranks": np.zeros((1, 2), np.int32)}, "page is 0"),
        ({"layout": "pages:16", "page_ranks": np.array([[0, -1, 1]], np.int32)}, "only behind the last page"),
        ({"layout": "pages:16", "page_ranks": np.array([[0, 0]], np.int32)}, "add a rank for every page"),
        ({"layout": "pages:16", "page_ranks": np.array([[0, 7]], np.int32)}, "names rank 7"),
    ],
)
def test_what_no_case_may_have_is_refused(tmp_path, change, says):
    write_case(tmp_path, replace(CASES["20-causal-gqa-cp1"], name="x", **change))
    with pytest.raises(InputError, match=says):
        read_case(tmp_path / "x.safetensors")
