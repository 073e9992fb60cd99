"""Turns: in every round each contender runs once, in an order that turns round; ratios are taken within a round."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from cpjax.bench.contenders import OURS
from cpjax.bench.process import Contender, Times
from cpjax.bench.setting import Setting


class Row(NamedTuple):
    """One contender in one setting.

    Attributes:
      seconds, cpu_seconds: medians over the rounds; None if it is unsupported.
      ratio, cpu_ratio: medians of ours / theirs, each pair from one round; None for ours.
      first: seconds of its first run, which compiles.
      unsupported: why it has no times.
    """

    setting: Setting
    contender: str
    seconds: float | None
    cpu_seconds: float | None
    ratio: float | None
    cpu_ratio: float | None
    first: float | None
    unsupported: str

    def as_json(self) -> dict[str, Any]:
        """Plain values, the setting's first."""
        return vars(self.setting) | {name: x for name, x in self._asdict().items() if name != "setting"}


def bench(
    settings: Sequence[Setting],
    contenders: Sequence[str],
    rounds: int = 5,
    advance: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Row]:
    """Times of `contenders` (names of `cpjax.bench.contenders.CONTENDERS`) in each setting.

    Args:
      rounds: how often each runs after its first run, which is not counted.
      advance: is called with a text, rounds done, and rounds in all.
    """
    rows, total = [], len(settings) * rounds
    for n, setting in enumerate(settings):
        with ExitStack() as stack:
            there = {name: stack.enter_context(Contender(name, setting)) for name in contenders}
            able = [name for name in contenders if not there[name].unsupported]
            taken: dict[str, list[Times]] = {name: [] for name in able}
            for turn in range(rounds):
                for name in able if turn % 2 == 0 else reversed(able):
                    taken[name].append(there[name].run())
                advance("rounds", n * rounds + turn + 1, total)
            rows += [_row(setting, name, one, taken) for name, one in there.items()]
    return rows


def _row(setting: Setting, name: str, one: Contender, taken: dict[str, list[Times]]) -> Row:
    if one.unsupported or one.first is None:
        return Row(setting, name, None, None, None, None, None, one.unsupported)
    wall, cpu = (statistics.median(x) for x in zip(*taken[name], strict=True))
    ratio = cpu_ratio = None
    if name != OURS and OURS in taken:
        pairs = [(a.wall / b.wall, a.cpu / b.cpu) for a, b in zip(taken[OURS], taken[name], strict=True)]
        ratio, cpu_ratio = (statistics.median(x) for x in zip(*pairs, strict=True))
    return Row(setting, name, wall, cpu, ratio, cpu_ratio, one.first.wall, "")
