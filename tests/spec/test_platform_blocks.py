"""Blocks that are kernels of a platform: judged as any other result, and refused where they cannot compute.

Splash runs here in Pallas's interpret mode. cuDNN cannot run here; its program is lowered for CUDA, and no more.
"""

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import AxisType

from cpjax import Mask, cp_mesh
from cpjax.blocks.chosen import BLOCKS
from cpjax.crosscheck import judge
from cpjax.dense import dense_attention
from cpjax.errors import InputError
from cpjax.mask import tokens
from cpjax.parallel import context_parallel_attention

RUN = 128


def inputs(length, dtype="float32", heads=(2, 1), dims=(64, 64), batch=1, seed=0):
    """Query, key, value: grouped heads unless it is said otherwise."""
    rng = np.random.default_rng(seed)
    shapes = [(heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1])]
    return [rng.standard_normal((batch, length, *shape)).astype(jnp.dtype(dtype)) for shape in shapes]


def judged(arrays, cp, attend="splash", causal=True, partition="zigzag", exchange="ring", **how):
    """The verdict on what the public function gives."""
    result = context_parallel_attention(
        *arrays, mesh=cp_mesh(cp), attend=attend, mask=Mask(causal), partition=partition, exchange=exchange, **how
    )
    precision = BLOCKS["splash"].precisions[arrays[0].dtype.name]
    assert result.out.dtype == arrays[0].dtype
    assert result.lse.dtype == np.float32
    order = "ring" if exchange == "ring" else "gather" if exchange == "gather" else "unknown"
    return judge(
        *arrays, *result, is_causal=causal, cp=cp, partition=partition, precision=precision, order=order, **how
    )


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_splash_passes_the_judge_in_float32(cp, causal):
    verdict = judged(inputs(2 * cp * RUN), cp, causal=causal)
    assert verdict.passed, verdict
    assert verdict.max_error < 5e-6, "rounded as float32 is, and no more"


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["zigzag", "contiguous"])
def test_splash_passes_the_judge_in_bfloat16(partition):
    """192/128 as DeepSeek-V3, and a scale that is no power of two: scale · q is rounded, as the profile says."""
    verdict = judged(inputs(512, "bfloat16", dims=(192, 128)), 2, partition=partition, scale=0.1352)
    assert verdict.passed, verdict


@pytest.mark.parametrize("exchange", ["ring_both_ways", "gather", "pass_query"])
def test_splash_in_other_exchanges(exchange):
    assert judged(inputs(512), 2, exchange=exchange).passed


def test_rows_of_a_batch_and_a_sink():
    """A sink is one more partial result, which no block sees."""
    arrays, sink = inputs(2 * RUN, batch=2), np.float32([0.5, -3.0])
    out, lse = context_parallel_attention(*arrays, mesh=cp_mesh(1), attend="splash", sink=sink)
    exact = dense_attention(*arrays, tokens(2, 256), tokens(2, 256), mask=Mask(), scale=0.125, sink=sink)
    np.testing.assert_allclose(out, exact.out, atol=3e-6, rtol=0)
    np.testing.assert_allclose(lse, exact.lse, atol=3e-6, rtol=0)


# Broken on purpose --------------------------------------------------------------------------------------------------


def broken(monkeypatch, attend=None):
    """Splash under another name, for what was compiled under a name is kept."""
    monkeypatch.setitem(BLOCKS, "broken", replace(BLOCKS["splash"], attend=attend or BLOCKS["splash"].attend))
    return judged(inputs(4 * RUN), 2, "broken")


