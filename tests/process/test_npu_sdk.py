"""The real torch_npu without an NPU: the vendor's dispatcher runs our kernels; other versions are read as files.

What needs the network or a compiler is skipped where they are missing, loudly; with CI=true it fails.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import npu_backend
from npu_backend.errors import InputError
from npu_backend.schemas import SCHEMAS
from npu_backend.sdk import cann, wheel
from npu_backend.sdk.signatures import arguments, differences, normal, signatures

pytestmark = pytest.mark.wheel
ROOT = Path(npu_backend.__file__).parents[1]
CACHE = ROOT / "build" / "sdk"
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
OLDER, NEWER = "2.8.0", "2.14.0"
_NO_DTYPES = ["without quant_scale_p", "without out_dtype"]
_NO_SEEDS = ["without sink", "without dropout_mask", "without seed", "without offset"]
KNOWN_DIFFERENCES = {  # docs/operators.md, "Versions"; operators that are not named are the same
    OLDER: {
        "npu_gather_pa_kv_cache": ["not declared"],
        "npu_gather_pa_kv_cache_functional": ["not declared"],
        "npu_fused_infer_attention_score_v2": _NO_DTYPES,
        "npu_fused_infer_attention_score_v2.out": _NO_DTYPES,
        "_npu_fused_infer_attention_score_v2_get_max_workspace": _NO_DTYPES,
        "npu_fusion_attention": _NO_SEEDS,
        "npu_fusion_attention_grad": ["without sink"],
        "npu_fusion_attention_v2": ["without softmax_layout", *_NO_SEEDS],
        "npu_fusion_attention_grad_v2": ["without softmax_layout", "without sink"],
        "npu_fusion_attention_v3": ["not declared"],
        "npu_fusion_attention_grad_v3": ["not declared"],
        "npu_ring_attention_update": ["not declared"],
        "npu_kv_rmsnorm_rope_cache": ["without v"],
        "npu_quantize": ["dtype is ScalarType, not int"],
        "npu_dynamic_quant": [
            *("without quant_mode", "without dst_type_max"),
            "dst_type is ScalarType?, not int?",
        ],
        "npu_quant_matmul": [
            *("without x1_dtype", "without x2_dtype", "without pertoken_scale_dtype", "without scale_dtype"),
            *("without y_scale", "output_dtype is ScalarType?, not int?", "group_sizes is SymInt[]?, not int[]?"),
        ],
        "npu_moe_gating_top_k": ["without input_ids", "without tid2eid"],
        "npu_moe_init_routing_v2": ["without x_dtype"],
        "npu_grouped_matmul": [
            *("without x_dtype", "without weight_dtype", "without scale_dtype", "without per_token_scale_dtype"),
            "output_dtype is ScalarType?, not int?",
        ],
        "npu_moe_finalize_routing": ["without k"],
    },
    NEWER: {},
}


def have(what):
    """The result of `what()`, of which only one process at a time does the work."""
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(CACHE / "lock"):
            return what()
    except InputError as error:
        message = f"NOT TESTED against the real torch_npu: {error}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="session")
def environment():
    """In which a process imports the real torch_npu."""
    return have(lambda: wheel.install(CACHE / f"torch_npu-{wheel.VERSION}-{PYTHON}"))


def test_the_vendors_dispatcher_runs_our_kernels(environment):
    command = [sys.executable, "-m", "pytest", "tests/helpers/under_torch_npu.py", "-q", "-n", "0", "--noconftest"]
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default"]
    run = subprocess.run(
        [*command, *options], cwd=ROOT, env=with_root(environment), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 60
    assert "skipped" not in run.stdout


def with_root(environment):
    """Options of the run that this test is part of are not the options of one that it starts."""
    path = os.pathsep.join([str(ROOT), environment["PYTHONPATH"]])
    return environment | {"PYTHONPATH": path, "PYTEST_ADDOPTS": ""}


def test_torch_npu_without_cann_is_broken_and_npu_backend_says_so(environment):
    """The stand-ins are needed: this is what a user without CANN sees."""
    without = with_root(environment) | {"LD_LIBRARY_PATH": ""}
    code = "import npu_backend; print(npu_backend.vendor.TORCH_NPU_PROBLEM)"
    run = subprocess.run([sys.executable, "-c", code], env=without, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(r"cannot be imported: lib\w+\.so", run.stdout)


def test_stand_ins_are_functions_that_return_zero(environment):
    folder = Path(environment["LD_LIBRARY_PATH"].split(os.pathsep)[0])
    libraries = {path.name: cann.read_library(path) for path in folder.glob("*.so")}
    assert {"libascendcl.so", "libhccl.so", "libatb.so"} <= set(libraries)
    symbols = set().union(*(library.defined for library in libraries.values()))
    assert {"aclInit", "aclrtMalloc"} <= symbols
    assert 50 < len(symbols) < 300


@pytest.mark.parametrize("version", [OLDER, NEWER])
def test_signatures_of_other_versions(version):
    path = have(lambda: wheel.download(CACHE, version))
    found = signatures(path)
    for schema in SCHEMAS:
        name = schema.partition("::")[2].partition("(")[0]
        if name == "npu_paged_cache_load.out" and name not in found:
            continue  # newer compilers keep this literal in pieces; its header has no overload names
        theirs = differences(schema, found[name]) if name in found else ["not declared"]
        assert theirs == KNOWN_DIFFERENCES[version].get(name, []), name


# --- the tool itself, without a network


def test_signatures_are_read_from_literals_and_from_the_header(tmp_path):
    import zipfile

    literal = b"npu_attention_update(Tensor[] lse, Tensor[] local_out, int update_type) -> (Tensor, Tensor)"
    header = "std::tuple<at::Tensor, at::Tensor> npu_paged_cache_load(const at::Tensor&key_cache, bool cumsum);"
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("torch_npu/lib/libtorch_npu.so", b"\x7fELF junk\0" + literal + b"\0more")
        file.writestr("torch_npu/include/AtbOpsInterface.h", header)
    assert signatures(path) == {
        "npu_attention_update": literal.decode(),
        "npu_paged_cache_load": "npu_paged_cache_load(Tensor key_cache, bool cumsum) -> (Tensor, Tensor)",
    }


def test_differences_name_what_is_missing_new_moved_or_of_another_type():
    ours = 'x(Tensor a, int b=1, str c="BSH") -> Tensor'
    assert differences(ours, ours) == []
    assert differences(ours, 'x(Tensor a, str c="BSH") -> Tensor') == ["without b"]
    assert differences(ours, 'x(Tensor a, int b=1, str c="BSH", int d=0) -> Tensor') == ["with d"]
    assert differences(ours, 'x(Tensor? a, int b=1, str c="BSH") -> Tensor') == ["a is Tensor?, not Tensor"]
    assert differences(ours, "x(int b, Tensor a, str c) -> Tensor") == ["in another order"]
    assert arguments("x(Tensor a, *, SymInt[]? b=None) -> Tensor") == {"a": "Tensor", "b": "SymInt[]?"}
    assert normal("npu::x(float scale=1, float y=2.0) -> Tensor") == "x(float scale=1., float y=2.) -> Tensor"


def test_install_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(InputError, match="neither empty nor a finished installation"):
        wheel.install(tmp_path)
    assert (tmp_path / "mine").exists()


def test_install_says_that_there_is_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no C compiler"):
        wheel.install(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_install_says_that_a_wheel_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"pip cannot install torch_npu==2\.13\.0"):
        wheel.install(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_ci", ["true", ""])
def test_what_is_missing_is_skipped_loudly_and_fails_in_ci(monkeypatch, is_ci):
    def fail():
        raise InputError("no C compiler")

    monkeypatch.setenv("CI", is_ci)
    expected = pytest.fail.Exception if is_ci else pytest.skip.Exception
    with pytest.raises(expected, match="NOT TESTED against the real torch_npu: no C compiler"):
        have(fail)


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["signatures", "no.whl"], 2), (["install", "."], 2)]
)
def test_the_command(arguments, status):
    command = [sys.executable, "-m", "npu_backend.sdk", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == status, run.stderr
    assert ("examples:" in run.stdout) == (status == 0)
    assert ("error: " in run.stderr) == (status == 2)
