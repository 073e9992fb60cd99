"""The judge knows every profile: the specification passes in the one it computes in, and in no narrower one."""

from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from cpjax.crosscheck import judge
from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.parallel import context_parallel_attention, cp_mesh
from cpjax.precision import PROFILES
from cpjax.trial.emulators import PROFILES as ARITHMETIC
from cpjax.trial.emulators import attend
from cpjax.trial.problem import Problem

NARROWER = {
    "float64": "float32",
    "float32": "flash_fp16",
    **{name: "flash_bf16" for name in PROFILES if PROFILES[name].out == "float16"},
    # Of the profiles in BF16 none is coarser than the one whose scores are, too.
    **{name: "eager_bf16" for name in PROFILES if PROFILES[name].out == "bfloat16" and name != "eager_bf16"},
}
"""Profile → a coarser one, whose results it must refuse."""


@cache
def computed(profile: str, seed: int, cp: int):
    """Inputs and the specification's result, 64 tokens of two heads; the trial's where the specification has none."""
    rng = np.random.default_rng(seed)
    precision = PROFILES[profile]
    inputs = [rng.standard_normal((1, 64, 2, 32)).astype(FORMATS[precision.out].dtype) for _ in range(3)]
    if precision.is_normalised:
        return inputs, attend(Problem(*inputs, 32**-0.5, is_causal=True, cp=cp), ARITHMETIC[profile], "ring")
    with jax.enable_x64():
        result = context_parallel_attention(*inputs, mesh=cp_mesh(cp), precision=profile)
    return inputs, [np.asarray(x) for x in result]


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@given(seed=st.integers(0, 2**32 - 1), cp=st.sampled_from([1, 2, 4]))
@examples(0.15)
def test_the_specification_passes_in_the_profile_it_computes_in(profile, seed, cp):
    inputs, (out, lse) = computed(profile, seed, cp)
    verdict = judge(*inputs, out, lse, cp=cp, precision=profile, order="ring")
    assert verdict.passed, verdict.reasons
    assert verdict.z < 1.3
    assert verdict.hard_ratio <= 1


@pytest.mark.parametrize(("profile", "narrower"), NARROWER.items())
@given(seed=st.integers(0, 2**32 - 1))
@examples(0.05)
def test_a_result_in_a_coarser_profile_is_refused(profile, narrower, seed):
    inputs, (out, lse) = computed(narrower, seed, 2)
    finer = [x.astype(FORMATS[PROFILES[profile].out].dtype) for x in inputs]
    assert not judge(*finer, out, lse, cp=2, precision=profile, order="ring").passed
