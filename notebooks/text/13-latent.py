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
# # 13. MLA, and what travels
#
# DeepSeek's *multi-head latent attention* (MLA) does not store keys and values. It stores one vector a token, the
# *latent*, from which the keys and values of all heads can be made. What does that change for context parallelism: what
# travels, how many bytes, and who computes the keys?
#
# Notation of [cpjax/latent.py](../cpjax/latent.py), with the sizes of DeepSeek-V3: N = 128 heads; the latent `c_kv` has
# C = 512 numbers; `k_rope`, the part of the key with rotary position, has R = 64 numbers and is shared by all heads. A
# key has 128 + 64 numbers, a value 128. W_UK and W_UV are weights, for each head a matrix:
#
# $$k_n = [\,c_{kv} W^{UK}_n \;;\; k_{rope}\,], \qquad v_n = c_{kv} W^{UV}_n$$

# %%
from functools import partial

import jax
import matplotlib.pyplot as plt
import numpy as np

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)  # simulated devices; before JAX is first used

from cpjax.attention import Attention
from cpjax.dense import dense_attention
from cpjax.latent import UpProjection, expand, latent_attention_on_device
from cpjax.mask import Mask, tokens
from cpjax.parallel import cp_mesh
from cpjax.plan.model import model_of
from cpjax.precision import profile

plt.rcParams.update({"figure.dpi": 80, "font.size": 10})
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]

# %% [markdown]
# ## Two ways to use a latent
#
# **Expanded**: make the keys and values of the heads, then compute attention as usual.
#
# **Absorbed**: a score is q_nope · (c_kv W_UK) + q_rope · k_rope. The weight can be applied to the query instead of the
# key: (q_nope W_UKᵀ) · c_kv. Then the latent itself is the key, of 512 + 64 numbers, and also the value, of 512. All
# heads share this one key and value. W_UV is applied to the result, once for each query.
#
# Both are the same function. Here with small sizes, on a ring of four devices and gathered, against dense attention in
# float64:

# %%
CP, T, HEADS, C, R, NOPE, VALUE = 4, 32, 2, 16, 4, 8, 8
rng = np.random.default_rng(0)
query = rng.standard_normal((1, T, HEADS, NOPE + R))
c_kv, k_rope = rng.standard_normal((1, T, C)), rng.standard_normal((1, T, R))
up = UpProjection(rng.standard_normal((C, HEADS, NOPE)), rng.standard_normal((C, HEADS, VALUE)))
place = tokens(1, T)
attention = Attention(Mask(), scale=(NOPE + R) ** -0.5, precision=profile("float64"))
key, value = (np.asarray(x) for x in expand(c_kv, k_rope, up, attention))
dense = dense_attention(query, key, value, place, place, mask=Mask(), scale=attention.scale)


def on_devices(**how):
    """Latent attention of shards; the weights are on every device."""
    device = partial(latent_attention_on_device, attention=attention, axis_name="cp", **how)
    shards, everywhere = jax.P(None, "cp"), jax.P()
    specs = (shards, shards, shards, everywhere, shards, shards)
    return jax.jit(jax.shard_map(device, mesh=cp_mesh(CP), in_specs=specs, out_specs=shards))


for exchange in ("ring", "gather"):
    for absorbed in (False, True):
        run = on_devices(exchange=exchange, absorbed=absorbed)
        error = float(np.abs(run(query, c_kv, k_rope, up, place, place).out - dense.out).max())
        assert error < 1e-12
        name = "absorbed" if absorbed else "expanded"
        print(f"{exchange:7} {name}: differs from dense attention by less than 1e-12")

# %% [markdown]
# ## What travels
#
# The latent, and nothing else: 576 numbers a token, in both ways and in every exchange. If keys and values travelled
# instead, it would depend on the heads of a rank. *tp* ranks share the heads: a rank with 128/tp heads needs 320 ·
# 128/tp numbers a token. The latent has no heads that could be dealt out, so each tp rank receives the whole of it:

# %%
N, KEY, VAL, LATENT, C_V3, NOPE_V3 = 128, 192, 128, 576, 512, 128  # DeepSeek-V3's
model = model_of("DeepSeek-R1")
assert (model.heads, model.key_dim, model.value_dim, model.cache_numbers(8)) == (N, KEY, VAL, LATENT)
tps = 2 ** np.arange(8)
heads_travel = N // tps * (KEY + VAL)
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
left.loglog(tps, heads_travel, "s--", color=COLOURS[1], label="keys and values of the rank's heads")
left.loglog(tps, np.full(len(tps), LATENT), "o-", color=COLOURS[0], label="the latent")
left.set(xlabel="tp", ylabel="numbers a token that a rank receives")
left.set_xticks(tps, tps)
left.set_yticks([320, 576, 1280, 5120, 40960], ["320", "576", "1,280", "5,120", "40,960"])
left.minorticks_off()
left.grid(alpha=0.3)
left.legend()
cps, length = np.array([2, 4, 8, 16]), 32768
share = (cps - 1) / cps * length * 2 / 2**20  # MiB for each number a token, in 16 bits
width = 0.38
for shift, numbers, name, colour, hatch in (
    (-width / 2, 5120, "keys and values, tp 8", COLOURS[1], "//"),
    (width / 2, LATENT, "the latent, any tp", COLOURS[0], ""),
):
    bars = right.bar(
        np.arange(len(cps)) + shift, share * numbers, width, color=colour, hatch=hatch, ec="white", label=name
    )
    right.bar_label(bars, fmt="%.0f", fontsize=9)
