"""Dumps of other tools: read in every format, and nothing that is malformed is executed, followed or unpacked."""

import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.layout import order
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


@pytest.mark.parametrize("layout", ["bsnd", "bnsd", "tnd"])
def test_layouts_are_found_by_trying(tmp_path, arrays, layout):
    change = {"bsnd": lambda x: x, "bnsd": lambda x: x.swapaxes(1, 2), "tnd": lambda x: x[0]}[layout]
    said = run(saved(tmp_path, {name: np.ascontiguousarray(change(x)) for name, x in arrays.items()}, "npy"))
    assert said.exit_code == 0, said.output
    assert f"taken as {layout}" in said.output


def test_ranks_are_joined_and_a_swapped_rank_is_wrong(tmp_path, arrays):
    rows = order("zigzag", arrays["query"].shape[1], 2).reshape(2, -1)
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
    said = run(files)
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


def test_what_is_wrong_is_diagnosed(tmp_path, arrays):
    arrays["lse"] = arrays["lse"] / np.float32(np.log(2))
    said = run(saved(tmp_path, arrays, "npy"), "--order", "ring")
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


def malformed(tmp_path):
    """name → (file name, content)."""
    trap = tmp_path / "executed"
    objects = io.BytesIO()
    np.save(objects, np.array([Code(trap)], object), allow_pickle=True)
    with_code = io.BytesIO()
    torch.save(Code(trap), with_code)
    return {
        "zip bomb": ("x.npz", bomb()),
        "not a zip": ("x.npz", b"PK\x03\x04 nothing"),
        "objects": ("x.npy", objects.getvalue()),
        "pickle as npy": ("x.npy", pickle.dumps(Code(trap))),
        "huge header": ("x.npy", npy_with_header("(9223372036854775807, 4, 4, 4)")),
        "negative": ("x.npy", npy_with_header("(-1, 4, 4, 4)")),
        "code in header": ("x.npy", npy_with_header(f"__import__('os').mkdir('{trap}')")),
        "empty": ("x.npy", b""),
        "truncated": ("x.npy", npy_with_header("(1, 64, 2, 32)") + bytes(100)),
        "strings": ("x.npy", npy_with_header("(1, 1, 1, 1)", "<U4") + bytes(16)),
        "torch code": ("x.pt", with_code.getvalue()),
        "pickle as torch": ("x.pt", pickle.dumps(Code(trap))),
        "safetensors header": ("x.safetensors", struct.pack("<Q", 2**60) + b"{}"),
        "suffix": ("x.pkl", pickle.dumps(Code(trap))),
    }


@pytest.mark.parametrize("name", range(14))
def test_malformed_dumps_end_in_one_line_and_execute_nothing(tmp_path, arrays, name):
    case, (file_name, content) = list(malformed(tmp_path).items())[name]
    files = saved(tmp_path, arrays, "npy")
    bad = tmp_path / "bad"
    bad.mkdir()
    files["value"] = bad / file_name
    files["value"].write_bytes(content)
    said = run(files)
    assert said.exit_code == 2, (case, said.output)
    assert said.output.startswith("cpjax: --value"), (case, said.output)
    assert said.output.count("\n") == 1, (case, said.output)
    assert not (tmp_path / "executed").exists(), case


def test_links_nan_and_wrong_dtypes_are_refused(tmp_path, arrays):
    files = saved(tmp_path, arrays, "npy")
    link = tmp_path / "link.npy"
    link.symlink_to(files["value"])
    said = run(files | {"value": link})
    assert said.exit_code == 2
    assert "symbolic link" in said.output
    worse = arrays["value"].copy()
    worse[0, 3, 0, 0] = np.nan
    np.save(tmp_path / "nan.npy", worse)
    said = run(files | {"value": tmp_path / "nan.npy"})
    assert said.exit_code == 2
    assert "NaN" in said.output
    np.save(tmp_path / "bool.npy", arrays["value"] > 0)
    said = run(files | {"value": tmp_path / "bool.npy"})
    assert said.exit_code == 2
    assert "holds bool" in said.output
    said = run(files | {"value": tmp_path / "nowhere.npy"})
    assert said.exit_code == 2
