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
# # 3. Who holds what, and who works how much
#
# With context parallelism each rank holds 1/cp of the tokens: their queries, keys and values. Which ones is a choice, the *layout*.
# It changes no result. It decides who waits for whom.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Polygon, Rectangle
from slider import slider

from cpjax.partition import SEQUENCES, sequence_of
from cpjax.partition.schedule import schedule, show

CP, T = 4, 64
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222"]
first, *_, last = SEQUENCES
for layout in SEQUENCES:
    shards = sequence_of(layout, CP).order(16).reshape(CP, -1)
    print(f"{layout:11}" + "   ".join(f"rank {rank}: {' '.join(map(str, held))}" for rank, held in enumerate(shards)))

# %% [markdown]
# Left, the sequence as a strip, coloured by the rank that holds each of 64 tokens. Right, the work of each rank under a causal
# mask, where a query sees its own key and those before it: the keys that the rank's queries see, over the mean of all ranks.
# The slider ([slider.py](slider.py)) is cp:

# %%
def layouts(cp):
    """One picture: who holds what, and who works how much."""
    figure, axes = plt.subplots(3, 2, figsize=(11, 3.6), dpi=80, width_ratios=[4, 1], sharex="col")
    for (strip, work), layout in zip(axes, SEQUENCES, strict=True):
        shards = sequence_of(layout, cp).order(T).reshape(cp, -1)
        for rank, held in enumerate(shards):
            strip.bar(held, 1, width=1, align="edge", color=COLOURS[rank], label=f"rank {rank}", ec="white", lw=0.3)
        seen = (shards + 1).sum(axis=1)
        work.bar(range(cp), seen / seen.mean(), color=COLOURS[:cp])
        work.axhline(1, color="black", lw=0.8, ls="--")
        work.set(ylim=(0, 2.1), yticks=(0, 1, 2), xticks=range(cp), xlim=(-0.6, cp - 0.4))
        strip.set(xlim=(0, T), xticks=range(0, T + 1, 8), yticks=[])
        strip.set_ylabel(layout, rotation=0, ha="right", va="center")
    axes[1, 1].set_ylabel("work / mean")
    axes[-1, 0].set_xlabel("token")
    axes[-1, 1].set_xlabel("rank")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=8, frameon=False, columnspacing=1)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    return figure


slider((f"cp {cp}", layouts(cp)) for cp in (1, 2, 4, 8))

# %% [markdown]
# *Zigzag* cuts twice as many chunks as there are ranks and gives rank r the chunks r and 2·cp − 1 − r: one from the front, one
# from the back. MindIE and Megatron do this. *Striped* deals tokens out like cards
# ([arXiv 2311.09431](https://arxiv.org/abs/2311.09431)).
#
# ## The causal mask, cut in blocks
#
# In a ring, rank r meets its own keys in step 0, those of rank r − 1 in step 1, and so on. `cpjax.partition.schedule` lists, per rank, every call
# of a kernel: which chunk of queries, which chunk of keys, and what the mask leaves of that block (■ all of it, ◣ the triangle with its
# diagonal, ◺ without). Blocks of which the mask leaves nothing are not in the list.

# %%
for layout in SEQUENCES:
    print(layout)
    print(show(schedule("ring", layout, CP, is_causal=True)), "\n")

# %% [markdown]
# Drawn: rows are queries and columns keys, both in the order in which the ranks hold them, so that each quarter of an axis is one rank.
# The colour is the rank that computes, the number is the step; earlier steps are pale. Below, what each rank computes in this
# step. Where bars differ, the ranks with the shorter ones wait. The slider is the step:


# %%
def corners(block, x, y, side):
    """The visible part of a block whose upper left corner is (x, y); the axis of queries points down."""
    if block.mask == "none":
        return Rectangle((x, y), side, side)
    return Polygon([(x, y), (x, y + side), (x + side, y + side)])


