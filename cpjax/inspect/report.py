"""An inspection as a person reads it: transfers of one kind together, loops, memory, and what follows."""

from collections import defaultdict

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from cpjax.inspect.inspection import Inspection
from cpjax.inspect.schedule import Transfer
from cpjax.wording import counted

LOOPS = 6
"""Loops that are shown: those that take most of the time."""


def report(seen: Inspection) -> Group:
    """Tables and sentences, for rich's `Console.print`."""
    return Group(_title(seen), _transfers(seen), _loops(seen), "\n".join(findings(seen)))


def findings(seen: Inspection) -> list[str]:
    """What the program does, a sentence each; the laws of docs/scale.md."""
    said, schedule = [], seen.schedule
    foreign = {name: n for name, n in schedule.collectives.items() if name != "collective-permute"}
    said.append(
        "It has no collective but permutes."
        if not foreign
        else "Beside permutes it has " + ", ".join(f"{n} {name}" for name, n in foreign.items()) + "."
    )
    for sender, transfers in _by_sender(schedule.transfers).items():
        count, sent = sum(x.runs for x in transfers), sum(x.bytes * x.runs for x in transfers)
        late = sum(x.runs for x in transfers if not x.asynchronous)
        hidden = sum(x.runs for x in transfers if x.encloses_attention)
        how = "all asynchronous" if not late else f"{late} synchronous"
        said.append(
            f"{sender}: {counted(count, 'transfer')}, {how}; during {hidden} of them attention is computed; "
            f"a chip sends {sent:,} bytes in all."
        )
    memory = seen.memory
    said.append(
        f"Memory per chip: {_mib(memory.peak)} at the peak (arguments {_mib(memory.arguments)}, results "
        f"{_mib(memory.results)}, temporaries {_mib(memory.temporaries)}); the program itself {_mib(memory.program)}."
    )
    if any(loop.trips is None for loop in schedule.loops):
        said.append("A loop's bound is computed, so it counts as one trip: cycles are too few.")
    if schedule.kernels:
        said.append(
            f"It has {counted(schedule.kernels, 'kernel')}, of whose cycles the compiler has no estimate: cycles are "
            "too few, of the program and of what transfers enclose."
        )
    said.append(f"Compiled in {seen.compile_seconds:.1f} s; its text has {seen.text_bytes / 1e6:.2f} MB.")
    return said


def _title(seen: Inspection) -> str:
    shape = seen.shape
    words = (
        f"{shape.tokens:,} tokens",
        f"{counted(shape.heads, 'head')} {shape.head_dim}/{shape.value_dim}",
        *(shape.dtype, shape.partition, shape.exchange, shape.attend, "causal" if shape.causal else "full"),
        f"{seen.schedule.cycles:,} estimated cycles",
    )
    return f"{seen.program}, {seen.topology.name}, cp {seen.cp}: {', '.join(words)}"


def _transfers(seen: Inspection) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Transfers of one chip", title_justify="left")
    for heading in (
        "sent by",
        "bytes",
        "in memory",
        "times",
        "hops",
        "async",
        "attention",
        "cycles enclosed",
        "on a link",
    ):
        table.add_column(heading, justify="left" if heading == "sent by" else "right")
    groups: dict[tuple, list[Transfer]] = defaultdict(list)
    for transfer in seen.schedule.transfers:
        key = (transfer.sender, transfer.kind, transfer.bytes, transfer.stored_bytes, transfer.asynchronous)
        groups[key].append(transfer)
    for (sender, kind, size, stored, asynchronous), transfers in groups.items():
        link = seen.topology.link_cycles(stored)
        table.add_row(
            sender if kind == "collective-permute" else f"{sender} ({kind})",
            f"{size:,}",
            f"{stored:,}",
            f"{sum(x.runs for x in transfers):,}",
            _range([seen.hops(x) for x in transfers]),
            "yes" if asynchronous else "NO",
            f"{sum(x.runs for x in transfers if x.encloses_attention):,}",
            _range([x.cycles_enclosed for x in transfers]),
            "?" if link is None else f"{link:,}",
        )
    return table


def _loops(seen: Inspection) -> Table:
    table = Table(box=SIMPLE_HEAD, title="Loops that take longest", title_justify="left")
    for heading in ("loop", "inside", "trips", "runs", "cycles of all trips", "attention"):
        table.add_column(heading, justify="right" if heading not in ("loop", "inside") else "left")
    loops = sorted(seen.schedule.loops, key=lambda loop: -loop.cycles * loop.runs)[:LOOPS]
    for loop in loops:
        table.add_row(
            loop.name,
            "the program" if loop.depth == 0 else f"{counted(loop.depth, 'loop')}",
            "?" if loop.trips is None else f"{loop.trips:,}",
            f"{loop.runs:,}",
            f"{loop.cycles:,}",
            "yes" if loop.products else "",
        )
    return table


def _by_sender(transfers: tuple[Transfer, ...]) -> dict[str, list[Transfer]]:
    found: dict[str, list[Transfer]] = defaultdict(list)
    for transfer in transfers:
        found[transfer.sender].append(transfer)
    return found


def _range(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} … {most:,}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
