"""Layers, one after the other: what is finished is not computed again, what is in the way is not overwritten."""

import json
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import torch

from npu_backend.contracts.kv_rmsnorm_rope_cache import LATENT
from npu_backend.errors import InputError
from npu_backend.files import VERSION, finished, write_whole
from npu_backend.layer.attention import Stages, as_arrays, attention_stages
from npu_backend.layer.case import FORMAT, RESULT, LayerCase, read_layer
from npu_backend.layer.experts import ROUTING, moe_stages
from npu_backend.layer.feed_forward import dense_stages
from npu_backend.layer.linear import OPERATORS
from npu_backend.provenance import host
from npu_backend.runner import check_device, under_torchrun


class LayerOutcome(NamedTuple):
    """What became of a case. Seconds are those of all its stages; None if it failed."""

    name: str
    is_moe: bool
    seconds: float | None
    result: str | None
    error: str | None = None


def operators_of(case: LayerCase) -> tuple[str, ...]:
    """Operators that the case needs."""
    fused = ("npu::npu_kv_rmsnorm_rope_cache",) if case.config.kv_lora_rank == LATENT else ()
    names = ["atb::npu_ring_mla", "npu::npu_rms_norm", "npu::npu_add_rms_norm", "npu::npu_interleave_rope", *fused]
    names += ["npu::npu_swiglu", *(ROUTING if case.is_moe else ())]
    names += [name for kind in sorted(set(case.kinds.values())) for name in OPERATORS[kind]]
    return tuple(dict.fromkeys(names))


def compute_layer(case: LayerCase, device: torch.device) -> Stages:
    """What every stage gave, by the names of docs/formats.md.

    Raises:
      InputError: what a wrapper refuses.
      RuntimeError: what an operator refuses.
    """
    with torch.no_grad():
        stages = attention_stages(case, device)
        (moe_stages if case.is_moe else dense_stages)(case, stages, device)
    return stages


def run_layers(cases: Path, results: Path, *, device: str) -> list[LayerOutcome]:
    """Compute all cases in a folder, or one file, that are not finished.

    Raises:
      InputError: before anything is computed.
    """
    if under_torchrun():
        raise InputError("layer computes on one device; start it without torchrun")
    read = [(path, read_layer(path)) for path in _paths(cases)]
    if results.exists() and not results.is_dir():
        raise InputError(f"{results} is no folder; results go into a folder")
    places = {case.name: results / f"{path.stem}.safetensors" for path, case in read}
    todo = {case.name for _, case in read if finished(places[case.name], case.digest, RESULT) is None}
    operators = tuple(dict.fromkeys(name for _, case in read for name in operators_of(case)))
    check_device(device, 1, operators)
    for _, case in read:
        _check_arithmetic(case, device)
    try:
        results.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=results):  # else a folder that cannot be written is only noticed after the computing
            pass
    except OSError as error:
        raise InputError(f"{results} cannot be made or written ({error.strerror}); choose another folder") from None
    return [_outcome(case, places[case.name], torch.device(device), case.name in todo) for _, case in read]


def _paths(cases: Path) -> list[Path]:
    if not cases.exists():
        raise InputError(f"{cases} does not exist; give a folder of layer cases or one case file")
    paths = sorted(cases.glob("*.safetensors")) if cases.is_dir() else [cases]
    if not paths:
        raise InputError(f"{cases} holds no case (*.safetensors of format {FORMAT})")
    return paths


def _check_arithmetic(case: LayerCase, device: str) -> None:
    """An NPU rounds as it does; exact arithmetic of what it rounds can be had of the CPU kernels only."""
    rounded = sorted({kind for kind in case.kinds.values() if kind in ("W8A8", "W4A8_DYNAMIC")})
    if device != "cpu" and case.arithmetic == "exact" and rounded:
        raise InputError(
            f"{case.name}: arithmetic is 'exact', but on {device} {' and '.join(rounded)} is computed as the vendor's "
            "kernels do; make the case with arithmetic 'vendor'"
        )


def _outcome(case: LayerCase, path: Path, device: torch.device, is_to_do: bool) -> LayerOutcome:
    if is_to_do:
        try:
            _compute_and_write(case, path, device)
        except (InputError, RuntimeError, OSError) as error:
            message = next(iter(str(error).splitlines()), type(error).__name__)
            return LayerOutcome(case.name, case.is_moe, None, None, message)
    about = finished(path, case.digest, RESULT)
    if about is None:
        return LayerOutcome(case.name, case.is_moe, None, None, "the result file has disappeared")
    return LayerOutcome(case.name, case.is_moe, about.get("seconds"), str(path))


def _compute_and_write(case: LayerCase, path: Path, device: torch.device) -> None:
    start = time.perf_counter()
    arrays = as_arrays(compute_layer(case, device))
    about = host(device) | {"operators": list(operators_of(case)), "seconds": time.perf_counter() - start}
    about["arithmetic"] = case.arithmetic if device.type == "cpu" else "vendor"
    metadata = {"format": RESULT, "version": VERSION, "name": case.name, "digest": case.digest, "backend": "npu"}
    write_whole(path, arrays, metadata | {"about": json.dumps(about)})
