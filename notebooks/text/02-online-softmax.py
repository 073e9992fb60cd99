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
# # 2. Online softmax and the merge
#
# Attention of one query is a weighted mean of values, the weights a softmax over **all** keys. Ring attention never has all keys
# in one place. It works because the softmax can be computed over some keys at a time, exactly, if one number is kept beside
# the mean. This notebook does it by hand, then breaks it in the ways in which it has been broken.

# %%
import itertools

import jax
import matplotlib.pyplot as plt
import numpy as np

from cpjax.dense import dense_attention
from cpjax.mask import Mask, tokens
from cpjax.partial import Partial, empty, merge
from cpjax.precision import profile

jax.config.update("jax_enable_x64", True)
S, H, TILE = 12, 4, 3
rng = np.random.default_rng(0)
query, key, value = rng.normal(size=H), rng.normal(size=(S, H)), rng.normal(size=(S, H))
score = key @ query / np.sqrt(H)
weight = np.exp(score) / np.exp(score).sum()
exact = weight @ value
print("out", exact.round(4))

# %% [markdown]
# ## The running (m, l, acc)
#
# One query, 12 keys, tiles of 3. Three things are kept: the largest score so far m, the sum l of e^(s − m), and the sum acc of
# e^(s − m) v. When a tile brings a larger score, what was summed relative to the old maximum is multiplied by e^(m − m'). That is
# all of FlashAttention's recurrence ([arXiv 2307.08691](https://arxiv.org/abs/2307.08691), algorithm 1).


# %%
def tile_loop(score, value, *, rescale=True):
    m, total, acc = -np.inf, 0.0, np.zeros(value.shape[1])
    for start in range(0, len(score), TILE):
        s, v = score[start : start + TILE], value[start : start + TILE]
        larger = max(m, s.max())
        shrink = np.exp(m - larger) if rescale else 1.0  # at first e^(−inf) = 0
        p = np.exp(s - larger)
        total, acc, m = total * shrink + p.sum(), acc * shrink + p @ v, larger
        yield m, total, acc, shrink


for i, (m, total, acc, shrink) in enumerate(tile_loop(score, value)):
    print(f"tile {i}:  m {m:+.3f}   rescale {shrink:.3f}   l {total:.3f}   out so far {(acc / total).round(3)}")
print(f"error of the last: {abs(acc / total - exact).max():.1e}")

# %% [markdown]
# ## What lse means
#
# m and l depend on where the tiles were cut. **lse = m + ln l** does not: it is ln Σ e^s, the total weight that these keys have,
# as a logarithm. The pair (out, lse) says everything about a set of keys that anybody else must know: their mean, and how
# much it counts.

# %%
print(f"m + ln l {m + np.log(total):.15f}")
print(f"ln Σ e^s {np.log(np.exp(score).sum()):.15f}")
cut = 5
lse_a, lse_b = (np.log(np.exp(part).sum()) for part in (score[:cut], score[cut:]))
share = 1 / (1 + np.exp(lse_b - lse_a))
print(f"share of the first five keys: {weight[:cut].sum():.6f}, from the two lses alone: {share:.6f}")

# %% [markdown]
# ## The merge
#
# `cpjax.partial.Partial` is that pair. `merge` gives the partial of A ∪ B from those of A and B (disjoint). We take partials of three
# random sets of keys, in float64, and try the laws.

# %%
precision = profile("float64")
place = tokens(1, S)


def partial_over(keys):
    where = np.asarray(keys)
    k, v = key[None, where, None], value[None, where, None]
    kv_place = jax.tree.map(lambda x: x[:, where], place)
    first = jax.tree.map(lambda x: x[:, :1], place)
    part = dense_attention(query[None, None, None], k, v, first, kv_place, mask=Mask(is_causal=False), scale=H**-0.5)
    return Partial(*(jax.numpy.asarray(x) for x in part))


def distance(x, y):
    return max(float(abs(x.out - y.out).max()), float(abs(x.lse - y.lse).max()))


a, b, c = (partial_over(keys) for keys in np.split(rng.permutation(S), [2, 7]))
ab_c, a_bc = merge(merge(a, b, precision), c, precision), merge(a, merge(b, c, precision), precision)
print(f"associative   {distance(ab_c, a_bc):.1e}")
print(f"commutative   {distance(merge(a, b, precision), merge(b, a, precision)):.1e}")
nothing = empty(a.out)
print(f"identity      {distance(merge(a, nothing, precision), a):.1e}   the identity: out 0, lse {nothing.lse.item()}")
print(f"no NaN from nothing and nothing: lse {merge(nothing, nothing, precision).lse.item()}")
print(f"all keys      {float(abs(ab_c.out.ravel() - exact).max()):.1e}")

# %% [markdown]
# A set with an associative, commutative operation and an identity is a commutative monoid. So context parallelism is a fold:
# in whatever order blocks arrive, on whatever rank they are computed, the answer is one. Here are all 24 orders of
# four chunks, merged one after the other, and once as a tree:

# %%
chunks = [partial_over(keys) for keys in np.split(np.arange(S), 4)]


def fold(parts):
    result = parts[0]
    for part in parts[1:]:
        result = merge(result, part, precision)
    return result


orders = [fold([chunks[i] for i in order]) for order in itertools.permutations(range(4))]
tree = merge(merge(*chunks[:2], precision), merge(*chunks[2:], precision), precision)
worst = max(distance(result, tree) for result in orders)
print(f"{len(orders)} orders and a tree differ by at most {worst:.1e}")

