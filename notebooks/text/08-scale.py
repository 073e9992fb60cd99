# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: notebooks//ipynb,notebooks/text//py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
# ---

# %% [markdown]
# # 8. On many chips
#
# What limits a ring of 4, 64 or 256 chips? This notebook draws it from compiled programs. `cpjax inspect` gave
# `context_parallel_attention` to the real TPU compiler, for chips that are not here, and read the schedule that came
# back; what it printed lies in `data/scale`. Nothing was run on a TPU: cycles are the compiler's estimates, and "needed on
# a link" follows from the bytes and the link's published rate ([docs/scale.md](../docs/scale.md)).

# %%
# %matplotlib inline
import json
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)

from cpjax.mesh import ring_order
from cpjax.parallel import context_parallel_attention, cp_mesh

folder = Path("data/scale") if Path("data/scale").exists() else Path("notebooks/data/scale")
found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
list(found)

# %% [markdown]
# ## One loop
#
# Every rank does the same cp − 1 times: send on the shard that it has, attend to it, take the one that arrives. So the program is
# a loop, and as large for many ranks as for few. Here, lowered for simulated devices, lines of the program, forwards and
# with derivatives:


# %%
def lines(cp, derivatives):
    x = jax.ShapeDtypeStruct((1, 16 * cp, 2, 8), jnp.float32)

    def attention(query, key, value):
        return context_parallel_attention(query, key, value, mesh=cp_mesh(cp)).out.sum()

    program = jax.grad(attention, (0, 1, 2)) if derivatives else attention
    return len(jax.jit(program).lower(x, x, x).as_text().splitlines())


sizes = np.array([[lines(cp, derivatives) for cp in (4, 6, 8)] for derivatives in (False, True)])
sizes

# %% [markdown]
# The compiler's text for TPUs says the same:

# %%
for one in found.values():
    print(f"{one['program']:9} {one['topology']:12} {one['cp']:4} chips {one['text_bytes'] / 1e6:5.2f} MB")

# %% [markdown]
# ## The order of the chips
#
# The chips of a v5e 8×8 are a torus. Numbered row by row, the step from the end of a row to the next one is more than one
# hop. `ring_order` goes round so that each step is one hop, the last one too.

# %%
Chip = namedtuple("Chip", "coords core_on_chip")
numbered = [Chip((x, y, 0), 0) for y in range(8) for x in range(8)]
figure, axes = plt.subplots(1, 2, figsize=(9, 4.2))
for ax, chips, title in zip(axes, (numbered, ring_order(numbered)), ("as numbered", "ring_order"), strict=True):
    x, y = np.array([chip.coords[:2] for chip in [*chips, chips[0]]]).T
    far = np.abs(np.diff(x)) + np.abs(np.diff(y)) > 1
    ax.plot(x, y, "o", color="0.6", zorder=3)
    for n, jump in enumerate(far):
        ax.plot(x[n : n + 2], y[n : n + 2], color="#ee6677" if jump else "#4477aa", ls="--" if jump else "-", lw=2)
    ax.set(
        title=f"{title}: {far.sum()} of {len(far)} steps are long",
        aspect="equal",
        xlabel="column",
        xticks=range(8),
        yticks=range(8),
    )
axes[0].set_ylabel("row")
plt.tight_layout()

# %% [markdown]
# (A torus closes its rows, so a dashed line is two hops and not eight: one to the next row, one round the row's end.) It matters: in the
# order as numbered the compiler sends every shard of the ring synchronously, and the chip waits. In the ring's order none.


# %%
def of_ring(one):
    """Its transfers of keys and values; the places of the tokens, which are small, are left out."""
    ring = [x for x in one["transfers"] if not x["sender"].startswith("moving")]
    return [x for x in ring if x["bytes"] > max(y["bytes"] for y in ring) / 100]


for name in ("forward-v5e-8x8-131072-given-order", "forward-v5e-8x8-131072"):
    runs = sum(x["runs"] for x in of_ring(found[name]))
    late = sum(x["runs"] for x in of_ring(found[name]) if not x["asynchronous"])
    print(f"{name:36} {runs} transfers of keys and values, {late} of them synchronous")

# %% [markdown]
# ## Is a transfer hidden?
#
# Asynchronous is not hidden. A shard needs a certain number of cycles on the link; what is computed between its start and its
# end must take at least as many. For each transfer of keys and values (and, backwards, of their derivatives):

# %%
rows = [(name, x) for name, one in found.items() if "given" not in name for x in of_ring(one)]
names = list(dict.fromkeys(name for name, _ in rows))
figure, ax = plt.subplots(figsize=(9, 4))
for name, x in rows:
    place = names.index(name)
    ax.plot(x["cycles_enclosed"] / 1e6, place, "o", color="#4477aa", ms=9, alpha=0.6)
    ax.plot(x["link_cycles"] / 1e6, place, "|", color="black", ms=22, mew=2)
ax.set(
    xscale="log", xlabel="million cycles: black needed on the link, blue computed meanwhile", yticks=range(len(names))
)
ax.set_yticklabels([name.replace("forward-", "").replace("-", " ") for name in names])
ax.invert_yaxis()
plt.tight_layout()

