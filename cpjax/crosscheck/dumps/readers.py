"""Arrays that some tool dumped, read without executing anything: .npy, .npz, .safetensors, torch .pt; whole or by rank.

What a file claims is checked before memory is taken for it: sizes in headers, compressed sizes, dtypes.
"""

import io
import math
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from cpjax.errors import InputError
from cpjax.partition import Zigzag, inverse

MOST_BYTES = 2**34
"""An array, unpacked, may take 16 GiB."""

RATIO = 1100
"""No deflated stream is more than 1032 times smaller than its content; what claims more lies."""

DTYPES = {"float16", "float32", "float64", "bfloat16", "int32", "int64"}

LAYOUTS = ("bsnd", "bnsd", "tnd")


def read_array(path: Path, name: str) -> np.ndarray:
    """The one array of a file; `path:key` chooses among several. A folder holds one file or folder for each rank.

    Raises:
      InputError: one line that names the file, what is wrong, and the fix.
    """
    file_name, _, key = str(path).partition("::")
    try:
        array = _read(Path(file_name), key)
    except InputError as error:
        raise InputError(f"--{name} {path}: {error}") from None
    except (OSError, ValueError, EOFError, SafetensorError, zipfile.BadZipFile, MemoryError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:120]
        raise InputError(f"--{name} {path}: cannot be read ({reason}); dump the array again") from None
    if array.dtype.name not in DTYPES:
        raise InputError(f"--{name} {path}: holds {array.dtype}; it must be one of {', '.join(sorted(DTYPES))}")
    return array


def read_tensor(path: Path, name: str, *, layout: str) -> np.ndarray:
    """Query, key, value or out as `[B, S, N, D]`; lse as `[B, S, N]`. Ranks of a folder are joined in zigzag order.

    Raises:
      InputError: see `read_array`; a number of axes that the layout has not; NaN or infinity in an input.
    """
    array = read_array(path, name)
    by_rank = Path(str(path).partition("::")[0]).is_dir()
    axes = {"bsnd": 4, "bnsd": 4, "tnd": 3}[layout] - (name == "lse") + by_rank
    if array.ndim != axes or 0 in array.shape:
        raise InputError(
            f"--{name} {path}: has shape {list(array.shape)}, but --layout-of {layout} has {axes} axes, none empty; "
            f"name the layout it has with --layout-of bsnd|bnsd|tnd"
        )
    parts = [_natural(part, layout) for part in (array if by_rank else array[None])]
    joined = np.concatenate(parts, axis=1)
    if by_rank:
        joined = joined[:, inverse(Zigzag(len(parts)).order(joined.shape[1]))]
    if name not in ("out", "lse") and not np.isfinite(joined.astype(np.float32)).all():
        where = [int(x) for x in np.argwhere(~np.isfinite(joined.astype(np.float32)))[0]]
        raise InputError(f"--{name} {path}: has a NaN or an infinity at {where}; inputs must be finite to be judged")
    return np.ascontiguousarray(joined)


def _natural(array: np.ndarray, layout: str) -> np.ndarray:
    """`[B, S, N, …]`."""
    if layout == "tnd":
        return array[None]
    return array.swapaxes(1, 2) if layout == "bnsd" else array


def _read(path: Path, key: str) -> np.ndarray:
    info = path.lstat() if path.exists() or path.is_symlink() else None
    if info is None:
        raise InputError("does not exist; give a .npy, .npz, .safetensors or .pt file, or a folder of ranks")
    if stat.S_ISLNK(info.st_mode):
        raise InputError("is a symbolic link, and none is followed; give the file itself")
    if stat.S_ISDIR(info.st_mode):
        return _ranks(path, key)
    if not stat.S_ISREG(info.st_mode):
        raise InputError("is no regular file; give a file")
    readers: dict[str, Callable[[Path, str], np.ndarray]] = {
        ".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".pt": _torch, ".pth": _torch,
    }  # fmt: skip
    if path.suffix not in readers:
        raise InputError(f"ends in {path.suffix!r}; known are {', '.join(readers)}")
    return readers[path.suffix](path, key)


def _ranks(folder: Path, key: str) -> np.ndarray:
    """One file (or folder with one file) for each rank, in the order of the last number in the name."""
    entries = sorted(
        (entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda e: _number(e.stem)
    )
    numbers = [_number(entry.stem) for entry in entries]
    if not entries or numbers != list(range(len(entries))):
        raise InputError(
            f"has entries numbered {numbers[:8]}; a folder holds ranks 0, 1, 2, …, one file or folder each"
        )
    parts = []
    for entry in entries:
        files = [f for f in sorted(entry.iterdir()) if not f.name.startswith(".")] if entry.is_dir() else [entry]
        if entry.is_symlink() or len(files) != 1:
            raise InputError(f"{entry.name} holds {len(files)} files (or is a symbolic link); it must hold one")
        parts.append(_read(files[0], key))
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise InputError(f"ranks have different shapes {sorted(shapes)[:4]}; they must be equal")
    return np.stack(parts)


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
        return file.get_tensor(_choose(sorted(file.keys()), key))


def _torch(path: Path, key: str) -> np.ndarray:
    """A tensor, or a flat dict of them, saved by torch.save; weights_only refuses every pickle that names code."""
    try:
        import torch
    except ImportError:
        raise InputError("reading .pt needs PyTorch; pip install 'cpjax[torch]', or dump .npy") from None

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MOST_BYTES:
                raise InputError("claims more than 16 GiB; split it")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile pickle provokes in the reader, it is refused
        reason = next(iter(str(error).splitlines()), "")[:80]
        raise InputError(f"is no plain tensor ({reason}); code is never executed: save tensors only") from None
    if isinstance(loaded, dict):
        loaded = loaded[_choose(sorted(map(str, loaded)), key)]
    if not isinstance(loaded, torch.Tensor):
        raise InputError(f"holds a {type(loaded).__name__}; it must hold a tensor, or a dict of tensors")
    dtype = str(loaded.dtype).removeprefix("torch.")
    if loaded.layout is not torch.strided or loaded.is_meta or loaded.is_quantized or dtype not in DTYPES:
        kind = f"{loaded.layout} tensor of {dtype} on {loaded.device}".replace("torch.", "")
        raise InputError(f"holds a {kind}; it must be a dense one of {', '.join(sorted(DTYPES))}")
    loaded = loaded.detach().contiguous()
    if loaded.dtype == torch.bfloat16:
        return loaded.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return loaded.numpy()


def _choose(names: list[str], key: str) -> str:
    if key:
        if key not in names:
            raise InputError(f"holds {', '.join(names[:8])}, not {key!r}")
        return key
    if len(names) != 1:
        raise InputError(f"holds {len(names)} arrays ({', '.join(names[:8])}); name one as FILE::NAME")
    return names[0]
