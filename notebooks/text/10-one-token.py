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
# # 10. One token's way through a DeepSeek model
#
# A prompt comes in, tokens go out. In between one token of the prompt is embedded on one device, leaves a small vector
# behind in each layer, travels around a ring, is stored in a cache that several devices share, changes hands to other
# devices, and is looked at again by each new token. This notebook follows it, in pictures.
#
# The model is small and its weights are random, but structure and names are those of DeepSeek-V3. Devices are simulated:
# four do the prefill (cp 4), two others decode (tp 2), as in a disaggregated deployment.
# [docs/deepseek.md](../docs/deepseek.md) has what is computed.

# %%
# %matplotlib inline
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from cpjax.deepseek.cache import CacheCut
from cpjax.deepseek.checkpoint import load, open_checkpoint, write_random
from cpjax.deepseek.config import SMALL
from cpjax.deepseek.handover import hand_over
from cpjax.deepseek.one_device import on_one_device
from cpjax.deepseek.parallel import decode_step, extended_cache, model_mesh, prefill, setup, specs
from cpjax.parallel import simulate_devices
from cpjax.partition import Zigzag

simulate_devices(6)
jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 80, "font.size": 10})
COLORS = np.array(["#88aadd", "#aaeeff", "#88cc88", "#eedd88"])  # of the four prefill ranks
RED, GREY, BLUE = "#bb0022", "#dddddd", "#4477aa"

folder = Path(tempfile.mkdtemp()) / "model"
write_random(folder, SMALL, seed=1)
checkpoint = open_checkpoint(folder)
PROMPT, STEPS, TOKEN = 21, 6, 9  # we follow the token at position 9
text = np.random.default_rng(0).integers(0, SMALL.vocab_size, (1, PROMPT))
print(f"{SMALL.num_hidden_layers} layers, {SMALL.num_attention_heads} heads, prompt: {text[0].tolist()}")

# %% [markdown]
# ## Who computes it
#
# The prompt is cut into 2·cp = 8 chunks of 3 (filled up with pads at the end). Rank r has chunks r and 7 − r: the
# zigzag, which gives all ranks the same causal work. The token stays on its rank from the embedding to the last layer.

# %%
CP, BLOCK = 4, 2
zigzag = Zigzag(CP)
order = zigzag.order(24).reshape(CP, -1)  # the positions that each rank has
owner = np.empty(24, int)
for rank, positions in enumerate(order):
    owner[positions] = rank


def draw_places(axis, positions, colors, first_new=PROMPT):
    """Squares with a position in each, ranks from top to bottom; the token in red, empty slots in grey."""
    for row, slots in enumerate(positions):
        for slot, position in enumerate(slots):
            color = GREY if position is None else "white" if position >= first_new else colors[row][slot]
            axis.add_patch(plt.Rectangle((slot, -row), 0.92, 0.92, facecolor=color, edgecolor="#666666", linewidth=0.6))
            if position is not None:
                is_ours = position == TOKEN
                axis.text(
                    slot + 0.46,
                    0.46 - row,
                    position,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=RED if is_ours else "black",
                    weight="bold" if is_ours else "normal",
                )
                if is_ours:
                    axis.add_patch(plt.Rectangle((slot, -row), 0.92, 0.92, fill=False, edgecolor=RED, linewidth=2.5))
    axis.set(xlim=(-0.2, max(map(len, positions)) + 0.2), ylim=(1 - len(positions) - 0.2, 1.1), xticks=[])
    axis.set_yticks([0.46 - row for row in range(len(positions))])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


figure, axis = plt.subplots(figsize=(8, 2.2))
draw_places(axis, [[p if p < PROMPT else None for p in row] for row in order], [[COLORS[r]] * 6 for r in range(CP)])
axis.set_yticklabels([f"cp rank {rank}" for rank in range(CP)])
axis.set_title("positions of the prompt on each rank; grey are pads")
print(f"position {TOKEN} is on cp rank {owner[TOKEN]}")

# %% [markdown]
# ## What it leaves behind
#
# A token's keys and values of all heads would be many numbers. Multi-head latent attention keeps a latent: `c_kv`, from
# which keys and values of all heads are made, and `k_rope`, one rotated key for all heads. This is what travels, and what is
# stored.

# %%
prefill_side = setup(SMALL, model_mesh(CP, 1), dtype="float64")
prefill_weights = load(checkpoint, "float64", mesh=prefill_side.mesh, specs=specs(SMALL))
outcome = prefill(prefill_side, prefill_weights, text)
c_kv, k_rope = (np.asarray(x[:, 0, TOKEN]) for x in outcome.latent)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), width_ratios=(3, 1))
shown = left.imshow(np.concatenate([c_kv, k_rope], axis=1), aspect="auto", cmap="RdBu", vmin=-3, vmax=3)
left.axvline(c_kv.shape[1] - 0.5, color="black", linewidth=1)
left.set(title="the token's latent: c_kv | k_rope", xlabel="number", ylabel="layer", yticks=range(len(c_kv)))
figure.colorbar(shown, ax=left)
heads, per_head = SMALL.num_attention_heads, SMALL.qk_nope_head_dim + SMALL.qk_rope_head_dim + SMALL.v_head_dim
sizes = {"keys, values": heads * per_head, "latent": c_kv.shape[1] + k_rope.shape[1]}
right.bar(list(sizes), list(sizes.values()), color=[GREY, BLUE], edgecolor="#666666")
right.bar_label(right.containers[0])
right.set(title="numbers a token and layer", ylim=(0, 1.2 * max(sizes.values())))
figure.tight_layout()
print(f"DeepSeek-V3: {128 * (128 + 64 + 128):,} numbers against {512 + 64}")

