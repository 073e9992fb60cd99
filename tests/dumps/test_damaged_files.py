"""Files with damaged bytes end in an array or in InputError, in every format; intact FP8 files are read."""

import io
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as safetensors_bytes

from cpjax.crosscheck.dumps import read_array
from cpjax.crosscheck.dumps.readers import names_in
from cpjax.errors import InputError

torch = pytest.importorskip("torch", reason="torch .pt files need PyTorch")

ARRAY = np.random.default_rng(0).standard_normal((1, 6, 2, 8)).astype(np.float32)


def _bytes(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


INTACT = {
    "x.npy": _bytes(lambda f: np.save(f, ARRAY)),
    "x.npz": _bytes(lambda f: np.savez(f, x=ARRAY)),
    "deflated.npz": _bytes(lambda f: np.savez_compressed(f, x=ARRAY)),
    "x.safetensors": safetensors_bytes({"x": ARRAY}),
    "f8.safetensors": safetensors_bytes({"x": ARRAY.astype(ml_dtypes.float8_e4m3fn)}),
    "x.pt": _bytes(lambda f: torch.save(torch.from_numpy(ARRAY), f)),
    "dict.pt": _bytes(lambda f: torch.save({"x": torch.from_numpy(ARRAY)}, f)),
}


@pytest.mark.parametrize("name", INTACT)
def test_intact_files_are_read(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(INTACT[name])
    wanted = ARRAY.astype(ml_dtypes.float8_e4m3fn) if name.startswith("f8") else ARRAY
    found = read_array(path, "query")
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16"])
def test_formats_of_ml_dtypes_are_read_from_safetensors_and_torch(tmp_path, dtype):
    x = ARRAY.astype(getattr(ml_dtypes, dtype))
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes({"a": ARRAY, "x": x}))
    torch.save(torch.from_numpy(ARRAY).to(getattr(torch, dtype)), tmp_path / "x.pt")
    for path in (Path(f"{tmp_path / 'x.safetensors'}::x"), tmp_path / "x.pt"):
        found = read_array(path, "key")
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found.astype(np.float32), x.astype(np.float32))


def test_npy_forgets_which_fp8_it_holds(tmp_path):
    np.save(tmp_path / "x.npy", ARRAY.astype(ml_dtypes.float8_e4m3fn))
    with pytest.raises(InputError, match="forgets which FP8 format"):
        read_array(tmp_path / "x.npy", "key")


@given(
    st.sampled_from(sorted(INTACT)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    st.one_of(st.none(), st.floats(0, 1)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_bytes_end_in_an_array_or_in_an_input_error(tmp_path, name, damage, cut):
    content = bytearray(INTACT[name])
    for where, byte in damage:
        # Half of the damage falls into the header, where it is felt.
        content[int(where * len(content)) if byte % 2 else int(where * min(160, len(content)))] = byte
    path = tmp_path / name
    path.write_bytes(bytes(content if cut is None else content[: int(cut * len(content))]))
    for ask in (lambda: read_array(path, "query"), lambda: names_in(path)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = ask()
        except InputError as error:
            found = str(error)
        assert isinstance(found, np.ndarray | list) or (str(path) in found and "\n" not in found)
