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
# # 0. Why split the context?
#
# A model on eight cards answers a prompt of 8,000 tokens. Why can the same eight cards not answer a prompt of a
# million? This chapter shows what grows with the length of the prompt, what context parallelism does about it, and what
# it costs.
#
# Words: a *token* is a piece of text. For each token, attention makes a *query*, a *key* and a *value*. A query is
# compared with the keys of all tokens before it; the result `out` is a weighted mean of their values. *Prefill* is the
# computation over the whole prompt, before the first new token. *cp* is the number of ranks that share the tokens of
# one prompt.
#
# The times and sizes of this chapter are **predicted** by the cost model of `cpjax plan`, not measured.
# [docs/plan.md](../docs/plan.md) has its formulas, and its error for each published time: often more than 15 %.

# %%
import inspect

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)  # simulated devices; before JAX is first used

import matplotlib.pyplot as plt
import numpy as np
from slider import slider

from cpjax.dense import dense_attention
from cpjax.exchange.ring import ring_attention
from cpjax.mask import Mask, tokens, visible
from cpjax.parallel import context_parallel_attention, cp_mesh
from cpjax.partition.schedule import schedule
from cpjax.plan.constants import frozen
from cpjax.plan.hardware import device_of, devices
from cpjax.plan.memory import USABLE, longest_prompt, memory
from cpjax.plan.model import model_of
from cpjax.plan.setting import Setting
from cpjax.plan.time import block_seconds, predict
from cpjax.plan.transfers import exposed_seconds, received_bytes

plt.rcParams.update({"figure.dpi": 80, "font.size": 10})
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]
GREY = "#bbbbbb"
LLAMA, H100 = model_of("Llama-3.1-405B"), device_of("h100", devices())
EFFICIENCIES = frozen()


def setting(cp, **options):
    """Llama-3.1 405B. Each cp rank is a node of eight H100, over which the heads are cut (tp 8)."""
    return Setting(LLAMA, H100, cp=cp, tp=8, **options)


# %% [markdown]
# ## What does not fit
#
# On a card there are the weights, whose size is fixed; the *cache*, which holds the keys and values of every token and
# layer; and the *activations*, which are the rows that are being computed. The last two grow with the number of tokens:

# %%
LENGTHS = 2 ** np.arange(13, 21)  # 8,192 to 1,048,576 tokens
NAMES = [f"{length // 1024:,}K" for length in LENGTHS]
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
for axis, cp in zip(axes, (1, 8), strict=True):
    parts = np.array([memory(setting(cp), int(length)) for length in LENGTHS]) / 1e9
    below = np.zeros(len(LENGTHS))
    for part, name, colour, hatch in zip(
        parts.T, ("weights", "cache: keys and values", "activations"), (GREY, *COLOURS[:2]), ("", "", "//"), strict=True
    ):
        axis.bar(range(len(LENGTHS)), part, bottom=below, color=colour, hatch=hatch, edgecolor="white", label=name)
        below += part
    axis.axhline(USABLE * H100.memory_gb, color="black", ls="--", label="usable memory of a card")
    axis.set(xticks=range(len(LENGTHS)), xticklabels=NAMES, xlabel="tokens in the prompt (K = 1,024)", ylim=(0, 310))
    axis.set_title(f"cp {cp}: {8 * cp} cards")
axes[0].set_ylabel("GB on a card")
axes[0].legend(loc="upper left", fontsize=9)
figure.tight_layout()
for cp in (1, 2, 4, 8):
    print(f"cp {cp}: the longest prompt that fits on {8 * cp:2} cards has {longest_prompt(setting(cp)):9,} tokens")

# %% [markdown]
# On one node a prompt of about 90,000 tokens is the end. More cards for the *heads* (a larger tp) would not help for
# long: the model has only 8 heads of keys and values. Context parallelism cuts the *tokens*: with cp ranks each card
# holds 1/cp of the cache and of the rows. The weights are on every rank again; that is its price in memory.
#
# ## The quadratic
#
# Also the time grows. The matrix products do the same for each token, so their time is proportional to the length. In
# attention each query meets the keys of all tokens before it: for T tokens these are T(T + 1)/2 pairs. Twice the length
# is four times the work:

