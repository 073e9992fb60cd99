"""Correct results that no emulator of the trial made: PyTorch's kernel, the JAX ring, the NPU backend's operator."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from cpjax.crosscheck import judge
from cpjax.mask import Mask
from cpjax.parallel import context_parallel_attention, cp_mesh
from npu_backend.operators import Partial, ring_mla_block
from npu_backend.schedule import blocks, chunk_count, held_chunks


class Case(NamedTuple):
    """Queries and keys of the same tokens."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    is_causal: bool


DATA = ("normal", "flat", "peaked", "mean", "sink")


def case(
    data: str, *, length: int, heads: int, dims: tuple[int, int], dtype: str, is_causal: bool, kv_heads: int = 0
) -> Case:
    rng = np.random.default_rng(len(data))
    query = rng.standard_normal((1, length, heads, dims[0])) * {"flat": 0.05, "peaked": 6.0}.get(data, 1.0)
    key = rng.standard_normal((1, length, kv_heads or heads, dims[0]))
    value = rng.standard_normal((1, length, kv_heads or heads, dims[1])) + (3.0 if data == "mean" else 0.0)
    if data == "sink":
        query[..., 0], key[..., 0] = 4.0, -4.0
        key[:, 0, :, 0] = 4.0
    return Case(*(x.astype(dtype) for x in (query, key, value)), is_causal)


def fused(c: Case) -> tuple[np.ndarray, np.ndarray]:
    """`scaled_dot_product_attention`'s CPU kernel, and the lse that it returns besides."""
    query, key, value = (torch.from_numpy(x).transpose(1, 2) for x in c[:3])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, c.is_causal)
    public = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=c.is_causal)
    assert torch.equal(out, public)
    return out.transpose(1, 2).numpy(), lse.transpose(1, 2).numpy()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 96, 700])
def test_pytorchs_fused_kernel_in_float32(length, is_causal, data):
    c = case(data, length=length, heads=2, dims=(64, 64), dtype="float32", is_causal=is_causal)
    out, lse = fused(c)
    verdict = judge(*c[:3], out, lse, is_causal=is_causal, layout="contiguous", precision="float32")
    assert verdict.passed, verdict.reasons


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 96, 700])
def test_pytorchs_fused_kernel_in_float16(length, is_causal, data):
    """FP16 probabilities, float32 otherwise: flash_fp16, of one chunk; but for its exponential, see below."""
    c = case(data, length=length, heads=2, dims=(64, 64), dtype="float16", is_causal=is_causal)
    verdict = judge(*c[:3], fused(c)[0], is_causal=is_causal, layout="contiguous", precision="flash_fp16")
    forgiven = {"scale"} if exponential_error() > 1e-6 and data == "flat" else set()
    assert set(verdict.failed_tests) <= forgiven, verdict.reasons


def exponential_error() -> float:
    """Largest relative error of exp(−x) in the FP16 kernel, 0 < x < 2, read from the lse of keys with equal logits."""
    x = np.linspace(0, 2, 41).astype(np.float16)
    query, key = np.zeros((1, 41, 1, 64), np.float16), np.zeros((1, 64, 1, 64), np.float16)
    query[0, :, 0, 0], key[0, 1:, 0, 0] = 8 * x, -1
    lse = fused(Case(query, key, key, False))[1].astype(np.float64).ravel()
    return float(np.abs((np.exp(lse) - 1) / 63 / np.exp(-x.astype(np.float64)) - 1).max())


def test_the_judge_sees_that_pytorchs_float16_kernel_approximates_the_exponential():
    """Its vectorised FP16 path computes exp to about 8e-5; lse shows it."""
    error = exponential_error()
    if error < 1e-6:
        pytest.skip(f"this processor's path has an exact exponential: it is off by {error:.1e} only")
    assert error < 2e-4
    for data in ("normal", "flat"):
        c = case(data, length=700, heads=2, dims=(64, 64), dtype="float16", is_causal=False)
        verdict = judge(*c[:3], *fused(c), is_causal=False, layout="contiguous", precision="flash_fp16")
        assert "lse spread" in verdict.failed_tests


@pytest.mark.parametrize("precision", ["float32", "flash_fp16", "ring_mla_fp16"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_specifications_ring(is_causal, data, precision):
    c = case(data, length=96, heads=4, dims=(64, 32), dtype="float16", is_causal=is_causal, kv_heads=2)
    mask = Mask(is_causal=is_causal)
    result = context_parallel_attention(*c[:3], mesh=cp_mesh(4), mask=mask, precision=precision)
    out, lse = np.asarray(result.out), np.asarray(result.lse)
    verdict = judge(*c[:3], out, lse, is_causal=is_causal, cp=4, precision=precision, order="ring")
    assert verdict.passed, verdict.reasons


def npu_ring(c: Case, cp: int) -> tuple[np.ndarray, np.ndarray]:
    """The NPU backend's schedule and operator, all ranks one after the other in this process."""
    query, key, value = ([torch.from_numpy(p) for p in np.split(x, chunk_count(cp), axis=1)] for x in c[:3])
    carried: dict[int, Partial] = {}
    for rank in range(cp):
        for step in range(cp):
            for block in blocks(rank, step, cp, is_causal=c.is_causal):
                q, k = block.query_chunk, block.kv_chunk
                assert q in held_chunks(rank, cp)
                previous = None if block.first else carried[q]
                triangle = block.mask == "triu"
                scale = c.query.shape[-1] ** -0.5
                carried[q] = ring_mla_block(
                    query[q], key[k], value[k], is_causal=triangle, scale=scale, previous=previous
                )
    parts = [carried[chunk] for chunk in range(chunk_count(cp))]
    return torch.cat([p.out for p in parts], dim=1).numpy(), torch.cat([p.lse for p in parts], dim=1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_npu_backends_ring(is_causal, data, cp):
    c = case(data, length=160, heads=2, dims=(192, 128), dtype="float16", is_causal=is_causal)
    out, lse = npu_ring(c, cp)
    verdict = judge(*c[:3], out, lse, is_causal=is_causal, cp=cp, precision="ring_mla_fp16", order="ring")
    assert verdict.passed, verdict.reasons


def test_a_wrong_block_in_the_npu_ring_is_seen():
    """The same path with one block computed twice: the test above would not pass whatever came out."""
    c = case("normal", length=160, heads=2, dims=(192, 128), dtype="float16", is_causal=True)
    changed = c._replace(key=np.concatenate([c.key[:, 1:2], c.key[:, 1:]], axis=1))
    out, lse = npu_ring(changed, 2)
    verdict = judge(*c[:3], out, lse, is_causal=True, cp=2, precision="ring_mla_fp16", order="ring")
    assert not verdict.passed
