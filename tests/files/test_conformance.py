"""The conformance set: the same bytes everywhere, verified when judged, and its diagnostic cases say what is wrong."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.crosscheck.conformance.cases import VERSION, conformance_cases, write_conformance
from cpjax.crosscheck.conformance.explain import read
from cpjax.crosscheck.files.folders import read_cases
from cpjax.crosscheck.files.result import Result
from cpjax.dense import dense_attention
from cpjax.errors import InputError
from cpjax.mask import Mask

CHECKSUMS = {1: "ded1b0bbd9ecf232a68e784f30e3c2f257c1876bee068c85e62026d711fe8f84"}
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
    kinds = [read_case.about.get("reading") for read_case in read_cases(folder)]
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