# %%
found = {cp: [predict(setting(cp), EFFICIENCIES, int(length)) for length in LENGTHS] for cp in (1, 2, 4, 8)}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for field, style, colour, name in (
    ("products", "s--", COLOURS[3], "matrix products"),
    ("attention", "o-", COLOURS[0], "attention"),
    ("reductions", "x:", COLOURS[2], "sums over tp"),
):
    left.loglog(LENGTHS, [getattr(one, field) for one in found[1]], style, color=colour, label=name)
left.set(title="cp 1: where the time goes", ylabel="seconds")
for (cp, line), style, colour in zip(found.items(), ("o-", "s--", "x-.", "^:"), COLOURS, strict=True):
    right.loglog(LENGTHS, [one.seconds for one in line], style, color=colour, label=f"cp {cp}, {8 * cp} cards")
right.set(title="time to first token", ylabel="seconds")
for axis in (left, right):
    axis.set(xlabel="tokens in the prompt (K = 1,024)")
    axis.set_xticks(LENGTHS, NAMES)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
figure.tight_layout()
at = list(LENGTHS).index(131072)
print("131,072 tokens:", ", ".join(f"cp {cp} {line[at].seconds:.1f} s" for cp, line in found.items()))

# %% [markdown]
# Up to about 250,000 tokens the products take most of the time; beyond that, attention does. Both are divided by cp.
# The curves on the right are nearly parallel: cp times as many cards, and nearly 1/cp of the time.
#
# For the products this is easy, because a token's row needs no other row. Attention does need the others: **each query
# needs the keys and values of all tokens before it, and most of these are on other cards**. They must travel.
#
# ## The ring
#
# The ranks form a ring. At step 0 each rank computes with the keys and values that it holds, and at the same time sends
# them to the next rank. At step *s* rank *r* has those of rank *r* − *s*. Queries stay where they are. After cp steps
# every query has met every key, and nobody ever had more than two shards.
#
# Left: the circles are the ranks with their queries; a square is the keys and values that come from the rank of its
# colour. Middle: the causal mask, each block in the colour of the rank that computes it; what earlier steps computed is pale.
# Right: how much each rank has computed. Move the slider: in the last step the mask is full, every pair of query and key was
# computed once, and in each step all four ranks do the same amount of work. (On GitHub, and in JupyterLab until the cell is
# run, the pictures stand one below the other: [slider.py](slider.py) says why.)

# %%
CP, T = 4, 64
place = tokens(1, T)
seen = np.asarray(visible(Mask(is_causal=True), place, place))[0]
BLOCKS = schedule("ring", "zigzag", CP, is_causal=True)
CORNERS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])  # where the ranks stand: the next one is clockwise
CHUNK = T // (2 * CP)


def draw_ring(axis, step, moved=0.0, size=9):
    """The ranks, and the keys and values that each has at a step; `moved` of the way to the next rank."""
    turn = np.linspace(0, 2 * np.pi, 100)
    axis.plot(np.sin(turn), np.cos(turn), color=GREY, lw=1, zorder=0)
    for rank, (x, y) in enumerate(CORNERS):
        axis.add_patch(plt.Circle((x, y), 0.42, fc="white", ec=COLOURS[rank], lw=3))
        axis.text(x, y + 0.16, f"rank {rank}", ha="center", va="center", fontsize=size)
    for source in range(CP):
        angle = (source + step + moved) * np.pi / 2
        x, y = np.sin(angle), np.cos(angle) - 0.12
        axis.add_patch(plt.Rectangle((x - 0.3, y - 0.13), 0.6, 0.26, fc=COLOURS[source], ec="black", lw=0.6, zorder=3))
        ink = "black" if source == 3 else "white"
        axis.text(x, y - 0.01, f"k, v {source}", color=ink, ha="center", va="center", fontsize=size, zorder=4)
    axis.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal")
    axis.axis("off")


