"""Global arrays in, global arrays out: split over a mesh, run an exchange on every device, join.

q[B, T, N, H]  ──layout──▶  q[B, T_cp, N, H]  ──shard_map──▶  out[B, T_cp, N, V]  ──inverse──▶  out[B, T, N, V]
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cpjax.exchange.ring import ring_attention
from cpjax.layout import chunks_per_rank, inverse, order
from cpjax.mask import Mask, Tokens, tokens
from cpjax.partial import Partial
from cpjax.precision import Precision, profile


def context_parallel_attention(
    query: Float[Array | np.ndarray, "B T N H"],
    key: Float[Array | np.ndarray, "B S K H"],
    value: Float[Array | np.ndarray, "B S K V"],
    q_tokens: Tokens | None = None,
    kv_tokens: Tokens | None = None,
    *,
    mesh: Mesh,
    axis_name: str = "cp",
    layout: str = "zigzag",
    mask: Mask | None = None,
    scale: float | None = None,
    precision: Precision | str = "flash_fp16",
) -> Partial:
    """Attention of a whole sequence, computed by the devices of `mesh[axis_name]` in a ring.

    Args:
      query, key, value: in natural (global) token order. T and S must be multiples of 2·cp for zigzag, of cp
        otherwise; fill up with pads (segment −1, see `cpjax.mask.tokens`).
      q_tokens, kv_tokens: places of the tokens; None: one request, positions 0, 1, 2, … (queries and keys then have
        equal lengths).
      mesh: a mesh with axis `axis_name` of type Auto; see `cp_mesh`.
      mask: None is causal.
      scale: None is 1/√H.
      precision: a profile or its name. float64 needs `jax_enable_x64`.

    Returns:
      `out` `[B, T, N, V]` and `lse` `[B, T, N]` in natural order, stored in the profile's compute dtype (`out` holds
      values of the profile's out format).

    Raises:
      ValueError: whatever does not fit, named with the rule and the fix, before anything is traced.
    """
    precision = profile(precision) if isinstance(precision, str) else precision
    mask = Mask() if mask is None else mask
    q_tokens, kv_tokens = check_inputs(query, key, value, q_tokens, kv_tokens)
    if axis_name not in mesh.shape:
        raise ValueError(f"the mesh has axes {tuple(mesh.shape)}, none is {axis_name!r}; name one with axis_name")
    if precision.compute == "float64" and not jax.config.read("jax_enable_x64"):
        raise ValueError("precision float64 needs float64 in JAX; call jax.config.update('jax_enable_x64', True) first")
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    return _on_mesh(mesh, axis_name, layout, mask, scale, precision)(query, key, value, q_tokens, kv_tokens)


def cp_mesh(cp: int) -> Mesh:
    """A mesh with the one axis "cp" over the first `cp` devices.

    Raises:
      ValueError: when JAX has fewer devices; on a CPU it says how to simulate more.
    """
    devices = jax.devices()
    if len(devices) < cp:
        raise ValueError(
            f"cp is {cp} but JAX sees {len(devices)} device(s); on a CPU call "
            f"jax.config.update('jax_num_cpu_devices', {cp}) before JAX is first used"
        )
    return jax.make_mesh((cp,), ("cp",), devices=devices[:cp], axis_types=(AxisType.Auto,))


def check_inputs(
    query: Array | np.ndarray,
    key: Array | np.ndarray,
    value: Array | np.ndarray,
    q_tokens: Tokens | None,
    kv_tokens: Tokens | None,
) -> tuple[Tokens, Tokens]:
    """The places of the tokens, made up where they are None, after checking that everything fits together.

    Raises:
      ValueError: shapes, head counts or places that disagree.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {x.shape}; it must be [batch, seq, heads, head_dim]")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"batch sizes differ: query {query.shape[0]}, key {key.shape[0]}, value {value.shape[0]}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key {key.shape} and value {value.shape} must agree in batch, length and heads")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query head_dim {query.shape[3]} and key head_dim {key.shape[3]} must be equal")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads cannot share {key.shape[2]} key/value heads evenly")
    if (q_tokens is None or kv_tokens is None) and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query length {query.shape[1]} and key length {key.shape[1]} differ, so positions must be given for both"
        )
    q_tokens = tokens(*query.shape[:2]) if q_tokens is None else q_tokens
    kv_tokens = tokens(*key.shape[:2]) if kv_tokens is None else kv_tokens
    for name, places, x in (("query", q_tokens, query), ("key", kv_tokens, key)):
        for field, array in zip(Tokens._fields, places, strict=True):
            if array.shape != x.shape[:2]:
                raise ValueError(f"{field}s of the {name} have shape {array.shape}; they must be {x.shape[:2]}")
    return q_tokens, kv_tokens


@partial(jax.jit, static_argnums=range(6))
def _run(mesh, axis_name, layout, mask, scale, precision, query, key, value, q_tokens, kv_tokens):
    cp = mesh.shape[axis_name]
    q_order, kv_order = order(layout, query.shape[1], cp), order(layout, key.shape[1], cp)
    q_inputs = jax.tree.map(lambda x: x[:, q_order], (query, q_tokens))
    kv_inputs = jax.tree.map(lambda x: x[:, kv_order], (key, value, kv_tokens))
    per_device = partial(
        ring_attention,
        axis_name=axis_name,
        mask=mask,
        scale=scale,
        precision=precision,
        chunks=chunks_per_rank(layout),
    )
    shard = P(None, axis_name)
    ring = jax.shard_map(per_device, mesh=mesh, in_specs=shard, out_specs=shard)
    result = ring(q_inputs[0], kv_inputs[0], kv_inputs[1], q_inputs[1], kv_inputs[2])
    return jax.tree.map(lambda x: x[:, inverse(q_order)], result)


def _on_mesh(*static):
    return lambda *arrays: _run(*static, *jax.tree.map(jnp.asarray, arrays))
