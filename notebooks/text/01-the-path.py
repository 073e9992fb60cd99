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
# # 1. The path
#
# Context parallelism splits one long sequence over several devices. Each device keeps its queries; the keys and values
# travel round a ring; each device merges what it computes from the blocks that pass by. This notebook follows one small
# example from the split to the verdict, with the functions of `cpjax` itself. Nothing here is a re-implementation.

# %%
import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)  # simulated devices; before JAX is first used

import matplotlib.pyplot as plt
import numpy as np

from cpjax.attention import Attention
from cpjax.blocks.tiles import attend
from cpjax.crosscheck import judge
from cpjax.dense import dense_attention
from cpjax.mask import Mask, Tokens, tokens, visible
from cpjax.parallel import context_parallel_attention, cp_mesh
from cpjax.partial import Partial, merge
from cpjax.partition import Zigzag, sequence_of
from cpjax.partition.schedule import schedule
from cpjax.precision import profile

plt.rcParams.update({"figure.dpi": 80, "font.size": 10})
RANK_COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]

# %% [markdown]
# ## Who holds which tokens
#
# Under a causal mask query *t* sees the keys 0 … *t*, so late queries cost more than early ones. If every rank held one
# run of the sequence, the last would work nearly twice the mean. **Zigzag** cuts the sequence into 2·cp chunks and gives
# rank *r* chunk *r* and chunk 2·cp − 1 − *r*: one cheap and one dear, the same sum for everybody.


# %%
def draw_holders(axis, length, cp):
    """One square per token, in the colour of the rank that holds it."""
    shards = Zigzag(cp).order(length).reshape(cp, -1)
    for rank, held in enumerate(shards):
        for token in held:
            axis.add_patch(plt.Rectangle((token, 0), 1, 1, color=RANK_COLOURS[rank], ec="white"))
            axis.text(token + 0.5, 0.5, f"{token}", ha="center", va="center", color="white")
    chunk = length // (2 * cp)
    for edge in range(0, length + 1, chunk):
        axis.plot([edge, edge], [-0.15, 1.15], color="black", lw=1)
    chunks = "   ".join(f"rank {rank}: chunks {Zigzag(cp).held_chunks(rank)}" for rank in range(cp))
    axis.set(xlim=(-0.1, length + 0.1), ylim=(-0.3, 1.3), title=f"cp {cp}    {chunks}")
    axis.axis("off")


figure, axes = plt.subplots(2, 1, figsize=(10, 3))
for axis, cp in zip(axes, (2, 4), strict=True):
    draw_holders(axis, 16, cp)
figure.tight_layout()

# %% [markdown]
# The price of the split is visible in the mask. Below, each row is a query and each filled square a key that it may see,
# in the colour of the rank that computes it. Count the squares per colour: with zigzag they are equal.

# %%
place = tokens(1, 16)
seen = np.asarray(visible(Mask(is_causal=True), place, place))[0]
figure, axes = plt.subplots(1, 2, figsize=(9, 4.4))
for axis, layout in zip(axes, ("contiguous", "zigzag"), strict=True):
    owner = np.empty(16, int)
    owner[sequence_of(layout, 4).order(16)] = np.repeat(np.arange(4), 4)
    work = [int(seen[owner == rank].sum()) for rank in range(4)]
    colours = np.array([plt.matplotlib.colors.to_rgb(c) for c in RANK_COLOURS])[owner]
    axis.imshow(np.where(seen[..., None], colours[:, None], 1.0))
    axis.set(title=f"{layout}, cp 4: keys seen per rank\n{work}, max/mean {max(work) / np.mean(work):.2f}")
    axis.set(xlabel="key", ylabel="query")
figure.tight_layout()

# %% [markdown]
# ## What travels at each step
#
# At step 0 each rank meets its own keys and values. Then everyone passes what it has to the next rank: at step *s* rank
# *r* holds what rank *r* − *s* began with. cp steps, cp − 1 transfers. Queries never move.
#
# `cpjax.partition.schedule` gives the blocks as integers. `triu` is a triangle (the chunk against itself), `none` a full block, and
# what the causal mask hides is not in the list at all.

# %%
cp = 4
figure, axes = plt.subplots(1, cp, figsize=(12, 3.4), sharey=True)
blocks = schedule("ring", "zigzag", cp, is_causal=True)
for step, axis in enumerate(axes):
    for rank in range(cp):
        for block in (b for b in blocks[rank] if b.step == step):
            colour, hatch = RANK_COLOURS[rank], "//" if block.mask == "triu" else ""
            axis.add_patch(plt.Rectangle((block.kv_chunk, block.query_chunk), 1, 1, fc=colour, ec="white", hatch=hatch))
    travel = ", ".join(f"{(rank - step) % cp}→{rank}" for rank in range(cp))
    axis.set(xlim=(0, 2 * cp), ylim=(2 * cp, 0), xlabel="key chunk", aspect="equal")
    axis.set_title(f"step {step}\n" + ("own shard" if step == 0 else f"shard→rank {travel}"), fontsize=9)