def draw_blocks(axis, layout, last):
    """The mask cut in blocks, up to a step."""
    one = sequence_of(layout, CP)
    side = 1 / one.chunks_per_rank
    at = {chunk: rank + i * side for rank in range(CP) for i, chunk in enumerate(one.held_chunks(rank))}
    for rank, blocks in enumerate(schedule("ring", layout, CP, is_causal=True)):
        for block in blocks:
            x, y = at[block.kv_chunk], at[block.query_chunk]
            patch = corners(block, x, y, side)
            colour, alpha = (COLOURS[rank], 0.35 if block.step < last else 1) if block.step <= last else ("#eeeeee", 1)
            patch.set(facecolor=colour, edgecolor="white", lw=0.6, alpha=alpha)
            axis.add_patch(patch)
            shift = 0.5 if block.mask == "none" else 0.3
            place = x + shift * side, y + (1 - shift if block.mask != "none" else 0.5) * side
            ink = "white" if block.step == last and rank != 3 else "black"
            axis.text(*place, block.step, ha="center", va="center", color=ink, fontsize=8)
    ticks = np.arange(CP) + 0.5
    labels = [f"rank {rank}" for rank in range(CP)]
    axis.set(xlim=(0, CP), ylim=(CP, 0), aspect="equal", title=layout, xlabel="holder of the keys")
    axis.set(xticks=ticks, yticks=ticks)
    axis.set_xticklabels(labels, fontsize=7)
    axis.set_yticklabels(labels if layout == first else [], fontsize=7)


def draw_step(axis, layout, step):
    """What each rank computes in one step, in squares of one rank's queries and one rank's keys."""
    side = 1 / sequence_of(layout, CP).chunks_per_rank
    for rank, blocks in enumerate(schedule("ring", layout, CP, is_causal=True)):
        now = [block for block in blocks if block.step == step]
        axis.bar(rank + 0.5, sum(side**2 * (1 if block.mask == "none" else 0.5) for block in now), color=COLOURS[rank])
    ticks = np.arange(CP) + 0.5
    axis.set(xlim=(0, CP), ylim=(0, 1.1), yticks=(0, 0.5, 1), xticks=ticks)
    axis.set_xticklabels([f"rank {rank}" for rank in range(CP)], fontsize=7)


