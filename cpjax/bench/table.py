"""The rows as a table."""

from rich.table import Table

from cpjax.bench.rounds import Row

COLUMNS = ("tokens", "heads", "dtype", "mask", "computed", "contender", "s", "CPU s", "ours / theirs", "of CPU time")


def table(rows: list[Row]) -> Table:
    """One line a contender; a setting's name stands on its first line."""
    shown = Table(title="attention on this machine, medians", title_justify="left", box=None, pad_edge=False)
    for column in COLUMNS:
        shown.add_column(column, justify="right" if column in ("tokens", *COLUMNS[6:]) else "left")
    before = None
    for row in rows:
        one = row.setting
        name = (
            f"{one.tokens:,}",
            f"{one.heads} × {one.head_dim}" + (f"/{one.value_dim}" if one.value_dim != one.head_dim else ""),
            one.dtype,
            "causal" if one.is_causal else "full",
            "forward" if one.direction == "forward" else "forward and backward",
        )
        times = [_number(x, 3) for x in (row.seconds, row.cpu_seconds)] + [
            _number(x, 2) for x in (row.ratio, row.cpu_ratio)
        ]
        shown.add_row(*(name if one != before else [""] * 5), row.contender, *times)
        if row.unsupported:
            shown.add_row(*[""] * 5, f"  not here: {row.unsupported:.60}")
        before = one
    return shown


def _number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"
