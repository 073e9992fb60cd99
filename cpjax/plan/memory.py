"""Bytes on a card during prefill, and the longest prompt that fits."""

from typing import NamedTuple

from cpjax.plan.setting import Setting

USABLE = 0.9
"""Of a card's memory: the rest is for the driver, the framework and the buffers of collectives. An assumption."""

LONGEST = 2**27
"""Tokens: beyond this a prompt is not searched for."""


class Memory(NamedTuple):
    """Bytes on one card, the fullest one."""

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.activations


def weight_bytes(setting: Setting, share_of_experts: float = 1.0) -> float:
    """Weights of a card: routed experts over moe_ep · moe_tp (without experts of its own over tp), the rest over tp."""
    model = setting.model
    spread = setting.ep * setting.moe_tp if model.experts else 1
    numbers = (model.total - model.routed) / setting.tp + model.routed * share_of_experts / spread
    return numbers * model.weight_bits / 8


def memory(setting: Setting, tokens: int, prefix: int = 0) -> Memory:
    """What a card holds when the last chunk of a prompt is computed.

    Cache: (tokens + prefix) / (cp · sp) tokens, a layer each with attention over all keys. Activations, of the t rows
    of a rank, in 16 bits: four times the hidden state; the widest feed-forward layer (gate and up, or rows sent to
    experts, there and back); queries and outputs of a tp rank's heads; the keys that are present at once: two blocks in
    a ring, all after a gather; and of a latent what is made of it, for one block or for all.
    """
    model, cp, tp = setting.model, setting.cp, setting.tp
    chunk = min(setting.chunk or tokens, tokens)
    rows = setting.padded(chunk) / cp
    before = (tokens - chunk + prefix) / cp
    cache = (rows + before) / setting.sp * model.cache_bytes(tp) * model.full_layers
    blocks = 1 if cp == 1 else 2 if setting.exchange == "ring" else cp
    expanded = (cp if setting.exchange == "gather" else 1) if model.latent else 0
    heads = model.heads / tp * (model.key_dim + model.value_dim)
    dense = 2 * model.intermediate / tp if model.moe_layers < model.layers or not model.experts else 0.0
    expert = model.experts_a_token / tp * 2 * (model.hidden + model.expert_intermediate) if model.experts else 0.0
    each = 4 * model.hidden + max(dense, expert) + heads
    activations = 2 * rows * each
    activations += (rows + before) * (blocks * model.cache_bytes(tp) + 2 * expanded * heads)
    return Memory(weight_bytes(setting), cache, activations)


def fits(setting: Setting, tokens: int, prefix: int = 0) -> bool:
    """Whether the prompt's prefill needs no more than the usable part of a card's memory."""
    return memory(setting, tokens, prefix).total <= USABLE * setting.device.memory_gb * 1e9


def longest_prompt(setting: Setting, prefix: int = 0) -> int:
    """The most tokens that fit, a multiple of the partition's chunks; 0 if not even the fewest do."""
    step = setting.sequence.chunk_count
    low, high = 0, LONGEST // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(setting, middle * step, prefix) else (low, middle)
    return low * step
