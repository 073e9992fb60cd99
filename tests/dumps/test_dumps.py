"""Dumps of other tools: read in every format, and nothing that is malformed is executed, followed or unpacked."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save as safetensors_bytes
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.partition import Zigzag
from cpjax.trial.emulators import PROFILES, attend
from cpjax.trial.localise import problem

torch = pytest.importorskip("torch", reason="torch .pt files need PyTorch")


@pytest.fixture
def arrays():
    p = problem(0, cp=2, is_causal=True, logits=1.0, heads=2)
    out, lse = attend(p, PROFILES["flash_fp16"], "ring")
    return {"query": p.query, "key": p.key, "value": p.value, "out": out, "lse": lse}


def run(files, *more, cp=2, causal="--causal"):
    names = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    return CliRunner().invoke(app, ["judge-dump", *names, "--scale", str(32**-0.5), causal, "--cp", str(cp), *more])


def saved(folder, arrays, fmt):
    files = {}
    for name, x in arrays.items():
        files[name] = folder / f"{name}.{fmt}"
        if fmt == "npy":
            np.save(files[name], x)
        elif fmt == "npz":
            np.savez_compressed(files[name], x)
        elif fmt == "safetensors":
            save_file({"x": np.ascontiguousarray(x)}, files[name])
        else:
            torch.save(torch.from_numpy(x), files[name])
    return files


@pytest.mark.parametrize("fmt", ["npy", "npz", "safetensors", "pt"])
def test_every_format_is_read_and_the_order_found(tmp_path, arrays, fmt):
    said = run(saved(tmp_path, arrays, fmt))
    assert said.exit_code == 0, said.output
    assert "agrees" in said.output


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bsnd", "bnsd", "tnd"])
def test_layouts_are_found_by_trying(tmp_path, arrays, layout):
    change = {"bsnd": lambda x: x, "bnsd": lambda x: x.swapaxes(1, 2), "tnd": lambda x: x[0]}[layout]
    said = run(saved(tmp_path, {name: np.ascontiguousarray(change(x)) for name, x in arrays.items()}, "npy"))
    assert said.exit_code == 0, said.output
    assert f"taken as {layout}" in said.output


@pytest.mark.slow
def test_ranks_are_joined_and_a_swapped_rank_is_wrong(tmp_path, arrays):
    rows = Zigzag(2).order(arrays["query"].shape[1]).reshape(2, -1)
    files = {}
    for name, x in arrays.items():
        files[name] = tmp_path / name
        for rank in range(2):
            (files[name] / f"rank{rank}").mkdir(parents=True)
            np.save(files[name] / f"rank{rank}" / "x.npy", x[:, rows[rank]])
    assert run(files).exit_code == 0
    a, b, c = (tmp_path / "out" / name for name in ("rank0", "rank1", "c"))
    a.rename(c)
    b.rename(a)
    c.rename(b)
    said = run(files, "--layout-of", "bsnd")
    assert said.exit_code == 2
    assert "say --partition" in said.output
    said = run(files, "--layout-of", "bsnd", "--partition", "zigzag")
    assert said.exit_code == 1
    assert "exchanged" in said.output


def test_query_and_key_in_two_parts(tmp_path, arrays):
    files = saved(tmp_path, {name: arrays[name] for name in ("value", "out", "lse")}, "npy")
    words = []
    for name in ("query", "key"):
        for part, x in (("nope", arrays[name][..., :24]), ("rope", arrays[name][..., 24:])):
            np.save(tmp_path / f"{name}_{part}.npy", x)
            words += [f"--{name}", str(tmp_path / f"{name}_{part}.npy")]
    assert run(files, *words).exit_code == 0


@pytest.mark.slow
def test_what_is_wrong_is_diagnosed(tmp_path, arrays):
    arrays["lse"] = arrays["lse"] / np.float32(np.log(2))
    said = run(saved(tmp_path, arrays, "npy"), "--order", "ring", "--lse-base", "e")
    assert said.exit_code == 1
    assert "base two" in " ".join(said.output.split())


class Code:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def npy_with_header(shape, descr="<f2"):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def bomb():
    """Sixteen gibibytes claimed in a member of a few bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy_with_header("(1048576, 16384)") + bytes(10**6))
    return buffer.getvalue()


