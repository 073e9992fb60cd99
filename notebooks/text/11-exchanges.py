# ---
# jupyter:
#   jupytext:
#     formats: notebooks//ipynb,notebooks/text//py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11. Exchanges other than the ring
#
# In the ring, keys and values travel and queries stay. There are other ways in which the queries of one rank can meet
# the keys of another. This chapter asks of each: what travels, how many bytes, and who waits?
#
# `cpjax.exchange` has six, one in a file, with one signature. The tokens are sharded as before: each of cp ranks holds
# 1/cp of them, T tokens, N query heads, K key/value heads, all of head_dim H.
#
# | exchange | what happens |
# | --- | --- |
# | `ring` | keys and values travel to the next rank, cp − 1 times |
# | `ring_both_ways` | they travel in both directions at once; half as many steps |
# | `gather` | every rank receives all keys and values before it begins; MindIE does this in prefill |
# | `pass_query` | queries travel with the result they have so far; keys and values stay |
# | `all_to_all` | each rank gives away its tokens of most heads, and receives all tokens of N/cp heads (Ulysses) |
# | `all_to_all_ring` | all-to-all inside a node, a ring between nodes |

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)  # simulated devices; before JAX is first used

from cpjax.attention import Attention
from cpjax.dense import dense_attention
from cpjax.errors import InputError
from cpjax.exchange.device import EXCHANGES, attention_on_device
from cpjax.mask import Mask, tokens
from cpjax.partition.schedule import schedule
from cpjax.plan.hardware import device_of, devices
from cpjax.precision import profile

plt.rcParams.update({"figure.dpi": 80, "font.size": 10})
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"]
HATCHES = ["", "//", "", "\\\\", "", ".."]


def program(exchange, cp, inner=2, precision="float64"):
    """An exchange over cp devices, for shards in the order of the ranks. `inner` devices are a node."""
    two_axes = exchange == "all_to_all_ring"
    shape, names = ((cp // inner, inner), ("node", "inner")) if two_axes else ((cp,), ("cp",))
    mesh = jax.make_mesh(
        shape, names, devices=jax.devices()[:cp], axis_types=(jax.sharding.AxisType.Auto,) * len(shape)
    )
    attention = Attention(Mask(is_causal=True), scale=0.25, precision=profile(precision))
    axis_name = names if two_axes else "cp"
    device = partial(attention_on_device, attention=attention, axis_name=axis_name, exchange=exchange)
    shards = jax.P(None, axis_name)
    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=shards, out_specs=shards))


# %% [markdown]
# ## One result
#
# All six give the same `out`, which is that of one device. Only the order of the merges differs, and with it the last
# bits:

# %%
CP, T = 4, 32
rng = np.random.default_rng(0)
query, key, value = rng.standard_normal((3, 1, T, 8, 16))
place = tokens(1, T)
dense = dense_attention(query, key, value, place, place, mask=Mask(is_causal=True), scale=0.25)
for exchange in EXCHANGES:
    error = float(np.abs(program(exchange, CP)(query, key, value, place, place).out - dense.out).max())
    assert error < 1e-14
    print(f"{exchange:16} differs from dense attention by less than 1e-14")

# %% [markdown]
# ## Who meets whom, and when
#
# Rows are the ranks whose queries are computed, columns those whose keys are. The colour is the rank that *computes*
# the block, the number is the step. With `pass_query` a row has several colours: its queries visited these ranks. With
# `all_to_all` each rank computes everything, for its own heads; so all four have the same picture, and here you see
# that of rank 0.

# %%
figure, axes = plt.subplots(1, 5, figsize=(12, 3.5), sharey=True)
for axis, exchange in zip(axes, ("ring", "ring_both_ways", "gather", "pass_query", "all_to_all"), strict=True):
    blocks = schedule(exchange, "contiguous", CP, is_causal=False)
    for rank, calls in reversed(list(enumerate(blocks))):
        for call in calls:
            corner = call.kv_chunk, call.query_chunk
            axis.add_patch(plt.Rectangle(corner, 1, 1, fc=COLOURS[rank], ec="white", hatch=HATCHES[rank]))
            box = {"fc": "white", "ec": "none", "pad": 1.5}
            axis.text(corner[0] + 0.5, corner[1] + 0.5, call.step, ha="center", va="center", bbox=box)
    ticks = np.arange(CP) + 0.5
    axis.set(xlim=(0, CP), ylim=(CP, 0), aspect="equal", title=exchange, xlabel="keys of rank")
    axis.set_xticks(ticks, range(CP))
    axis.set_yticks(ticks, range(CP))
