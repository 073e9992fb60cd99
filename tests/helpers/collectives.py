"""The collectives of a compiled program, read from its text: what goes over the wire."""

import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
LINE = re.compile(r"= (?P<shape>\(.*?\)|\S+) (?P<kind>" + "|".join(KINDS) + r")(?:-start)?\(")
ARRAY = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) .*?\{\n(.*?)^\}", re.M | re.S)
CALLS = "body", "calls", "to_apply", "true_computation", "false_computation", "branch_computations"
CALLED = re.compile(rf"(?:{'|'.join(CALLS)})=(%[\w.-]+|\{{[^}}]*\}})")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s32": 4, "u32": 4, "s8": 1, "s64": 8, "u8": 1}


class Collective(NamedTuple):
    """One instruction: its kind, the bytes of its result on one device, the (source, destination) of a permute."""

    kind: str
    size: int
    pairs: tuple[tuple[int, int], ...]

    @property
    def sent(self) -> int:
        """Bytes that a permute sends, of all devices together."""
        return self.size * sum(s != d for s, d in self.pairs)


def collectives(compiled) -> list[Collective]:
    """Of a compiled program, or of its text; what lies in a loop stands there as often as the loop runs."""
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations = {name: body.splitlines() for name, body in COMPUTATION.findall(text)}
    (entry,) = re.findall(r"^ENTRY %([\w.-]+)", text, re.M)
    return _of(entry, computations)


def _of(name: str, computations: dict[str, list[str]]) -> list[Collective]:
    found = []
    for line in computations[name]:
        called = [x for group in CALLED.findall(line) for x in re.findall(r"[\w.-]+", group)]
        inner = [x for other in called if other in computations for x in _of(other, computations)]
        if inner and " while(" in line:
            inner *= int(TRIPS.search(line)[1])
        found += inner
        match = LINE.search(line)
        if match is None:
            continue
        arrays = ARRAY.findall(match["shape"])
        size = sum(SIZES[kind] * int(np.prod([int(n) for n in shape.split(",") if n])) for kind, shape in arrays)
        pairs = PAIRS.search(line)
        listed = re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pairs else ()
        found.append(Collective(match["kind"], size, tuple((int(a), int(b)) for a, b in listed)))
    return found
