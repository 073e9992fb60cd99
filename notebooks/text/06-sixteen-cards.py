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
# # 6. Sixteen cards
#
# A MindIE `config.json` has a dozen numbers that decide what each of sixteen NPUs does with a prompt. This notebook reads
# the vendor's own example and draws the answer: who computes which heads of which tokens, in whose cache the keys and
# values end up, and how they travel from a prefill node to a decode node. No NPU is needed; everything is integers.

# %%
# %matplotlib inline
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from cpjax.mindie.check import check_files
from cpjax.mindie.deployment import read_deployment
from cpjax.mindie.draw import figure_of
from cpjax.mindie.layout import groups, lay_out
from cpjax.mindie.link import link_map, transfers
from cpjax.mindie.models import GEOMETRIES
from cpjax.partition.kv_cache import block_ranks, tokens_per_rank

root = Path.cwd() if (Path.cwd() / "examples").exists() else Path.cwd().parent
example = Path("examples/deepseek-r1-cp2.json")
deployment = read_deployment(root / example)
deployment.model_name, deployment.sizes

# %% [markdown]
# ## Would MindIE take it?
#
# About eighty rules, each with its source. A finding says where, what was found, what the rule is, and whether the server
# itself would notice. The example breaks none:

# %%
(checked,) = check_files([root / example], dtype="float16", hardware="800i-a3")
checked.findings

# %% [markdown]
# Now a hasty edit: sequence parallelism off, two data-parallel replicas, a rounding to BF16. Everything is named at once.
# The last column is the important one. Where it says `False`, the server starts, and nobody is told.

