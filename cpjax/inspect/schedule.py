"""What a compiled program does on each chip, read from its schedule: transfers, what they enclose, loops, cycles.

    %start = collective-permute-start(shard)        the DMA engine begins
    %while = while(…)                               enclosed: computed in the meantime
    %done  = collective-permute-done(%start)        the chip waits here for what has not arrived

Asynchronous is not hidden: a transfer may enclose little. Compare the cycles that it encloses with its bytes over the
rate of a link.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from cpjax.inspect.cycles import BRANCHES, Cycles, is_kernel
from cpjax.inspect.hlo import Instruction, Program, logical_bytes, parts, stored_bytes

COLLECTIVES = (
    *("collective-permute", "all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-broadcast"),
    *("ragged-all-to-all", "send", "recv"),
)


PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
HELPERS = ("blocks",)
"""Files of `cpjax.exchange` that send for others."""


@dataclass(frozen=True)
class Work:
    """An instruction that takes time."""

    name: str
    kind: str
    """loop, conditional, call, fusion, kernel, or the instruction's own name."""
    cycles: int
    """Estimated, all trips."""
    products: bool
    """Whether it multiplies matrices: attention does, and nothing else in these programs."""
    start: int
    """Cycles from the start of its computation."""


@dataclass(frozen=True)
class Transfer:
    """One instruction that sends: on every chip, in every run of the computation in which it stands."""

    name: str
    kind: str
    sender: str
    """Who wrote it: a file of `cpjax.exchange` (ring, moving, …), or "exchange" where JAX's derivative hides which."""
    bytes: int
    """What one chip sends in one run."""
    stored_bytes: int
    """The same in the memory's layout, which fills tiles up: what goes over the link."""
    runs: int
    """Trips of the loops around, multiplied."""
    pairs: tuple[tuple[int, int], ...]
    """Of a permute: source and target, as places in the mesh."""
    asynchronous: bool
    encloses: tuple[Work, ...]
    """What runs between its start and its end, in order."""
    computation: str
    start: int
    end: int
    """Cycles from the start of its computation."""

    @property
    def cycles_enclosed(self) -> int:
        """Estimated cycles of work between start and end. The chip waits for what the transfer takes longer."""
        return sum(work.cycles for work in self.encloses)

    @property
    def encloses_attention(self) -> bool:
        """Whether anything that multiplies matrices runs in the meantime."""
        return any(work.products for work in self.encloses)


@dataclass(frozen=True)
class Loop:
    """A while loop, wherever it stands."""

    name: str
    computation: str
    depth: int
    trips: int | None
    """None: the bound is computed, and the loop counts as one trip."""
    cycles: int
    """Of one execution, all trips."""
    runs: int
    """Executions: trips of the loops around, multiplied."""
    products: bool


@dataclass(frozen=True)
class Schedule:
    """The whole program."""

    collectives: dict[str, int]
    """Instructions by HLO name, wherever they stand, `-start` left out; 0 is not listed."""
    transfers: tuple[Transfer, ...]
    loops: tuple[Loop, ...]
    cycles: int
    steps: dict[str, tuple[Work, ...]]
    """Work of the computations that send something, in order."""
    kernels: int
    """Instructions that are kernels written by hand, wherever they stand; their cycles are not estimated."""

    @property
    def step(self) -> str | None:
        """The computation that sends most: the loop's body of a ring that is a loop, the entry of one that is not."""
        sent = Counter[str]()
        for transfer in self.transfers:
            sent[transfer.computation] += transfer.bytes * transfer.runs
        return sent.most_common(1)[0][0] if sent else None


def read(program: Program) -> Schedule:
    """The schedule of a program from `cpjax.inspect.hlo.parse`."""
    return _Reader(program).schedule()


