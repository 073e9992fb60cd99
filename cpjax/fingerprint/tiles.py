"""Where the running maximum is raised: size of a key tile, splits of the keys, or a maximum that is taken first.

One key t has the score 0, all keys at even places have −A and those at odd places −A − C. A key in a tile before t's
gets p = exp(−C), which is rounded, and is scaled by exp(−A) later; a key in t's tile or after it gets exp(−A − C),
which is rounded. So the contributions of an odd key and of the last key, with values 1 and −1, cancel or do not.
"""

import numpy as np

from cpjax.crosscheck.exact.formats import Format
from cpjax.fingerprint.probe import (
    HEAD_DIM,
    ROWS,
    UNTOLD,
    Answer,
    Answers,
    Line,
    Probe,
    digits_of,
    missing,
    scored,
)

KEYS = 1024
COARSE = np.arange(ROWS) * (KEYS // ROWS) + 30
"""Places of t, one a row, all even; and in a second probe, of 64 keys:"""
FINE = np.arange(ROWS) * 2
LARGE = 2.0**10


def gaps(fmt: Format) -> list[tuple[float, float]]:
    """A and C, chosen so that the two roundings differ by much.

    Where p is float32 and so is its sum, exp(−100) has few digits left, which differ, and exp(−87 − C) may become 0.
    """
    if fmt.digits > 11:
        return [(100.0, 0.6875), (87.0, 0.6875)]
    some = -digits_of(np.linspace(0.25, 1, 2000), 8)
    large = 6.0
    early = fmt.round(np.exp(some)) * np.exp(-large)
    late = fmt.round(np.exp(some - large))
    return [(large, float(-some[np.argmax(np.abs(early - late) / late)]))]


def probes(fmt: Format) -> dict[str, Probe]:
    """1,024 keys: t at 32 places, all odd keys; 64 keys: t at 32 places."""
    return {"tiles": _asked(fmt, KEYS, COARSE), "small-tiles": _asked(fmt, 64, FINE)}


def _asked(fmt: Format, keys: int, places: np.ndarray) -> Probe:
    odd = np.arange(1, keys - 1, 2)
    heads = -(-len(odd) // HEAD_DIM)
    scores = []
    for large, less in gaps(fmt):
        score = np.full((ROWS, keys), -large)
        score[:, 1::2] -= less
        score[np.arange(ROWS), places] = 0
        scores += [score] * heads
    value = np.zeros((heads * HEAD_DIM, keys))
    size = LARGE if fmt.digits <= 11 else 2.0**126
    value[np.arange(len(odd)), odd] = size
    value[: len(odd), -1] = -size
    value = value.reshape(heads, HEAD_DIM, keys).swapaxes(1, 2)
    return scored(np.stack(scores), np.tile(value, (len(gaps(fmt)), 1, 1)), fmt)


def apart(fmt: Format, keys: int, places: np.ndarray, answer: Answer) -> np.ndarray:
    """Whether an odd key was rounded in another way than the last key, `[T, keys/2 − 1]`: 1 yes, 0 no, −1 neither."""
    odd = np.arange(1, keys - 1, 2)
    out = answer.out[0].reshape(ROWS, len(gaps(fmt)), -1)[..., : len(odd)]
    if fmt.digits > 11:
        return np.where((out == 0).all(axis=1), 0, 1)
    ((large, less),) = gaps(fmt)
    late = float(fmt.round(np.exp(np.array([-large - less])))[0])
    differ = (float(fmt.round(np.exp(np.array([-less])))[0]) * np.exp(-large) - late) * LARGE
    total = 1 + np.exp(-large) * keys / 2 * (1 + np.exp(-less))
    share = np.abs(out[:, 0] * total / differ)
    return np.where(share < 0.2, 0, np.where((share > 0.8) & (share < 1.2), 1, -1))


def map_of(fmt: Format, answers: Answers) -> np.ndarray | None:
    """`apart` of the probe of 1,024 keys, to draw; None if it was not answered."""
    answer = answers.get("tiles")
    return None if answer is None else apart(fmt, KEYS, COARSE, answer)


def read(fmt: Format, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """One line on the tile, one on splits."""
    answer = answers.get("tiles")
    if answer is None or not np.isfinite(answer.out).all():
        return [missing("key tile"), missing("splits of the keys")]
    starts, ends, odd = _runs(apart(fmt, KEYS, COARSE, answer), COARSE)
    if odd:
        why = "what is rounded before and after a larger score does not fit a running maximum"
        return [Line(name, f"{UNTOLD}: {why}", odd) for name in ("key tile", "splits of the keys")]
    small = answers.get("small-tiles")
    fine = _runs(apart(fmt, 64, FINE, small), FINE)[0] if small is not None and np.isfinite(small.out).all() else set()
    return [_tile_of_parts(starts, ends) if ends else _tile(starts, fine), _splits(ends)]


def _runs(found: np.ndarray, places: np.ndarray) -> tuple[set[int], set[int], str]:
    """Keys at which a tile begins and at which a part of the keys ends; or why there is no telling.

    The last key is in t's part, and then all keys before t's tile are apart from it; or in another, and then those
    from t's tile to the end of its part are.
    """
    starts, ends = set(), set()
    for row, place in zip(found, places, strict=True):
        if (row < 0).any():
            return set(), set(), f"{int((row < 0).sum())} of {len(row)} keys are neither together nor apart"
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
        if len(edges) > 2:
            return set(), set(), f"{len(edges) // 2} runs of keys in one row"
        if len(edges) == 2:
            begin, end = (2 * int(edge) for edge in edges)
            if end <= place:
                starts.add(end)
            else:
                ends.add(end)
                starts |= {begin} - {0}
    return starts, ends, ""


def _tile(starts: set[int], fine: set[int]) -> Line:
    name = "key tile"
    evidence = (
        f"the maximum is raised at keys {', '.join(map(str, sorted(starts)[:6]))}{' …' if len(starts) > 6 else ''}"
    )
    if not starts and not fine:
        said = f"{KEYS} keys or more, or the maximum of the whole row is taken first"
        return Line(name, said, "a larger score changes the rounding of all keys alike", "whole")
    first = min(fine) if fine else min(starts)
    if fine and all(edge % first == 0 for edge in fine | starts):
        return Line(name, f"{first} keys", evidence if starts else f"at keys {sorted(fine)}", str(first))
    if not fine:
        step = int(np.gcd.reduce(np.array(sorted(starts))))
        if all(edge % first == 0 for edge in starts):
            return Line(name, f"{first} keys", evidence, str(first))
        return Line(name, f"{UNTOLD}: tiles of unequal size, multiples of {step}", evidence)
    return Line(name, f"{UNTOLD}: tiles of unequal size", evidence)


def _tile_of_parts(starts: set[int], ends: set[int]) -> Line:
    """Of keys in several parts. Their size may depend on the number of keys, so the small probe says nothing."""
    name, inner = "key tile", sorted(starts - ends)
    sizes = np.diff([0, *sorted(ends), KEYS])
    if not inner:
        said = f"a whole part, {sizes.min()} keys or more, or its maximum is taken first"
        return Line(name, said, f"the maximum is raised at keys {', '.join(map(str, sorted(starts)))}", "whole part")
    behind = {edge - max([0, *(end for end in ends if end <= edge)]) for edge in inner}
    first = min(behind)
    evidence = f"the maximum is raised {', '.join(map(str, sorted(behind)[:6]))} keys behind the beginning of a part"
    if all(edge % first == 0 for edge in behind):
        return Line(name, f"{first} keys", evidence, str(first))
    return Line(name, f"{UNTOLD}: tiles of unequal size", evidence)


def _splits(ends: set[int]) -> Line:
    name = "splits of the keys"
    if not ends:
        return Line(name, "none seen: one running maximum over all keys", "", "1")
    listed = ", ".join(map(str, sorted(ends)))
    return Line(
        name, f"{len(ends) + 1} parts with maxima of their own", f"they end at keys {listed}", str(len(ends) + 1)
    )