axes[0].set_ylabel("queries of rank")
handles = [plt.Rectangle((0, 0), 1, 1, fc=COLOURS[r], ec="white", hatch=HATCHES[r]) for r in range(CP)]
figure.legend(handles, [f"rank {r} computes" for r in range(CP)], loc="lower center", ncols=CP, frameon=False)
figure.tight_layout(rect=(0, 0.1, 1, 1))


# %% [markdown]
# ## How many bytes
#
# Formulas are easily wrong, so we count in the program itself: JAX can show what a program will do before it runs
# (`jax.make_jaxpr`). The function below adds up what one device receives, loops included. Places of tokens (a position
# and a segment, 8 bytes a token) are counted too; they are small beside the rest.

# %%
def received(jaxpr, sizes):
    """Bytes that one device receives; `sizes` are those of the mesh's axes, by name."""
    total = 0
    for line in jaxpr.eqns:
        name, said = line.primitive.name, line.params
        axis = said.get("axis_name")
        ranks = int(np.prod([sizes[one] for one in (axis if isinstance(axis, tuple) else (axis,)) if one in sizes]))
        given = sum(x.aval.size * x.aval.dtype.itemsize for x in line.invars if hasattr(x.aval, "shape"))
        if name == "ppermute":
            total += given
        elif name == "all_to_all":
            total += given * (ranks - 1) // ranks  # one part stays
        elif name.startswith("all_gather"):
            total += given * (ranks - 1)
        for inner in jax.tree.leaves(said, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                times = said["length"] if name == "scan" else 1
                total += times * received(getattr(inner, "jaxpr", inner), sizes)
    return total


def bytes_of(exchange, cp, heads, kv_heads, queries, keys=None, head_dim=128):
    """Bytes that a rank receives in one layer, FP16 inputs; `queries` new tokens, `keys` tokens in all."""
    q = jax.ShapeDtypeStruct((1, queries, heads, head_dim), jnp.float16)
    kv = jax.ShapeDtypeStruct((1, keys or queries, kv_heads, head_dim), jnp.float16)
    places = [tokens(1, n) for n in (queries, keys or queries)]
    one = program(exchange, cp, precision="flash_fp16")
    sizes = {"cp": cp, "node": cp // 2, "inner": 2}
    return received(jax.make_jaxpr(one)(q, kv, kv, *places).jaxpr, sizes)


SETTINGS = {
    "prefill, 32 query and 32 key heads": (8, 32, 32, 8192),
    "prefill, 32 query and 8 key heads": (8, 32, 8, 8192),
    "512 new tokens, 8,192 cached": (8, 32, 8, 512, 8192),
}
counted = {name: {x: bytes_of(x, *how) / 1e6 for x in EXCHANGES} for name, how in SETTINGS.items()}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), sharey=True)
for axis, (name, numbers) in zip(axes, counted.items(), strict=True):
    bars = axis.barh(list(numbers), list(numbers.values()), color=COLOURS[0])
    axis.bar_label(bars, fmt="%.3g", padding=3)
    axis.set(title=name, xlabel="MB received by a rank", xlim=(0, 1.2 * max(numbers.values())))
axes[0].invert_yaxis()
figure.tight_layout()

# %% [markdown]
# What the bars say, for cp ranks (each number is for one layer and one rank, in numbers of 2 bytes unless said):
#
# | exchange | received |
# | --- | --- |
# | `ring`, `ring_both_ways`, `gather` | (cp − 1)/cp · T · K · 2H: all keys and values but one's own |
# | `pass_query` | (cp − 1)/cp · t · N · H for t queries, and results in float32, cp times: t · N · (H + 1) · 4 bytes |
# | `all_to_all` | (cp − 1)/cp² · (T · N · H + T · K · 2H), and the results on the way back |
#
# All-to-all moves the least, because every rank gives each other rank only what this one needs: 1/cp of its heads. With
# few key heads (grouped-query attention) keys and values are cheap, and the ring receives hardly more. With a long
# cached prefix and few new tokens, queries are cheap: `pass_query` receives fewer bytes than the ring, although its
# results are float32. All-to-all would receive fewer still, but it moves the cached keys to other ranks for each new
# chunk, and it needs enough heads.

# %%
few = counted["512 new tokens, 8,192 cached"]
assert few["pass_query"] < few["ring"]
ring = (8 - 1) / 8 * 8192 * (8 * 2 * 128 * 2 + 8) / 1e6  # keys and values in FP16; a place is 8 bytes
assert abs(counted["prefill, 32 query and 8 key heads"]["ring"] - ring) < 1e-6
print(f"ring, 32 query and 8 key heads: {ring:.1f} MB, as the formula says")

