"""The programs that are inspected, each lowered from shapes: the public function is what is compiled, not a copy.

`context_parallel_attention` checks its arguments and makes arrays of them, so it cannot be lowered itself; under
`jax.jit` it can, for then its arguments are traced. Arguments and results are sharded over their tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cpjax.attention import Attention
from cpjax.blocks.chosen import DEFAULT, block_of
from cpjax.errors import InputError
from cpjax.latent import HEADLESS, UpProjection, latent_attention_on_device
from cpjax.mask import Mask, Tokens
from cpjax.parallel import context_parallel_attention
from cpjax.partition.names import sequence_of
from cpjax.precision import precision_of

PROGRAMS = ("forward", "backward", "latent")
"""forward: the public function. backward: its value and derivatives. latent: MLA, the latent travels."""
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Shape:
    """What decides the program, besides the topology."""

    tokens: int
    heads: int = 16
    kv_heads: int | None = None
    """None: as many as heads."""
    head_dim: int = 192
    value_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = True
    partition: str = "zigzag"
    exchange: str = "ring"
    attend: str = DEFAULT
    in_partition_order: bool = False
    latent: int = 512
    """C, of the latent program only: what keys and values are made from."""
    rope: int = 64
    """R, of the latent program only: of head_dim, the part that all heads share."""


def check_program(program: str, shape: Shape) -> None:
    """Refuse what no topology has.

    Raises:
      InputError: an unknown program, dtype or block; a block that does not compute the program.
    """
    if program not in PROGRAMS:
        raise InputError(f"unknown program {program!r}; known are {', '.join(PROGRAMS)}")
    if shape.dtype not in DTYPES:
        raise InputError(f"dtype is {shape.dtype!r}; the TPU compiler takes {', '.join(DTYPES)}")
    if block_of(shape.attend).is_kernel and program == "latent":
        raise InputError(
            f"attend is {shape.attend!r}; a latent's keys and values are made inside the block, which only "
            f"{DEFAULT!r} does: leave attend or the latent out"
        )


def lowered(program: str, shape: Shape, devices: tuple[Any, ...]) -> jax.stages.Lowered:
    """A program for these devices, ready to compile.

    Raises:
      InputError: as `check_program`; shapes that the function refuses.
    """
    check_program(program, shape)
    mesh = Mesh(np.array(devices), ("cp",), axis_types=(AxisType.Auto,))
    return _latent(shape, mesh) if program == "latent" else _public(shape, mesh, program == "backward")


def _public(shape: Shape, mesh: Mesh, backward: bool) -> jax.stages.Lowered:
    kv_heads = shape.heads if shape.kv_heads is None else shape.kv_heads
    attention = partial(
        context_parallel_attention,
        mesh=mesh,
        partition=shape.partition,
        exchange=shape.exchange,
        attend=shape.attend,
        in_partition_order=shape.in_partition_order,
        mask=Mask(is_causal=shape.causal),
    )

    def gradients(query, key, value, cotangent):
        result, back = jax.vjp(lambda *inputs: attention(*inputs).out, query, key, value)
        return result, back(cotangent.astype(result.dtype))

    array = partial(_array, shape, mesh)
    inputs = [array(shape.heads, shape.head_dim), array(kv_heads, shape.head_dim), array(kv_heads, shape.value_dim)]
    if backward:
        return jax.jit(gradients).lower(*inputs, array(shape.heads, shape.value_dim))
    return jax.jit(lambda query, key, value: attention(query, key, value)).lower(*inputs)


def _latent(shape: Shape, mesh: Mesh) -> jax.stages.Lowered:
    if shape.exchange not in HEADLESS:
        raise InputError(
            f"exchange is {shape.exchange!r}; a latent has no heads to deal out, use one of {', '.join(HEADLESS)}"
        )
    if not shape.rope < shape.head_dim:
        raise InputError(f"rope is {shape.rope} of head_dim {shape.head_dim}; a part without rope must be left")
    attention = Attention(Mask(is_causal=shape.causal), shape.head_dim**-0.5, precision_of(None, np.dtype(shape.dtype)))
    one = sequence_of(shape.partition, mesh.size)
    one.order(shape.tokens)  # refuses what cannot be cut
    device = partial(
        latent_attention_on_device,
        attention=attention,
        axis_name="cp",
        exchange=shape.exchange,
        chunks=one.chunks_per_rank,
    )
    shards, nope = P(None, "cp"), shape.head_dim - shape.rope
    array, dtype = partial(_array, shape, mesh), np.dtype(shape.dtype)
    latents = [array(dims) for dims in (shape.latent, shape.rope)]
    whole = NamedSharding(mesh, P())
    weights = [
        jax.ShapeDtypeStruct((shape.latent, shape.heads, dim), dtype, sharding=whole) for dim in (nope, shape.value_dim)
    ]
    up: Any = UpProjection(*weights)  # pyright: ignore[reportArgumentType]
    place: Any = Tokens(*(array(dtype="int32") for _ in range(2)))
    specs = (shards, shards, shards, P(), shards, shards)
    program = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=shards))
    return program.lower(array(shape.heads, shape.head_dim), *latents, up, place, place)


def _array(shape: Shape, mesh: Mesh, *dims: int, dtype: str | None = None) -> jax.ShapeDtypeStruct:
    """`[1, T, dims…]`, its tokens over the ranks."""
    sharding = NamedSharding(mesh, P(None, "cp"))
    return jax.ShapeDtypeStruct((1, shape.tokens, *dims), np.dtype(dtype or shape.dtype), sharding=sharding)