axes[0].set_ylabel("query chunk")
figure.tight_layout()

# %% [markdown]
# The four pictures laid over each other are the causal mask, each block once: nothing is computed twice, nothing is
# forgotten. Hatched squares are triangles. From step 1 on every rank computes two full blocks at every step.

# %% [markdown]
# ## Partials, before and after the merge
#
# Attention over *some* keys is a pair: `out`, the weighted mean of their values, and `lse`, the logarithm of their total
# weight. Two such pairs over disjoint keys determine the pair over both:
#
# $$\text{lse} = \ln(e^{\text{lse}_a} + e^{\text{lse}_b}), \qquad
#   \text{out} = e^{\text{lse}_a - \text{lse}}\,\text{out}_a + e^{\text{lse}_b - \text{lse}}\,\text{out}_b$$
#
# Eight tokens, cp 2, so four chunks of two tokens. Rank 0 holds chunks 0 and 3. We follow its **last** query, token 7,
# which sees everything. Values are numbers (head dim 1), so they can be drawn.

# %%
LENGTH, CP = 8, 2
rng = np.random.default_rng(3)
query, key = rng.standard_normal((2, 1, LENGTH, 1, 4))
value = rng.uniform(-1, 1, (1, LENGTH, 1, 1))
place = tokens(1, LENGTH)
exact = Attention(Mask(is_causal=True), scale=0.5, precision=profile("float64"))


def cut(chunk):
    """The slice of a chunk's two tokens."""
    return slice(2 * chunk, 2 * chunk + 2)


def places(chunk):
    """Where these tokens are in the text."""
    return Tokens(place.position[:, cut(chunk)], place.segment[:, cut(chunk)])


def block(q_chunk, kv_chunk):
    """One query chunk against one key/value chunk: cpjax's own `attend`."""
    q, kv = cut(q_chunk), cut(kv_chunk)
    return attend(query[:, q], key[:, kv], value[:, kv], places(q_chunk), places(kv_chunk), exact)


met = [b.kv_chunk for b in schedule("ring", "zigzag", CP, is_causal=True)[0] if b.query_chunk == 3]
partials = [block(3, chunk) for chunk in met]
carried = [partials[0]]
for partial in partials[1:]:
    carried.append(merge(carried[-1], partial, exact.precision))

print("query 7 on rank 0        this chunk alone        after the merge")
for chunk, alone, so_far in zip(met, partials, carried, strict=True):
    numbers = [float(x.ravel()[-1]) for x in (alone.out, alone.lse, so_far.out, so_far.lse)]
    print("key/value chunk {}     out {:+.4f}  lse {:+.4f}     out {:+.4f}  lse {:+.4f}".format(chunk, *numbers))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
x = np.arange(len(met))
dense = dense_attention(query, key, value, place, place, mask=exact.mask, scale=exact.scale)
for axis, field, label in ((left, "out", "out of query 7"), (right, "lse", "lse of query 7")):
    alone = [float(getattr(p, field).ravel()[-1]) for p in partials]
    so_far = [float(getattr(p, field).ravel()[-1]) for p in carried]
    axis.bar(x, alone, width=0.5, color="#bbbbbb", label="this chunk alone")
    axis.plot(x, so_far, "o-", color=RANK_COLOURS[0], label="merged so far")
    axis.axhline(float(getattr(dense, field).ravel()[-1]), color="black", ls="--", label="dense")
    axis.set(
        title=label,
        ylabel=field,
        xlabel="key/value chunk, in the order of the ring",
        xticks=x,
        xticklabels=[f"chunk {c}" for c in met],
    )
right.legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# The mean wanders, the total weight only grows; both end on the dashed line. The order does not matter, because `merge`
# is associative and commutative; that is why any rank may meet the blocks whenever they come.
#
# ## Equal to dense attention
#
# The whole ring, on four simulated devices, real collectives, float64, against the definition in NumPy:

# %%
ring = context_parallel_attention(query, key, value, mesh=cp_mesh(4), scale=0.5, precision="float64")
differences = {name: float(np.abs(getattr(ring, name) - getattr(dense, name)).max()) for name in Partial._fields}
assert all(difference < 1e-15 for difference in differences.values()), differences
print("largest difference from dense, cp 4:", {name: f"{x:.1e}" for name, x in differences.items()})