# %% [markdown]
# ## Around the ring
#
# In each layer every rank's queries need the latents of all tokens. At step s rank r has the latents that came from rank
# r − s: its own first, then those of its neighbours, one after the other. So the token visits each rank once. A query
# looks at it if it stands behind it.

# %%
figure, axis = plt.subplots(figsize=(8, 2.9))
for step in range(CP):
    for rank in range(CP):
        source = (rank - step) % CP
        is_here = source == owner[TOKEN]
        axis.add_patch(
            plt.Rectangle(
                (step, -rank),
                0.92,
                0.92,
                facecolor=COLORS[source],
                edgecolor=RED if is_here else "#666666",
                linewidth=2.5 if is_here else 0.6,
            )
        )
        behind = int((order[rank][order[rank] < PROMPT] >= TOKEN).sum())
        axis.text(
            step + 0.46,
            0.46 - rank,
            f"latents of rank {source}" + (f"\n{behind} queries look" if is_here else ""),
            ha="center",
            va="center",
            fontsize=8,
        )
axis.set(
    xlim=(-0.1, CP + 0.1),
    ylim=(0.8 - CP, 1.1),
    title=f"what each rank holds; red: the token at position {TOKEN} is among them",
)
axis.set_xticks([step + 0.46 for step in range(CP)], [f"step {step}" for step in range(CP)])
axis.set_yticks([0.46 - rank for rank in range(CP)], [f"cp rank {rank}" for rank in range(CP)])
axis.spines[:].set_visible(False)
axis.tick_params(length=0)

# %% [markdown]
# That nobody in front of it looks at it can be seen from outside: another token in its place changes the logits from its
# position on, and not one bit before.

# %%
one_device = load(checkpoint, "float64")
other = text.copy()
other[0, TOKEN] = (other[0, TOKEN] + 1) % SMALL.vocab_size
before, after = (np.asarray(on_one_device(SMALL, one_device, jnp.asarray(x, jnp.int32)))[0] for x in (text, other))
change = np.abs(after - before).max(axis=1)

figure, axis = plt.subplots(figsize=(8, 2.4))
axis.bar(range(PROMPT), change, color=[RED if p == TOKEN else BLUE for p in range(PROMPT)])
axis.set(
    xlabel="position",
    ylabel="largest |change|\nof a logit",
    title=f"another token at position {TOKEN}",
    xticks=range(0, PROMPT, 2),
)
print("changed in front of it:", np.flatnonzero(change[:TOKEN]).tolist())

# %% [markdown]
# ## Into the cache
#
# After the prefill the latents lie in a cache that the four ranks share: blocks (here of 2 tokens, in MindIE of 128) go to
# the ranks in turns. Block 10 with position 20, the prompt's last and only half filled, would be rank 2's by its turn; it goes
# to the last rank. You will see in a moment why.

# %%
cut = CacheCut(CP, BLOCK, PROMPT + STEPS, is_last_moved=True)
cache = extended_cache(prefill_side, cut, outcome, [PROMPT])
held = np.asarray(cut.positions(cache.prompt))[0]
used = [[int(p) if p < PROMPT else None for p in row] for row in held]

figure, axis = plt.subplots(figsize=(8, 2.2))
draw_places(axis, used, [[COLORS[rank]] * len(row) for rank, row in enumerate(used)])
axis.set_yticklabels([f"cp rank {rank}" for rank in range(CP)])
axis.set_title(f"positions in the slots of the cache; {PROMPT} tokens, the last block ({PROMPT - 1}) on the last rank")
rank, slot = (int(x[0, 0]) for x in cut.place(jnp.array([[TOKEN]], jnp.int32), cache.prompt))
print(f"position {TOKEN} is in slot {slot} of rank {rank}")

# %% [markdown]
# ## To other devices
#
# A decode instance takes over. Each of its ranks fetches all blocks, rank by rank, and stores them one behind the other as
# they come. So they lie in another order than in the text. Attention does not mind, for a rotated key carries its position
# in it. But new tokens are stored behind the last one. If the half-empty block stood in the middle, there would be a hole.

# %%
decode_side = setup(SMALL, model_mesh(1, 2, first=CP), dtype="float64")
decode_weights = load(checkpoint, "float64", mesh=decode_side.mesh, specs=specs(SMALL))
handed = hand_over(cut, cache, decode_side)
stored = np.asarray(handed.cut.positions(cache.prompt))[0, 0]
source = np.asarray(cut.place(jnp.asarray(stored[None], jnp.int32), cache.prompt)[0])[0]

