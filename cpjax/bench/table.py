"""The rows as a table."""

from rich.table import Table

from cpjax.bench.rounds import Row
from cpjax.bench.setting import Setting

OF_SETTING = ("tokens", "heads", "dtype", "mask", "computed")
OF_TIMES = ("s", "CPU s", "ours / theirs", "of CPU time", "first s")
COMPUTED = {"forward": "forward", "both": "forward and backward", "decode": "one new token"}


def table(rows: list[Row]) -> Table:
    """One line a contender; a setting's name stands on its first line."""
    shown = Table(title="attention on this machine, medians", title_justify="left", box=None, pad_edge=False)
    for column in (*OF_SETTING, "contender", *OF_TIMES):
        shown.add_column(column, justify="right" if column in ("tokens", *OF_TIMES) else "left")
    before = None
    for row in rows:
        one = row.setting
        name = (
            f"{one.tokens:,}",
            _heads(one),
            one.dtype,
            "causal" if one.is_causal else "full",
            COMPUTED[one.direction],
        )
        times = [_number(x, 3) for x in (row.seconds, row.cpu_seconds)] + [
            _number(x, 2) for x in (row.ratio, row.cpu_ratio, row.first)
        ]
        shown.add_row(*(name if one != before else [""] * len(name)), row.contender, *times)
        if row.unsupported:
            shown.add_row(*[""] * len(name), f"  not here: {row.unsupported:.60}")
        before = one
    return shown


def _heads(one: Setting) -> str:
    shared = f" on {one.kv_heads}" if one.kv_heads != one.heads else ""
    return f"{one.heads}{shared} × {one.head_dim}" + (f"/{one.value_dim}" if one.value_dim != one.head_dim else "")


def _number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"
