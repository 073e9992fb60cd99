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
# # 12. The backward ring
#
# Training needs derivatives. In the forward ring keys and values travel, and each rank keeps its queries. What must
# travel backwards, so that each rank ends with the derivatives of *its own* queries, keys and values, and with nothing
# kept that grows with the whole sequence?
#
# Notation: the loss is a number L. `dout` is the derivative of L with respect to `out`, and so on: dq, dk, dv.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)  # simulated devices; before JAX is first used

from cpjax.crosscheck import judge_gradients
from cpjax.dense import dense_attention
from cpjax.mask import Mask, tokens
from cpjax.parallel import context_parallel_attention, cp_mesh
from cpjax.partition import Zigzag

plt.rcParams.update({"figure.dpi": 80, "font.size": 10})
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]
CP, T, H = 4, 32, 8
SCALE = H**-0.5
rng = np.random.default_rng(0)
query, key, value, dout = rng.standard_normal((4, T, H))  # one head, so that formulas are matrices
hidden = np.triu(np.full((T, T), True), 1)  # what the causal mask hides

# %% [markdown]
# ## Why lse is enough
#
# Of the forward pass a rank keeps its inputs, `out` and `lse`. The probabilities P, one number for each pair of query
# and key, are thrown away: they would be T² numbers. But each of them can be computed again, *without knowing the other
# keys*, because lse is the logarithm of the whole sum:
#
# $$P = e^{s - \text{lse}}, \qquad s = \text{scale} \cdot q k^T$$
#
# and the derivatives are sums over pairs:
#
# $$dv = P^T\,dout, \qquad dS = P \circ (dout\,v^T - \delta), \qquad dq = \text{scale} \cdot dS\,k, \qquad
# dk = \text{scale} \cdot dS^T q$$
#
# with δ = Σ dout · out for each query, one number. So a block of queries and keys can be computed alone, and the
# results of blocks are *added*: no rescaling, for lse is final. Here with NumPy, the keys in four blocks:

# %%
score = np.where(hidden, -np.inf, SCALE * query @ key.T)
lse = np.log(np.exp(score).sum(axis=1))
out = np.exp(score - lse[:, None]) @ value
delta = (dout * out).sum(axis=1)


def derivatives(keys):
    """What one block of keys adds to dq, and its dk and dv."""
    k, v = key[keys], value[keys]
    p = np.exp(np.where(hidden[:, keys], -np.inf, SCALE * query @ k.T) - lse[:, None])
    ds = p * (dout @ v.T - delta[:, None])
    return SCALE * ds @ k, SCALE * ds.T @ query, p.T @ dout


blocks = [derivatives(keys) for keys in np.split(np.arange(T), CP)]
dq = sum(block[0] for block in blocks)
dk, dv = (np.concatenate([block[i] for block in blocks]) for i in (1, 2))

# %% [markdown]
# ## Checked against differences
#
# A derivative is what a difference tends to. Move all queries, keys and values by h in a random direction, and by −h;
# the difference of the two losses over 2h is the derivative in this direction, up to an error of h² and the rounding of
# L divided by h. The ring on four devices (`jax.grad` through `context_parallel_attention`) and the formulas above
# against these differences, in float64:

# %%
given = [x[None, :, None] for x in (query, key, value)]
how = {"mesh": cp_mesh(CP), "scale": SCALE, "precision": "float64"}


def loss(q, k, v):
    """L: a weighted sum of all outputs, so that its derivative by out is dout."""
    return (context_parallel_attention(q, k, v, **how).out * dout[None, :, None]).sum()


def exact_loss(q, k, v):
    """The same by the definition, in NumPy."""
    place = tokens(1, T)
    return float((dense_attention(q, k, v, place, place, mask=Mask(), scale=SCALE).out * dout[None, :, None]).sum())


ring = [np.asarray(x)[0, :, 0] for x in jax.jit(jax.grad(loss, (0, 1, 2)))(*given)]
for name, ours, theirs in zip(("dq", "dk", "dv"), (dq, dk, dv), ring, strict=True):
    assert np.abs(ours - theirs).max() < 1e-13
    print(f"{name}: the ring and the formulas differ by less than 1e-13")

