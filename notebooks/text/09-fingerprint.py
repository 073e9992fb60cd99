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
# # 9. What does this kernel compute?
#
# A kernel comes as a binary. What does it round, how many keys does it take at a time, in which order does it add, how
# exact is its exponential? `cpjax fingerprint` reads that off its answers to small questions. This notebook makes some of
# the questions by hand and draws the answers ([docs/fingerprint.md](../docs/fingerprint.md) has them all).
#
# What PyTorch's CPU kernel answers depends on the processor. The outputs below are those of one x86-64 processor with
# AVX-512, one thread.

# %%
# %matplotlib inline
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint import Answer, Probe, card_of, order, tiles, weights
from cpjax.fingerprint.kernels import emulator, sdpa
from cpjax.fingerprint.probe import scored
from cpjax.fingerprint.tree import tree_of, words

torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 80, "font.size": 10})
BLUE, RED, GREEN, GREY = "#4477aa", "#ee6677", "#228833", "#bbbbbb"
fp16 = FORMATS["float16"]

# %% [markdown]
# ## Two correct kernels, different bits
#
# FlashAttention in FP16, twice: PyTorch's kernel, and an emulator of the project in NumPy. Same inputs, no bug in either.
# A kernel here is a function that takes a `Probe` (query, key, value, scale) and gives an `Answer` (out, lse).

# %%
rng = np.random.default_rng(0)
same_input = Probe(*fp16.round(rng.standard_normal((3, 1, 256, 4, 64))).astype(np.float32), scale=0.125)
pytorch, ours = sdpa("flash", "float16"), emulator("flash_fp16")
score = 0.125 * np.einsum("btnh,bsnh->bnts", *same_input[:2], dtype=np.float64)
weight = np.exp(score - score.max(axis=3, keepdims=True))
exact = np.einsum("bnts,bsnh->btnh", weight / weight.sum(axis=3, keepdims=True), same_input.value)
step = fp16.spacing(exact)  # the unit in the last place of an FP16 number of that size
a, b = pytorch(same_input).out, ours(same_input).out
print(
    f"{np.mean(a != b):.0%} of {a.size:,} numbers differ, {np.mean(np.abs(a - b) > 7 * step):.1%} by more than 7 units"
)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
apart = np.round((a - b) / step).ravel()
left.hist(apart, np.arange(-7.5, 8), rwidth=0.8, color=BLUE)
left.set(yscale="log", xlabel="PyTorch − emulator, in units of the last place of FP16", ylabel="numbers in out")
for name, out, colour, line in (("PyTorch", a, BLUE, "-"), ("emulator", b, RED, "--")):
    error = ((out - exact) / step).ravel()
    right.hist(error, np.linspace(-2, 2, 81), histtype="step", color=colour, ls=line, lw=1.6, label=name)
    print(f"{name:8} half of its numbers err by less than {np.median(np.abs(error)):.3f} units")
right.set(xlabel="error against float64, in the same units", ylabel="numbers in out")
right.legend()
figure.tight_layout()

# %% [markdown]
# (A number near 0 has a small last place, and what was added up to it had not: hence the few that are far apart.) Both
# are as right as FP16 lets them be. So "which bits?" is not a question about the definition of attention, but about
# the kernel: what it rounds, and in which order.
#
# ## One question by hand: in which order is a sum added?
#
# Take *n* ones. Replace one by M, another by −M, with M so large that M + 1 = M. Ones that are added to M or −M before the
# two meet are lost; the others survive. So the sum itself says how many terms were in the node where *i* and *j* met. All
# pairs together are the tree (the idea of FPRev, [arXiv 2411.00442](https://arxiv.org/abs/2411.00442)).

# %%
M = np.float32(2.0**40)


def lost(total, n):
    """For each pair of terms: how many terms meet where the two meet, themselves included."""
    size = np.ones((n, n), int)
    for i, j in np.argwhere(~np.eye(n, dtype=bool)):
        terms = np.ones(n, np.float32)
        terms[i], terms[j] = M, -M
        size[i, j] = n - int(total(terms))
    return size


def loop(terms):
    total = np.float32(0)
    for term in terms:
        total = total + term
    return total


def draw(axis, tree, every=1, label=str):
    """The height of a node is the most additions that a term below it went through; terms stand in the tree's order."""
    terms = list(tree.leaves())

    def place(node):
        if node.leaf >= 0:
            return terms.index(node.leaf), 0
        below = [place(child) for child in node.children]
        x, y = np.mean([x for x, _ in below]), 1 + max(y for _, y in below)
        for child in below:
            axis.plot([child[0], x], [child[1], y], color=BLUE, lw=0.9)
        axis.plot(x, y, "o", color="black", ms=2.5, zorder=3)
        return x, y

    axis.set(ylim=(0, 1.04 * place(tree)[1]), xlabel="term", ylabel="additions")
    axis.set_xticks(range(0, len(terms), every), map(label, terms[::every]), fontsize=7)


figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), width_ratios=[1, 2])
for (left, right), (name, total) in zip(axes, {"a loop": loop, "np.sum": np.sum}.items(), strict=True):
    size = lost(total, 32)
    image = left.imshow(size, cmap="cividis", vmin=1, vmax=32)
    left.set(title=f"{name}: terms lost", xlabel="place of −M", ylabel="place of M")
    figure.colorbar(image, ax=left)
    draw(right, tree_of(size))
    right.set_title("\n".join(textwrap.wrap(f"{name}: {words(tree_of(size))}", 60)), fontsize=10)
figure.tight_layout()

# %% [markdown]
# `np.sum` has eight running sums, as a processor with vectors likes it. Its tree is lower, and the rounding error of a sum
# grows with the height of the tree.
#
# The same question can be put to a kernel. In q·k the terms are the products of the head's 64 dimensions, and the score is
# read off the softmax. In p·v they are the keys. The probe holds 2,016 heads, one for each pair.


# %%
def order_of(kernel, probe_name):
    """The trees of a kernel, each with the number of places in out where it is the order."""
    return order.trees_of(fp16, probe_name, kernel(order.probes(fp16)[probe_name]))


QK, FAR = "terms-of-qk", "terms-of-pv-far"
found = {
    "emulator with pairwise sums: q·k": order_of(emulator("flash_fp16", summation="pairwise"), QK),
    "PyTorch: q·k": order_of(pytorch, QK),
    "emulator with NumPy's matrix product: q·k": order_of(ours, QK),
    "PyTorch: p·v, every 64th of 1,024 keys": order_of(pytorch, FAR),
}
figure, axes = plt.subplots(2, 2, figsize=(11, 7.4))
for axis, (name, trees) in zip(axes.flat, found.items(), strict=True):
    several = [(tree, places) for tree, places in trees.most_common() if tree is not None]
    tree, places = several[-1]  # the rarest order, where there are several
    said = words(tree) + (f" (at {places / trees.total():.0%} of the places in out)" if len(several) > 1 else "")
    far = "keys" in name
    draw(axis, tree, every=1 if far else 4, label=(lambda term: 64 * term + 32) if far else str)
    axis.set_title("\n".join([name, *textwrap.wrap(said, 68)]), fontsize=9)
axes[1, 1].set_xlabel("key")
figure.tight_layout()

# %% [markdown]
# PyTorch's q·k is a plain loop over the head. NumPy's BLAS does the same on the processor of these outputs. On
# another one a third of the places in out had two sums, of the even and of the odd terms: at the edge of a matrix BLAS runs
# another kernel. In the last picture keys 0–511 and 512–1,023 are two tiles,
# and within a tile three sums show the blocks of the matrix product: it ends one between keys 160 and 224, the next between
# 352 and 416. Blocks of 192 fit.
#
# ## What is rounded: the probabilities
#
# Two keys with the values 1 and −1: out is the difference of their probabilities, and out is FP16, so a small difference
# has all its digits. If p is rounded to FP16 before it is multiplied with v, every difference is a whole number of FP16's
# steps.

# %%
asked = weights.probes(fp16)["differences"]
p = np.exp(weights.scores_of(asked))
one, other = p[:, weights.PAIRS[:, 0]], p[:, weights.PAIRS[:, 1]]
steps = fp16.spacing(other)

figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True, sharey=True)
kernels = {"PyTorch flash: p is FP16": pytorch, "PyTorch math: p is float32": sdpa("math", "float16")}
for axis, (name, kernel) in zip(axes, kernels.items(), strict=True):
    given = kernel(asked).out[0, :, 0, : len(weights.PAIRS)] * p.sum(axis=1, keepdims=True)
    axis.plot((one - other) / steps, given / steps, ".", ms=4, color=BLUE)
    off = np.abs(given / steps - np.round(given / steps))
    axis.set(
        title=f"{name}\nmedian distance to a whole number {np.median(off):.3f}", xlabel="exact difference, in steps"
    )
    axis.plot([0, 6], [0, 6], color=RED, lw=1, ls="--", zorder=0)
    axis.set(xlim=(0, 6), ylim=(-0.3, 6.3), yticks=range(7))
    axis.grid(axis="y", color=GREY, lw=0.6)
axes[0].set_ylabel("measured difference, in steps of FP16")
figure.tight_layout()

# %% [markdown]
# A staircase, and the straight line of no rounding (dashed): that is the line `p as the factor of v` of the card. The card goes one step further and
# asks, for each format, how much exp must err so that the rounding explains all points.
#
# ## How many keys at a time: the tile map
#
# One key, *t*, has the score 0, all others lie far below. A key that was met in a tile *before* *t*'s was rounded beside
# a smaller maximum than the others, and scaled down later; so its last digits differ from those of the last key. Rows: the
# place of *t*. Columns: the other keys; blue where a key was rounded in another way than the last one.


