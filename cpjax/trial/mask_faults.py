"""Faults of the mask: who sees too many keys or too few."""

import re
from dataclasses import replace

import numpy as np

from cpjax.trial.fault_case import Case, Made, named, requests_of
from cpjax.trial.plain_attention import work_of
from cpjax.trial.problem import Result, places
from cpjax.trial.settings import PREFIX, TOKENS


def _queries(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """For each query its index among those of its request, and how many there are, `[B, T]`."""
    numbers = requests_of(case)
    index, count = np.zeros_like(numbers), np.ones_like(numbers)
    for b, row in enumerate(numbers):
        for number in np.unique(row):
            own = row == number
            index[b, own], count[b, own] = np.arange(own.sum()), own.sum()
    return index, count


def _limited(case: Case, off: np.ndarray) -> Result:
    """Each query sees the keys of its request up to its own place plus `off` `[B, T]`."""
    here, there = places(case.problem)
    seen = there[:, None] <= (here + off)[:, :, None]
    return case.with_(seen=seen & _same_request(case))


def _same_request(case: Case) -> np.ndarray:
    numbers = case.problem.segments
    if numbers is None:
        return np.ones_like(case.work.seen)
    return (numbers[:, :, None] == numbers[:, None]) & (numbers >= 0)[:, :, None]


def shifted(case: Case, most: int) -> Made | None:
    """The causal mask is off by a number of tokens."""
    if not case.setting.is_causal:
        return None
    k = int(case.rng.integers(1, most + 1)) * int(case.rng.choice([-1, 1]))
    names = named(re.escape(f"the causal mask is shifted by {k:+d}") + r"\b")
    return Made(_limited(case, np.full(case.work.seen.shape[:2], k)), names)


def fewer_every(case: Case) -> Made | None:
    """One key too few for every 8 queries before."""
    if not case.setting.is_causal or case.setting.layout == "decode":
        return None
    every = 8
    return Made(
        _limited(case, -(_queries(case)[0] // every)),
        named(f"a query sees one key too few for every {every} queries before it"),
    )


def drafts_alike(case: Case) -> Made | None:
    """All queries of a decode step see as much as the last one."""
    if case.setting.layout != "decode":
        return None
    index, count = _queries(case)
    return Made(_limited(case, count - 1 - index), named(r"sees 1·\(n − 1 − i\) keys too many"))


def local_lengths(case: Case) -> Made | None:
    """Each query sees as many keys as its rank of four holds."""
    if not case.setting.is_causal or case.setting.layout == "packed":
        return None
    wanted = places(case.problem)[0] + 1
    return Made(_limited(case, -(-wanted // 4) - wanted), named("as many as one of 4 ranks holds"))


def off_by_request(case: Case) -> Made | None:
    """The lengths of a pack are off by one, two, three."""
    if case.setting.layout != "packed":
        return None
    return Made(_limited(case, -1 - np.maximum(requests_of(case), 0)), named("off by one number a request"))


def top_left(case: Case) -> Made | None:
    """Queries after a prefix take themselves for the first tokens."""
    if case.setting.layout != "prefix":
        return None
    return Made(
        _limited(case, np.full((1, TOKENS - PREFIX), -PREFIX)),
        named(f"the causal mask is shifted by -{PREFIX}:|the causal mask was aligned top-left"),
    )


def mask_absent(case: Case) -> Made | None:
    """All keys of the request are seen."""
    if not case.setting.is_causal:
        return None
    return Made(case.with_(seen=_same_request(case)), named("no causal mask was applied|the causal mask is absent"))


def mask_applied(case: Case) -> Made | None:
    """Causal, where all keys should be seen."""
    if case.setting.is_causal:
        return None
    return Made(
        _limited(case, np.zeros((1, TOKENS), int)), named("a causal mask was applied where there should be none")
    )


def mask_in_blocks(case: Case) -> Made | None:
    """A triangle in each chunk; in each of four runs where there is one chunk."""
    if case.setting.layout != "text":
        return None
    size = TOKENS // (2 * case.setting.cp if case.setting.cp > 1 else 4)
    index = np.arange(TOKENS) % size
    words = "in every chunk, by the index" if case.setting.cp > 1 else "in each of 4 equal blocks, by its own index"
    count = TOKENS // size
    return Made(
        case.with_(seen=case.work.seen & (index <= index[:, None])),
        named(f"a causal mask was applied ({words}|in each of {count} equal blocks)"),
    )


def window_applied(case: Case) -> Made | None:
    """A window that nobody stated."""
    least, most = (8, 60) if case.setting.layout == "decode" else (4, 30)
    size = int(case.rng.integers(least, most))
    near = case.work.distance < size
    return Made(case.with_(seen=case.work.seen & near), named(rf"a window of {size} was applied"))


def window_ignored(case: Case) -> Made:
    """The stated window is not applied."""
    seen = work_of(replace(case.problem, window=None), case.work.arithmetic, case.setting.order).seen
    return Made(case.with_(seen=seen), named("the window was not applied"))


def requests_mixed(case: Case) -> Made | None:
    """Requests of a pack see those before them."""
    if case.setting.layout != "packed":
        return None
    numbers = case.problem.segments
    assert numbers is not None
    here, there = places(case.problem)
    seen = (there[:, None] <= here[:, :, None]) & (numbers >= 0)[:, None]
    return Made(case.with_(seen=seen), named("requests of a packed batch see each other's keys"))


def pads_leaked(case: Case) -> Made | None:
    """The pads are seen."""
    if case.setting.layout != "packed":
        return None
    numbers = case.problem.segments
    assert numbers is not None
    return Made(case.with_(seen=case.work.seen | (numbers < 0)[:, None]), named("pads leaked"))


def prefix_dropped(case: Case) -> Made | None:
    """Cached keys are not seen."""
    if case.setting.layout != "prefix":
        return None
    return Made(
        case.with_(seen=case.work.seen & (np.arange(TOKENS) >= PREFIX)),
        named(
            r"the keys before the first query \(a cached prefix\) were dropped"
            rf"|{PREFIX} keys 0 to {PREFIX - 1} were lost"
        ),
    )