directions = [rng.standard_normal((3, T, H)) for _ in range(3)]
sizes = 10.0 ** -np.arange(0, 11)
figure, axis = plt.subplots(figsize=(7, 3.4))
for number, (direction, style) in enumerate(zip(directions, ("o-", "s--", "x-."), strict=True)):
    moved = [
        [x + sign * h * d[None, :, None] for x, d in zip(given, direction, strict=True)]
        for h in sizes
        for sign in (1, -1)
    ]
    losses = np.array([exact_loss(*x) for x in moved]).reshape(-1, 2)
    difference = (losses[:, 0] - losses[:, 1]) / (2 * sizes)
    derivative = sum((d * g).sum() for d, g in zip(direction, ring, strict=True))
    error = np.abs(difference / derivative - 1)
    axis.loglog(sizes, np.maximum(error, 1e-10), style, color=COLOURS[number], label=f"direction {number + 1}")
    assert error.min() < 1e-8
axis.loglog(sizes[:6], 0.1 * sizes[:6] ** 2, color="black", lw=1, ls=":", label="h², for comparison")
axis.set(xlabel="h", ylabel="relative difference, at least 1e-10", title="finite differences against the backward ring")
axis.grid(alpha=0.3)
axis.legend()
figure.tight_layout()

# %% [markdown]
# From right to left the error falls with h², as it must for a right derivative, until the rounding of L divided by h
# takes over. With a wrong derivative the curves would stay flat, at the size of the fault.
#
# ## What travels home
#
# A rank computes dk and dv only for the pairs of *its* queries. The dk of a key is the sum over all queries behind it,
# and these are on all ranks. So dk and dv travel **with** the shard of keys and values to which they belong, and each
# rank adds its part:
#
# - step *s*: rank *r* has the shard of rank *r* − *s*. It adds to the shard's dk and dv, and to its own dq, which never
#   moves.
# - keys and values travel cp − 1 times, as in the forward pass. dk and dv travel cp times: the last transfer brings
#   them home.
#
# Each square below is a rank at a step. Its colour is the shard that it has; the number is how many ranks have added to
# the shard's dk and dv by then. In the last column nothing is computed: each shard's dk and dv are where its keys are.

# %%
figure, axis = plt.subplots(figsize=(7.5, 3))
for step in range(CP + 1):
    for rank in range(CP):
        source = (rank - step) % CP
        axis.add_patch(plt.Rectangle((step, -rank), 0.9, 0.9, fc=COLOURS[source], ec="black", lw=0.6))
        text = f"shard {source}\nadded: {step + 1}" if step < CP else f"dk, dv of {source}\nhome"
        ink = "black" if source == 3 else "white"
        axis.text(step + 0.45, 0.45 - rank, text, ha="center", va="center", fontsize=9, color=ink)
axis.set(xlim=(-0.1, CP + 1), ylim=(-CP + 0.9, 1.0))
axis.set_xticks([step + 0.45 for step in range(CP + 1)], [*(f"step {step}" for step in range(CP)), "after"])
axis.set_yticks([0.45 - rank for rank in range(CP)], [f"rank {rank}" for rank in range(CP)])
axis.spines[:].set_visible(False)
axis.tick_params(length=0)
figure.tight_layout()


# %% [markdown]
# ## How many bytes
#
# Counted in the program itself, as in [chapter 11](11-exchanges.ipynb): what one device receives per `ppermute`, loops
# included. Inputs are bfloat16; dk and dv are added up in float32, because a sum over many ranks in bfloat16 would lose
# digits.

