"""Bytes between ranks, seconds that they take, and what of these no computation hides."""

import numpy as np
from jaxtyping import Float, Int

from cpjax.plan.setting import Setting
from cpjax.plan.work import prefix_tokens


def tokens_met(setting: Setting, tokens: int, prefix: int = 0) -> Int[np.ndarray, " cp"]:
    """Tokens whose keys each rank holds: of the chunk (padded, an equal share), and of what is cached before it."""
    return setting.padded(tokens) // setting.cp + prefix_tokens(prefix, setting.cp)


def received_bytes(setting: Setting, tokens: int, prefix: int = 0) -> Float[np.ndarray, " cp"]:
    """Bytes that a card of each rank receives in one layer, through the ring or a gather: all keys but its own.

    Where the shards are equal that is (cp − 1)/cp · (tokens + prefix) · bytes of a token in the cache: both lengths are
    sent anew for each chunk of a prompt. A latent is sent whole to every tp rank, key/value heads are shared.
    """
    held = tokens_met(setting, tokens, prefix)
    return (held.sum() - held) * setting.model.cache_bytes(setting.tp)


def exposed_seconds(
    setting: Setting, blocks: Float[np.ndarray, "cp steps"], tokens: int, prefix: int = 0
) -> Float[np.ndarray, " cp"]:
    """Seconds that each rank of a layer waits for keys; `blocks` are its seconds of attention, step by step.

    Ring: Σ over steps of max(0, bytes / link + latency − block), where the keys of the next step travel during this
    one; after the last step nothing does. Gather: bytes / links + (cp − 1) · latency, which hides behind nothing,
    because every block needs what is gathered.
    """
    if setting.cp == 1:
        return np.zeros(1)
    if setting.exchange == "gather":
        rate, latency = setting.device.collective(setting.cards)
        return received_bytes(setting, tokens, prefix) / rate + (setting.cp - 1) * latency
    rate, latency = setting.device.ring(setting.cards)
    held = tokens_met(setting, tokens, prefix) * setting.model.cache_bytes(setting.tp)
    travel = by_step(np.broadcast_to(held, blocks.shape))[:, 1:] / rate + latency
    return np.maximum(0.0, travel - blocks[:, :-1]).sum(axis=1)


def by_step(by_source: np.ndarray) -> np.ndarray:
    """[rank, source] as [rank, step]: at step j rank r meets the keys of rank r − j.

    >>> by_step(np.array([[0, 1, 2]] * 3))
    array([[0, 2, 1],
           [1, 0, 2],
           [2, 1, 0]])
    """
    rank = np.arange(len(by_source))
    return np.take_along_axis(by_source, (rank[:, None] - rank[None, :]) % len(rank), axis=1)


def reduce_seconds(setting: Setting, tokens: int) -> float:
    """All layers' exchanges of hidden states for one chunk, over tp and over experts. Nothing hides them here.

    A tp sum of t = tokens/cp rows is 2 · (tp − 1)/tp · t · hidden · 2 bytes (a ring all-reduce, 16 bits), two a layer.
    A layer with dealt experts has one tp sum, and instead of the other: rows to their experts and back,
    2 · t/tp · experts a token · hidden · 2 bytes · (ep − 1)/ep, then a gather over tp, half a sum. Experts that are cut
    over cp as well (moe_ep 1) have all rows gathered and summed over cp.
    """
    model, device, tp, cp = setting.model, setting.device, setting.tp, setting.cp
    rows = setting.padded(tokens) / cp
    row_bytes = 2 * model.hidden
    rate, latency = device.collective(tp)
    tp_sum = (2 * (tp - 1) / tp * rows * row_bytes / rate + 2 * (tp - 1) * latency) if tp > 1 else 0.0
    total = (2 * model.layers - model.moe_layers) * tp_sum
    rate, latency = device.collective(setting.cards)
    if setting.ep > 1:
        share = (setting.ep - 1) / setting.ep
        there = rows / tp * model.experts_a_token * row_bytes * share / rate + latency
        total += model.moe_layers * (2 * there + tp_sum / 2)
    elif model.moe_layers:
        over_cp = 2 * (cp - 1) * (rows * row_bytes / rate + latency) if setting.moe_tp > tp else 0.0
        total += model.moe_layers * (over_cp + tp_sum)
    return total
