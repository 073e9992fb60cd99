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
# # 4. Precision: what FP16 costs, and BF16
#
# In exact arithmetic ring attention is attention. In FP16 every rank's result is rounded when it is stored, and again after every merge,
# cp times or more. How much is that, and how would one know a rounding error from a bug? Everything below is computed by
# `cpjax.trial.emulators` in NumPy, which rounds where [docs/precision.md](../docs/precision.md) says, and is judged by
# `cpjax.crosscheck.judge`. Nothing in this notebook was run on an NPU.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np

from cpjax.crosscheck import judge
from cpjax.trial.emulators import PROFILES, attend
from cpjax.trial.problem import Problem

rng = np.random.default_rng(0)
T, HEADS, H = 256, 2, 64
query, key, value = (rng.normal(size=(1, T, HEADS, H)).astype(np.float16) for _ in range(3))
problem = Problem(query, key, value, scale=H**-0.5, is_causal=True)

# %% [markdown]
# ## The three ways to carry a result
#
# An *arithmetic* says in which format each quantity is kept. All three accumulate in float32. They differ in what is stored:
# FP16 everywhere, as `npu_ring_mla` does between its calls; the result carried in FP32 and rounded to FP16 once, at the end; BF16 everywhere.

# %%
flash = PROFILES["flash_fp16"]
ARITHMETIC = {
    "FP16, carried in FP16": flash,
    "FP16, carried in FP32": replace(flash, carry="float32"),
    "BF16": replace(flash, probability="bfloat16", carry="bfloat16", out="float32"),
}
for name, fmt in (("float16", np.finfo(np.float16)), ("bfloat16", ml_dtypes.finfo(ml_dtypes.bfloat16))):
    print(f"{name:9} spacing at 1: {float(fmt.eps):.2e}   largest {float(fmt.max):.3g}")

# %% [markdown]
# (NumPy has no BF16; its numbers are kept in float32, where they are exact, hence `out="float32"`. The last carry has rounded them.)
#
# ## Error against cp
#
# A causal zigzag ring over 256 tokens, the keys cut in 2·cp chunks, each rounded and merged in the order of the ring. The reference is the same
# computation in float64. Two measures: the error itself (root mean square), and *z*, the error in units of the σ that the judge
# computes for each output from the roundings that `flash_fp16` has with this cp.

# %%
SIZES = [1, 2, 4, 8, 16, 32]


def verdict_on(result, cp, precision="flash_fp16", asked=problem):
    question = replace(asked, cp=cp).judge_arguments()
    return judge(asked.query, asked.key, asked.value, *result, precision=precision, order="ring", **question)


verdicts = {}
exact = attend(problem.cast("float64"), PROFILES["float64"]).out
rms, z = {name: [] for name in ARITHMETIC}, {name: [] for name in ARITHMETIC}
for name, arithmetic in ARITHMETIC.items():
    for cp in SIZES:
        result = attend(replace(problem, cp=cp), arithmetic, "ring")
        rms[name].append(float(np.sqrt(np.square(result.out - exact).mean())))
        handed_over = result._replace(out=result.out.astype(np.float16))
        verdicts[name, cp] = verdict_on(handed_over, cp)
        z[name].append(verdicts[name, cp].z)
for name in ARITHMETIC:
    print(f"{name:22} RMS " + " ".join(f"{x:.1e}" for x in rms[name]), end="   ")
    print("z " + " ".join(f"{x:5.2f}" for x in z[name]))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), dpi=80)
for axis, numbers, label in zip(axes, (rms, z), ("RMS error of out", "z = RMS(error / σ)"), strict=True):
    for (name, line), style in zip(numbers.items(), ("o-", "s-", "x--"), strict=True):
        axis.loglog(SIZES, line, style, label=name)
    axis.set(xlabel="cp", ylabel=label, xticks=SIZES)
    axis.set_xticklabels(SIZES)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
axes[1].set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
axes[0].legend(fontsize=8)
figure.tight_layout()