# %% [markdown]
# ## Who waits
#
# Bytes are not all. What counts is what can be done *while* they travel:
#
# - **ring**: the shard of the next step travels while this one is computed. It is hidden if a step takes longer than a
#   transfer ([chapter 0](00-why-split.ipynb) has the chart).
# - **ring_both_ways**: the same bytes over two directions of the links; each transfer carries half of what a step
#   computes.
# - **gather**: nothing can begin before all is there, so nothing is hidden, unless the gather itself is cut in pieces.
#   In return it is one collective, which uses all links of a node at once; and every rank needs memory for all keys and
#   values.
# - **pass_query**: a result must be complete before it can be sent on, so the way of the results is not hidden.
# - **all_to_all**: like gather, nothing is hidden, but there are fewer bytes. N and K must be multiples of cp.
#
# How long a layer takes follows from the bytes, the links, and the time of attention. In a node of eight Atlas 800I A2
# each NPU has a link to each other one: a ring uses one of the seven at a time, a collective uses all. A model, not a
# measurement; latencies are left out:

# %%
A2 = device_of("800i-a2", devices())
ONE, ALL = A2.ring_link_gb_s * 1e9, A2.all_links_gb_s * 1e9
cp = 8
data = {name: counted["prefill, 32 query and 8 key heads"][name] * 1e6 for name in EXCHANGES}
share = np.geomspace(0.1, 10, 41)  # time of all attention, over the time of the ring's transfers
base = data["ring"] / ONE
attention = share * base
kv_step = base / (cp - 1)
lines = {
    "ring": attention + (cp - 1) * np.maximum(0, kv_step - attention / cp),
    "gather, one link": attention + base,
    "gather, all links": attention + data["gather"] / ALL,
    "all_to_all, all links": attention + data["all_to_all"] / ALL,
}
figure, axis = plt.subplots(figsize=(7.5, 3.8))
for (name, line), style, colour in zip(lines.items(), ("-", "--", "-.", ":"), COLOURS, strict=False):
    axis.loglog(share, line / attention, style, color=colour, lw=2, label=name)
axis.set(xlabel="time of attention / time of the ring's transfers", ylabel="time of the layer / time of attention")
axis.set_yticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
axis.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
axis.minorticks_off()
axis.grid(alpha=0.3)
axis.legend()
figure.tight_layout()
print(f"links: {ONE / 1e9:g} GB/s from a neighbour, {ALL / 1e9:g} GB/s from all of them")

# %% [markdown]
# At 1 the layer takes no longer than its attention. The ring is there where attention takes longer than the ring's
# transfers: to the right, for long prompts. To the left little is computed, and a collective over all links is faster
# than a ring over one of them.
#
# ## Exercises
#
# 1. For how many new tokens over a prefix of 8,192 does `pass_query` receive fewer bytes than the ring (cp 8, 32 query
#    and 8 key heads)?
# 2. What happens if you deal 4 key heads to 8 ranks with `all_to_all`? And with `all_to_all_ring`, with 2 ranks in a
#    node?
#
# <details>
# <summary>Solutions</summary>
#
# 1. A query with its result costs N · (2H + 4(H + 1)) bytes or so at each of cp − 1 transfers, a key with its value K ·
#    4H. With N = 4K that is about six times as much. So it pays below about 8,192 / 6 tokens.
# 2. It is refused, with the rule and the fix. Inside a node heads are dealt to 2 ranks only, so 4 heads are enough.
#
# The next cell computes both.
#
# </details>

# %%
news = 2 ** np.arange(6, 14)
passed, rung = ([bytes_of(name, 8, 32, 8, int(n), 8192) / 1e6 for n in news] for name in ("pass_query", "ring"))
figure, axis = plt.subplots(figsize=(6.5, 3))
axis.loglog(news, passed, "o-", color=COLOURS[0], label="pass_query")
axis.loglog(news, rung, "s--", color=COLOURS[1], label="ring")
axis.set_xticks(news, [f"{n:,}" for n in news])
axis.minorticks_off()
axis.set(xlabel="new tokens, over 8,192 keys in all", ylabel="MB received by a rank")
axis.grid(alpha=0.3)
axis.legend()
figure.tight_layout()
assert passed[list(news).index(1024)] < rung[0] < passed[list(news).index(2048)]

try:
    bytes_of("all_to_all", 8, 32, 4, 8192)
except InputError as error:
    print("all_to_all with 4 key heads and 8 ranks:", str(error).split(";")[0])
print(f"all_to_all_ring with the same: {bytes_of('all_to_all_ring', 8, 32, 4, 8192) / 1e6:.1f} MB")

# %% [markdown]
# Previous: [10. One token's way through a DeepSeek model](10-one-token.ipynb) · [Contents](../docs/README.md#the-book) · Next: [12. The backward ring](12-backward-ring.ipynb)