# %% [markdown]
# Blue is right of black everywhere: all of them are hidden, if the estimates and the published rate hold.
#
# ## What limits a ring: tokens per chip
#
# A step's attention is work of (tokens per chip)², its transfer has bytes of tokens per chip. So what is computed, over what is
# needed, grows with the tokens *per chip*, whatever the number of chips. The compiled programs:

# %%
points = []
for name, one in found.items():
    if one["program"] == "forward" and "given" not in name:
        worst = min(x["cycles_enclosed"] / x["link_cycles"] for x in of_ring(one))
        points.append((one["topology"], one["tokens"] // one["cp"], one["cp"], worst))
figure, ax = plt.subplots(figsize=(7, 4))
for topology, per_chip, cp, ratio in points:
    chip = topology.split(":")[0]
    ax.plot(per_chip, ratio, "o" if chip == "v5e" else "s", color={"v5e": "#4477aa", "v5p": "#ee6677"}[chip], ms=8)
    ax.annotate(f"  {topology}, cp {cp}", (per_chip, ratio), fontsize=8, va="top" if chip == "v5p" else "bottom")
ax.axhline(1, color="black", lw=1)
ax.set(xscale="log", yscale="log", xlabel="tokens per chip", ylabel="cycles enclosed / needed on the link")
ax.set(xlim=(1500, 40000), ylim=(0.5, 200))
ax.set_xticks(K := [2048, 4096, 8192, 16384], [f"{k:,}" for k in K])
ax.minorticks_off()
plt.tight_layout()
points

# %% [markdown]
# Below the black line a chip would wait. The least of these is a few times above it. A kernel that computes attention ten times faster than this XLA block (which is
# far from the chip's peak: [docs/scale.md](../docs/scale.md)) moves every point down by ten: then 2,048 tokens per chip would be too few.
#
# ## Memory
#
# A chip holds its queries, its shard, the shard that arrives, and the result: all of tokens per chip.

# %%
figure, ax = plt.subplots(figsize=(7, 3.6))
for name, one in found.items():
    if "given" in name:
        continue
    per_chip, peak = one["tokens"] // one["cp"], one["peak_bytes"] / 2**20
    ax.plot(per_chip, peak, "s" if one["program"] == "backward" else "o", color="#aa3377", ms=8)
    below = name == "forward-v5e-2x2-8192"
    ax.annotate(f"  {one['program']}, {one['topology']}", (per_chip, peak), fontsize=8, va="top" if below else "bottom")
ax.set(xscale="log", yscale="log", xlabel="tokens per chip", ylabel="MiB per chip, at the peak")
ax.set(xlim=(1500, 40000), ylim=(100, 4000))
ax.set_xticks(K, [f"{k:,}" for k in K])
ax.minorticks_off()
plt.tight_layout()


# %% [markdown]
# Backwards a chip needs more: derivatives are float32, and those of keys and values travel beside the shard.
#
# To ask for other shapes: `cpjax inspect --topology v5e:8x8 --tokens 1048576 --json` (`make inspect` makes the files of this notebook
# again, in `build/inspect`). What all this would mean in seconds for a deployment, `cpjax plan` predicts ([docs/plan.md](../docs/plan.md)).

# %% [markdown]
# ## Exercises
#
# 1. `ring_order` finds rings of one-hop steps without the links that close the torus. On 4 × 4 chips there is one. Why is there none on 3 × 3,
#    and can you find one there that does use the closing links?
# 2. Assume that cycles enclosed / needed grow in proportion to the tokens per chip. With how few tokens per chip would a v5e 2 × 2 begin to
#    wait, and with how few if attention were ten times faster?
#
# <details>
# <summary>Solutions</summary>
#
# 1. Colour the chips like a chessboard: each step changes the colour, so a closed way has an even number of steps, and nine is odd. With
#    the closing links: go along each row, and begin the next row where the last one ended.
# 2. The ratio at 2,048 tokens is 5.8, so it would be 1 at about 350 tokens, and at about 3,500 with a tenfold attention.
#
# The next cell computes both.
#
# </details>

# %%
def hops(a, b, side):
    """Links between two chips of a torus."""
    return sum(min(abs(x - y), side - abs(x - y)) for x, y in zip(a.coords[:2], b.coords[:2], strict=True))


def one_hop(ring, side):
    """How many steps of a closed way are one hop."""
    return sum(hops(a, b, side) == 1 for a, b in zip(ring, [*ring[1:], ring[0]], strict=True))


for side in (4, 3):
    ring = ring_order([Chip((x, y, 0), 0) for y in range(side) for x in range(side)])
    print(f"ring_order, {side} × {side}: {one_hop(ring, side)} of {side**2} steps are one hop")
by_hand = [Chip(((x + 2 * y) % 3, y, 0), 0) for y in range(3) for x in range(3)]
print(f"by hand,    3 × 3: {one_hop(by_hand, 3)} of 9 steps are one hop")
assert one_hop(by_hand, 3) == len(set(by_hand)) == 9

(ratio,) = (ratio for topology, _, _, ratio in points if topology == "v5e:2x2")
for faster in (1, 10):
    print(f"attention {faster:2} times as fast: a ring would wait below {2048 * faster / ratio:,.0f} tokens per chip")

# %% [markdown]
# Previous: [7. Break the ring in ten ways](07-break-it.ipynb) · [Contents](../docs/README.md#the-book) · Next: [9. What does this kernel compute?](09-fingerprint.ipynb)
