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
# # 5. One case, three families of operators
#
# On Atlas, ring attention is computed in three ways. MindIE lets `npu_ring_mla` carry (out, lse) from block to block.
# vLLM-Ascend computes every block with `npu_fused_infer_attention_score` and merges all partials at once with
# `npu_attention_update`. MindSpeed's `npu_fusion_attention` gives a softmax maximum and sum, merged pairwise by
# `npu_ring_attention_update`. The same mathematics; other shapes, other conventions, other roundings.
#
# Here one small case goes through all three, beside the specification in float64. Each call is the vendor's own operator
# with the vendor's own arguments. On an NPU its kernel would run; here ours does, which keeps its contract and its
# roundings ([docs/operators.md](../docs/operators.md)). Nothing in this notebook was run on an NPU.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from cpjax.dense import dense_attention
from cpjax.mask import Mask, Tokens
from npu_backend.emulation import arithmetic
from npu_backend.operators import fused_infer_block, fusion_block, fusion_update, merge_partials, ring_mla_block

T, CHUNK, N, SCALE = 384, 128, 2, 192**-0.5
rng = np.random.default_rng(0)
query, key = (rng.normal(size=(1, T, N, 192)).astype(np.float16) for _ in range(2))
value = rng.normal(size=(1, T, N, 128)).astype(np.float16)

# %% [markdown]
# ## What a rank has to do
#
# A sequence of three chunks of 128 tokens, two heads of DeepSeek's dims (128 + 64 rotary, values 128). We are the rank that
# holds the queries of the last chunk. The first two chunks of keys lie in the past, so it sees all of them; of its own
# chunk it sees a triangle. The specification decides that by positions, in float64:


# %%
def tokens(rows):
    position = np.arange(T, dtype=np.int32)[None, rows]
    return Tokens(position, np.zeros_like(position))


chunks = [slice(i * CHUNK, (i + 1) * CHUNK) for i in range(3)]
mine = chunks[2]


def specified(rows, scale=SCALE, q=query):
    parts = q[:, mine], key[:, rows], value[:, rows]
    return dense_attention(*parts, tokens(mine), tokens(rows), mask=Mask(is_causal=True), scale=scale)


exact_blocks = [specified(rows) for rows in chunks]
exact = specified(slice(0, T))
print("out", exact.out.shape, " lse", exact.lse.shape)

# %% [markdown]
# ## The first block, call by call
#
# **Family 1.** Tokens of all requests lie one after the other, 128 + 64 dims in two tensors. Lengths are per request, int32,
# and on the CPU. The mask is an argument even where there is none. The lse comes back as `[heads, tokens]`.

# %%
q, k, v = (torch.from_numpy(x) for x in (query[:, mine], key[:, chunks[0]], value[:, chunks[0]]))
triangle_512 = torch.full((512, 512), -torch.inf, dtype=torch.float16).triu(1)
ring_out, ring_lse = torch.ops.atb.npu_ring_mla(
    q[0, ..., :128].contiguous(),
    q[0, ..., 128:].contiguous(),
    k[0, ..., :128].contiguous(),
    k[0, ..., 128:].contiguous(),
    v[0],
    triangle_512,
    torch.tensor([[CHUNK], [CHUNK]], dtype=torch.int32),
    N,
    N,
    qk_scale=SCALE,
    mask_type="no_mask",
    calc_type="calc_type_first_ring",
)
print("npu_ring_mla:                    out", tuple(ring_out.shape), " lse", tuple(ring_lse.shape), ring_lse.dtype)

# %% [markdown]
# **Family 2.** One of a dozen layouts; masks hide where they are 1. The lse is `[B, N, S, 1]`, and only there if asked for.

# %%
fia_out, fia_lse = torch.ops.npu.npu_fused_infer_attention_score_v2(
    q[..., :128].contiguous(),
    k[..., :128].contiguous(),
    v,
    query_rope=q[..., 128:].contiguous(),
    key_rope=k[..., 128:].contiguous(),
    num_query_heads=N,
    softmax_scale=SCALE,
    input_layout="BSND",
    return_softmax_lse=True,
)
print("npu_fused_infer_attention_score: out", tuple(fia_out.shape), " lse", tuple(fia_lse.shape), fia_lse.dtype)

# %% [markdown]
# **Family 3.** Softmax maximum and sum instead of an lse, each stored eight times, because a 32-byte block is the smallest
# thing the hardware likes to move.

# %%
fusion_out, softmax_max, softmax_sum, *_ = torch.ops.npu.npu_fusion_attention(q, k, v, N, "BSND", scale=SCALE)
print("npu_fusion_attention:            out", tuple(fusion_out.shape), " max, sum", tuple(softmax_max.shape))