class _Reader:
    def __init__(self, program: Program) -> None:
        self.program, self.cycles = program, Cycles(program)

    def schedule(self) -> Schedule:
        transfers, loops, steps = [], [], {}
        for computation, runs, depth in self._walk(self.program.entry, 1, 0):
            found = list(self._transfers(computation, runs))
            transfers += found
            if found:
                steps[computation] = tuple(work for _, work in self._timeline(computation) if work.cycles)
            loops += self._loops(computation, runs, depth)
        counts = Counter(
            kind for body in self.program.computations.values() for line in body if (kind := _kind(line.opcode))
        )
        kernels = sum(is_kernel(line) for body in self.program.computations.values() for line in body)
        total = self.cycles.total(self.program.entry)
        return Schedule(dict(counts), tuple(transfers), tuple(loops), total, steps, kernels)

    def _walk(self, computation: str, runs: int, depth: int) -> Iterator[tuple[str, int, int]]:
        """Each computation that is a list of steps (no fusion), how often it runs, and how many loops are around it."""
        yield computation, runs, depth
        for line in self.program.computations[computation]:
            if line.opcode == "while":
                trips = self.cycles.trips(computation, line)
                yield from self._walk(line.called("body")[0], runs * (1 if trips is None else trips), depth + 1)
            elif line.opcode in ("conditional", "call"):
                for below in line.called(*BRANCHES):
                    yield from self._walk(below, runs, depth)

    def _transfers(self, computation: str, runs: int) -> Iterator[Transfer]:
        body = self.program.computations[computation]
        timeline = self._timeline(computation)
        clock = [*(work.start for _, work in timeline), self.cycles.total(computation)]
        ends = {line.operands[0]: place for place, line in enumerate(body) if line.opcode.endswith("-done")}
        for place, line in enumerate(body):
            kind = _kind(line.opcode) or self._asynchronous_kind(line)
            if kind is None:
                continue
            # What never ends here ends in the caller, or with the program.
            end = ends.get(line.name, len(body)) if line.opcode.endswith("-start") else place
            shape = self._sent(computation, line)
            yield Transfer(
                line.name,
                kind,
                self._sender(line),
                logical_bytes(shape),
                stored_bytes(shape),
                runs,
                _pairs(line),
                line.opcode.endswith("-start"),
                tuple(work for _, work in timeline[place + 1 : end] if work.cycles or work.products),
                computation,
                clock[place],
                clock[end],
            )

    def _sent(self, computation: str, line: Instruction) -> str:
        """The shape of what one chip gives away."""
        operands = [self.cycles.lines[computation].get(name) for name in line.operands]
        known = [operand.shape for operand in operands if operand is not None]
        return f"({', '.join(known)})" if known else parts(line.shape)[0]

    def _asynchronous_kind(self, line: Instruction) -> str | None:
        """`async-start` wraps a collective in a computation of its own."""
        if line.opcode != "async-start":
            return None
        inside = (x for name in line.called("calls") for x in self.program.computations[name])
        return next((kind for x in inside if (kind := _kind(x.opcode))), None)

    def _loops(self, computation: str, runs: int, depth: int) -> Iterator[Loop]:
        for line in self.program.computations[computation]:
            if line.opcode == "while":
                trips, cycles = self.cycles.trips(computation, line), self.cycles.of(computation, line)
                yield Loop(line.name, computation, depth, trips, cycles, runs, self.cycles.multiplies(line))

    def _timeline(self, computation: str) -> list[tuple[Instruction, Work]]:
        found, now = [], 0
        for line in self.program.computations[computation]:
            cycles = self.cycles.of(computation, line)
            found.append((line, Work(line.name, _work(line), cycles, self.cycles.multiplies(line), now)))
            now += cycles
        return found

    def _sender(self, line: Instruction) -> str:
        """The innermost file of `cpjax.exchange` on the call stack; JAX's derivatives lose what lies within one."""
        stack = self.program.stacks.get(line.number("stack_frame_id") or 0, ())
        files = [PurePath(file) for file, _ in stack]
        ours = [file.stem for file in files if file.parent.name == "exchange" and file.stem not in HELPERS]
        name = re.search(r'op_name="([^"]*)"', line.attributes)
        sender = "exchange" if not ours or ours[0] == "device" else ours[0]
        return f"{sender}, backwards" if name and "transpose(" in name[1] else sender


def _kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _work(line: Instruction) -> str:
    return "kernel" if is_kernel(line) else {"while": "loop"}.get(line.opcode, line.opcode)


def _pairs(line: Instruction) -> tuple[tuple[int, int], ...]:
    listed = PAIRS.search(line.attributes)
    return tuple((int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", listed[1] if listed else ""))