# %%
def received(jaxpr):
    """Bytes that one device receives by `ppermute`, which is all that this program sends."""
    total = 0
    for line in jaxpr.eqns:
        if line.primitive.name == "ppermute":
            total += sum(x.aval.size * x.aval.dtype.itemsize for x in line.invars)
        for inner in jax.tree.leaves(line.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                times = line.params["length"] if line.primitive.name == "scan" else 1
                total += times * received(getattr(inner, "jaxpr", inner))
    return total


HEADS, KV_HEADS, DIM, TOKENS = 32, 8, 128, 8192
q = jax.ShapeDtypeStruct((1, TOKENS, HEADS, DIM), jnp.bfloat16)
kv = jax.ShapeDtypeStruct((1, TOKENS, KV_HEADS, DIM), jnp.bfloat16)


def forward(q, k, v):
    """In the order of the ranks' shards, so that nothing else has to be moved."""
    return context_parallel_attention(q, k, v, mesh=cp_mesh(CP), in_partition_order=True).out


def both(q, k, v):
    """The forward pass, and its derivative."""
    out, backwards = jax.vjp(forward, q, k, v)
    return backwards(out)


one_way, in_all = (received(jax.make_jaxpr(f)(q, kv, kv).jaxpr) / 1e6 for f in (forward, both))
shard = TOKENS // CP * KV_HEADS * 2 * DIM / 1e6  # numbers of a shard, in millions
parts = {"forward": [(CP - 1) * shard * 2, 0.0], "backward": [(CP - 1) * shard * 2, CP * shard * 4]}
places = (CP - 1) * TOKENS // CP * 8 / 1e6
assert abs(one_way - parts["forward"][0] - places) < 1e-6
assert abs(in_all - one_way - sum(parts["backward"]) - places) < 1e-6

figure, axis = plt.subplots(figsize=(7, 2.2))
keys, home = np.array(list(parts.values())).T
axis.barh(list(parts), keys, color=COLOURS[0], label="keys and values, bfloat16")
axis.barh(list(parts), home, left=keys, color=COLOURS[1], hatch="//", ec="white", label="dk and dv, float32")
for row, total in enumerate(keys + home):
    axis.text(total + 1, row, f"{total:.1f}", va="center")
axis.set(
    xlabel=f"MB that a rank receives in one layer: {TOKENS:,} tokens, {KV_HEADS} key heads of {DIM}, cp {CP}",
    xlim=(0, 110),
)
axis.invert_yaxis()
axis.legend(loc="upper right", fontsize=9)
figure.tight_layout()


# %% [markdown]
# Backwards a rank receives (cp − 1) shards of keys and values at 2 bytes a number, and cp times their derivatives at 4
# bytes: 3.7 times the bytes of the forward pass for cp 4, and nearly 3 times for a large cp. It also computes more:
# five products a pair instead of two.
#
# ## Exercises
#
# 1. Leave δ out. Which of dq, dk and dv are wrong? What does the judge say?
# 2. Let rank 1 forget its last transfer: of its keys it has only the dk and dv of its own queries. What does the judge
#    say?
#
# <details>
# <summary>Solutions</summary>
#
# 1. dq and dk. dv has no δ in it.
# 2. The parts of the other ranks never came home. dq is right, for it does not travel. The judge names the rank.
#
# The next cell asks the judge. It judges gradients by an error model of their own
# ([docs/gradients.md](../docs/gradients.md)).
#
# </details>

# %%
def judged(**wrong):
    """What the judge says of the gradients, some of them replaced."""
    found = {"dq": ring[0], "dk": ring[1], "dv": ring[2]} | wrong
    arrays = [x.astype(np.float32)[None, :, None] for x in (query, key, value, out)]
    cotangent, *gradients = (x.astype(np.float32)[None, :, None] for x in (dout, *found.values()))
    saved = lse.astype(np.float32)[None, :, None]
    asked = {"scale": SCALE, "is_causal": True, "precision": "float32", "cp": CP}
    return judge_gradients(*arrays, saved, cotangent, *gradients, **asked)


ds = np.exp(score - lse[:, None]) * (dout @ value.T)
without_delta = {"dq": SCALE * ds @ key, "dk": SCALE * ds.T @ query, "dv": np.exp(score - lse[:, None]).T @ dout}
assert np.abs(without_delta["dv"] - dv).max() < 1e-13
mine = Zigzag(CP).order(T).reshape(CP, -1)[1]  # the tokens of rank 1
p = np.exp(score[np.ix_(mine, mine)] - lse[mine, None])
ds = p * (dout[mine] @ value[mine].T - delta[mine, None])
not_home = {"dk": dk.copy(), "dv": dv.copy()}
not_home["dk"][mine], not_home["dv"][mine] = SCALE * ds.T @ query[mine], p.T @ dout[mine]
for name, wrong in (("correct", {}), ("without δ", without_delta), ("not sent home", not_home)):
    verdict = judged(**wrong)
    print(f"{name:16} passed {verdict.passed}", *verdict.causes, sep="\n    ")

# %% [markdown]
# Previous: [11. Exchanges other than the ring](11-exchanges.ipynb) · [Contents](../docs/README.md#the-book) · Next: [13. MLA, and what travels](13-latent.ipynb)