# %%
def by_hand(exp=np.exp, splits=1, head=lambda h, group, kv_heads: h // group, hidden=-np.inf):
    """Attention in FP16 of our own, with parts to replace; each split of the keys has its own maximum."""

    def kernel(asked):
        query, key, value = (x.astype(np.float16).astype(np.float32).swapaxes(1, 2) for x in asked[:3])
        heads, kv_heads = query.shape[1], key.shape[1]
        take = [head(h, heads // kv_heads, kv_heads) for h in range(heads)]
        score = query @ key[:, take].swapaxes(2, 3) * np.float32(asked.scale)
        if asked.is_causal:
            score = np.where(np.tri(*score.shape[2:], dtype=bool), score, np.float32(hidden))
        top, total, out = score.max(axis=3, keepdims=True), 0, 0
        for some in np.array_split(np.arange(score.shape[3]), splits):
            m = score[..., some].max(axis=3, keepdims=True)
            m = np.where(np.isinf(m), np.float32(0), m)
            p = exp(score[..., some] - m)
            total = total + np.exp(m - top) * p.sum(axis=3, keepdims=True)
            out = out + np.exp(m - top) * (fp16.round(p) @ value[:, take][:, :, some])
        lse = (top + np.log(total))[..., 0]
        return Answer(fp16.round(out / total).swapaxes(1, 2).astype(float), lse.swapaxes(1, 2).astype(float))

    return kernel


shown = {
    "PyTorch flash": pytorch,
    "emulator, tiles of 128": emulator("flash_fp16", tile=128),
    "by hand, four splits": by_hand(splits=4),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 4.4), sharey=True)
for axis, (name, kernel) in zip(axes, shown.items(), strict=True):
    asked = tiles.probes(fp16)
    answers = {"tiles": kernel(asked["tiles"])}
    colours = plt.matplotlib.colors.ListedColormap([RED, "#eeeeee", BLUE])
    place = {"extent": (0, tiles.KEYS, tiles.KEYS, 0), "aspect": "equal", "interpolation": "nearest"}
    axis.imshow(tiles.map_of(fp16, answers), cmap=colours, vmin=-1, vmax=1, **place)
    axis.plot([0, tiles.KEYS], [0, tiles.KEYS], color="black", lw=0.8, ls=":")
    tile, splits = (line.value.split(":")[0] for line in tiles.read(fp16, asked, answers))
    said = [*textwrap.wrap(f"tile: {tile}", 36), f"splits: {splits}"]
    axis.set_title("\n".join([name, *said]), fontsize=9)
    axis.set(xlabel="key", xticks=range(0, 1025, 256), yticks=range(0, 1025, 256))
axes[0].set_ylabel("place of the large score, t")
figure.tight_layout()

# %% [markdown]
# Stairs are tiles: the first tile was met before the maximum rose, so it is blue in every row in which *t* lies behind it.
# Squares on the diagonal are splits: only the keys of *t*'s own part know of *t*. (In the bottom rows the last key is one
# of these, and all other parts differ from it. Red, which no kernel here has, would be
# neither of the two roundings.)
#
# ## The whole card
#
# Twenty-six probes, two seconds. Where BF16 answers the same, nothing is printed.

# %%
cards = {dtype: card_of(sdpa("flash", dtype), dtype) for dtype in ("float16", "bfloat16")}
print(f"{'':29} {'FP16':44} BF16")
values = {line.name: line.value for line in cards["bfloat16"].lines}
for line in cards["float16"].lines:
    bf16 = values.get(line.name, "not asked")
    columns = textwrap.wrap(line.value, 43), textwrap.wrap(bf16, 43) if bf16 != line.value else []
    for row in range(max(map(len, columns))):
        cells = [column[row] if row < len(column) else "" for column in columns]
        print(f"{line.name if row == 0 else '':29} {cells[0]:44} {cells[1]}".rstrip())
for dtype, card in cards.items():
    print(f"\nprofile of the {dtype} kernel: {card.profile.name if card.profile else 'cannot be told'}", end="")

# %% [markdown]
# The profile is what `cpjax judge-dump --precision` takes, so that the kernel is judged as strictly as it is exact.
#
# ## A fast exponential
#
# `error of exp` is far above what float32 allows. With a key of score 0 and 63 keys of score *s*, lse is
# ln(exp(0) + 63 exp(*s*)), and a row of zeros gives exp(0); so exp can be read off lse, in as many places as we like.

# %%
s = -fp16.round(np.linspace(0, 6, 32 * 32)).reshape(32, 32)  # heads, rows
score = np.repeat(s[..., None], 64, axis=2)
score[:, :, 0] = 0
score[0, 0] = 0  # all keys alike: lse = ln 64 + ln exp(0)


def error_of_exp(kernel):
    lse = kernel(scored(score, np.zeros((32, 64, 64)), fp16)).lse[0].T
    of_zero = np.exp(lse[0, 0]) / 64
    error = (np.exp(lse) - of_zero) / 63 / np.exp(s) - 1
    return of_zero - 1, error.ravel()[1:]


figure, axis = plt.subplots(figsize=(10, 4))
of_each = {
    "PyTorch flash, FP16": (pytorch, BLUE, "o"),
    "emulator: exp of NumPy": (ours, RED, "s"),
}
for name, (kernel, colour, mark) in of_each.items():
    of_zero, error = error_of_exp(kernel)
    most = np.log2(np.abs(error).max())
    print(f"{name:24} largest error 2^{most:.1f} of its value; exp(0) − 1 = {of_zero:+.1e}")
    axis.plot(s.ravel()[1:], error * 1e4, mark, color=colour, ms=2, label=f"{name}: largest $2^{{{most:.1f}}}$")
for period in np.arange(0, 9) * np.log(2):
    axis.axvline(-period, color=GREY, lw=0.7, zorder=0)
axis.set(xlabel="s; grey lines are multiples of ln 2", ylabel="relative error of exp(s), in units of 0.0001")
axis.set(ylim=(-3.2, 3.2))
axis.axhspan(
    -(2.0**-12) * 1e4, 2.0**-12 * 1e4, color="#eeeeee", zorder=-1, label="half a step of FP16: $2^{-12}$ or more"
)
axis.legend(loc="upper right", ncols=3, fontsize=8)
figure.tight_layout()

# %% [markdown]
# The error repeats with ln 2: the kernel computes 2 to the power of *s* · log₂ e, the whole part exactly. In between it
# changes sign four times, as the error of a fitted polynomial of degree 3 does. PyTorch's source has just that: `fexp_u20`,
# after Malossi et al., *Fast Exponential Computation on SIMD Architectures*. Even exp(0) is not 1. (The card cannot tell the
# base of such a kernel, and its bound on the error is a little too high, because it takes exp(0) to be 1.) It is no fault:
# the error is smaller than the rounding of p that follows.
#
# ## Exercises
#
# For each: which lines of the card change, and does the profile? Guess before you open the solution.
#
# 1. exp is replaced by Schraudolph's trick: the bits of a float, computed as an integer.
# 2. Query head *h* takes key head *h* mod K, instead of *h* div (N/K).
# 3. The causal mask sets hidden scores to −10,000 instead of −∞.
#
# <details>
# <summary>Solutions</summary>
#
# 1. `error of exp` is about 2⁻⁴, several per cent. Beside that no rounding can be seen, so the lines on scale, scores and
#    p cannot be told, nor the order within q·k, which is read through exp. Without them there is no profile: the card does
#    not guess.
# 2. Only `heads that share keys`: "h mod 2". The profile is flash_fp16 as before: every rounding is right. A profile says
#    how exact a kernel is, not whether it computes attention; that is the judge's question.
# 3. Only `what hides a key`: a hidden key is seen from some score on, and the two numbers have −10,000 between them. On
#    inputs with usual scores no test of out would find this.
#
# The next cell asks all three.
#
# </details>


# %%
def schraudolph(x):
    bits = np.maximum(x * (2**23 / np.log(2)) + (127 * 2**23 - 366_000), 0)
    return bits.astype(np.int32).view(np.float32)


tried = {
    "1. exp": by_hand(exp=schraudolph),
    "2. heads": by_hand(head=lambda h, group, kv_heads: h % kv_heads),
    "3. mask": by_hand(hidden=-10_000),
}
with np.errstate(all="ignore"):
    plain = card_of(by_hand(), "float16")
    broken = {name: card_of(kernel, "float16") for name, kernel in tried.items()}
usual = {line.name: line.value for line in plain.lines}
for name, card in broken.items():
    print(f"{name:10} profile {card.profile.name if card.profile else 'cannot be told'}")
    for line in card.lines:
        if line.value != usual.get(line.name):
            print(textwrap.fill(f"{line.name}: {line.value}", 110, initial_indent="   ", subsequent_indent="      "))

# %% [markdown]
# Your own kernel: `cpjax fingerprint my_kernel.py:attention --dtype float16 --evidence`, or, if it runs elsewhere,
# `cpjax cases --preset fingerprint DIR`. [docs/fingerprint.md](../docs/fingerprint.md) says how each line is read.

# %% [markdown]
# Previous: [8. On many chips](08-scale.ipynb) · [Contents](../docs/README.md#the-book) · Next: [10. One token's way through a DeepSeek model](10-one-token.ipynb)
