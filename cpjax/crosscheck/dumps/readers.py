"""Arrays that some tool dumped, read without executing anything: .npy, .npz, .safetensors, torch .pt; whole or by rank.

What a file claims is checked before memory is taken for it: sizes in headers, compressed sizes, dtypes.
"""

import io
import json
import math
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import safe_open

from cpjax.arrays import of_torch
from cpjax.crosscheck.files.checksums import sha256_of
from cpjax.errors import InputError
from cpjax.wording import counted

MOST_BYTES = 2**34
"""An array, unpacked, may take 16 GiB."""

RATIO = 1100
"""No deflated stream is more than 1032 times smaller than its content; what claims more lies."""

FLOATS = {"float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
"""What query, key, value, out and lse may be; FP8 in caches."""

WHOLE = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
"""What positions, segments, lengths and block tables may be."""

FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
"""Names of safetensors."""


class Read(NamedTuple):
    """The arrays of a file, or of the ranks of a folder, and where they came from."""

    parts: list[np.ndarray]
    """One, or one for each rank."""
    by_rank: bool
    files: dict[str, str]
    """File → SHA-256."""

    @property
    def about(self) -> str:
        """dtype and shape in words."""
        ranks = f"{counted(len(self.parts), 'rank')} of " if self.by_rank else ""
        return f"{ranks}{self.parts[0].dtype} {list(self.parts[0].shape)}"


def read(path: Path, name: str, dtypes: set[str] = FLOATS) -> Read:
    """The one array of a file, or one for each rank of a folder; `path::key` chooses among several arrays or files.

    Raises:
      InputError: one line that names the file, what is wrong, and the fix.
    """
    file_name, _, key = str(path).partition("::")
    try:
        found = _read(Path(file_name), key)
    except InputError as error:
        raise InputError(f"--{name} {path}: {error}") from None
    # Whatever a damaged file provokes in a reader (zlib.error, TokenError, RuntimeError, …), it cannot be read.
    except Exception as error:
        raise InputError(f"--{name} {path}: cannot be read ({_reason(error)}); dump the array again") from None
    for part in found.parts:
        if part.dtype.name not in dtypes:
            raise InputError(f"--{name} {path}: holds {part.dtype}; it must be one of {', '.join(sorted(dtypes))}")
    return found


def read_array(path: Path, name: str, dtypes: set[str] = FLOATS | WHOLE) -> np.ndarray:
    """The one array of a file; of a folder, one after the other along a new first axis.

    Raises:
      InputError: see `read`; ranks of different shapes.
    """
    found = read(path, name, dtypes)
    if not found.by_rank:
        return found.parts[0]
    if len({part.shape for part in found.parts}) != 1:
        raise InputError(f"--{name} {path}: ranks have different shapes; they must be equal")
    return np.stack(found.parts)


def names_in(path: Path) -> list[str]:
    """The names of the arrays of one file of several; of a folder, of its files or of what rank 0 dumped.

    Raises:
      InputError: as `read`.
    """
    try:
        _check_file(path)
        if path.is_dir():
            return _names_in_folder(path)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return sorted(info.filename.removesuffix(".npy") for info in archive.infolist())
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                return sorted(file.keys())
        if path.suffix in (".pt", ".pth"):
            loaded = _loaded(path)
            return sorted(map(str, loaded)) if isinstance(loaded, dict) else []
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # as in `read`
        raise InputError(f"{path}: cannot be read ({_reason(error)}); dump it again") from None
    raise InputError(f"{path}: a file of several arrays is .npz, .safetensors, or .pt with a dict of tensors")


def _names_in_folder(folder: Path) -> list[str]:
    """Of a folder of ranks, what rank 0 has in its file or as files in its folder; else the names of the files."""
    entries = _entries(folder)
    if not _are_ranks(entries):
        return sorted(entry.stem for entry in entries)
    first = min(entries, key=lambda entry: _number(entry.stem))
    return sorted(file.stem for file in _entries(first)) if first.is_dir() else names_in(first)


def _reason(error: Exception) -> str:
    """In words: of an exception with several arguments, as TokenError, the first."""
    said = str(error.args[0]) if len(error.args) > 1 and str(error) == str(error.args) else str(error)
    return (next(iter(said.splitlines()), "") or type(error).__name__)[:120]


def _check_file(path: Path) -> None:
    info = path.lstat() if path.exists() or path.is_symlink() else None
    if info is None:
        raise InputError("does not exist; give a .npy, .npz, .safetensors or .pt file, or a folder of ranks")
    if stat.S_ISLNK(info.st_mode):
        raise InputError("is a symbolic link, and none is followed; give the file itself")
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
        raise InputError("is no regular file; give a file")


def _read(path: Path, key: str) -> Read:
    _check_file(path)
    if path.is_dir():
        return _ranks(path, key) if not key or _are_ranks(_entries(path)) else _read(_file_named(path, key), "")
    readers: dict[str, Callable[[Path, str], np.ndarray]] = {
        ".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".pt": _torch, ".pth": _torch,
    }  # fmt: skip
    if path.suffix not in readers:
        raise InputError(f"ends in {path.suffix!r}; known are {', '.join(readers)}")
    return Read([readers[path.suffix](path, key)], False, {str(path): sha256_of(path)})


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, but for hidden files."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _are_ranks(entries: list[Path]) -> bool:
    """Whether their names end in 0, 1, 2, …, each once."""
    return bool(entries) and sorted(_number(entry.stem) for entry in entries) == list(range(len(entries)))


def only_file(path: Path) -> Path:
    """The one file of a folder that holds nothing else and is not of ranks; what is no such folder, as it is."""
    if path.is_symlink() or not path.is_dir():
        return path
    entries = _entries(path)
    return path if len(entries) != 1 or entries[0].is_dir() or _are_ranks(entries) else entries[0]


def _file_named(folder: Path, name: str) -> Path:
    """The file of a folder whose name, without the ending, is this."""
    there = _entries(folder)
    found = [entry for entry in there if entry.stem == name]
    if len(found) != 1:
        holds = ", ".join(entry.name for entry in there[:8])
        raise InputError(f"{folder.name} holds {counted(len(found), 'file')} named {name!r} (it holds {holds})")
    return found[0]


def _ranks(folder: Path, key: str) -> Read:
    """One file (or folder with one file, or with one of this name) for each rank, by the last number in the name."""
    entries = sorted(_entries(folder), key=lambda entry: _number(entry.stem))
    if not _are_ranks(entries):
        raise InputError(
            f"has entries numbered {[_number(entry.stem) for entry in entries][:8]}; a folder holds ranks 0, 1, 2, …, "
            "one file or folder each"
        )
    parts, seen = [], {}
    for entry in entries:
        files = _entries(entry) if entry.is_dir() else [entry]
        if key and len(files) > 1:
            files = [_file_named(entry, key)]
        if entry.is_symlink() or len(files) != 1:
            raise InputError(
                f"{entry.name} holds {counted(len(files), 'file')} (or is a symbolic link); it must hold one, or name "
                "one of them as FOLDER::NAME"
            )
        one = _read(files[0], key)
        if one.by_rank:
            raise InputError(f"{entry.name} holds a folder; it must hold one file")
        parts += one.parts
        seen |= one.files
    return Read(parts, True, seen)


def _number(stem: str) -> int:
    digits = "".join(c if c.isdigit() else " " for c in stem).split()
    return int(digits[-1]) if digits and len(digits[-1]) < 9 else -1


def _npy(path: Path, key: str) -> np.ndarray:
    with path.open("rb") as file:
        return _npy_stream(file, path.stat().st_size)


def _npy_stream(file: Any, size: int) -> np.ndarray:
    """Read only after the header is known to describe as many bytes as are there, and no objects."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file, max_header_size=4096)
    if dtype.hasobject:
        raise InputError("holds Python objects, which are never loaded; dump plain numbers")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > MOST_BYTES or wanted > size:
        raise InputError(f"claims shape {list(shape)[:6]}, {wanted:,} bytes, but has {size:,}; the file is damaged")
    flat = np.frombuffer(file.read(wanted), dtype)
    if flat.nbytes != wanted:
        raise InputError(f"ends after {flat.nbytes:,} of {wanted:,} bytes; the file is truncated")
    array = flat.reshape(shape[::-1]).T if is_fortran else flat.reshape(shape)
    if dtype.kind == "V" and dtype.itemsize == 2:  # how np.save writes ml_dtypes.bfloat16
        array = array.view(ml_dtypes.bfloat16)
    if dtype.kind == "V" and dtype.itemsize == 1:
        raise InputError("holds raw bytes: .npy forgets which FP8 format they are; save them as .safetensors or .pt")
    return array


def _npz(path: Path, key: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        info = members[_choose(sorted(members), key)]
        if info.file_size > MOST_BYTES or info.file_size > RATIO * max(info.compress_size, 1):
            raise InputError(
                f"unpacks {info.compress_size:,} bytes to {info.file_size:,}; that is no array (zip bomb?)"
            )
        with archive.open(info) as member:
            return _npy_stream(io.BufferedReader(member), info.file_size)  # type: ignore[arg-type]


def _safetensors(path: Path, key: str) -> np.ndarray:
    with safe_open(path, framework="numpy") as file:
        name = _choose(sorted(file.keys()), key)
        dtype = str(file.get_slice(name).get_dtype())
        if not dtype.startswith("F8"):
            return file.get_tensor(name)
    if dtype not in FLOAT8:
        raise InputError(f"holds {dtype}; of FP8 formats known are {', '.join(FLOAT8)}")
    # The library has checked the header, but knows no NumPy dtype for it.
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(length))[name]
        first, last = entry["data_offsets"]
        stream.seek(8 + length + first)
        return np.frombuffer(stream.read(last - first), FLOAT8[dtype]).reshape(entry["shape"])


def _loaded(path: Path) -> Any:
    """What torch.save wrote; weights_only refuses every pickle that names code."""
    try:
        import torch
    except ImportError:
        raise InputError("reading .pt needs PyTorch; pip install 'cpjax[torch]', or dump .npy") from None

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MOST_BYTES:
                raise InputError("claims more than 16 GiB; split it")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle provokes in the reader, it is refused
        reason = next(iter(str(error).splitlines()), "")[:80]
        raise InputError(f"is no plain tensor ({reason}); code is never executed: save tensors only") from None


def _torch(path: Path, key: str) -> np.ndarray:
    """A tensor, or a flat dict of them, saved by torch.save."""
    loaded = _loaded(path)
    import torch

    if isinstance(loaded, dict):
        named = {str(name): x for name, x in loaded.items()}
        loaded = named[_choose(sorted(named), key)]
    if not isinstance(loaded, torch.Tensor):
        raise InputError(f"holds a {type(loaded).__name__}; it must hold a tensor, or a dict of tensors")
    return of_torch(loaded, "it")


def _choose(names: list[str], key: str) -> str:
    if key:
        if key not in names:
            raise InputError(f"holds {', '.join(names[:8])}, not {key!r}")
        return key
    if len(names) != 1:
        raise InputError(f"holds {len(names)} arrays ({', '.join(names[:8])}); name one as FILE::NAME")
    return names[0]
