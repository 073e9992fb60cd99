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
# # 7. Break the ring in ten ways
#
# A test that says "wrong" costs an engineer a day. "Rank 1 did not merge the block of rank 3 at step 2" costs a minute.
# In this notebook a ring of two ranks computes causal attention in FP16, as FlashAttention-2 does inside each chunk.
# (It is `cpjax.trial.emulators`: NumPy, every rounding where a kernel rounds, chunks merged in the order of the ring,
# so that one thing at a time can be broken.) We break it in ten ways, show the judge nothing but the outputs, and
# read what it says.

# %%
import textwrap

import matplotlib.pyplot as plt
import numpy as np

from cpjax.crosscheck import judge
from cpjax.trial.emulators import PROFILES
from cpjax.trial.faults import FAULTS, Bench
from cpjax.trial.localise import Place, problem, wrong_result

problem_ = problem(0, cp=2, is_causal=True, logits=1.0, heads=2)
bench = Bench(problem_, PROFILES["flash_fp16"], "ring")


def verdict_of(result):
    """What the judge makes of this result, given the inputs and the claim "FP16, causal, ring of two"."""
    p = problem_
    return judge(
        p.query, p.key, p.value, result.out, result.lse, **p.judge_arguments(), precision="flash_fp16", order="ring"
    )


# %% [markdown]
# ## First, nothing is broken
#
# Zigzag: of four chunks rank 0 holds 0 and 3, rank 1 holds 1 and 2. `z` is the RMS of error / σ, where σ is what
# rounding does in this very problem. About 1 is what correct arithmetic gives; there is no diagnosis of what passed.

# %%
right = verdict_of(bench.correct)
print("passed:", right.passed, "  z:", round(right.z, 2), "  diagnosis:", right.diagnosis)

# %% [markdown]
# ## Ten ways to break it
#
# One missing key, a mask that is one token off, a chunk that came twice, a merge that forgot to scale the old sum
# down, …. Look at the third column: the largest error. Some of these a tolerance of 1e-2 would let pass.

# %%
NAMES = [
    "one key dropped", "causal mask +1", "diagonal unmasked", "scale +1 %", "heads exchanged",
    "ranks exchanged", "chunk doubled", "chunk × 0.9", "not rescaled", "BF16 probabilities",
]  # fmt: skip
said = {name: verdict_of(FAULTS[name](bench)) for name in NAMES}
for name, verdict in said.items():
    print(f"{name:20} z = {verdict.z:8.4g}   largest error {verdict.max_error:.2g}   passed: {verdict.passed}")

# %% [markdown]
# ## What it says of each
#
# The first sentence of each diagnosis. Behind it is a dictionary of faults. Each is a changed computation, with the
# judge's own error model of *that* computation, so that a likelihood can be compared with the next best explanation.

# %%
for name, verdict in said.items():
    print(f"■ {name}")
    print(textwrap.fill(verdict.diagnosis[0], 110, initial_indent="  ", subsequent_indent="  "))

# %% [markdown]
# ## Weights from outputs alone
#
# If key/value chunk c entered with weight w_c, then Σ w_c (B_c − a_c out′) = 0, where a_c is the chunk's share of the
# softmax and B_c its share of the output. That is linear in w, so the outputs themselves tell the weights: 1 is right,
# 0 dropped, 2 counted twice. Dark cells are hidden by the causal mask, or cannot be known.

# %%
broken = {
    "chunk 0 doubled": FAULTS["chunk doubled"](bench),
    "chunk 0 × 0.9": FAULTS["chunk × 0.9"](bench),
    "rank 1, step 1: chunk 0 dropped": wrong_result(bench, "dropped", Place(1, 1, 0)),
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for axis, (name, result) in zip(axes, broken.items(), strict=True):
    weights = verdict_of(result).chunk_weights
    colours = plt.get_cmap("RdBu").with_extremes(bad="0.35")
    image = axis.imshow(np.ma.masked_invalid(weights), cmap=colours, vmin=0, vmax=2)
    for (row, column), weight in np.ndenumerate(weights):
        if np.isfinite(weight):
            ink = "white" if abs(weight - 1) > 0.7 else "black"
            axis.text(column, row, f"{weight:.3f}", ha="center", va="center", color=ink)
    axis.set(title=name, xlabel="key/value chunk", ylabel="query chunk", xticks=range(4), yticks=range(4))
figure.colorbar(image, ax=axes, label="weight")
plt.show()

# %% [markdown]
# In the third picture only the query chunks of rank 1 are wrong (1 and 2), and only in the column of chunk 0: that is
# the ring's step 1, when rank 1 holds what rank 0 sent.

# %%
for sentence in verdict_of(broken["rank 1, step 1: chunk 0 dropped"]).diagnosis:
    print(textwrap.fill(sentence, 110))

# %% [markdown]
# ## It may say that it does not know
#
# The right answer to *another* question is wrong everywhere, and no fault in the judge's list explains it. Then the
# diagnosis says so. Naming the nearest fault instead would cost the day that it was meant to save.

# %%
print(textwrap.fill(verdict_of(FAULTS["another case"](bench)).diagnosis[0], 110))

# %% [markdown]
# Over all 1,708 faults of one (rank, step, chunk) with rings of 2, 4 and 8 and logits ×4 the place was right every time
# that anything could be seen: `python -m cpjax.trial.localise`; the figures are in `docs/diagnosis.md`.

# %% [markdown]
# ## Exercises
#
# 1. Write a fault of your own: a backend that hands over lse to base 2. Does the judge find it, and does it name it?
# 2. How small may an error of the scale be and still be found here? Try `SIZED["scale off by"]`, with lse and without.
#
# <details>
# <summary>Solutions</summary>
#
# 1. `out` is right, so a test of `out` alone would pass. The judge looks at lse, too, and names the base.
# 2. With lse, which is float32, also the smallest, one part in 100,000. From `out` alone, which is FP16, from 0.01 % on: no single row
#    shows it, but the errors of all rows together do.
#
# The next cell computes both.
#
# </details>

# %%
from cpjax.trial.faults import SIZED

wrong = bench.correct._replace(lse=bench.correct.lse / np.log(2))
verdict = verdict_of(wrong)
print("lse to base 2: passed", verdict.passed)
print(textwrap.fill(verdict.diagnosis[0].split(" (")[0], 110, initial_indent="  ", subsequent_indent="  "))
assert not verdict.passed

fault, sizes = SIZED["scale off by"]
p = problem_
asked = {**p.judge_arguments(), "precision": "flash_fp16", "order": "ring"}
for size in sizes[:7]:
    wrong = fault(bench, size)
    passed = [judge(p.query, p.key, p.value, wrong.out, lse, **asked).passed for lse in (wrong.lse, None)]
    said = ["not found" if one else "found" for one in passed]
    print(f"scale off by {size:6.3%}: with lse {said[0]}, from out alone {said[1]}")
    assert passed == [False, size < 1e-4]

# %% [markdown]
# Previous: [6. Sixteen cards](06-sixteen-cards.ipynb) · [Contents](../docs/README.md#the-book) · Next: [8. On many chips](08-scale.ipynb)