def draw_mask(axis, last):
    """The blocks of the causal mask that are computed up to a step."""
    picture = np.where(seen[..., None], 0.88, 1.0) * np.ones(3)
    for rank, blocks in enumerate(BLOCKS):
        colour = np.array(plt.matplotlib.colors.to_rgb(COLOURS[rank]))
        for block in (one for one in blocks if one.step <= last):
            rows, columns = (slice(c * CHUNK, (c + 1) * CHUNK) for c in (block.query_chunk, block.kv_chunk))
            shade = colour if block.step == last else 0.5 + 0.5 * colour
            picture[rows, columns] = np.where(seen[rows, columns, None], shade, picture[rows, columns])
    axis.imshow(picture)
    ticks = range(0, T + 1, 16)
    axis.set(xlabel="key", ylabel="query", xticks=ticks, yticks=ticks, xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5))


def draw_work(axis, last):
    """The pairs of query and key that each rank has computed up to a step, which is on top."""
    for rank, blocks in enumerate(BLOCKS):
        below = 0
        for step in range(last + 1):
            pairs = sum(
                seen[one.query_chunk * CHUNK : (one.query_chunk + 1) * CHUNK][
                    :, one.kv_chunk * CHUNK : (one.kv_chunk + 1) * CHUNK
                ].sum()
                for one in blocks
                if one.step == step
            )
            alpha = 1 if step == last else 0.5
            axis.bar(rank, pairs, bottom=below, color=COLOURS[rank], alpha=alpha, edgecolor="white")
            below += pairs
    whole = T * (T + 1) // 2
    axis.axhline(whole / CP, color="black", ls="--", lw=1)
    axis.text(CP / 2 - 0.5, whole / CP * 1.02, "a quarter of all pairs", ha="center", va="bottom")
    axis.set(xticks=range(CP), xlabel="rank", ylabel="pairs of query and key", ylim=(0, whole / CP * 1.15))


