"""Which tensors of a checkpoint an array comes from: one, or the same one of many experts, stacked.

A `Source` stands for an array as a PartitionSpec does: `ModelWeights` of sources say what is to be read.
"""

from typing import Any, NamedTuple

import jax

from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.names import shapes, weights_of
from cpjax.deepseek.quantized import DynamicW4A8, DynamicW8A8, StaticW8A8
from cpjax.errors import InputError


class Source(NamedTuple):
    """Where an array comes from: one tensor, or the same one of many experts, stacked."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    is_stacked: bool = False
    dtype: str | None = None
    """None: that in which the model is computed."""
    is_column: bool = False
    """In the file it is `[n, 1]`, and `[n]` here."""


def sources_of(config: DeepseekConfig, quantized: dict[str, str], stored: dict[str, tuple[int, ...]]) -> Any:
    """A `ModelWeights` of sources; a quantised weight is a NamedTuple of them, as `cpjax.deepseek.quantized` has it.

    Args:
      quantized: weights that are quantised, and their kinds.
      stored: shapes of all tensors, as they are in the files.

    Raises:
      InputError: experts of a layer that are not quantised in the same way.
    """
    wanted = shapes(config)

    def source(name: str) -> Any:
        kind = quantized.get(name)
        return Source((name,), wanted[name]) if kind is None else _quantized_source(stored, name, kind)

    return weights_of(config, source, stacked)


def _quantized_source(stored: dict[str, tuple[int, ...]], name: str, kind: str) -> Any:
    """What is stored of a quantised weight."""
    prefix = name.removesuffix("weight")

    def one(last: str, dtype: str = "float32", *, is_column: bool = False) -> Source | None:
        shape = stored.get(prefix + last)
        if shape is None:
            return None
        return Source((prefix + last,), shape[:1] if is_column else shape, dtype=dtype, is_column=is_column)

    weight, scale = one("weight", "int8"), one("weight_scale", is_column=True)
    if kind == "W8A8":
        numbers = (one(last) for last in ("input_scale", "input_offset", "deq_scale"))
        return StaticW8A8._make((weight, *numbers, one("quant_bias", "int32")))
    if kind == "W8A8_DYNAMIC":
        return DynamicW8A8._make((weight, scale))
    return DynamicW4A8._make((weight, scale, one("scale_bias"), one("weight_scale_second")))


def stacked(sources: list[Any]) -> Any:
    """The same weight of many experts.

    Raises:
      InputError: they are not quantised in the same way.
    """
    is_source = lambda x: isinstance(x, Source)  # noqa: E731
    alike = {(jax.tree.structure(x, is_leaf=is_source), *_shapes_of(x)) for x in sources}
    if len(alike) > 1:
        name = jax.tree.leaves(sources[0], is_leaf=is_source)[0].names[0]
        raise InputError(
            f"the experts beside {name} are not all quantised in the same way; they are computed as one, quantise them "
            "alike"
        )

    def stack(*same: Source) -> Source:
        first = same[0]
        return first._replace(
            names=tuple(one.names[0] for one in same), shape=(len(same), *first.shape), is_stacked=True
        )

    return jax.tree.map(stack, *sources, is_leaf=is_source)


def _shapes_of(source: Any) -> list[tuple[int, ...]]:
    return [one.shape for one in jax.tree.leaves(source, is_leaf=lambda x: isinstance(x, Source))]