# %% [markdown]
# Equal to float64's last places, not bit for bit: additions round. In FP16 the order shows in the last place of FP16, and
# a comparison of two backends must allow for it ([notebook 04](04-precision.ipynb)).
#
# ## Without the maximum
#
# A softmax does not change when all scores are shifted, so why keep m? Because e^s leaves float32 at s = 88.7. Two partials
# with the same lse, merged with weights e^lse as ATB's `FaUpdate` does in MindIE's decode (Σ e^(lse_i) out_i / Σ e^(lse_i), no maximum
# subtracted), and with `merge`. The outs are 1 and 3, so the answer is 2, whatever the lse:


# %%
def fa_update(lse, out):
    with np.errstate(over="ignore", invalid="ignore"):
        w = np.exp(lse.astype(np.float32))
        return (w * out).sum() / w.sum()


def one_number(out, lse):
    return Partial(jax.numpy.full((1, 1, 1, 1), out, "float32"), jax.numpy.full((1, 1, 1), lse, "float32"))


outs = np.float32([1, 3])
print("   lse   no maximum   merge")
for lse in (-110, -103, -80, 0, 80, 87, 90, 110):
    merged = merge(one_number(1, lse), one_number(3, lse), profile("float32"))
    print(f"{lse:6}   {fa_update(np.float32([lse, lse]), outs):10.4f}   {merged.out.item():.4f}")

# %% [markdown]
# Too large gives ∞/∞, too small 0/0, both NaN. (At −103 the weights are the smallest subnormal number: the mean is right only
# because they are equal.) Subtracting the maximum makes the largest weight exactly 1: nothing can overflow, and what
# underflows is less than 1e-38 of the rest.
#
# ## Without the rescale
#
# The commonest bug: the new maximum is used, but the old sums are not multiplied by e^(m − m'). Earlier keys then count
# too much, by that factor. Whether anybody notices depends on the data: if the largest score comes in the first tile, nothing is wrong.

# %%
sizes = [0.1, 0.3, 1, 3, 10]
descending = np.argsort(-score)
wrong = {"as they come": [], "largest score first": []}
for size in sizes:
    for name, order in zip(wrong, (np.arange(S), descending), strict=True):
        s, v = size * score[order], value[order]
        *_, (m, total, acc, _) = tile_loop(s, v, rescale=False)
        want = np.exp(s - s.max()) @ v / np.exp(s - s.max()).sum()
        wrong[name].append(abs(acc / total - want).max())

figure, axis = plt.subplots(figsize=(7, 3), dpi=80)
for (name, errors), style in zip(wrong.items(), ("o-", "s--"), strict=True):
    axis.loglog(sizes, np.maximum(errors, 1e-15), style, label=f"keys {name}")
axis.set(xlabel="factor on all scores", ylabel="largest error, at least 1e-15", title="Without the rescale")
axis.legend()
axis.grid(alpha=0.3)
figure.tight_layout()


# %% [markdown]
# Small random scores hide the bug below the tolerance of 1e-2 that many test suites use, and descending scores hide
# it altogether. That is why the tests of cpjax draw large logits and needles, where one late key decides the answer.

# %% [markdown]
# ## Exercises
#
# 1. Somebody merges two halves of the keys as the plain mean of their two outs. For which queries is that right?
# 2. Undo a merge: from the partial of all keys and that of the first five, find the partial of the other seven.
#    When does this lose digits?
#
# <details>
# <summary>Solutions</summary>
#
# 1. Only where both halves have the same total weight, that is the same lse. A query of zeros has it: all its scores are 0.
# 2. e^lse is a sum, so it can be subtracted: lse_b = ln(e^lse − e^lse_a), and with w = e^(lse_a − lse)
#    out_b = (out − w · out_a) / (1 − w). If the first part has nearly all the weight, w is nearly 1, and 1 − w has few digits left.
#
# The next cell computes both.
#
# </details>

# %%
def halves(q):
    """Of the first and the last six keys: out and lse."""
    found = []
    for k, v in zip(np.split(key, 2), np.split(value, 2), strict=True):
        s = k @ q / np.sqrt(H)
        found.append((np.exp(s) @ v / np.exp(s).sum(), np.log(np.exp(s).sum())))
    return found


for name, q in (("this query", query), ("a query of zeros", np.zeros(H))):
    (out_1, _), (out_2, _) = halves(q)
    s = key @ q / np.sqrt(H)
    error = abs((out_1 + out_2) / 2 - np.exp(s) @ value / np.exp(s).sum()).max()
    print(f"plain mean, {name:16} error {'below 1e-15' if error < 1e-15 else f'{error:.3f}'}")

whole, first_five, others = partial_over(range(S)), partial_over(range(5)), partial_over(range(5, S))
w = np.exp(first_five.lse - whole.lse)
lse_b = np.log(np.exp(whole.lse) - np.exp(first_five.lse))
out_b = (whole.out - w[..., None] * first_five.out) / (1 - w[..., None])
assert distance(Partial(out_b, lse_b), others) < 1e-14
print("the partial of the other seven keys is found again, to 1e-14")

# %% [markdown]
# Previous: [1. The path](01-the-path.ipynb) · [Contents](../docs/README.md#the-book) · Next: [3. Who holds what, and who works how much](03-layouts.ipynb)
