"""One machine for all tests: eight simulated devices, hypothesis profiles, and strict dtypes."""

import os
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, Phase, settings

jax.config.update("jax_num_cpu_devices", 8)  # before JAX is first used
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Data is drawn freely, shapes from grids: a new shape costs a compilation, which a deadline would take for slowness.
settings.register_profile(
    "ci", derandomize=True, database=None, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("dev", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", parent=settings.get_profile("dev"), max_examples=1000)
# For a mutant it is enough to know that a test fails; shrinking takes longer than finding.
settings.register_profile("mutants", parent=settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_report_header() -> str:
    """How many examples each property gets, unless it says otherwise itself."""
    return f"hypothesis: profile {settings.get_current_profile_name()}, {settings().max_examples} examples a property"


def pytest_runtest_teardown() -> None:
    """Forget compiled programs in time: each maps memory, and at the 65,531st mapping of a process XLA dies."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def pools():
    """A persistent pool of processes of the NPU backend for each cp; they start when they are first used."""
    from npu_backend.workers import Workers

    found = {cp: Workers(cp, timeout=60) for cp in (1, 2, 3, 4)}
    yield found
    for workers in found.values():
        workers.close()