# %% [markdown]
# The same three things, in the specification's shapes `[B, t, N]`, side by side for the first query of the first head:

# %%
rows = {
    "specification, float64": exact_blocks[0].lse[0, 0, 0],
    "npu_ring_mla": ring_lse[0, 0],
    "fused_infer": fia_lse[0, 0, 0, 0],
    "fusion: max + ln sum": softmax_max[0, 0, 0, 0] + softmax_sum[0, 0, 0, 0].log(),
}
for name, lse in rows.items():
    print(f"{name:24} lse {float(lse):.7f}   error {float(lse) - rows['specification, float64']:+.1e}")

# %% [markdown]
# Two agree to float32; `npu_ring_mla` is off in the fourth decimal. That is no error of its, as we shall see.
#
# ## Every partial beside the specification's
#
# `npu_backend.operators` makes these calls, with the translations in one place. Below, the three blocks by each family, and
# the root mean square of their errors against float64.


# %%
def block(i, family, q=query, scale=SCALE):
    parts = [torch.from_numpy(x) for x in (q[:, mine], key[:, chunks[i]], value[:, chunks[i]])]
    return family(*parts, is_causal=i == 2, scale=scale)


FAMILIES = {
    "ring_mla": ring_mla_block,
    "fused_infer": fused_infer_block,
    "fusion": lambda *tensors, **options: fusion_block(*tensors, **options).partial(),
}


def rms(x, want):
    return float(np.sqrt(np.square(x.double().numpy() - want).mean()))


def table(blocks, want):
    print(f"{'':12}" + "".join(f"   chunk {i}: out, lse " for i in range(3)))
    for name, parts in blocks.items():
        errors = (f"   {rms(p.out, w.out):.1e}  {rms(p.lse, w.lse):.1e}" for p, w in zip(parts, want, strict=True))
        print(f"{name:12}" + "".join(errors))


staged = {name: [block(i, family) for i in range(3)] for name, family in FAMILIES.items()}
table(staged, exact_blocks)

# %% [markdown]
# ## Merged
#
# `npu_ring_mla` merges while it computes: each call gets what was there before. `npu_attention_update` takes all partials in
# one call. `npu_ring_attention_update` takes two.


# %%
def merged():
    tensors = [[torch.from_numpy(x) for x in (query[:, mine], key[:, c], value[:, c])] for c in chunks]
    options = [{"is_causal": i == 2, "scale": SCALE} for i in range(3)]
    carried = None
    for parts, option in zip(tensors, options, strict=True):
        carried = ring_mla_block(*parts, previous=carried, **option)
    partials = [fused_infer_block(*parts, **option) for parts, option in zip(tensors, options, strict=True)]
    first, *others = (fusion_block(*parts, **option) for parts, option in zip(tensors, options, strict=True))
    for other in others:
        first = fusion_update(first, other)
    return {"ring_mla": carried, "fused_infer": merge_partials(partials), "fusion": first.partial()}


print("staged, as the kernels round:")
for name, partial in merged().items():
    print(f"  {name:12} out {rms(partial.out, exact.out):.2e}   lse {rms(partial.lse, exact.lse):.2e}")
with arithmetic("exact"):
    print("exact, float64 inside and one cast at the end:")
    for name, partial in merged().items():
        print(f"  {name:12} out {rms(partial.out, exact.out):.2e}   lse {rms(partial.lse, exact.lse):.2e}")

# %% [markdown]
# In exact arithmetic the lses are right to float32, and what remains of the outs is FP16 storage between the calls: it belongs to
# the contract, no arithmetic removes it. So the families differ by rounding alone. By which?
#
# ## What "high precision" rounds
#
# `kernel_type_high_precision` is the only kernel that `npu_ring_mla` accepts. Its exponentials and sums are float32. But
# the scores are written to memory in **FP16** before it sees them, are scaled and compared in FP16, and the scale itself is
# rounded to FP16. An error of a score is an error of the exponent of a weight: the larger the scores, the more it matters.
# FIA and fusion_attention keep scores in float32. Let us make the queries larger and watch.