def frame(step, moved):
    """One picture, and its name."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.8), width_ratios=[1.1, 1.1, 0.8])
    draw_ring(left, step, moved)
    draw_mask(middle, step)
    draw_work(right, step)
    figure.tight_layout()
    return f"step {step}" + (", keys and values move on" if moved else ""), figure


moments = [(step, moved) for step in range(CP) for moved in (0, 0.5) if step < CP - 1 or moved == 0]
slider(frame(*moment) for moment in moments)

# %% [markdown]
# ## The loop
#
# What each device does is a few lines. This is their source, from [cpjax/exchange/ring.py](../cpjax/exchange/ring.py):
# `to_next` sends to the next rank, `attended` computes with one shard and merges the result into what is there. Sending
# stands *before* computing in `step`, so that both can be done at the same time:

# %%
source = inspect.getsource(ring_attention)
print(inspect.cleandoc(source[source.index("    def step(") :]))

# %% [markdown]
# It runs here on four simulated devices. The result is that of one device, up to the rounding of float64:

# %%
rng = np.random.default_rng(0)
query, key, value = rng.standard_normal((3, 1, T, 2, 8))
ring = context_parallel_attention(query, key, value, mesh=cp_mesh(CP), precision="float64")
dense = dense_attention(query, key, value, place, place, mask=Mask(is_causal=True), scale=8**-0.5)
error = float(np.abs(ring.out - dense.out).max())
assert error < 1e-14
print("the largest difference from attention on one device is below 1e-14")


# %% [markdown]
# ## Who waits for whom
#
# A transfer takes bytes / rate of the link. A step of attention takes work / speed. The transfer is hidden if it is not
# longer than the step beside it. Attention of a step grows with the square of the tokens of a rank, the transfer only
# with the tokens: **long prompts hide their transfers, short ones do not.** One layer, as predicted; each rank has a
# row for what it computes and a row for what it receives meanwhile:

# %%
def gantt(axis, one, length):
    """Draw a layer's attention: a rank's step begins when its keys are there and the step before is done."""
    blocks = block_seconds(one, EFFICIENCIES, length) * 1e3
    rate, latency = one.device.ring(one.cards)
    travel = (float(received_bytes(one, length)[0]) / (one.cp - 1) / rate + latency) * 1e3
    for rank, steps in enumerate(blocks):
        start = 0.0
        for step, took in enumerate(steps):
            axis.barh(rank - 0.2, took, 0.36, start, color=COLOURS[rank], ec="white")
            if took:
                ink = "black" if rank == 3 else "white"
                axis.text(start + took / 2, rank - 0.2, step, ha="center", va="center", fontsize=8, color=ink)
            if step < one.cp - 1:
                axis.barh(rank + 0.2, travel, 0.36, start, color=GREY, ec="white", hatch="///")
                start = max(start + took, start + travel)
    axis.set(yticks=range(one.cp), yticklabels=[f"rank {rank}" for rank in range(one.cp)], xlabel="milliseconds")
    axis.invert_yaxis()
    waits = exposed_seconds(one, blocks / 1e3, length)
    axis.set_title(
        f"{length:,} tokens, cp {one.cp}, {one.partition}: a rank waits {waits.max() * 1e3:.2f} ms", fontsize=10
    )


figure, axes = plt.subplots(1, 2, figsize=(11, 3.4))
for axis, length in zip(axes, (4096, 32768), strict=True):
    gantt(axis, setting(4), length)
handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[0]), plt.Rectangle((0, 0), 1, 1, fc=GREY, ec="white", hatch="///")]
names = ["computes (the number is the step; a colour for each rank)", "receives the keys and values of the next step"]
figure.legend(handles, names, loc="lower center", ncols=2, frameon=False)
figure.tight_layout(rect=(0, 0.08, 1, 1))


# %% [markdown]
# Left, the transfers are longer than the steps, and the gaps between the coloured bars are waiting. Right, they end
# before the step does, and no rank waits.
#
# ## Exercises
#
# 1. How many tokens does a prompt need so that a ring of 4 hides all its transfers? And a ring of 16? What stays the
#    same?
# 2. Above, the ranks hold the tokens in *zigzag* order. Draw the chart for `partition="contiguous"`, where each rank
#    holds one run of the text. Who works longest, and how much longer is the layer?
#
# <details>
# <summary>Solutions</summary>
#
# 1. What counts is the number of tokens *of a rank*, so a ring of 16 needs about four times as many tokens as a ring of
#    4.
# 2. The last rank: its queries see all tokens before them. It computes almost 2 − 1/cp times the mean, here 1.75 times,
#    and the layer takes as long as it does. [Chapter 3](03-layouts.ipynb) is about this.
#
# The next cell computes both.
#
# </details>

# %%
def hidden_from(cp):
    """The fewest tokens, to 1,024, at which no rank of a ring waits."""
    for length in range(1024, 2**20, 1024):
        one = setting(cp)
        if exposed_seconds(one, block_seconds(one, EFFICIENCIES, length), length).max() == 0:
            return length
    return None


fewest = {cp: hidden_from(cp) for cp in (4, 8, 16)}
for cp, length in fewest.items():
    print(f"cp {cp:2}: nothing waits from {length:7,} tokens on, {length // cp:,} of a rank")
assert 3 < fewest[16] / fewest[4] < 5

figure, axis = plt.subplots(figsize=(7, 2.8))
one = setting(4, partition="contiguous")
gantt(axis, one, 32768)
figure.tight_layout()
seconds = block_seconds(one, EFFICIENCIES, 32768).sum(axis=1)
print(f"the slowest rank takes {seconds.max() / seconds.mean():.2f} times the mean")
assert abs(seconds.max() / seconds.mean() - 1.75) < 0.01

# %% [markdown]
# [Contents](../docs/README.md#the-book) · Next: [1. The path](01-the-path.ipynb)