def steps(step):
    """One picture: the blocks up to a step, and the work in it."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.2), dpi=80, height_ratios=[4, 1])
    for (above, below), layout in zip(axes.T, SEQUENCES, strict=True):
        draw_blocks(above, layout, step)
        draw_step(below, layout, step)
    axes[0, 0].set_ylabel("queries, and who computes")
    axes[1, 0].set_ylabel("squares")
    figure.tight_layout()
    return figure


slider((f"step {step}", steps(step)) for step in range(CP))

# %% [markdown]
# Contiguous: rank 0 has one triangle and is done, rank 3 has three squares and a triangle. In zigzag every rank has in step 0 two
# triangles and a square, and in each later step two squares: nobody waits, in *no* step. Striped has a triangle everywhere, with
# or without its diagonal.
#
# ## Work
#
# Count the pairs (query, key) that each rank computes. A chunk of n tokens has n² pairs in a square, n(n + 1)/2 in a triangle,
# n(n − 1)/2 without the diagonal.


# %%
def work(layout, cp, tokens):
    """Pairs per rank and step, `[cp, steps]`."""
    n = tokens // sequence_of(layout, cp).chunk_count
    pairs = {"none": n * n, "triu": n * (n + 1) // 2, "strict": n * (n - 1) // 2}
    table = np.zeros((cp, cp), dtype=np.int64)
    for rank, blocks in enumerate(schedule("ring", layout, cp, is_causal=True)):
        for block in blocks:
            table[rank, block.step] += pairs[block.mask]
    return table


for layout in SEQUENCES:
    assert work(layout, CP, 4096).sum() == 4096 * 4097 // 2  # every pair of the mask, once

figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), dpi=80, sharey=True)
for axis, layout in zip(axes, SEQUENCES, strict=True):
    table = work(layout, CP, 4096) / (4096 * 4097 / 2)
    for step in range(CP):
        below = table[:, :step].sum(axis=1)
        axis.bar(range(CP), table[:, step], bottom=below, color=COLOURS[:CP], alpha=1 - 0.2 * step, edgecolor="white")
    axis.axhline(1 / CP, color="black", lw=0.8, ls="--")
    axis.set(title=layout, xlabel="rank", xticks=range(CP))
axes[0].set_ylabel("share of all pairs")
figure.tight_layout()

# %% [markdown]
# Each bar is cut into the ring's steps, the first at the bottom and darkest; the dashed line is the mean. A layer is done when the
# slowest rank is done, so what counts is max/mean:

# %%
SIZES, TOKENS = [1, 2, 4, 8, 16, 32, 64], 8192
print("cp         " + "".join(f"{cp:8}" for cp in SIZES))
curves = {}
for layout in SEQUENCES:
    totals = [work(layout, cp, TOKENS).sum(axis=1) for cp in SIZES]
    curves[layout] = [total.max() / total.mean() for total in totals]
    print(f"{layout:11}" + "".join(f"{ratio:8.4f}" for ratio in curves[layout]))

figure, axis = plt.subplots(figsize=(6, 3), dpi=80)
for (layout, ratios), style in zip(curves.items(), ("o-", "s-", "x--"), strict=True):
    axis.semilogx(SIZES, ratios, style, base=2, label=layout)
axis.set(xlabel="cp", ylabel="max / mean work of a rank", xticks=SIZES, title=f"{TOKENS:,} tokens, causal")
axis.set_xticklabels(SIZES)
axis.legend()
axis.grid(alpha=0.3)
figure.tight_layout()

# %% [markdown]
# Contiguous tends to 2, which is 2 − 1/cp: half of the machine is idle. Zigzag is even exactly. Striped is off by the diagonals,
# a share of about cp/tokens; but its blocks are triangles in every step, and a kernel must be good at these.
#
# ## What travels
#
# The keys and values of a token go round the ring cp − 1 times, once per layer. DeepSeek's latent attention has per token one vector of
# 512 numbers, from which all heads' keys and values are computed, and 64 numbers for the rotary part that all heads share.
# Sending these, and expanding them where they are used, costs a little arithmetic and saves most of the traffic:

# %%
LATENT, ROPE, NOPE, VALUE = 512, 64, 128, 128
numbers = {"latent": LATENT + ROPE}
for heads in (16, 128):
    numbers[f"{heads} heads, keys and values"] = heads * (NOPE + ROPE + VALUE)
    numbers[f"{heads} heads, rotary part shared"] = heads * (NOPE + VALUE) + ROPE
for name, n in numbers.items():
    mib = 2 * n * 32768 / 2**20
    print(f"{name:31} {n:7,} numbers a token   {n / numbers['latent']:5.1f} x   {mib:7,.0f} MiB, FP16, 32,768 tokens")

# %% [markdown]
# 576 numbers against 5,120 for 16 heads (what a rank has when 128 heads are divided over 8) and 40,960 for all 128. That is why
# MindIE's prefill can afford to gather all latents on every rank instead of passing them on: `cpjax.latent` has both, and they are equal.

# %% [markdown]
# ## Exercises
#
# 1. Without the causal mask, which layout is balanced?
# 2. Give rank r the chunks r and r + cp of 2·cp, instead of r and 2·cp − 1 − r. What is max/mean for cp 4?
#
# <details>
# <summary>Solutions</summary>
#
# 1. All of them: every query sees every key, so equal numbers of tokens are equal work.
# 2. A query of chunk c sees about c + ½ chunks of keys, so rank r has 2r + cp + 1 units of work: 5, 7, 9 and 11, and
#    11 / 8 = 1.375. The chunk from the front does not make up for the one from the back.
#
# The next cell computes both.
#
# </details>

# %%
for layout in SEQUENCES:
    calls = [len(blocks) for blocks in schedule("ring", layout, CP, is_causal=False)]
    assert len(set(calls)) == 1
    print(f"{layout:11} without a mask: blocks of each rank {calls}")

n = 4096 // (2 * CP)
seen = [n * n * chunk + n * (n + 1) // 2 for chunk in range(2 * CP)]  # keys that the queries of a chunk see
units = np.array([seen[rank] + seen[rank + CP] for rank in range(CP)])
print(f"chunks r and r + cp: max / mean {units.max() / units.mean():.3f}")
assert units.sum() == 4096 * 4097 // 2
assert abs(units.max() / units.mean() - 11 / 8) < 1e-3

# %% [markdown]
# Previous: [2. Online softmax and the merge](02-online-softmax.ipynb) · [Contents](../docs/README.md#the-book) · Next: [4. Precision: what FP16 costs, and BF16](04-precision.ipynb)
