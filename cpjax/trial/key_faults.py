"""Faults of the keys and values that enter: lost, counted twice, stale, those of another head or token."""

import numpy as np

from cpjax.trial.fault_case import Case, Made, named
from cpjax.trial.problem import Result
from cpjax.trial.settings import PREFIX, REQUESTS, TOKENS


def _run(case: Case, size: int) -> tuple[int, int]:
    """A run that every setting has a query for: decode reads 66 keys at least, a pack sees its own."""
    first = TOKENS - sum(REQUESTS) if case.setting.layout == "packed" else 1
    last = 60 if case.setting.layout == "decode" else 100
    start = int(case.rng.integers(first, last - size))
    return start, start + size


def run_weighted(case: Case, weight: float) -> Made:
    """A run of keys lost or counted twice."""
    start, stop = _run(case, int(case.rng.integers(5, 40)))
    index = np.arange(TOKENS)
    result = case.with_(weight=np.where((index >= start) & (index < stop), weight, 1.0))
    return Made(result, named(f"keys {start} to {stop - 1} were {'lost' if weight == 0 else 'counted twice'}"))


def _border(case: Case) -> int:
    """Where a chunk, a request, a cached prefix or a page ends, that later queries see beyond."""
    layout = case.setting.layout
    if case.setting.cp > 1:
        return TOKENS // case.setting.cp // 2 * int(case.rng.integers(1, case.setting.cp))
    first = TOKENS - sum(REQUESTS) + REQUESTS[0]
    return {"packed": first, "prefix": PREFIX, "decode": 48}.get(layout, TOKENS // 2)


def run_across(case: Case, weight: float) -> Made:
    """A run of keys lost or counted twice on both sides of a border."""
    border = _border(case)
    start = max(border - int(case.rng.integers(3, 30)), 1)
    stop = border + int(case.rng.integers(3, 30 if case.setting.layout != "decode" else 15))
    index = np.arange(TOKENS)
    result = case.with_(weight=np.where((index >= start) & (index < stop), weight, 1.0))
    return Made(result, named(f"keys {start} to {stop - 1} were {'lost' if weight == 0 else 'counted twice'}"))


def page_of_one_row(case: Case) -> Made | None:
    """One batch row misses a page of 16 keys."""
    if case.setting.batch == 1:
        return None
    row, page = int(case.rng.integers(case.setting.batch)), int(case.rng.integers(0, 3))
    lost = np.arange(TOKENS) // 16 == page
    result = case.with_(weight=np.where(lost, 0.0, 1.0))
    mine = np.arange(case.setting.batch) == row
    out = np.where(mine[:, None, None, None], result.out, case.right.out)
    lse = np.where(mine[:, None, None], result.lse, case.right.lse)
    first = 16 * page
    return Made(Result(out, lse), named(f"keys {first} to {first + 15} were lost"))


def key_weighted(case: Case, weight: float) -> Made:
    """One key lost or counted twice."""
    at = int(case.rng.integers(8, 40))
    words = "lost" if weight == 0 else "counted twice"
    return Made(
        case.with_(weight=np.where(np.arange(TOKENS) == at, weight, 1.0)),
        named(f"key {at} was(?:re)? {words}|key {at} were {words}"),
    )


def stale_block(case: Case) -> Made:
    """A block of 16 keys and their values is that of another place."""
    slot, source = 16 * case.rng.choice(np.arange(1, 4), 2, replace=False)
    key, value = case.work.key.copy(), case.work.value.copy()
    for new, old in ((key, case.work.key), (value, case.work.value)):
        new[:, slot : slot + 16] = old[:, source : source + 16]
    words = f"in the place of 16 keys {slot} to {slot + 15} those from {source} to {source + 15} were used"
    chunk = f"in the place of key/value chunk {slot // 16} .* the data of chunk {source // 16} entered"
    return Made(case.with_(key=key, value=value), named(f"{words}|{chunk}" if case.setting.cp == 4 else words))


def keys_of_another(case: Case) -> Made | None:
    """Keys of the next key/value head, with the right values."""
    heads = _other_heads(case)
    return (
        None
        if heads is None
        else Made(case.with_(key=case.work.key[:, :, heads]), named(r"the keys of key/value head \d+ were used"))
    )


def values_of_another(case: Case) -> Made | None:
    """Values of the next key/value head, with the right keys."""
    heads = _other_heads(case)
    return (
        None
        if heads is None
        else Made(case.with_(value=case.work.value[:, :, heads]), named(r"the values of key/value head \d+ were used"))
    )


def _other_heads(case: Case) -> np.ndarray | None:
    """For each query head one of the next key/value head."""
    heads, group = case.setting.heads, case.setting.heads // case.setting.kv_heads
    return None if case.setting.kv_heads < 2 else (np.arange(heads) + group) % heads


def head_mod(case: Case) -> Made | None:
    """Head h takes key/value head h mod K instead of h div G."""
    group = case.setting.heads // case.setting.kv_heads
    if group == 1 or case.setting.kv_heads == 1:
        return None
    heads = np.arange(case.setting.heads) % case.setting.kv_heads * group
    return Made(
        case.with_(key=case.work.key[:, :, heads], value=case.work.value[:, :, heads]),
        named("Key/value heads are exchanged: head 1 attends to key/value head 1 instead of 0"),
    )


def neighbours_value(case: Case, shift: int) -> Made:
    """Each key enters with the value of the token beside it."""
    side = "after" if shift > 0 else "before"
    return Made(case.with_(value=np.roll(case.work.value, -shift, axis=1)), named(f"the value of the token {side} it"))