# %% [markdown]
# Carried in FP16, the error grows with cp: each of the 2·cp chunk results and merges rounds once more. But the judge counts these
# roundings, so z stays at 1, whatever cp is. Carried in FP32 it does not grow (probabilities and the final result are still FP16), and z falls below 1:
# better than asked. BF16 has eight significant digits (binary) where FP16 has eleven: its error and its z are eight times as
# large, at every cp.
#
# ## Verdicts
#
# One for each, at cp 8. A z below 1 passes; beyond the bound of what rounding can do, nothing does.

# %%
for name in ARITHMETIC:
    verdict = verdicts[name, 8]
    answer = "passed" if verdict.passed else "FAILED"
    print(f"{name:22} {answer}   z {verdict.z:.2f}   bound used {verdict.hard_ratio:.2f}")
    if verdict.reasons:
        print("    " + verdict.reasons[0])

# %% [markdown]
# ## Scores in FP16
#
# `npu_ring_mla` rounds the scores themselves (`ring_mla_fp16`). An error δ of a score multiplies its weight by e^δ, and δ grows with the
# score: half a unit in the last place is 4.9e-4 at 1, 7.8e-3 at 16. So larger queries hurt one profile and not the other:

# %%
LOUD = [0.5, 1, 2, 4, 8, 16]
errors = {"flash_fp16": [], "ring_mla_fp16": []}
for factor in LOUD:
    louder = replace(problem, query=(query * np.float16(factor)).astype(np.float16), cp=2)
    want = attend(louder.cast("float64"), PROFILES["float64"]).out
    for name, line in errors.items():
        line.append(float(np.sqrt(np.square(attend(louder, PROFILES[name], "gather").out - want).mean())))

figure, axis = plt.subplots(figsize=(6, 3), dpi=80)
for (name, line), style in zip(errors.items(), ("o-", "s--"), strict=True):
    axis.loglog(LOUD, line, style, label=name)
axis.set(xlabel="standard deviation of the scores", ylabel="RMS error of out")
axis.set_xticks(LOUD, LOUD)
axis.minorticks_off()
axis.legend()
axis.grid(alpha=0.3)
figure.tight_layout()

# %% [markdown]
# ## Why FP16 and not BF16?
#
# MindIE's documentation says that context parallelism does not support BF16; it gives no reason, and its code does not check. The operator
# itself takes BF16. So this is our reading of the numbers, not the vendor's: a carried result loses a place per merge, and BF16
# begins with three places fewer. The range for which one chooses BF16 is not needed here, since an attention output is an average
# of values and never larger than the largest of them. What FP16 cannot hold are large *scores*, and that is the other edge.

# %% [markdown]
# ## Exercises
#
# 1. A kernel rounds only the probabilities to BF16 and keeps FP16 everywhere else. Does the judge notice at cp 8?
# 2. An lse is ln Σ e^s. What is the largest score that FP16 can hold, and what does a score of 70,000 become?
#
# <details>
# <summary>Solutions</summary>
#
# 1. Yes. The error is between that of FP16 and that of BF16, and z is far above 1.
# 2. 65,504. What is larger becomes ∞, and a row with a score of ∞ has no softmax: ∞ − ∞ is NaN. The judge says that such a
#    case is not judgeable in this format.
#
# The next cell computes both.
#
# </details>

# %%
mixed = replace(flash, probability="bfloat16")
result = attend(replace(problem, cp=8), mixed, "ring")
verdict = verdict_on(result._replace(out=result.out.astype(np.float16)), 8)
print(f"BF16 probabilities at cp 8: {'passed' if verdict.passed else 'FAILED'}, z {verdict.z:.1f}")
assert not verdict.passed
assert verdicts["FP16, carried in FP16", 8].z < verdict.z < verdicts["BF16", 8].z

with np.errstate(over="ignore", invalid="ignore"):
    score = np.array([70_000.0, 0.0]).astype(np.float16)
    print("largest", float(np.finfo(np.float16).max), " scores", score, " minus their maximum", score - score.max())

# %% [markdown]
# Previous: [3. Who holds what, and who works how much](03-layouts.ipynb) · [Contents](../docs/README.md#the-book) · Next: [5. One case, three families of operators](05-three-families.ipynb)
