"""A checkpoint as Hugging Face lays it out: config.json, safetensors in one file or in several with an index.

Nothing is read as a whole: every device of a mesh reads the slice of a tensor that it holds, and no other byte. Where a
description file stands beside the weights, it says which of them are quantised (`cpjax.deepseek.description`); such a
weight is loaded as a `cpjax.deepseek.quantized.Quantized` in the place of its matrix.
"""

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cpjax.crosscheck.files.atomic import atomic_write, is_free
from cpjax.deepseek.config import DeepseekConfig, read_config
from cpjax.deepseek.description import (
    FLOATS,
    Description,
    Stored,
    find_description,
    quantized_kinds,
    read_description,
    stored_of,
)
from cpjax.deepseek.model import ModelWeights
from cpjax.deepseek.mtp import MtpWeights
from cpjax.deepseek.names import BIAS, mtp_of, mtp_shapes, shapes
from cpjax.deepseek.quantized_matrix import specs_of_stored
from cpjax.deepseek.sources import Source, sources_of, stacked
from cpjax.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
"""Dtypes in which a random checkpoint can be written."""
COMPUTED = ("float64", "float32")
"""Dtypes in which a model is computed."""
MOST_BYTES = 2**33
"""A random checkpoint larger than this is refused."""

_IGNORED = "rotary_emb.inv_freq"
"""A tensor that older checkpoints have, and that follows from the config."""

