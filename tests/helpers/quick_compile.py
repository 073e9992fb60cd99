"""Programs of the tests are compiled in a quarter of the time: each runs a few times only, and most of the CPU of the
tests that use JAX was spent in the compiler.

XLA is told to leave out what makes programs fast. What they compute follows from their text all the same, but where a
program lets it keep float32 inside a fused loop, it fuses less. So the tests of roundings bear the mark `optimized`:
they run what users run. So do commands that tests start as processes of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import compiler

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Found one by one: nine programs of the ring backwards took 7.2 seconds of CPU without and 1.5 with them."""

_is_optimized = False


def install() -> None:
    """From now on, on CPUs, unless a program brings options of its own."""
    real = compiler.get_compile_options

    def quick(*of: Any, env_options_overrides: dict | None = None, backend: Any = None, **more: Any) -> Any:
        if not _is_optimized and backend is not None and backend.platform == "cpu":
            env_options_overrides = OPTIONS | (env_options_overrides or {})
        return real(*of, env_options_overrides=env_options_overrides, backend=backend, **more)

    compiler.get_compile_options = quick


@contextmanager
def optimized() -> Iterator[None]:
    """Programs as users compile them; none is taken over from before, nor kept."""
    global _is_optimized
    jax.clear_caches()
    _is_optimized = True
    yield
    _is_optimized = False
    jax.clear_caches()
