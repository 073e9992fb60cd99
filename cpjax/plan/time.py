"""Seconds until the first token, predicted: attention, matrix products, transfers; rank by rank, chunk by chunk."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cpjax.plan.constants import Constants
from cpjax.plan.memory import weight_bytes
from cpjax.plan.setting import Setting
from cpjax.plan.transfers import by_step, exposed_seconds, received_bytes, reduce_seconds, tokens_met
from cpjax.plan.work import visible_pairs


@dataclass(frozen=True)
class Prediction:
    """Seconds of a whole prompt, of the slowest rank: predicted, not measured.

    `received` are the bytes that cp brings a card, `balance` the mean rank's attention over the slowest rank's.
    """

    tokens: int
    attention: float
    products: float
    exposed: float
    reductions: float
    received: float
    balance: float

    @property
    def seconds(self) -> float:
        """Time to first token, without scheduling, sampling and queueing."""
        return self.attention + self.products + self.exposed + self.reductions


def predict(setting: Setting, constants: Constants, tokens: int, prefix: int = 0) -> Prediction:
    """The prefill of one prompt of `tokens` tokens over `prefix` cached ones, alone on the machine.

    Raises:
      InputError: there is no token.
    """
    layers = setting.model.full_layers
    attention = exposed = received = mean = 0.0
    chunks = setting.chunks(tokens, prefix)
    for size, before in chunks:
        blocks = block_seconds(setting, constants, size, before)
        waits = exposed_seconds(setting, blocks, size, before)
        slowest = int(np.argmax(blocks.sum(axis=1) + waits))
        attention += layers * float(blocks[slowest].sum())
        exposed += layers * float(waits[slowest])
        mean += layers * float(blocks.sum(axis=1).mean())
        received += layers * float(received_bytes(setting, size, before).max())
    # Of these the prefix does not matter, and nearly all chunks have one size.
    sizes = Counter(size for size, _ in chunks)
    products = sum(count * product_seconds(setting, constants, size) for size, count in sizes.items())
    reductions = sum(count * reduce_seconds(setting, size) for size, count in sizes.items())
    return Prediction(tokens, attention, products, exposed, reductions, received, mean / attention)


def attention_layer(setting: Setting, constants: Constants, tokens: int) -> float:
    """Seconds of attention and its transfers in one layer, summed over the chunks of a prompt."""
    found = predict(setting, constants, tokens)
    return (found.attention + found.exposed) / setting.model.full_layers


def ideal_layer(setting: Setting, constants: Constants, tokens: int) -> float:
    """The same if the work were cut into equal parts, and nothing travelled."""
    total = sum(
        block_seconds(setting, constants, size, before).sum() for size, before in setting.chunks(tokens)
    )  # fmt: skip
    return float(total) / setting.cp


def block_seconds(
    setting: Setting, constants: Constants, tokens: int, prefix: int = 0
) -> Float[np.ndarray, "cp steps"]:
    """Seconds of attention of a layer for each rank and step: max(compute, memory).

    Compute: pairs · heads/tp · 2 · (key_dim + value_dim) / (16-bit peak · efficiency of attention), and where a latent
    travels the products that make keys and values of it on every rank, 2 · tokens · latent · heads/tp · (nope +
    value_dim) / (16-bit peak · efficiency of products): MindIE leaves that projection unquantised (kv_b_proj).
    Memory: keys and values are read once a step, written before if they are made of a latent; queries are read and
    outputs written.
    """
    model, device, tp = setting.model, setting.device, setting.tp
    padded = setting.padded(tokens)
    pairs = by_step(visible_pairs(setting.sequence, padded, prefix))
    keys = by_step(np.broadcast_to(tokens_met(setting, tokens, prefix), pairs.shape))
    if setting.exchange == "ring":
        keys = np.where(pairs > 0, keys, 0)  # what no query sees is passed on untouched
    heads, peak = model.heads / tp, device.peak(16)
    compute = pairs * heads * 2 * (model.key_dim + model.value_dim) / (peak * constants.attention)
    compute += 2 * keys * model.up_projection / tp / (peak * constants.products)
    numbers = 2 * heads * (model.key_dim + model.value_dim) * 2 if model.latent else model.cache_bytes(tp)
    rows = np.where(pairs > 0, padded / setting.cp, 0)
    moved = keys * numbers + rows * heads * (model.key_dim + model.value_dim) * 2
    return np.maximum(compute, moved / (device.memory_gb_s * 1e9))


def product_seconds(setting: Setting, constants: Constants, tokens: int) -> float:
    """Seconds of all layers' matrix products of a chunk on a card: max(compute, memory).

    Compute: 2 · active parameters · tokens/(cp · tp) / (peak · efficiency of products), experts evenly used; what is
    made of latents is counted with attention. Memory: every weight that any of the tokens uses is read once a chunk,
    of E experts a share 1 − (1 − k/E)^tokens; the hidden state is read twice and written twice a layer, in 16 bits.
    """
    model, device = setting.model, setting.device
    rows = setting.padded(tokens) / setting.cp
    per_token = model.active - model.layers * model.up_projection
    compute = 2 * per_token * rows / setting.tp / (device.peak(model.product_bits) * constants.products)
    used = 1 - (1 - model.experts_a_token / model.experts) ** tokens if model.experts else 1.0
    moved = weight_bytes(setting, used) + 4 * model.layers * rows * model.hidden * 2
    return max(compute, moved / (device.memory_gb_s * 1e9))