Advance = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config, and which file holds which tensor."""

    folder: Path
    config: DeepseekConfig
    files: dict[str, Path]
    quantized: dict[str, str] = field(default_factory=dict)
    """Weights that are quantised, and their kinds."""
    stored: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of all tensors, as they are in the files."""

    @property
    def has_mtp(self) -> bool:
        """Whether the MTP modules that the config counts are there; Hugging Face writes checkpoints without them."""
        drafts = mtp_shapes(self.config)
        return bool(drafts) and set(drafts) <= set(self.files)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor, in the dtype of the file.

        Raises:
          InputError: the file cannot be read.
        """
        try:
            with safe_open(self.files[name], framework="numpy") as file:
                return file.get_slice(name)[index]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.files[name]}: {name} cannot be read ({_first_line(error)})") from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config, index and description, and check that every tensor is there with its shape; no weight is read.

    Raises:
      InputError: a file or tensor that is missing, is of another shape or dtype, or is not understood; a quantised one
        without a description, or with one that does not fit.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give a checkpoint's, or write one: cpjax checkpoint DIR")
    config, found = read_config(folder), find_description(folder)
    description = None if found is None else read_description(found)
    files = _files(folder, is_quantized=description is not None)
    drafts = mtp_shapes(config)
    wanted = shapes(config) | (drafts if any(name in files for name in drafts) else {})
    kinds = {} if description is None else quantized_kinds(description, wanted, files)
    expected = _expected(wanted, kinds, description)
    for name, tensor in expected.items():
        if name not in files and tensor.is_needed:
            said = "config.json says the model has it" if name in wanted else "by the description it must be there"
            raise InputError(f"{folder}: tensor {name} is missing; {said}")
    there = {}
    for path in sorted(set(files.values())):
        for name, dtype, shape in _header(path):
            there[name] = shape
            if name in expected:
                _check_tensor(path, name, dtype, shape, expected[name], is_described=description is not None)
            elif not _may_be_there(name, config):
                raise InputError(
                    f"{path}: tensor {name} is not understood, so results might be wrong; only the weights of this "
                    "config's layers are read"
                )
    present = [name for name in expected if name in files]
    for name in present:
        if name not in there:
            raise InputError(f"{files[name]}: tensor {name} is missing; the index says the file has it")
    stored = {name: there[name] for name in present}
    sources_of(config, kinds, stored)  # refuses experts that cannot be stacked
    return Checkpoint(folder, config, {name: files[name] for name in present}, kinds, stored)


def load(
    checkpoint: Checkpoint,
    dtype: str,
    *,
    mesh: Mesh | None = None,
    specs: ModelWeights | None = None,
    advance: Advance = lambda what, done, total: None,
) -> ModelWeights:
    """The weights as JAX arrays; each device reads its own slices.

    Args:
      dtype: in which the model is computed, one of `COMPUTED`; the file's floats are converted exactly, or rounded
        where they are wider.
      mesh, specs: where each weight lives, a `ModelWeights` of PartitionSpec; without them all are on one device.
        A quantised weight has the spec of its matrix there.
      advance: is told how many tensors have been read.

    Raises:
      InputError: a dtype in which nothing is computed; a quantised weight that the mesh cannot cut, or whose numbers
        mean nothing; a file that cannot be read.
    """
    sources = sources_of(checkpoint.config, checkpoint.quantized, checkpoint.stored)
    return _loaded(checkpoint, sources, dtype, mesh, specs, advance)


def load_mtp(
    checkpoint: Checkpoint, dtype: str, *, mesh: Mesh | None = None, specs: tuple[MtpWeights, ...] | None = None
) -> tuple[MtpWeights, ...]:
    """The MTP modules; `mesh` and `specs` as in `load`.

    Raises:
      InputError: there is none, or it is quantised; a dtype in which nothing is computed; a file that cannot be read.
    """
    if not checkpoint.has_mtp:
        raise InputError(f"{checkpoint.folder} has no MTP module; take a checkpoint with num_nextn_predict_layers > 0")
    wanted = mtp_shapes(checkpoint.config)
    for name in wanted:
        if name in checkpoint.quantized:
            raise InputError(
                f"{checkpoint.folder}: tensor {name} is {checkpoint.quantized[name]}; an MTP module is computed only "
                "as FLOAT, leave it out of the quantisation"
            )
    sources = mtp_of(checkpoint.config, lambda name: Source((name,), wanted[name]), stacked)
    return _loaded(checkpoint, sources, dtype, mesh, specs, lambda what, done, total: None)


def _loaded(checkpoint: Checkpoint, sources: Any, dtype: str, mesh: Mesh | None, specs: Any, advance: Advance) -> Any:
    """A tree of sources as arrays."""
    check_computed(dtype)
    is_source = lambda x: isinstance(x, Source)  # noqa: E731
    leaves, structure = jax.tree.flatten(sources, is_leaf=is_source)
    where = [PartitionSpec()] * len(leaves)
    if specs is not None:
        where = jax.tree.leaves(specs_of_stored(specs, sources), is_leaf=lambda x: isinstance(x, PartitionSpec))
    if mesh is not None:
        for source, spec in zip(leaves, where, strict=True):
            _check_cut(checkpoint, source, spec, mesh)
    _check_values(checkpoint, leaves)
    found = []
    for number, (source, spec) in enumerate(zip(leaves, where, strict=True)):
        sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec)
        kind = source.dtype or dtype
        read = _reader(checkpoint, source, np.dtype(kind))
        found.append(jax.make_array_from_callback(source.shape, sharding, read, dtype=jnp.dtype(kind)))
        advance("weights", number + 1, len(leaves))
    return jax.tree.unflatten(structure, found)


def check_computed(dtype: str) -> None:
    """Refuse a dtype in which no model is computed, and float64 where JAX would silently take float32.

    Raises:
      InputError: it names the dtypes.
    """
    if dtype not in COMPUTED:
        raise InputError(f"dtype {dtype!r:.60} is not one that a model is computed in; give {' or '.join(COMPUTED)}")
    if dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
        raise InputError("dtype float64 needs float64 in JAX; call jax.config.update('jax_enable_x64', True) first")


def write_random(
    folder: Path, config: DeepseekConfig, seed: int, *, dtype: str = "float16", shard_bytes: int = 2**18
) -> list[Path]:
    """Write a random checkpoint with a model's structure and names into a new folder; the files, in order.

    Linear weights have variance 1/in, so that hidden states keep their size; norms are about 1; the router's bias is
    about ±0.1, and float32 as in DeepSeek's own. A tensor follows from the seed and its name alone.

    Args:
      shard_bytes: a file is closed before it gets larger, unless one tensor is.

    Raises:
      InputError: something is there already, it cannot be written, or it would be larger than `MOST_BYTES`.
    """
    check_free(folder)
    arrays = random_tensors(config, seed, dtype)
    return write_tensors(folder, arrays, config.as_json() | {"torch_dtype": dtype}, shard_bytes=shard_bytes)


def random_tensors(config: DeepseekConfig, seed: int, dtype: str) -> dict[str, np.ndarray]:
    """What `write_random` writes, by name.

    Raises:
      InputError: a dtype that is not known, or more than `MOST_BYTES`.
    """
    if dtype not in STORED:
        raise InputError(f"dtype {dtype!r:.60} is unknown; known are {', '.join(STORED)}")
    wanted = shapes(config) | mtp_shapes(config)
    size = sum(int(np.prod(shape)) for shape in wanted.values()) * np.dtype(STORED[dtype]).itemsize
    if size > MOST_BYTES:
        raise InputError(f"{size} bytes of random weights are more than {MOST_BYTES}; make the config smaller")
    return {name: _random(name, shape, seed, dtype) for name, shape in wanted.items()}


def check_free(folder: Path) -> None:
    """Refuse to overwrite anything.

    Raises:
      InputError: something is there.
    """
    if not is_free(folder):
        raise InputError(f"{folder} is there already; nothing is overwritten, name a new folder")


def write_tensors(
    folder: Path,
    arrays: dict[str, np.ndarray],
    config: dict[str, Any],
    *,
    shard_bytes: int,
    stem: str = "model",
    more: dict[str, dict[str, Any]] | None = None,
) -> list[Path]:
    """Write a checkpoint into a new folder, whole or not at all; the safetensors files, in order.

    Args:
      config: what config.json says.
      stem: how names of files begin.
      more: other JSON files, by name.

    Raises:
      InputError: something is there already, or it cannot be written.
    """
    check_free(folder)
    try:
        with atomic_write(folder) as unfinished:
            unfinished.mkdir()
            names = _write_shards(unfinished, arrays, shard_bytes, stem)
            for name, document in {"config.json": config, **(more or {})}.items():
                (unfinished / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written ({_first_line(error)})") from None
    return [folder / name for name in names]


def _reader(checkpoint: Checkpoint, source: Source, dtype: Any) -> Callable[[Any], np.ndarray]:
    """Of an array's index (slices) the numbers."""

    def one(name: str, cut: tuple[slice, ...]) -> np.ndarray:
        x = checkpoint.read(name, (*cut, slice(0, 1)) if source.is_column else cut)
        return _converted(x[..., 0] if source.is_column else x, dtype)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        cut = tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, source.shape, strict=True))
        if not source.is_stacked:
            return one(source.names[0], cut)
        return np.stack([one(name, cut[1:]) for name in source.names[cut[0]]])

    return read


