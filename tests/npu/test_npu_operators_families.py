"""Three families, one answer: in exact arithmetic they agree to float32 rounding, block by block and merged."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from npu_strategies import problem
from oracle import dense
from strategies import examples

import npu_backend  # noqa: F401 (declares the operators)
from npu_backend import vendor
from npu_backend.emulation import arithmetic
from npu_backend.emulation.mode import Mode, is_exact
from npu_backend.errors import InputError
from npu_backend.operators import (
    Carried,
    Partial,
    fused_infer_block,
    fusion_block,
    fusion_update,
    merge_partials,
    ring_mla_block,
)

CASES = (
    st.integers(0, 2**32 - 1),
    st.sampled_from(("normal", "needle", "mean")),
    st.sampled_from(((1, 1), (2, 1), (4, 2))),
    st.integers(2, 90),
)


def blocks(query, key, value, **options):
    """The same block by each family."""
    return {
        "ring_mla": ring_mla_block(query, key, value, **options),
        "fused_infer": fused_infer_block(query, key, value, **options),
        "fusion TND": fusion_block(query, key, value, **options).partial(),
        "fusion SBH": fusion_block(query, key, value, layout="SBH", **options).partial(),
    }


@examples(0.3)
@given(*CASES, st.booleans())
def test_blocks_agree_in_exact_arithmetic_to_float32_rounding(seed, kind, heads, length, is_causal):
    p = problem(seed, kind, heads, (length,), length, is_causal=is_causal, cp=1)
    out, lse = dense(*p[:3], scale=p.scale, visible=p.visible)
    with arithmetic("exact"):
        got = blocks(*map(torch.from_numpy, p[:3]), is_causal=is_causal, scale=p.scale)
    size = np.abs(p.value.astype(np.float64)).max()
    # The third family hands over the maximum m and the sum l, each rounded to float32: lse = m + ln l has an error of
    # u|m| from m, u from l, 2u of the logarithm, which is computed to a unit in the last place, and one of the sum.
    key = np.repeat(p.key.astype(np.float64), heads[0] // heads[1], axis=2)
    score = p.scale * np.einsum("btnh,bsnh->btns", p.query.astype(np.float64), key)
    m = np.where(p.visible[:, :, None], score, -np.inf).max(axis=-1)
    lse_error = 2.0**-24 * (abs(m) + 1 + 2 * abs(lse - m) + abs(lse))
    for name, partial in got.items():
        # Each is float64 rounded once, so any two differ at most where a float32 rounding decides.
        slack = 2.0**-23 * size
        low, high = (torch.from_numpy(out + sign * slack).half() for sign in (-1, 1))
        assert bool(((low <= partial.out) & (partial.out <= high)).all()), name
        assert (abs(partial.lse.double().numpy() - lse) <= lse_error).all(), name


@examples(0.3)
@given(*CASES, st.integers(1, 89))
def test_merges_of_the_same_partials_agree_in_exact_arithmetic(seed, kind, heads, length, cut):
    """What is carried between blocks is FP16 by contract, so the merges are given the same partials."""
    p = problem(seed, kind, heads, (length,), length, is_causal=False, cp=1)
    query, key, value = map(torch.from_numpy, p[:3])
    cut = min(cut, length - 1)
    options = {"is_causal": False, "scale": p.scale}
    with arithmetic("exact"):
        early = fused_infer_block(query, key[:, :cut], value[:, :cut], **options)
        late = fused_infer_block(query, key[:, cut:], value[:, cut:], **options)
        carried = [Carried(x.out, x.lse, torch.ones_like(x.lse)) for x in (early, late)]
        merged = {
            "attention_update": merge_partials([early, late]),
            "update TND": fusion_update(*carried).partial(),
            "update SBH": fusion_update(*carried, layout="SBH").partial(),
        }
        ring = ring_mla_block(query, key[:, cut:], value[:, cut:], previous=early, **options)
    x = np.stack([early.lse.double().numpy(), late.lse.double().numpy()])
    lse = np.logaddexp(*x)
    weights = np.exp(x - lse)[..., None]
    out = (weights * np.stack([early.out.double().numpy(), late.out.double().numpy()])).sum(0)
    slack = 2.0**-21 * (1 + abs(lse).max()) * np.abs(p.value.astype(np.float64)).max()
    for name, got in merged.items():
        low, high = (torch.from_numpy(out + sign * slack).half() for sign in (-1, 1))
        assert bool(((low <= got.out) & (got.out <= high)).all()), name
        np.testing.assert_allclose(got.lse.double(), lse, rtol=2.0**-22, atol=2.0**-22, err_msg=name)
    # ring_mla merges its own block before anything is rounded: that is half a unit of the late out away.
    unit = np.spacing(np.abs(late.out.numpy()).astype(np.float16)).astype(np.float64)
    apart = abs(ring.out.double().numpy() - out)
    assert (apart <= 0.51 * unit + 0.51 * np.spacing(abs(out).astype(np.float16)).astype(np.float64) + slack).all()
    np.testing.assert_allclose(ring.lse.double(), lse, rtol=2.0**-22, atol=2.0**-22)


@pytest.mark.slow
@examples(0.25)
@given(*CASES)
def test_staged_and_exact_differ_and_exact_is_nearer(seed, kind, heads, length):
    p = problem(seed, "mean", heads, (length + 200,), length + 200, is_causal=False, cp=1)
    out, _ = dense(*p[:3], scale=p.scale, visible=p.visible)
    tensors = [torch.from_numpy(x) for x in p[:3]]
    staged = blocks(*tensors, is_causal=False, scale=p.scale)
    with arithmetic("exact"):
        exact = blocks(*tensors, is_causal=False, scale=p.scale)
    for name in staged:
        errors = [np.square(x[name].out.double().numpy() - out).mean() for x in (staged, exact)]
        assert errors[1] < errors[0], name


def test_arithmetic_is_staged_unless_asked_for_and_after():
    assert not is_exact()
    with arithmetic("exact"):
        assert is_exact()
        with arithmetic("staged"):
            assert not is_exact()
        assert is_exact()
    assert not is_exact()
    assert get_args(Mode) == ("staged", "exact")
    with pytest.raises(ValueError, match="'fast'; it is one of staged, exact"), arithmetic("fast"):
        pass


def test_nothing_but_a_cpu_has_kernels_of_ours():
    assert vendor.TORCH_NPU_PROBLEM == "torch_npu is not installed"
    meta = [torch.zeros(1, 4, 2, x, dtype=torch.float16, device="meta") for x in (192, 192, 128)]
    with pytest.raises(InputError, match=r"npu_fused_infer_attention_score_v2 cannot run on meta: torch_npu is not"):
        fused_infer_block(*meta, is_causal=False, scale=1.0)
    partial = Partial(*(torch.zeros(*x, device="meta") for x in ((1, 2, 1, 64), (1, 2, 1))))
    with pytest.raises(InputError, match="cannot run on meta"):
        vendor.require("npu::npu_attention_update", partial.out.device)


@examples(0.2)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.integers(0, 3))
def test_no_key_is_zero_and_minus_infinity_in_every_family_and_plus_infinity_never_leaves(seed, is_causal, count):
    """Fewer keys than queries: under a causal mask, which ends bottom-right here, the first queries see none."""
    rng = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, n, 2, x, generator=rng).half() for n, x in ((4, 192), (4, 192), (4, 128)))
    options = {"is_causal": is_causal, "scale": 0.1, "kv_lengths": (count,)}
    got = [fused_infer_block(query, key, value, **options), fusion_block(query, key, value, **options).partial()]
    if not is_causal:
        got.append(ring_mla_block(query, key, value, **options))
    blind = 4 - count if is_causal or not count else 0
    for partial in got:
        assert (partial.out[:, :blind] == 0).all()
        assert torch.isneginf(partial.lse[:, :blind]).all()
        assert partial.lse[:, blind:].isfinite().all()
        assert partial.out.isfinite().all()