figure, axis = plt.subplots(figsize=(12, 1.1))
draw_places(axis, [[int(p) for p in stored]], [[COLORS[r] for r in source]])
axis.set_yticklabels(["decode rank"])
axis.set_title("as fetched: the color says from which prefill rank; white: room for new tokens")
devices = sorted(device.id for device in handed.cache.latent.c_kv.devices())
print(f"each decode rank fetched {handed.bytes_per_rank:,} bytes; devices {devices}")


# %% [markdown]
# ## Looked at again
#
# Each new token's query is absorbed (multiplied by the matrix that makes keys) and meets the latents themselves. To see what
# our token does for each of them, decode twice: with the cache as it is, and with this token's latents replaced by those
# of its neighbour.

# %%
def decoded(cache):
    """Tokens and logits of the steps after the prompt."""
    token, ids, logits = (
        np.asarray(on_one_device(SMALL, one_device, jnp.asarray(text, jnp.int32)))[0, -1].argmax(),
        [],
        [],
    )
    for _ in range(STEPS):
        found, _, cache = decode_step(decode_side, handed.cut, decode_weights, jnp.asarray([[token]], jnp.int32), cache)
        ids.append(int(token))
        logits.append(np.asarray(found)[0, 0])
        token = logits[-1].argmax()
    return ids, np.array(logits)


ids, logits = decoded(handed.cache)
whole = np.concatenate([text[0], ids])[None]
expected = np.asarray(on_one_device(SMALL, one_device, jnp.asarray(whole, jnp.int32)))[0, PROMPT:]
place, neighbour = (int(np.flatnonzero(stored == p)[0]) for p in (TOKEN, TOKEN + 1))
wrong = jax.tree.map(lambda x: x.at[:, :, place].set(x[:, :, neighbour]), handed.cache.latent)
_, without = decoded(handed.cache._replace(latent=wrong))

figure, axis = plt.subplots(figsize=(8, 3))
steps = np.arange(STEPS)
axis.semilogy(
    steps,
    np.abs(without - expected).max(axis=1),
    "s-",
    color=RED,
    label=f"position {TOKEN} holds its neighbour's latents",
)
off = np.maximum(np.abs(logits - expected).max(axis=1), 1e-13)  # below it there is only rounding
axis.semilogy(steps, off, "o-", color=BLUE, label="the cache as it is")
axis.set(
    xlabel="step of decoding",
    ylabel="largest |difference|\nof a logit to one device, at least 1e-13",
    xticks=steps,
    ylim=(1e-15, 1e2),
)
axis.legend()
print("new tokens:", ids)
assert np.abs(logits - expected).max() < 1e-10

# %% [markdown]
# Through ring, shared cache, hand-over and absorbed decoding the logits are those of one device that has the whole text, up to
# float64's rounding. One wrong latent among 21, and all of them are off by many orders of magnitude more.
#
# The same on the command line: `cpjax generate MODEL --prompt-ids … --cp 4 --block 2 --last-block mindie --decode-tp 2 --check`.
#
# ## Exercises
#
# 1. Let the last block lie where its turn is (`is_last_moved=False`). Where does a decode rank have position 20 then, and which slot
#    belongs to position 21, the first new token? What is in the slot behind the last one?
# 2. A decode rank fetched 20,160 bytes above. Of which numbers does that follow?
#
# <details>
# <summary>Solutions</summary>
#
# 1. Not moved, block 10 comes from rank 2, in front of rank 3's blocks: the slot of position 21 is in the middle. A server that stores
#    new tokens behind the prompt's last slot would leave a hole there, and the token would stand for another position.
# 2. Each decode rank fetches the whole latent of each token of the prompt, in each layer: tokens · layers · (c_kv + k_rope) numbers of 8 bytes
#    (float64). Its tp does not matter, for a latent has no heads.
#
# The next cell computes both.
#
# </details>

# %%
from cpjax.deepseek.handover import Fetched

for is_last_moved in (True, False):
    fetched = Fetched(1, BLOCK, PROMPT + STEPS, is_last_moved, sources=CP)
    places = fetched.place(jnp.array([[20, 21]], jnp.int32), jnp.array([PROMPT], jnp.int32))[1]
    slots = np.asarray(fetched.positions(jnp.array([PROMPT], jnp.int32)))[0, 0]
    print(f"last block moved: {is_last_moved}; positions 20 and 21 in slots {places[0].tolist()};", *slots)

layers, width = SMALL.num_hidden_layers, SMALL.kv_lora_rank + SMALL.qk_rope_head_dim
print(f"{PROMPT} tokens · {layers} layers · {width} numbers · 8 bytes = {PROMPT * layers * width * 8:,}")
assert handed.bytes_per_rank == PROMPT * layers * width * 8

# %% [markdown]
# Previous: [9. What does this kernel compute?](09-fingerprint.ipynb) · [Contents](../docs/README.md#the-book) · Next: [11. Exchanges other than the ring](11-exchanges.ipynb)