# %% [markdown]
# ## A verdict
#
# In FP16 a result is never equal to the definition; the question is whether rounding explains the difference. The judge
# computes for every output how large rounding errors typically are (σ) and can be at most (the bound). Correct
# arithmetic has z = RMS(error/σ) about 1.
#
# We take 256 tokens, 4 heads, cp 2, the FP16 profile. Then the same with one fault: for the queries of chunk 3 the merge
# of key/value chunk 1 is left out, as if one block had not arrived.

# %%
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, 256, 4, 64)).astype(np.float16) for _ in range(3))
how = {"mesh": cp_mesh(2), "scale": 0.125, "precision": "flash_fp16"}
right_out, right_lse = (np.asarray(x) for x in context_parallel_attention(q, k, v, **how))

# The chunk is hidden from everybody by making its tokens pads; only the rows of chunk 3 are taken from that result.
natural = tokens(1, 256)
hidden = Tokens(natural.position, np.where(np.arange(256) // 64 == 1, -1, natural.segment).astype(np.int32))
without = context_parallel_attention(q, k, v, hidden, hidden, **how)
wrong_out, wrong_lse = right_out.copy(), right_lse.copy()
wrong_out[:, 192:], wrong_lse[:, 192:] = without.out[:, 192:], without.lse[:, 192:]

verdicts = {}
for name, out, lse in (("correct", right_out, right_lse), ("chunk 1 dropped", wrong_out, wrong_lse)):
    verdicts[name] = verdict = judge(q, k, v, out, lse, scale=0.125, cp=2, order="ring", precision="flash_fp16")
    print(f"{name}: passed {verdict.passed}, z {verdict.z:.3g}, {verdict.hard_ratio:.3g} times the bound")
    for reason in verdict.reasons:
        print("   ", reason)

# %%
exact_out = dense_attention(q, k, v, natural, natural, mask=Mask(is_causal=True), scale=0.125).out
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for name, out, colour in (("chunk 1 dropped", wrong_out, RANK_COLOURS[1]), ("correct", right_out, RANK_COLOURS[0])):
    axes[0].semilogy(np.abs(out - exact_out).max(axis=(0, 2, 3)), ".", ms=3, color=colour, label=name)
axes[0].set(xlabel="query", ylabel="largest |error| of out", title="error by position")
axes[0].legend(fontsize=8)
chunks = [f"query chunk {chunk}" for chunk in range(4)]
for shift, (name, verdict), colour in zip((-0.2, 0.2), verdicts.items(), RANK_COLOURS, strict=False):
    by_name = {part.name: part.z for part in verdict.parts}
    axes[1].bar(np.arange(4) + shift, [by_name[chunk] for chunk in chunks], width=0.4, color=colour, label=name)
axes[1].axhline(1, color="black", ls="--", lw=1)
axes[1].set(yscale="log", xticks=range(4), xlabel="query chunk", ylabel="z", title="z of each query chunk")
figure.tight_layout()

# %% [markdown]
# The first rows have few keys and values as large as the inputs, so their errors are the largest; an absolute tolerance
# wide enough for them is too wide for the rest. z measures each error against its own σ, and points at query chunk 3.

# %% [markdown]
# ## Exercises
#
# 1. How much of its weight does query 7 give to each chunk? The four `lse` of the partials are enough to say it.
# 2. Compute the ring again with another layout, `partition="striped"`. Which numbers change?
#
# <details>
# <summary>Solutions</summary>
#
# 1. The share of a chunk is e^(lse of the chunk − lse of all). The shares add up to 1.
# 2. Only who computes what. `out` and `lse` come in the order of the queries and are the same, up to the rounding of float64.
#
# The next cell computes both.
#
# </details>

# %%
total = float(dense.lse.ravel()[-1])
shares = [float(np.exp(float(partial.lse.ravel()[-1]) - total)) for partial in partials]
for chunk, share in zip(met, shares, strict=True):
    print(f"chunk {chunk}: {share:6.1%} of the weight of query 7")
assert abs(sum(shares) - 1) < 1e-12

how = {"mesh": cp_mesh(4), "scale": 0.5, "precision": "float64"}
striped = context_parallel_attention(query, key, value, partition="striped", **how)
for name in Partial._fields:
    assert np.abs(getattr(striped, name) - getattr(dense, name)).max() < 1e-14
print("striped: out and lse are those of dense attention")

# %% [markdown]
# Previous: [0. Why split the context?](00-why-split.ipynb) · [Contents](../docs/README.md#the-book) · Next: [2. Online softmax and the merge](02-online-softmax.ipynb)