# %%
document = json.loads((root / example).read_text())
document["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0] |= {"sp": 1, "dp": 2}
hasty = Path("hasty.json")
hasty.write_text(json.dumps(document))
(checked,) = check_files([hasty], dtype="bfloat16")
hasty.unlink()
for finding in checked.findings:
    print(f"{finding.rule:16} {finding.found:38} enforced: {finding.enforced}")

# %% [markdown]
# ## Who computes what
#
# `cp 2` cuts the sequence, `tp 8` cuts the heads. A prompt of 2,048 tokens is cut into 2·cp = 4 chunks; cp rank 0 gets
# chunks 0 and 3, cp rank 1 chunks 1 and 2 (zigzag), so that both do the same amount of causal work. Each tp rank computes
# 16 of DeepSeek's 128 heads.

# %%
layout = lay_out(deployment, 2048, GEOMETRIES["DeepSeek-R1"].heads)
figure_of(layout, "DeepSeek-R1 on sixteen cards: a prompt of 2048 tokens")

# %% [markdown]
# Every head of every token is computed by exactly one card. That is no accident of the example: the tests draw random
# sizes, and whatever `check` accepts must satisfy it.

# %%
work = np.zeros((128, 2048), int)
for card in layout.cards:
    for start, end in card.tokens:
        work[slice(*card.heads), start:end] += 1
int(work.min()), int(work.max())

# %% [markdown]
# ## Which cards talk to each other
#
# Two constructors make all groups: neighbours (tensor parallel, and with it the cache's sequence parallel), and every
# eighth card (context parallel). Over the cp groups the latent keys and values travel.

# %%
found = groups(deployment.sizes)
figure, panels = plt.subplots(1, 3, figsize=(9, 1.9), layout="constrained", dpi=80)
for axes, kind in zip(panels, ["attn_tp", "attn_cp", "moe_ep"], strict=True):
    number = np.empty(16)
    for color, group in enumerate(found[kind]):
        number[group] = color
    axes.imshow(number.reshape(2, 8), cmap="tab10" if len(found[kind]) > 1 else "Pastel1", vmin=0, vmax=9)
    for rank in range(16):
        axes.text(rank % 8, rank // 8, rank, ha="center", va="center", size=8)
    axes.set_title(f"{kind}: {len(found[kind])} × {len(found[kind][0])}", size=9)
    axes.axis("off")

# %% [markdown]
# ## In whose cache it ends up
#
# The cache is cut over all cp·sp = 16 cards, by blocks of 128 tokens, in turn, with one exception: **the last block lives
# on the last card** (where there are more blocks than cards). Here are prompts of 1,000 to 5,000 tokens; each row is a
# prompt, each cell a block, the number is the card that stores it, the dark one is the last block.

# %%
lengths = [1000, 2048, 2300, 3000, 4225, 5000]
figure, axes = plt.subplots(figsize=(10, 2.4), layout="constrained", dpi=80)
for row, tokens in enumerate(lengths):
    owners = block_ranks(tokens, 16)
    for block, owner in enumerate(owners):
        is_last = block == len(owners) - 1
        color = "#333333" if is_last else plt.get_cmap("tab20")(owner)
        axes.add_patch(plt.Rectangle((block, row), 0.94, 0.9, color=color))
        axes.text(
            block + 0.47, row + 0.47, owner, ha="center", va="center", size=7, color="white" if is_last else "black"
        )
axes.set(xlim=(0, 40), ylim=(len(lengths), 0), xlabel="block of the prompt", yticks=[])
axes.set_yticks([row + 0.45 for row in range(len(lengths))], [f"{tokens} tokens" for tokens in lengths])
axes.spines[:].set_visible(False)

# %% [markdown]
# So the load is nearly, but not exactly, even:

# %%
for tokens in (2048, 2300):
    print(tokens, tokens_per_rank(tokens, 16))

# %% [markdown]
# ## Why the last block?
#
# With disaggregation, a decode node (without cp and sp: only prefill nodes may have them) fetches the prompt's cache from
# all sixteen prefill cards, **card by card**, and stores what comes in consecutive blocks of its own. So it has the prompt
# in another order. Attention does not care: positions are in the keys already, and a decode query sees every key. But a
# cache is read up to a *length*, so the one block that is only partly filled must come last. It does, because it is the
# last block of the last card.

# %%
prefill, decode = (read_deployment(root / "examples" / name) for name in ("prefill-cp2.json", "decode.json"))
p, d = prefill.sizes, decode.sizes
print("decode rank 0 fetches from prefill ranks", link_map(p.tp, d.tp, p.sp, p.cp)[0])
pulled = transfers(p, d, tokens=4225)[0]
print("in this order of the prompt's blocks:   ", [transfer.block for transfer in pulled])
print("tokens in the last three:               ", [transfer.tokens for transfer in pulled[-3:]])

# %%
figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained", dpi=80)
for transfer in pulled:
    color = "#333333" if transfer.tokens < 128 else plt.get_cmap("tab20")(transfer.source)
    axes.plot([transfer.block, transfer.target], [1, 0], color=color, lw=2)
axes.set_yticks([0, 1], ["place on the decode node", "block of the prompt"])
axes.set(xlabel="colour: the prefill card that stores it; dark: the partly filled block")
axes.spines[:].set_visible(False)

# %% [markdown]
# Take the exception away, and the partial block lands in the middle, where the decode node would read the filling behind
# its tokens as keys:

# %%
count = -(-4225 // 128)
plain = sorted(range(count), key=lambda block: (block % 16, block))  # purely in turn, fetched card by card
print("the partial block", count - 1, "would be decode block", plain.index(count - 1), "of", count - 1)

# %% [markdown]
# On the command line: `cpjax mindie check`, `ranks --draw cards.svg`, `link`, and `enable`, which turns CP on in a config
# by the smallest valid edit. They are described in `docs/mindie.md`.

# %% [markdown]
# ## Exercises
#
# 1. A prompt has 3,000 tokens. Which card stores its last token, and how many tokens are in that block?
# 2. Try to write a config for cp 4 on the same sixteen cards, and have it checked. What stands in the way?
#
# <details>
# <summary>Solutions</summary>
#
# 1. 3,000 tokens are 23 blocks and 56 tokens. The last block is number 23; there are more blocks than cards, so it is on card 15.
# 2. cp · tp is the number of cards, so tp must be 4, and sp must be what tp is. Then one finding is left: MindIE supports cp 1 and 2 only.
#
# The next cell computes both.
#
# </details>

# %%
owners = block_ranks(3000, 16)
print(f"block {len(owners) - 1} with {3000 % 128} tokens is on card {owners[-1]}")
assert owners[-1] == 15

for edit in ({"cp": 4}, {"cp": 4, "tp": 4}, {"cp": 4, "tp": 4, "sp": 4}):
    document = json.loads((root / example).read_text())
    document["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0] |= edit
    edited = Path("edited.json")
    edited.write_text(json.dumps(document))
    (checked,) = check_files([edited], dtype="float16", hardware="800i-a3")
    edited.unlink()
    rules = [finding.rule for finding in checked.findings]
    print(edit, "→", ", ".join(rules))
assert rules == ["cp-1-or-2"]

# %% [markdown]
# Previous: [5. One case, three families of operators](05-three-families.ipynb) · [Contents](../docs/README.md#the-book) · Next: [7. Break the ring in ten ways](07-break-it.ipynb)
