"""Several cp side by side, and from which length on each beats the first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpjax.errors import InputError
from cpjax.plan.constants import Constants
from cpjax.plan.memory import Memory, fits, longest_prompt, memory
from cpjax.plan.setting import Setting
from cpjax.plan.time import Prediction, predict

SHORTEST, FARTHEST = 16, 2**20
"""Between these lengths it is searched from which on cp pays."""

MOST_TOKENS = 2**24
MOST_CHUNKS = 4096


@dataclass(frozen=True)
class Choice:
    """One cp: times and memory at each length, the longest prompt that fits, and from how many tokens on it pays.

    `pays`: None where it never does up to FARTHEST, or for the choice to which the others are compared.
    """

    setting: Setting
    predictions: tuple[Prediction, ...]
    memories: tuple[Memory, ...]
    fits: tuple[bool, ...]
    longest: int
    pays: int | None


@dataclass(frozen=True)
class Plan:
    """All choices, over `prefix` cached tokens. The first is the one that the others are compared with."""

    choices: tuple[Choice, ...]
    tokens: tuple[int, ...]
    prefix: int
    constants: Constants

    def speedup(self, choice: Choice, at: int) -> float:
        """How many times as fast as the first choice at length number `at`."""
        return self.choices[0].predictions[at].seconds / choice.predictions[at].seconds


def usual_cps(base: Setting, cards: int | None) -> tuple[int, ...]:
    """1, 2, 4 and 8, and that of `base`; of a number of cards those that leave a tp which divides the heads."""
    cps = sorted({1, 2, 4, 8, base.cp})
    return tuple(n for n in cps if cards is None or (cards % n == 0 and base.model.heads % (cards // n) == 0))


def settings(base: Setting, cps: Sequence[int], cards: int | None) -> tuple[Setting, ...]:
    """`base` with each cp: with its tp, or if `cards` is given with tp = cards / cp.

    How experts are dealt is kept where the cards stay the same in number, else they are dealt to all.

    Raises:
      InputError: no cp, one twice, or one that does not divide the cards.
    """
    if not cps or len(set(cps)) < len(cps):
        raise InputError(f"--cp is {','.join(map(str, cps))}; give different numbers of ranks, as 1,2,4,8")
    found = []
    for cp in cps:
        if cp < 1 or (cards is not None and cards % cp):
            raise InputError(f"--cp has {cp}, which does not divide {cards or 'any'} cards; leave it out")
        tp = base.tp if cards is None else cards // cp
        is_same = base.moe_ep is not None and cp * tp == base.moe_ep * base.moe_tp
        ep, moe_tp = (base.moe_ep, base.moe_tp) if is_same else (None, 1)
        found.append(replace(base, cp=cp, tp=tp, moe_ep=ep, moe_tp=moe_tp, sp=tp if base.sp == base.tp else 1))
    return tuple(found)


def plan(settings: Sequence[Setting], constants: Constants, tokens: Sequence[int], prefix: int = 0) -> Plan:
    """Predict all of it.

    Raises:
      InputError: a length that is none, or so long or cut so small that nobody would wait for it.
    """
    chunk = settings[0].chunk
    for length in (*tokens, prefix):
        if not 0 <= length <= MOST_TOKENS:
            raise InputError(f"{length} tokens are not planned for; give at most {MOST_TOKENS:,}")
    if chunk is not None and max(tokens) > MOST_CHUNKS * chunk:
        raise InputError(f"chunk {chunk} cuts {max(tokens)} tokens into more than {MOST_CHUNKS} chunks; make it larger")
    choices = [
        Choice(
            setting,
            tuple(predict(setting, constants, length, prefix) for length in tokens),
            tuple(memory(setting, length, prefix) for length in tokens),
            tuple(fits(setting, length, prefix) for length in tokens),
            longest_prompt(setting, prefix),
            None if setting is settings[0] else pays_from(setting, settings[0], constants, prefix),
        )
        for setting in settings
    ]
    return Plan(tuple(choices), tuple(tokens), prefix, constants)


def pays_from(setting: Setting, base: Setting, constants: Constants, prefix: int = 0) -> int | None:
    """The fewest tokens from which on `setting` is faster than `base`, to 16; None: not at the farthest length.

    Lengths are doubled from 16 on to find the last at which it is not; then the interval is halved. SHORTEST means
    that it pays already there.
    """
    farthest = FARTHEST if setting.chunk is None else min(FARTHEST, 256 * setting.chunk)

    def is_faster(length: int) -> bool:
        return predict(setting, constants, length, prefix).seconds < predict(base, constants, length, prefix).seconds

    high = None
    length = farthest
    while length >= SHORTEST:
        if not is_faster(length):
            break
        high, length = length, length // 2
    if high is None or length < SHORTEST:
        return high
    low = length
    while high - low > SHORTEST:
        middle = (low + high) // 2 // SHORTEST * SHORTEST
        low, high = (low, middle) if is_faster(middle) else (middle, high)
    return high
