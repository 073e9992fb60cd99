"""A sliding window in a case file: computed and judged, or refused with the reason; never forgotten."""

import json
from dataclasses import replace

import pytest

from cpjax.crosscheck import backends
from cpjax.crosscheck.backends.compute import compute
from cpjax.crosscheck.conformance.cases import conformance_cases
from cpjax.crosscheck.files.case import (
    content_digest,
    gaussian_case,
    read_case,
    read_tensors,
    write_case,
    write_tensors,
)
from cpjax.crosscheck.run.session import judge_result
from cpjax.errors import InputError


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    made = gaussian_case("c", (64, 2, 2, 192, 128), cp=2, precision={}, seed=3, about={})
    return write_case(tmp_path_factory.mktemp("cases"), replace(made, window=9))


def test_it_is_read_again_and_a_case_without_one_has_none(case, tmp_path):
    write_case(tmp_path, case)
    assert read_case(tmp_path / "c.safetensors").window == 9
    plain = write_case(tmp_path / "plain", replace(case, window=None))
    assert read_case(tmp_path / "plain" / "c.safetensors").window is None
    assert "window" not in read_tensors(tmp_path / "plain" / "c.safetensors")[2]["case"]
    assert plain.digest != case.digest


@pytest.mark.parametrize("window", [0, -1, True, 2.5, "9", 2**40])
def test_what_is_no_window_is_refused(case, tmp_path, window):
    write_case(tmp_path / "good", case)
    tensors, dtypes, metadata = read_tensors(tmp_path / "good" / "c.safetensors")
    text = json.dumps(json.loads(metadata["case"]) | {"window": window})
    write_tensors(
        tmp_path / "c.safetensors", tensors,
        metadata | {"case": text, "digest": content_digest(text, tensors, dtypes)},
    )  # fmt: skip
    with pytest.raises(InputError, match="window"):
        read_case(tmp_path / "c.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spec", "sdpa"])
def test_it_is_computed_and_one_that_is_forgotten_is_named(case, tmp_path, name):
    pytest.importorskip("torch", reason="the backend sdpa is PyTorch")
    backend = backends.load(name)
    compute(name, backend, [case], tmp_path / name)
    assert judge_result(case, tmp_path / name / "c.safetensors", draw=True).outcome == "pass"

    class Forgets:
        def supports(self, case):
            return None

        def run(self, case):
            return backend.run(replace(case, window=None))

    compute("forgets", Forgets(), [case], tmp_path / "forgets")
    judged = judge_result(case, tmp_path / "forgets" / "c.safetensors")
    assert judged.outcome == "fail"
    assert judged.verdict is not None
    assert "the window was not applied" in judged.verdict.diagnosis[0]


def test_the_npu_backend_refuses_it(case, tmp_path):
    pytest.importorskip("torch", reason="npu_backend is PyTorch")
    from npu_backend import files
    from npu_backend.errors import InputError as Refused

    npu = backends.load("npu")
    reason = npu.supports(case)
    npu._folder.cleanup()  # type: ignore[attr-defined]
    assert reason is not None
    assert "window; its operators are called without" in reason
    write_case(tmp_path, case)
    with pytest.raises(Refused, match="window is 9"):
        files.read_case(tmp_path / "c.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["36-packed-gqa-cp2", "37-prefix-gqa-cp2"])
def test_packs_have_windows_too(tmp_path, name):
    """Each request by its own positions, its prefix with it."""
    (made,) = [case for case in conformance_cases() if case.name == name]
    made = write_case(tmp_path / "cases", replace(made, window=9))
    compute("spec", backends.load("spec"), [made], tmp_path / "spec")
    judged = judge_result(made, tmp_path / "spec" / f"{name}.safetensors")
    assert judged.outcome == "pass", judged.reasons
