"""What was found, as Markdown tables for a terminal and for docs/trial.md."""

from collections.abc import Iterable, Sequence

import numpy as np

from cpjax.trial import foreign as foreign_trial
from cpjax.trial import gradients as gradients_trial
from cpjax.trial.detection import Caught, Setting
from cpjax.trial.false_alarms import Row
from cpjax.trial.naming import OUTCOMES, UNSEEN, Answer, table
from cpjax.trial.rivals import RULES


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def false_alarms(rows: Sequence[Row]) -> str:
    """One line per kind and profile."""
    head = ("kind", "profile", "results", "alarms", "not judged", "bound", "z", "lse z", "z_score", "scale")

    def line(row: Row) -> list[str]:
        numbers = (f"{x:.2f}" for x in (row.hard_ratio, row.z, row.lse_z, row.z_score, row.scale_z_score))
        return [row.kind, row.profile, *(f"{x:,}" for x in row[2:5]), *numbers]

    return markdown(head, map(line, rows))


def foreign(rows: Sequence[foreign_trial.Row]) -> str:
    """One line per kernel and dtype."""
    head = (
        "kernel",
        "dtype",
        "judged as",
        "results",
        "called wrong",
        "not judged",
        "median z",
        "z",
        "lse z",
        "bound",
        "scale",
    )

    def line(row: foreign_trial.Row) -> list[str]:
        return [*row[:3], *(f"{x:,}" for x in row[3:6]), *(f"{x:.2f}" for x in row[6:])]

    return markdown(head, map(line, rows))


def named(found: Sequence[Answer], by: str) -> str:
    """One line per fault, or per setting: how many, and what was said of them."""
    columns = (*UNSEEN[::-1], *OUTCOMES[::-1])
    counts = table(found, by)
    rows = (
        [name, f"{sum(of.values()):,}", *(f"{of[x]:,}" if of[x] else "" for x in columns)]
        for name, of in counts.items()
    )
    return markdown((by, "all", *columns), rows)


def detection(found: Sequence[Caught], profile: str, keys: int) -> str:
    """One line per fault: per kind of data the smallest size that is caught, from `out` alone / with lse too."""
    some = [one for one in found if one.setting.profile == profile and one.setting.keys == keys]
    columns = sorted({one.setting for one in some}, key=lambda s: (s.logits, s.mean))
    by = {(one.fault, one.setting): one for one in some}
    faults = list(dict.fromkeys(one.fault for one in some))
    head = ["fault", *(f"{s.logits}, mean {s.mean:.0f}" for s in columns)]
    return markdown(head, ([fault, *(_judged(by[fault, s]) for s in columns)] for fault in faults))


def rules(found: Sequence[Caught], profile: str, keys: int) -> str:
    """One line per fault and kind of data: the smallest size that the judge catches, and that each rule refuses."""
    some = [one for one in found if one.setting.profile == profile and one.setting.keys == keys and one.applies]
    some.sort(key=lambda one: (one.fault, one.setting.logits, one.setting.mean))

    def line(one: Caught) -> list[str]:
        said = (_size(one, one.rules[rule]) for rule in RULES)
        return [one.fault, f"{one.setting.logits}, mean {one.setting.mean:.0f}", _size(one, one.with_lse), *said]

    return markdown(["fault", "data", "judge", *RULES], map(line, some))


def _judged(one: Caught) -> str:
    if not one.applies:
        return "no fault here"
    parts = ((one.from_out, one.out_tests), (one.with_lse, one.lse_tests))
    return " / ".join(_size(one, size) + (f" ({tests[0]})" if tests else "") for size, tests in parts)


def _size(one: Caught, size: float | None) -> str:
    if size is None:
        return "missed"
    if np.isnan(size):
        return "refuses all"
    return f"{size:g}" if one.sizes else "caught"


def summary(found: Sequence[Caught]) -> str:
    """Per profile and length, how many faults are caught: by the judge, by each rule that accepts what is correct."""
    groups = sorted({(one.setting.profile, one.setting.keys) for one in found})
    rows = []
    for profile, keys in groups:
        some = [one for one in found if (one.setting.profile, one.setting.keys) == (profile, keys) and one.applies]
        said = [_share(one.rules[rule] for one in some) for rule in RULES]
        rows.append(
            [profile, f"{keys:,}", _share(one.from_out for one in some), _share(one.with_lse for one in some), *said]
        )
    return markdown(["profile", "keys", "judge, out", "judge, lse too", *RULES], rows)


def _share(smallest: Iterable[float | None]) -> str:
    """How many are caught at some size; a rule that refuses correct results catches nothing there."""
    all_of_them = list(smallest)
    caught = sum(size is not None and not np.isnan(size) for size in all_of_them)
    return f"{caught}/{len(all_of_them)}"


def settings_of(found: Sequence[Caught]) -> list[tuple[str, int]]:
    """Profiles and lengths that occur."""
    kinds: set[Setting] = {one.setting for one in found}
    return sorted({(setting.profile, setting.keys) for setting in kinds})


def gradients(rows: Sequence[gradients_trial.Row]) -> str:
    """One line for each who computes and profile; z of dq, dk and dv."""
    head = ("who", "judged as", "results", "called wrong", "not judged", "median z", "largest z", "bound")

    def line(row: gradients_trial.Row) -> list[str]:
        z = (" ".join(f"{x:.2f}" for x in some) for some in (row.median_z, row.z))
        return [row.who, row.profile, *(f"{x:,}" for x in row[2:5]), *z, f"{row.of_bound:.2f}"]

    return markdown(head, map(line, rows))


def gradient_faults(found: Sequence[gradients_trial.Caught]) -> str:
    """One line for each fault and profile."""
    head = ("fault", "profile", "the judge", "named", "2 × low precision", "torch.testing")

    def line(one: gradients_trial.Caught) -> list[str]:
        caught = [("caught" if x else "passes") for x in (one.judge, one.twice_low_precision, one.torch_testing)]
        return [one.fault, one.profile, caught[0], "yes" if one.named else "", *caught[1:]]

    return markdown(head, map(line, found))
