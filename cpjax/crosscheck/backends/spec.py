"""The specification as a backend: ring attention in JAX, on as many simulated CPU devices as there are ranks."""

import contextlib

import numpy as np

from cpjax.crosscheck.case import Case
from cpjax.crosscheck.result import Result
from cpjax.precision import profile


class Spec:
    """Self-attention of layout zigzag, in the profile that the case wants, `flash_fp16` otherwise."""

    def supports(self, case: Case) -> str | None:
        """Layout zigzag only."""
        if case.layout != "zigzag":
            return f"layout {case.layout!r}; it runs cases of layout zigzag only"
        if case.query.shape[1] != case.key.shape[1] or case.query.shape[1] % (2 * case.cp):
            return f"{case.query.shape[1]} queries, {case.key.shape[1]} keys; both must be one multiple of 2·cp"
        return None

    def prepare(self, cases: list[Case]) -> None:
        """Devices for the largest case: their number is fixed once JAX has begun."""
        import jax

        with contextlib.suppress(RuntimeError):  # JAX has begun; cp_mesh says what to do if there are too few devices
            jax.config.update("jax_num_cpu_devices", max(case.cp for case in cases))

    def run(self, case: Case) -> Result:
        """Ring attention.

        Raises:
          InputError: JAX was used before, and has fewer devices than the case has ranks.
        """
        import jax

        from cpjax.mask import Mask
        from cpjax.parallel import context_parallel_attention, cp_mesh

        precision = case.precision.get("spec", "flash_fp16")
        out, lse = context_parallel_attention(
            case.query,
            case.key,
            case.value,
            case.q_tokens,
            case.kv_tokens,
            mesh=cp_mesh(case.cp),
            mask=Mask(is_causal=case.is_causal, window=case.window),
            scale=case.scale,
            precision=profile(precision),
        )
        about = {"jax": jax.__version__, "device": f"cpu ({jax.local_device_count()} simulated)"}
        return Result(
            "spec", precision, "ring", np.asarray(out).astype(np.float16), np.asarray(lse).astype(np.float32), about
        )