def torch_bytes(what):
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


def zipped(name=None, content=b""):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        if name is not None:
            archive.writestr(name, content)
    return buffer.getvalue()


def malformed(tmp_path):
    """name → (file name, content)."""
    trap = tmp_path / "executed"
    objects = io.BytesIO()
    np.save(objects, np.array([Code(trap)], object), allow_pickle=True)
    plain = torch_bytes(torch.zeros(1, 64, 2, 32))
    whole = {"npy": io.BytesIO(), "npz": io.BytesIO()}
    np.save(whole["npy"], np.zeros((1, 64, 2, 32), np.float16))
    np.savez(whole["npz"], np.zeros((1, 64, 2, 32), np.float16))
    objects_in_zip = io.BytesIO()
    np.savez(objects_in_zip, np.array([Code(trap)], object))
    tensors = safetensors_bytes({"x": np.zeros((1, 64, 2, 32), np.float16)})
    return {
        "zip bomb": ("x.npz", bomb()),
        "not a zip": ("x.npz", b"PK\x03\x04 nothing"),
        "objects": ("x.npy", objects.getvalue()),
        "pickle as npy": ("x.npy", pickle.dumps(Code(trap))),
        "huge header": ("x.npy", npy_with_header("(9223372036854775807, 4, 4, 4)")),
        "open header": ("x.npy", npy_with_header("(1, 64, 2, 32)").replace(b"}", b" ")),
        "negative": ("x.npy", npy_with_header("(-1, 4, 4, 4)")),
        "code in header": ("x.npy", npy_with_header(f"__import__('os').mkdir('{trap}')")),
        "empty": ("x.npy", b""),
        "truncated": ("x.npy", npy_with_header("(1, 64, 2, 32)") + bytes(100)),
        "strings": ("x.npy", npy_with_header("(1, 1, 1, 1)", "<U4") + bytes(16)),
        "torch code": ("x.pt", torch_bytes(Code(trap))),
        "pickle as torch": ("x.pt", pickle.dumps(Code(trap))),
        "safetensors header": ("x.safetensors", struct.pack("<Q", 2**60) + b"{}"),
        "suffix": ("x.pkl", pickle.dumps(Code(trap))),
        "objects in a zip": ("x.npz", objects_in_zip.getvalue()),
        "huge header in a zip": ("x.npz", zipped("x.npy", npy_with_header("(9223372036854775807, 4)"))),
        "nothing in a zip": ("x.npz", zipped()),
        "no array in a zip": ("x.npz", zipped("x.npy", b"no array")),
        "code beside a tensor": ("x.pt", torch_bytes({"x": torch.zeros(1, 64, 2, 32), "y": Code(trap)})),
        "sparse": ("x.pt", torch_bytes(torch.eye(4).to_sparse())),
        "float8": ("x.pt", torch_bytes(torch.zeros(1, 64, 2, 32).to(torch.float8_e4m3fn))),
        "nowhere": ("x.pt", torch_bytes(torch.zeros(1, 64, 2, 32, device="meta"))),
        "no tensor": ("x.pt", torch_bytes({})),
        "truncated torch": ("x.pt", plain[:-300]),
        "half a torch file": ("x.pt", plain[: len(plain) // 2]),
        "half a npy": ("x.npy", whole["npy"].getvalue()[:1000]),
        "half a header": ("x.npy", whole["npy"].getvalue()[:40]),
        "half a npz": ("x.npz", whole["npz"].getvalue()[:1000]),
        "half a safetensors": ("x.safetensors", tensors[:1000]),
        "half a safetensors header": ("x.safetensors", tensors[:30]),
        "nothing in a safetensors": ("x.safetensors", b""),
        "huge safetensors shape": ("x.safetensors", tensors.replace(b"[1,64,2,32]", b"[9,99,99,9]")),
        "structured": ("x.npy", npy_with_header("(1, 1)", "|V8") + bytes(8)),
        "complex": ("x.npy", npy_with_header("(1, 64, 2, 32)", "<c8") + bytes(64 * 64 * 8)),
        "bytes": ("x.npy", npy_with_header("(1, 64, 2, 32)", "|u1") + bytes(64 * 64)),
        "version": ("x.npy", b"\x93NUMPY\x09\x00" + bytes(100)),
    }


NAMES = (
    "zip bomb", "not a zip", "objects", "pickle as npy", "huge header", "negative", "code in header", "empty",
    "truncated", "strings", "torch code", "pickle as torch", "safetensors header", "suffix", "objects in a zip",
    "huge header in a zip", "nothing in a zip", "no array in a zip", "code beside a tensor", "sparse", "float8",
    "nowhere", "no tensor", "truncated torch", "half a torch file", "half a npy", "half a header", "half a npz",
    "half a safetensors", "half a safetensors header", "nothing in a safetensors", "huge safetensors shape",
    "structured", "complex", "bytes", "version", "open header",
)  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_malformed_dumps_end_in_one_line_and_execute_nothing(tmp_path, arrays, case):
    every = malformed(tmp_path)
    assert every.keys() == set(NAMES)
    file_name, content = every[case]
    files = saved(tmp_path, arrays, "npy")
    bad = tmp_path / "bad"
    bad.mkdir()
    files["value"] = bad / file_name
    files["value"].write_bytes(content)
    said = run(files)
    assert said.exit_code == 2, (case, said.output)
    assert said.output.startswith("cpjax: --value"), (case, said.output)
    assert said.output.count("\n") == 1, (case, said.output)
    assert "(('" not in said.output  # words, and no tuple of an exception's arguments
    assert not (tmp_path / "executed").exists(), case


@pytest.mark.parametrize("kind", ["file", "folder", "rank", "file of a rank", "pipe"])
def test_no_link_is_followed_and_no_pipe_is_waited_for(tmp_path, arrays, kind):
    files = saved(tmp_path, arrays, "npy")
    bad, real = tmp_path / "bad.npy", tmp_path / "real"
    (real / "rank0").mkdir(parents=True)
    np.save(real / "rank0" / "x.npy", arrays["value"])
    if kind == "file":
        bad.symlink_to(files["value"])
    elif kind == "folder":
        bad.symlink_to(real)
    elif kind == "rank":
        bad.mkdir()
        (bad / "rank0").symlink_to(real / "rank0")
    elif kind == "file of a rank":
        (bad / "rank0").mkdir(parents=True)
        (bad / "rank0" / "x.npy").symlink_to(real / "rank0" / "x.npy")
    else:
        os.mkfifo(bad)
    said = run(files | {"value": bad}, cp=1)
    assert said.exit_code == 2, said.output
    assert ("no regular file" if kind == "pipe" else "symbolic link") in said.output
    assert said.output.count("\n") == 1, said.output


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_no_numbers_are_refused(tmp_path, arrays, name, number):
    arrays[name][0, 3, 0, 0] = number
    said = run(saved(tmp_path, arrays, "npy"))
    assert said.exit_code == 2, said.output
    assert said.output.startswith(f"cpjax: --{name}"), said.output
    assert "holds a NaN or an infinity, first at batch 0, token 3, head 0, component 0" in said.output
    assert said.output.count("\n") == 1, said.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_nan_in_a_result_is_wrong_and_not_refused(tmp_path, arrays, name):
    arrays[name][0, 3] = np.nan
    said = run(saved(tmp_path, arrays, "npy"), "--order", "ring")
    assert said.exit_code == 1, said.output
    assert "WRONG" in said.output


def test_wrong_dtypes_and_what_is_not_there_are_refused(tmp_path, arrays):
    files = saved(tmp_path, arrays, "npy")
    np.save(tmp_path / "bool.npy", arrays["value"] > 0)
    said = run(files | {"value": tmp_path / "bool.npy"})
    assert said.exit_code == 2
    assert "holds bool" in said.output
    said = run(files | {"value": tmp_path / "nowhere.npy"})
    assert said.exit_code == 2
    assert "does not exist" in said.output


def folder_of_ranks(folder, arrays, kind):
    """A folder with what each of two ranks dumped: a folder of files, or a file of several tensors."""
    rows = Zigzag(2).order(arrays["query"].shape[1]).reshape(2, -1)
    for rank in range(2):
        held = {name: np.ascontiguousarray(x[:, rows[rank]]) for name, x in arrays.items()}
        if kind == "folders":
            (folder / f"rank{rank}").mkdir(parents=True)
            saved(folder / f"rank{rank}", held, "npy")
        else:
            folder.mkdir(exist_ok=True)
            save_file({f"layer.{name}": x for name, x in held.items()}, folder / f"rank{rank}.safetensors")
    return folder


def run_file(file, *more):
    return CliRunner().invoke(app, ["judge-dump", str(file), "--scale", str(32**-0.5), "--causal", *more])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folders", "files"])
def test_what_each_rank_dumped_is_found_by_name(tmp_path, arrays, kind):
    said = run_file(folder_of_ranks(tmp_path / "dump", arrays, kind))
    assert said.exit_code == 0, said.output
    assert "the folders hold 2 ranks" in said.output


def test_a_folder_with_a_file_for_each_tensor(tmp_path, arrays):
    saved(tmp_path, {{"query": "q_states", "out": "attn.o"}.get(name, name): x for name, x in arrays.items()}, "npy")
    said = run_file(tmp_path, "--cp", "2")
    assert said.exit_code == 0, said.output
    (tmp_path / "key.npy").rename(tmp_path / "my_keys.npy")
    said = run_file(tmp_path, "--cp", "2")
    assert said.exit_code == 2
    assert "it holds attn.o, lse, my_keys, q_states, value: say --names key=NAME" in " ".join(said.output.split())
    assert run_file(tmp_path, "--cp", "2", "--names", "key=my_keys").exit_code == 0


def test_a_folder_with_one_file_of_all_tensors(tmp_path, arrays):
    save_file({f"layer.{name}": np.ascontiguousarray(x) for name, x in arrays.items()}, tmp_path / "attn.safetensors")
    said = run_file(tmp_path, "--cp", "2")
    assert said.exit_code == 0, said.output
    assert run_file(tmp_path / "attn.safetensors", "--cp", "2").exit_code == 0


def test_a_tensor_of_a_folder_is_there_once_and_is_no_link(tmp_path, arrays):
    saved(tmp_path, arrays, "npy")
    (tmp_path / "key.npz").write_bytes(b"")
    said = run_file(tmp_path)
    assert said.exit_code == 2
    assert "key and key may both be key" in said.output
    (tmp_path / "key.npz").unlink()
    (tmp_path / "key.npy").rename(tmp_path / "other.npy")
    (tmp_path / "key.npy").symlink_to(tmp_path / "other.npy")
    said = run_file(tmp_path)
    assert said.exit_code == 2
    assert "symbolic link" in said.output


def test_a_rank_that_lacks_a_tensor_is_named(tmp_path, arrays):
    folder = folder_of_ranks(tmp_path / "dump", arrays, "folders")
    (folder / "rank1" / "key.npy").unlink()
    said = run_file(folder)
    assert said.exit_code == 2
    assert "rank1 holds 0 files named 'key'" in " ".join(said.output.split())


@pytest.mark.slow
def test_of_a_wrong_result_with_the_sequence_first_sbnd_is_named(tmp_path, arrays):
    wrong = {name: np.ascontiguousarray(x.swapaxes(0, 1)) for name, x in arrays.items() if name != "lse"}
    wrong["out"] = wrong["out"] + np.float16(0.1)
    said = run(saved(tmp_path, wrong, "npy"), cp=1)
    assert f"or --layout-of sbnd, if these are not {len(wrong['query'])} texts of 1 token" in " ".join(
        said.output.split()
    )
    assert "sbnd" not in run(saved(tmp_path, wrong, "npy"), "--layout-of", "bsnd", cp=1).output


def test_lines_about_the_only_result_do_not_repeat_its_name(tmp_path, arrays):
    arrays["out"] = np.zeros_like(arrays["out"])
    said = run(saved(tmp_path, arrays, "npy"), "--order", "ring")
    assert said.exit_code == 1
    lines = said.output.splitlines()
    assert any(line.startswith("out: ") for line in lines)
    assert any(line.startswith("diagnosis: ") for line in lines)
    assert not any(line.startswith("out.npy, dump") for line in lines)
