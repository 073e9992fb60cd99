"""The specification as a backend: attention in JAX, on as many simulated CPU devices as there are ranks."""

import numpy as np

from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.result import Result
from cpjax.mask import PAD, Mask, Tokens
from cpjax.partial import Partial
from cpjax.partition import Packed, SequencePartition
from cpjax.partition.cached import Cached
from cpjax.precision import Precision, profile
from cpjax.wording import counted


class Spec:
    """Every layout, in the profile that the case wants, `flash_fp16` otherwise."""

    def __init__(self, exchange: str = "ring"):
        """`exchange`: how keys meet queries in prefill; the ring, or what `cpjax.exchange.device.EXCHANGES` names."""
        self._exchange = exchange

    def supports(self, case: Case) -> str | None:
        """One text whose queries and keys are the same tokens; all packs and decodes that can be read."""
        tokens, keys, partition = case.query.shape[1], case.key.shape[1], case.partition
        if isinstance(partition, SequencePartition) and (tokens != keys or tokens % partition.chunk_count):
            return (
                f"{counted(tokens, 'query', 'queries')}, {counted(keys, 'key')}; both must be one multiple "
                f"of {partition.chunk_count}"
            )
        absent = [name for name in case.logit_options if name in ("alibi", "bias")]
        if absent:
            return f"{' and '.join(absent)}; the specification has none"
        wanted = self._precision(case)
        if isinstance(partition, Packed) and keys > tokens and wanted.carry != wanted.out:
            return f"a prefix in {wanted.name}; it is merged into what was rounded to {wanted.out} already"
        return None

    def prepare(self, cases: list[Case]) -> None:
        """Devices for the largest case: their number is fixed once JAX has begun."""
        from cpjax.parallel import simulate_devices

        simulate_devices(max(case.cp for case in cases))

    def run(self, case: Case) -> Result:
        """Attention by the exchange; of layout decode, by an exchange of partials.

        Raises:
          InputError: JAX was used before, and has fewer devices than the case has ranks.
        """
        import jax

        precision = self._precision(case)
        partition = case.partition
        is_decode = isinstance(partition, Cached)
        if is_decode:
            out, lse = _decode(case, precision, partition)
        else:
            out, lse = (self._pack if isinstance(partition, Packed) else self._prefill)(case, precision)
        order = self._exchange if self._exchange in ("ring", "gather") else "unknown"
        about = {"jax": jax.__version__, "device": f"cpu ({jax.local_device_count()} simulated)"}
        return Result(
            "spec",
            precision.name,
            "ascending" if is_decode else order,
            np.asarray(out).astype(np.float16),
            np.asarray(lse).astype(np.float32),
            about,
        )

    def _precision(self, case: Case) -> Precision:
        return profile(case.precision.get("spec", "flash_fp16"))

    def _prefill(self, case: Case, precision: Precision, **places) -> Partial:
        from cpjax.parallel import context_parallel_attention, cp_mesh

        tokens = case.query.shape[1]  # behind these are the prefixes of a pack
        return context_parallel_attention(
            case.query,
            case.key[:, :tokens],
            case.value[:, :tokens],
            **(places or {"q_tokens": case.q_tokens, "kv_tokens": case.kv_tokens}),
            mesh=cp_mesh(case.cp),
            partition=case.partition if isinstance(case.partition, SequencePartition) else "zigzag",
            exchange=self._exchange,
            mask=Mask(is_causal=case.is_causal, window=case.window),
            scale=case.scale,
            softcap=case.softcap,
            sink=case.sink,
            precision=precision,
        )

    def _pack(self, case: Case, precision: Precision) -> Partial:
        """Each request on its own, then its prefix as one block, merged last."""
        import jax

        from cpjax.attention import Attention
        from cpjax.blocks.tiles import attend
        from cpjax.partial import merge

        segment = np.asarray(case.q_tokens.segment)[0]
        lengths = tuple(int((segment[start:stop] != PAD).sum()) for start, stop in Packed(case.cp).bounds(segment))
        own, tokens = self._prefill(case, precision, lengths=lengths), len(segment)
        if case.key.shape[1] == tokens:
            return own
        mask = Mask(is_causal=case.is_causal, window=case.window)
        attention = Attention(mask, case.scale, precision, case.softcap)
        key, value = case.key[:, tokens:], case.value[:, tokens:]
        cached = Tokens(*(np.asarray(x)[:, tokens:] for x in case.kv_tokens))
        prefix = jax.jit(attend, static_argnums=5)(case.query, key, value, case.q_tokens, cached, attention)
        return merge(own, prefix, precision)


def _decode(case: Case, precision: Precision, partition: Cached) -> Partial:
    from cpjax.decode import context_parallel_decode
    from cpjax.parallel import cp_mesh

    return context_parallel_decode(
        case.query,
        case.key,
        case.value,
        case.q_tokens,
        case.kv_tokens,
        partition=partition,
        mesh=cp_mesh(case.cp),
        mask=Mask(is_causal=case.is_causal, window=case.window),
        scale=case.scale,
        softcap=case.softcap,
        sink=case.sink,
        precision=precision,
    )