# %%
loud = [2.0**i for i in range(-3, 5)]
errors = {name: [] for name in FAMILIES}
for factor in loud:
    louder = (query * np.float16(factor)).astype(np.float16)
    want = specified(chunks[0], q=louder)
    for name, family in FAMILIES.items():
        got = block(0, family, q=louder)
        errors[name].append((rms(got.out, want.out), rms(got.lse, want.lse)))

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), dpi=80)
for axis, which, label in zip(axes, (0, 1), ("out", "lse"), strict=True):
    for (name, pairs), style in zip(errors.items(), ("o-", "s-", "x--"), strict=True):
        axis.loglog(loud, [pair[which] for pair in pairs], style, label=name)
    axis.set(xlabel="standard deviation of the scores", ylabel=f"RMS error of {label}")
    axis.grid(alpha=0.3)
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# On the left all three start at the same floor: FP16 probabilities and an FP16 result. From scores of ordinary size on,
# `npu_ring_mla` leaves it. On the right the lse tells at once which kernel rounds scores: it is float32 in all three, but
# an lse of rounded scores knows only half the digits. That is why a verdict on `npu_ring_mla` must know its profile
# (`ring_mla_fp16`), and why the lse is judged too.
#
# The roundings of one score, one after the other: the product, the scale, their product.

# %%
a, b = query[0, mine, 0].astype(np.float64), key[0, chunks[0], 0].astype(np.float64)
raw = a @ b.T
rounded = raw.astype(np.float16)
scaled = rounded * np.float16(SCALE)
steps = {
    "q·k in FP16": rounded.astype(np.float64) * SCALE - raw * SCALE,
    "scale in FP16": raw * (float(np.float16(SCALE)) - SCALE),
    "all of it": scaled.astype(np.float64) - raw * SCALE,
}
figure, axis = plt.subplots(figsize=(9, 3.2), dpi=80)
for (name, error), size in zip(reversed(steps.items()), (3, 3, 3), strict=True):
    axis.plot((raw * SCALE).ravel()[::5], error.ravel()[::5], ".", ms=size, label=name)
axis.set(xlabel="score", ylabel="error of the score")
axis.legend(loc="upper right", markerscale=3)
axis.grid(alpha=0.3)
figure.tight_layout()

# %% [markdown]
# The line through the middle is the scale: 192**-0.5 becomes 0.0351 % less in FP16, so every score is nearer to 0 by
# that much. The rest is a staircase of units in the last place, which double in width with every power of two.
#
# ## Where nothing is seen
#
# The specification says (0, −∞) for a query without keys, and merging that changes nothing. Each operator has its own idea:

# %%
short = [x[:, :1] for x in (k[..., :128], v)]
triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
options = {"num_query_heads": N, "input_layout": "BSND", "return_softmax_lse": True}
two = q[:, :2, :, :128].contiguous()

fia = torch.ops.npu.npu_fused_infer_attention_score_v2(two, *short, atten_mask=triangle, sparse_mode=3, **options)
print(
    "fused_infer, first of two causal queries, one key:  out",
    float(fia[0][0, 0].abs().max()),
    " lse",
    float(fia[1][0, 0, 0]),
)
fusion = torch.ops.npu.npu_fusion_attention(two, *short, N, "BSND", atten_mask=triangle, sparse_mode=3)
print(f"fusion_attention, the same:  max {fusion[1][0, 0, 0, 0]:.2g}  sum {fusion[2][0, 0, 0, 0]:g}")
nothing = [torch.full((1,), -torch.inf)] * 2, [torch.zeros(1, 8)] * 2, 1
print("attention_update of two empty partials:  lse", float(torch.ops.npu.npu_attention_update(*nothing)[1]))
packed = torch.tensor([[2, 2], [0, 2]], dtype=torch.int32)  # two requests, the first has no keys
four, keys = q[0, :4], k[0, :2]
parts = four[..., :128], four[..., 128:], keys[..., :128], keys[..., 128:], v[0, :2]
ring = torch.ops.atb.npu_ring_mla(*parts, triangle_512, packed, N, N, qk_scale=SCALE)
print("ring_mla, a request without keys is not written:  lse", float(ring[1][0, 0]))

for name, partial in {
    "fused_infer_block": fused_infer_block(two, *short, is_causal=True, scale=SCALE),
    "fusion_block": fusion_block(two, *short, is_causal=True, scale=SCALE).partial(),
    "ring_mla_block": ring_mla_block(q, k, v, is_causal=False, scale=SCALE, kv_lengths=(0,)),
}.items():
    print(f"{name:18} out {float(partial.out[0, 0].abs().max())}  lse {float(partial.lse[0, 0, 0])}")

# %% [markdown]
# The wrappers know from the lengths which queries see a key, and never ask the value. So the three families can be exchanged
# for one another, and mixed: a partial is a partial.

# %% [markdown]
# ## Keys that are made on arrival
#
# In MindIE no keys and values travel. What is gathered is DeepSeek's latent, one row a token for all heads, and each rank makes
# keys and values of it: `k = [c_kv W_UK ; k_rope]`, `v = c_kv W_UV`. So does `npu_backend` if a case holds the latent
# (`cpjax crosscheck --latent`).