right.set_xticks(range(len(cps)), cps)
right.set(xlabel="cp", ylabel="MiB a rank and layer, 16 bits", title=f"{length:,} tokens", ylim=(0, 400))
right.legend(loc="upper left")
figure.tight_layout()
print(f"tp 8: the latent is {5120 / LATENT:.1f} times smaller than the keys and values of 16 heads")

# %% [markdown]
# Up to tp 64 the latent is smaller; with one head a rank its own keys and values would be. (`cpjax plan` counts 1,152
# bytes a token and layer, 576 numbers of two bytes, whatever tp is.)
#
# That is why MindIE can afford to *gather* in prefill: with cp 2 and 32,768 tokens a card receives 18 MiB a layer
# instead of 160.
#
# ## Who makes the keys
#
# Expanded, each rank makes keys and values of **all** latents that it meets, its own and those of the
# other cp ranks, for its heads. So cp ranks do this work cp times. Absorbed, nothing is made of a key, but each pair
# costs more: 576 + 512 instead of 192 + 128 multiplications. Which is less work depends on how many queries use a key:

# %%
QUERIES = 2 ** np.arange(0, 14)
KEYS = 8192


def expanded_work(queries, keys):
    """Multiplications for one head: keys and values are made, then attention (no mask)."""
    return keys * C_V3 * (NOPE_V3 + VAL) + queries * keys * (KEY + VAL)


def absorbed_work(queries, keys):
    """The same in the latent's space: queries and results are multiplied, once each."""
    return queries * C_V3 * (NOPE_V3 + VAL) + queries * keys * (LATENT + C_V3)


figure, axis = plt.subplots(figsize=(7.5, 3.6))
axis.loglog(QUERIES, expanded_work(QUERIES, KEYS), "s--", color=COLOURS[1], label="expanded")
axis.loglog(QUERIES, absorbed_work(QUERIES, KEYS), "o-", color=COLOURS[0], label="absorbed")
axis.set_xticks(QUERIES[::2], [f"{n:,}" for n in QUERIES[::2]])
axis.minorticks_off()
axis.set(xlabel="queries", ylabel="multiplications of a head", title=f"{KEYS:,} keys")
axis.grid(alpha=0.3)
axis.legend()
figure.tight_layout()
for queries, name in ((1, "decoding, 1 query"), (KEYS, "prefill, 8,192 queries")):
    print(f"{name:24} expanded / absorbed: {expanded_work(queries, KEYS) / absorbed_work(queries, KEYS):6.2f}")

# %% [markdown]
# Left, decoding: one query looks at 8,192 keys, and to make the keys would be nearly all of the work. Right, prefill:
# each key is used by thousands of queries, and making it pays. So prefill expands and decoding absorbs, and the cache
# that both use is the same: latents.
#
# ## Exercises
#
# 1. From how many queries on is expanded less work than absorbed? Does it depend on the number of keys?
# 2. With 16 cards cp · tp = 16. What share of a prefill's attention is making keys and values, for cp 1, 2, 4 and 8 and
#    a causal prompt of 8,192 tokens?
#
# <details>
# <summary>Solutions</summary>
#
# 1. For many keys: 512 · 256 = queries · (1,088 − 320), so from about 171 queries on; the number of keys hardly
#    matters.
# 2. A rank makes the keys of all tokens for its 128/tp = 8 · cp heads. So this work grows with cp, while its part of
#    attention does not: its share of the pairs is 1/cp, for cp times as many heads.
#
# The next cell computes both.
#
# </details>

# %%
pays = {
    keys: next(n for n in range(1, 1000) if expanded_work(n, keys) < absorbed_work(n, keys))
    for keys in (2048, 8192, 131072)
}
print("expanded is less work from so many queries on, by number of keys:", pays)
assert all(140 < queries < 175 for queries in pays.values())

figure, axis = plt.subplots(figsize=(6, 3))
shares = []
for cp in (1, 2, 4, 8):
    heads = N * cp // 16
    making = heads * KEYS * C_V3 * (NOPE_V3 + VAL)
    pairs = heads * KEYS * (KEYS + 1) // 2 // cp * (KEY + VAL)
    shares.append(making / (making + pairs))
bars = axis.bar(["cp 1, tp 16", "cp 2, tp 8", "cp 4, tp 4", "cp 8, tp 2"], shares, color=COLOURS[0])
axis.bar_label(bars, [f"{share:.0%}" for share in shares])
axis.set(ylabel="share of making keys and values", ylim=(0, 0.6), title=f"{KEYS:,} tokens, 16 cards, causal")
figure.tight_layout()
assert np.all(np.diff(shares) > 0)

# %% [markdown]
# Previous: [12. The backward ring](12-backward-ring.ipynb) · [Contents](../docs/README.md#the-book)