def test_a_pair_of_runs_that_is_dropped_fails(monkeypatch):
    def without_a_pair(query, key, value, q_tokens, kv_tokens, attention):
        found = BLOCKS["splash"].attend(query, key, value, q_tokens, kv_tokens, attention)
        lost = (q_tokens.position // RUN == 2) & (kv_tokens.position[:, :1] // RUN == 1)
        return found._replace(lse=jnp.where(lost[..., None], -jnp.inf, found.lse))

    verdict = broken(monkeypatch, without_a_pair)
    assert not verdict.passed
    assert "chunk 1 (of rank 1) never entered query chunk 2" in verdict.diagnosis[0]


@pytest.mark.parametrize("shift", [1, -1])
def test_a_mask_that_is_shifted_by_one_fails(shift, monkeypatch):
    shifted = partial(splash_attention_mask.CausalMask, offset=shift)
    monkeypatch.setattr(splash_attention_mask, "CausalMask", shifted)
    assert not broken(monkeypatch).passed


def test_an_lse_to_another_base_fails(monkeypatch):
    def base_2(query, key, value, q_tokens, kv_tokens, attention):
        found = BLOCKS["splash"].attend(query, key, value, q_tokens, kv_tokens, attention)
        return found._replace(lse=found.lse / np.float32(np.log(2)))

    assert not broken(monkeypatch, base_2).passed


# As a function of JAX -----------------------------------------------------------------------------------------------


def test_the_derivative_is_that_of_the_readable_block():
    arrays = inputs(4 * RUN)

    def loss(attend, query, key, value, scale):
        out, lse = context_parallel_attention(query, key, value, mesh=cp_mesh(2), scale=scale, attend=attend)
        return (out**2).sum() + lse.sum()

    found, expected = (
        jax.jit(jax.grad(partial(loss, attend), (0, 1, 2, 3)))(*arrays, np.float32(0.13))
        for attend in ("splash", "tiles")
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_inside_a_shard_map_of_the_caller():
    """Which must not check over which axes arrays vary: JAX's kernels do not say it."""
    arrays, runs = inputs(4 * RUN), jax.P(None, "cp")

    def program(**how):
        device = lambda *x: context_parallel_attention(*x, attend="splash")  # noqa: E731
        return jax.jit(jax.shard_map(device, mesh=cp_mesh(2), in_specs=runs, out_specs=runs, **how))(*arrays)

    whole = context_parallel_attention(*arrays, mesh=cp_mesh(2), attend="splash")
    np.testing.assert_array_equal(program(check_vma=False).out, whole.out)
    with pytest.raises(InputError, match="check_vma=False"):
        program()


def test_on_an_explicit_mesh_with_heads_cut():
    arrays = inputs(4 * RUN, heads=(4, 2))
    typed = jax.make_mesh((2, 2), ("cp", "tp"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    with jax.set_mesh(typed):
        found = context_parallel_attention(*arrays, head_axis="tp", attend="splash")
    assert judge(*arrays, *found, cp=2, precision="float32", order="ring").passed


# Refused ------------------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(attend="flash"), "unknown attend 'flash'; known are tiles, splash, cudnn"),
    (dict(attend="cudnn", dtype="float16"), "devices of gpu, and the mesh is of cpu"),
    (dict(attend="cudnn"), "takes arrays of float16 or bfloat16, and these are of float32"),
    (dict(dtype="float16"), "takes arrays of bfloat16 or float32, and these are of float16"),
    (dict(dtype="bfloat16", precision="flash_bf16"), "precision is 'flash_bf16'; .* computes 'scaled_query_bf16'"),
    (dict(precision="ring_mla_fp16"), "precision is 'ring_mla_fp16'; .* computes 'float32'"),
    (dict(softcap=30.0), "softcap is 30.0; .* computes none"),
    (dict(mask=Mask(window=100)), "window is 100; .* computes none"),
    (dict(dims=(80, 64)), "head_dim is 80; .* multiples of 64 up to 256"),
    (dict(dims=(64, 320)), "value's head_dim is 320; .* multiples of 64 up to 256"),
    (dict(partition="striped"), "partition is 'striped', whose shards are no runs"),
    (dict(length=1000), "1000 tokens make 4 runs of 250; .* multiple of 128: pad the text to 1024 tokens"),
    (dict(length=0), "0 tokens make 4 runs of 0; .* pad the text to 512 tokens"),
    (
        dict(exchange="all_to_all"),
        "exchange is 'all_to_all', which brings every run .* use one of ring, ",
    ),
    (dict(q_tokens=tokens(1, 512)), "q_tokens are given; .* leave q_tokens out"),
    (dict(kv_tokens=tokens(1, 512)), "kv_tokens are given; .* leave kv_tokens out"),
    (dict(lengths=(512,)), "lengths are given; .* one text"),
]


@pytest.mark.parametrize(("how", "why"), REFUSED, ids=[re.sub(r"\W+", "-", why)[:40] for _, why in REFUSED])
def test_what_it_cannot_compute_is_refused_before_any_work(how, why, monkeypatch):
    def never(*_):
        raise AssertionError("it began to work")

    monkeypatch.setattr("cpjax.parallel._run", never)
    shape = {word: said for word, said in how.items() if word in ("dtype", "dims", "length")}
    asked = {word: said for word, said in how.items() if word not in shape}
    arrays = inputs(**{"length": 512, "heads": (2, 2)} | shape)
    with pytest.raises(InputError, match=why):
        context_parallel_attention(*arrays, **{"mesh": cp_mesh(2), "attend": "splash"} | asked)


# cuDNN, lowered -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("causal", "masks"), [(True, {"CAUSAL": 12, "NO_MASK": 12}), (False, {"NO_MASK": 12})])
def test_cudnn_is_lowered_for_cuda(causal, masks, monkeypatch):
    """Own shard, loop and last shard, of two runs of queries and two of keys each; and a kernel for every mask."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)  # none is here, and JAX asks
    monkeypatch.setitem(BLOCKS, "lowered", replace(BLOCKS["cudnn"], platforms=("cpu",)))
    program = jax.jit(partial(context_parallel_attention, mesh=cp_mesh(4), attend="lowered", mask=Mask(causal)))
    query, key, value = (jax.ShapeDtypeStruct((1, 64, n, 64), jnp.float16) for n in (4, 2, 2))
    traced = program.trace(query, key, value)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$fmhaSoftmax\(.*", text)
    assert Counter(found for call in calls for found in re.findall(r"mask_type\W+22: \W+22(\w+)\\22", call)) == masks
    for call in calls:
        assert re.search(r"fmha_scale\W+22: 1.0", call), "queries are scaled before"
        assert re.search(r"-> \(tensor<1x4x8x64xf16>, tensor<1x4x8xf32>, ", call), "lse is float32"
    assert not re.search(r"tensor<1x(4x8|8x4)xf32>\) -> tensor<1x(4x8|8x4)xf16>", text), "and stays so"
    assert {str(x.dtype) for x in jax.tree.leaves(traced.out_info)} == {"float16", "float32"}