def _converted(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Numbers in `dtype`; an int64, as deq_scale may be, holds a float32 in its low 32 bits."""
    return (x & 0xFFFFFFFF).astype(np.uint32).view(np.float32) if x.dtype == np.int64 else x.astype(dtype)


def _check_cut(checkpoint: Checkpoint, source: Source, spec: PartitionSpec, mesh: Mesh) -> None:
    """Refuse what the mesh does not divide."""
    for count, axes in zip(source.shape, spec, strict=False):
        size = int(np.prod([mesh.shape[axis] for axis in _axes(axes)]))
        if count % size:
            raise InputError(
                f"{checkpoint.folder}: tensor {source.names[0]} has shape {list(source.shape)}, of which "
                f"{'·'.join(_axes(axes))} = {size} cannot cut {count} equally; make it a divisor"
            )


def _axes(axes: Any) -> tuple[str, ...]:
    """Of one entry of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _check_values(checkpoint: Checkpoint, sources: list[Source]) -> None:
    """Refuse an input_scale that divides by nothing, and a weight_offset, which is not computed."""
    for name in (name for source in sources for name in source.names):
        for last in ("input_scale", "weight_offset", "weight_offset_second"):
            other = name.removesuffix("weight") + last
            if name not in checkpoint.quantized or other not in checkpoint.stored:
                continue
            x = checkpoint.read(other, tuple(slice(0, n) for n in checkpoint.stored[other])).astype(np.float32)
            is_good = np.isfinite(x) & (x > 0) if last == "input_scale" else x == 0
            if not is_good.all():
                rule = "a positive number" if last == "input_scale" else "0, weights are symmetric"
                raise InputError(
                    f"{checkpoint.files[other]}: tensor {other} has {x[~is_good].flat[0]}; it must be {rule}"
                )


def _files(folder: Path, *, is_quantized: bool) -> dict[str, Path]:
    """Tensor → file, by the index or of the only file; those of quantised weights have no fixed names."""
    path, single = folder / INDEX, folder / SINGLE
    if is_quantized:
        indices, files = (sorted(folder.glob(f"*.safetensors{end}")) for end in (".index.json", ""))
        if len(indices) > 1 or (not indices and len(files) != 1):
            raise InputError(
                f"{folder} has {len(indices)} indices and {len(files)} files of safetensors beside its description; "
                "there must be one index, or one file"
            )
        path, single = (indices or [path])[0], (files or [single])[0]
    if not path.exists():
        if not single.exists():
            raise InputError(f"{folder} has neither {INDEX} nor {SINGLE}; give a checkpoint in safetensors")
        return {name: single for name, _, _ in _header(single)}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({_first_line(error)})") from None
    table = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise InputError(f"{path} has no weight_map from tensors to files; it must be an index of safetensors")
    for file in sorted(set(table.values())):
        if file != Path(file).name or not (folder / file).is_file():
            raise InputError(f"{path} names the file {file!r:.80}, which is not beside it; fetch all files")
    return {name: folder / file for name, file in table.items()}


def _header(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor in a file."""
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                part = file.get_slice(name)
                yield name, part.get_dtype(), tuple(part.get_shape())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no safetensors file ({_first_line(error)})") from None


def _expected(
    wanted: dict[str, tuple[int, ...]], kinds: dict[str, str], description: Description | None
) -> dict[str, Stored]:
    """Every tensor that may be in the files, by name."""
    expected = {}
    for name, shape in wanted.items():
        if description is not None and name in kinds:
            expected |= stored_of(name, kinds[name], shape, description)
        else:
            expected[name] = Stored(FLOATS, (shape,))
    return expected


def _check_tensor(
    path: Path, name: str, dtype: str, shape: tuple[int, ...], wanted: Stored, *, is_described: bool
) -> None:
    if dtype not in wanted.dtypes:
        if is_described:
            raise InputError(
                f"{path}: tensor {name} has dtype {dtype}; by the description it must be {' or '.join(wanted.dtypes)}"
            )
        raise InputError(
            f"{path}: tensor {name} has dtype {dtype}, a quantisation, and no quant_model_description*.json is beside "
            f"it; only {', '.join(FLOATS)} are read without one"
        )
    if shape not in wanted.shapes:
        said = " or ".join(str(list(one)) for one in wanted.shapes)
        by = "config.json and the description" if is_described else "config.json"
        raise InputError(f"{path}: tensor {name} has shape {list(shape)}; by {by} it must be {said}")


def _may_be_there(name: str, config: DeepseekConfig) -> bool:
    """Whether a tensor may be left out: it follows from the config, is shared by an MTP module, or of one too many."""
    if name.endswith(_IGNORED):
        return True
    parts = name.split(".")
    if parts[:2] != ["model", "layers"] or len(parts) < 4 or not parts[2].isdecimal():
        return False
    number, shared = int(parts[2]) - config.num_hidden_layers, ("embed_tokens.weight", "shared_head.head.weight")
    return number >= config.num_nextn_predict_layers or (number >= 0 and ".".join(parts[3:]) in shared)


def _random(name: str, shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    x = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith(BIAS):
        return x * np.float32(0.1)
    if "norm" in name.split(".")[-2]:  # enorm, q_a_layernorm, …
        return (1 + x * np.float32(0.1)).astype(STORED[dtype])
    size = 1.0 if "embed_tokens" in name else shape[-1] ** -0.5
    return (x * np.float32(size)).astype(STORED[dtype])


def _write_shards(folder: Path, arrays: dict[str, np.ndarray], shard_bytes: int, stem: str) -> list[str]:
    """The files' names."""
    shards: list[dict[str, np.ndarray]] = [{}]
    held = 0
    for name, x in arrays.items():
        if shards[-1] and held + x.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = x
        held += x.nbytes
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    table = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(x.nbytes for x in arrays.values())}, "weight_map": table}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
