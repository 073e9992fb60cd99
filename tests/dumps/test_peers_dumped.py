"""judge-dump on what real peers hand over: it says what they compute, and in which precision."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from cpjax.cli import app

torch = pytest.importorskip("torch", reason="PyTorch is one of the peers")

ROUNDED = {"of_torch": "probabilities rounded to", "of_jax": "probabilities divided by their sum and rounded to"}
"""PyTorch's fused kernel rounds p as the factor of v, JAX the softmax itself."""


def says(peer, dtype: str) -> str:
    """A precision that the result is said to be consistent with; the others cannot be told apart from it."""
    if dtype == "float32":
        return "consistent with float32 throughout"
    return f"float32 scores, {ROUNDED[peer.__name__]} {dtype}, out rounded once to {dtype}"


def inputs(dtype, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((1, 256, 2, 64)).astype(np.float32) for _ in range(3)]
    return [x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype) for x in arrays]


def of_torch(arrays, dtype):
    tensors = [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)).transpose(1, 2) for x in arrays]
    out = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    return out.transpose(1, 2).float().numpy().astype(arrays[0].dtype)


def of_jax(arrays, dtype):
    with jax.numpy_dtype_promotion("standard"):  # the peer promotes on its own
        return np.asarray(jax.nn.dot_product_attention(*(jnp.asarray(x) for x in arrays), is_causal=True))


def judged(folder, arrays, out, scale=0.125):
    for name, x in zip(("query", "key", "value", "out"), (*arrays, out), strict=True):
        save_file({"x": np.ascontiguousarray(x)}, folder / f"{name}.safetensors")
    words = [w for name in ("query", "key", "value", "out") for w in (f"--{name}", str(folder / f"{name}.safetensors"))]
    said = CliRunner().invoke(app, ["judge-dump", *words, "--scale", str(scale), "--causal", "--layout-of", "bsnd"])
    return said.exit_code, " ".join(said.output.split())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("peer", [of_torch, of_jax])
def test_a_peer_is_right_and_its_precision_is_named(tmp_path, peer, dtype):
    arrays = inputs(dtype)
    code, said = judged(tmp_path, arrays, peer(arrays, dtype))
    assert code == 0, said
    assert "causal attention, 2 heads on 2; consistent with" in said, said
    assert says(peer, dtype) in said, said


@pytest.mark.parametrize("peer", [of_torch, of_jax])
def test_a_peer_asked_with_another_scale_is_wrong_and_the_factor_is_named(tmp_path, peer):
    arrays = inputs("float16")
    code, said = judged(tmp_path, arrays, peer(arrays, "float16"), scale=0.1)
    assert code == 1
    # They took their default.
    assert "the scale is 1/√64, that of a head_dim of 64: 1.25 times the stated one" in said, said


@pytest.mark.parametrize("peer", [of_torch, of_jax])
def test_a_factor_that_has_no_name_is_told(tmp_path, peer):
    arrays = inputs("float16")
    code, said = judged(tmp_path, arrays, peer([2 * arrays[0], *arrays[1:]], "float16"))
    assert code == 1
    (factor,) = re.findall(r"the scale is (\S+) times the stated one", said)
    # Fitted to FP16 outputs: their spacing is 2^-11, some thousand of them are averaged.
    assert abs(float(factor) / 2 - 1) < 1e-4, said


def test_one_rounding_at_the_end_is_told_from_rounded_probabilities(tmp_path):
    arrays = inputs("float16")
    exact = of_torch([x.astype(np.float32) for x in arrays], "float32").astype(np.float16)
    code, said = judged(tmp_path, arrays, exact)
    assert code == 0, said
    assert "consistent with float32 throughout, out rounded once to float16" in said, said


RING = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
def work(rank, folder):
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    query, key, value = (torch.load(f"{folder}/{x}.pt").chunk(2, dim=1)[rank].contiguous() for x in "qkv")
    out = ring_flash_attn(query, key, value, causal=True, bucket_size=64, ring_reduce_col=True).contiguous()
    parts = [torch.empty_like(out) for _ in range(2)]
    dist.all_gather(parts, out)
    if rank == 0:
        torch.save(torch.cat(parts, 1), f"{folder}/o.pt")
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
"""


@pytest.mark.process
def test_ring_attention_pytorch_over_gloo_is_right_in_float32_throughout(tmp_path):
    pytest.importorskip("ring_attention_pytorch", reason="pip install --no-deps ring-attention-pytorch einops")
    arrays = inputs("float32")
    for name, x in zip("qkv", arrays, strict=True):
        torch.save(torch.from_numpy(x), tmp_path / f"{name}.pt")
    (tmp_path / "ring.py").write_text(RING)
    subprocess.run([sys.executable, tmp_path / "ring.py", tmp_path], check=True, timeout=120)
    code, said = judged(tmp_path, arrays, torch.load(tmp_path / "o.pt").numpy())
    assert code == 0, said
    assert "consistent with float32 throughout" in said, said