# %%
from cpjax.crosscheck.files.latent import Latent, expanded
from cpjax.crosscheck.judging.expansion import check_expanded
from npu_backend.latent import expand, up_projection

C, R = 512, 64
c_kv, k_rope = (rng.normal(size=(1, T, width)).astype(np.float16) for width in (C, R))
w_uk, w_uv = ((rng.normal(size=(C, N, 128)) / C**0.5).astype(np.float16) for _ in range(2))
row = torch.from_numpy(np.concatenate([c_kv, k_rope], axis=2))[:, :, None]
made_key, made_value = (x.numpy() for x in expand(row, up_projection(*map(torch.from_numpy, (w_uk, w_uv)))))
print(f"{row.shape[3]} numbers a token travel; of 16 heads' keys and values there are {16 * (192 + 128):,}")

latent = Latent(c_kv, k_rope, w_uk, w_uv)
right_key, right_value = expanded(latent)
found = check_expanded(latent, made_key, made_value, np.ones((1, T), bool))
print(f"{found.differing:.2%} of the numbers are not next to the exact product; reasons against: {found.reasons}")

# %% [markdown]
# Not an error: the product is a float32 sum of 512 terms, and where it lies near the middle between two FP16 numbers, a last
# place of float32 decides which of them comes out. Each point is one number of a value. To the right it is farther from that
# middle, upwards its float32 sum is farther off; above the line it can come out as the other one.

# %% tags=["processor"]
product = np.einsum("bsc,cnv->bsnv", c_kv.astype(np.float64), w_uv.astype(np.float64))
spacing = np.spacing(np.abs(right_value)).astype(np.float64)
to_middle = np.abs(np.abs(product / spacing - np.floor(product / spacing)) - 0.5)
sums = (c_kv[0].astype(np.float32) @ w_uv.astype(np.float32).reshape(C, -1)).reshape(product.shape)
off = np.abs(sums - product) / spacing
other = sums.astype(np.float16) != right_value
figure, axis = plt.subplots(figsize=(9, 3.4), dpi=80)
axis.loglog(to_middle[~other][::20], off[~other][::20] + 1e-8, ".", ms=2, color="0.6", label="the nearest FP16 number")
axis.loglog(to_middle[other], off[other], ".", ms=4, color="C3", label=f"its neighbour ({other.mean():.2%})")
axis.loglog([1e-6, 0.5], [1e-6, 0.5], "k--", lw=1)
axis.set(xlabel="distance to the middle, in spacings", ylabel="error of the float32 sum")
axis.set(xlim=(1e-6, 0.6), ylim=(1e-7, 0.1))
axis.legend(loc="lower right", markerscale=3)
figure.tight_layout()

# %% [markdown]
# So two correct kernels need not have the same keys, and a neighbour is a whole spacing off. No verdict on attention is widened
# for that. A result states its keys and values; these are judged by themselves, and attention is judged on them
# ([docs/verdict.md](../docs/verdict.md), §10).

# %% [markdown]
# ## Exercises
#
# 1. Choose a scale that FP16 holds exactly, 1/16, instead of 192^(−½). How much smaller is the error of `npu_ring_mla`'s lse?
# 2. Can partials of different families be merged? Take block 0 of one, block 1 of the next, block 2 of the third.
#
# <details>
# <summary>Solutions</summary>
#
# 1. About seven times. The scale's own error is gone, which moved all scores in one direction; and to multiply by a power of two rounds
#    nothing. What remains is the rounding of q·k.
# 2. Yes. A partial is (out, lse) over some keys, whoever computed it; the error is between those of the three.
#
# The next cell computes both.
#
# </details>

# %%
for name, scale in (("192^(−½)", SCALE), ("1/16", 1 / 16)):
    error = rms(block(0, ring_mla_block, scale=scale).lse, specified(chunks[0], scale).lse)
    off = abs(float(np.float16(scale)) / scale - 1)
    print(f"scale {name:9} is off by {off:.3%} in FP16; RMS error of lse {error:.1e}")

mixed = merge_partials([staged[name][i] for i, name in enumerate(FAMILIES)])
error = rms(mixed.out, exact.out)
print(f"one block of each family, merged: RMS error of out {error:.1e}")
assert error < 1.2e-4  # the largest of the three families' own

# %% [markdown]
# Previous: [4. Precision: what FP16 costs, and BF16](04-precision.ipynb) · [Contents](../docs/README.md#the-book) · Next: [6. Sixteen cards](06-sixteen-cards.ipynb)
