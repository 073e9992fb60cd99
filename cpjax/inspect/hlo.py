"""The text of a compiled program: computations, their instructions in the order in which they run, and who wrote them.

    %name = shape opcode(operands), attributes, metadata={…}, backend_config={…}

Only what `cpjax.inspect.schedule` asks for is taken apart. The grammar is that of XLA's own printer; a program that is
not scheduled (`is_scheduled=true` in its first line) is refused, for its lines are in no order.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
END = re.compile(r"^\}(?:$|, )")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
TILE = re.compile(r"T\(([\d,]+)\)")
RECORD = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    """Names; of a constant, what it is."""
    attributes: str
    """All that follows the operands."""
    root: bool = False

    def called(self, *words: str) -> tuple[str, ...]:
        """The computations that it names under these words, as `body`, `calls`."""
        found = re.findall(rf"\b(?:{'|'.join(words)})=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return tuple(name for group in found for name in re.findall(r"%([\w.\-]+)", group))

    def number(self, word: str) -> int | None:
        """A number among the attributes."""
        found = re.search(rf"\"?\b{word}\"?[=:]\"?(-?\d+)", self.attributes)
        return None if found is None else int(found[1])


@dataclass(frozen=True)
class Program:
    """The computations by name, and the call stacks under which JAX traced their instructions."""

    entry: str
    computations: Mapping[str, tuple[Instruction, ...]]
    stacks: Mapping[int, tuple[tuple[str, str], ...]]
    """`stack_frame_id` → (file, function), innermost first."""


def parse(text: str) -> Program:
    """Take the text of `compiled.as_text()` apart.

    Raises:
      ValueError: it is not scheduled, or has no entry.
    """
    lines = text.splitlines()
    if not lines or "is_scheduled=true" not in lines[0]:
        raise ValueError("the program's text is not scheduled: its first line must say is_scheduled=true")
    computations: dict[str, list[Instruction]] = {}
    entry, inside = None, None
    for line in _whole(lines):
        if (head := HEAD.match(line)) is not None:
            inside = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif END.match(line):
            inside = None
        elif inside is not None and (start := LINE.match(line)) is not None:
            inside.append(_instruction(line[start.end() :], start[2], start[1] is not None))
    if entry is None:
        raise ValueError("the program's text has no ENTRY computation")
    return Program(entry, {name: tuple(body) for name, body in computations.items()}, _stacks(lines))


def _whole(lines: list[str]) -> Iterator[str]:
    """The lines, an instruction in one: the attributes of a Pallas kernel have line breaks in them."""
    held = None
    for line in lines:
        if HEAD.match(line) or LINE.match(line) or END.match(line):
            if held is not None:
                yield held
            held = line if LINE.match(line) else None
            if held is None:
                yield line
        elif held is not None:
            held += " " + line
    if held is not None:
        yield held


def logical_bytes(shape: str) -> int:
    """Bytes of the arrays of a shape, as a program sees them.

    >>> logical_bytes("f32[2,3]{1,0:T(2,128)}"), logical_bytes("(bf16[8], u32[])")
    (24, 20)
    """
    return sum(_bits(kind, bits) * prod(dims) for kind, bits, dims, *_ in _arrays(shape)) // 8


def stored_bytes(shape: str) -> int:
    """Bytes in memory: the last axes of the layout are filled up to whole tiles.

    >>> stored_bytes("f32[2,3]{1,0:T(2,128)}"), stored_bytes("f32[2,3]{0,1:T(2,128)}"), stored_bytes("f32[2,3]")
    (1024, 2048, 24)
    """
    total = 0
    for kind, bits, dims, order, tile in _arrays(shape):
        filled = list(dims)
        for axis, size in zip(order, reversed(tile), strict=False):
            filled[axis] = -(-filled[axis] // size) * size
        total += _bits(kind, bits) * prod(filled)
    return total // 8


def parts(shape: str) -> tuple[str, ...]:
    """The shapes of a tuple; one shape alone.

    >>> parts("(f32[2]{0:T(8)}, (u32[], s32[3]))"), parts("f32[2]")
    (('f32[2]{0:T(8)}', '(u32[], s32[3])'), ('f32[2]',))
    """
    return _split(shape[1:-1]) if shape.startswith("(") else (shape,)


def _instruction(rest: str, name: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    operands = tuple(part.removeprefix("%") for part in _split(rest[opened + 1 : closed - 1]))
    return Instruction(name, shape, rest[:opened], operands, rest[closed:], root)


def _closing(text: str, opened: int) -> int:
    """Behind the bracket that closes the one at `opened`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opened):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"a bracket is never closed: {text:.80}")


def _split(text: str) -> tuple[str, ...]:
    """At commas outside all brackets; without XLA's comments /*index=5*/."""
    found, depth, start = [], 0, 0
    text = re.sub(r"/\*.*?\*/", "", text)
    for match in re.finditer(r"[()\[\]{},]", text):
        if match[0] == ",":
            if depth == 0:
                found.append(text[start : match.start()].strip())
                start = match.end()
        else:
            depth += 1 if match[0] in "([{" else -1
    last = text[start:].strip()
    return tuple([*found, last] if last else found)


def _arrays(shape: str) -> Iterator[tuple[str, str, list[int], list[int], list[int]]]:
    for kind, bits, dims, order, tiling in ARRAY.findall(shape):
        tile = TILE.search(tiling)
        yield kind, bits, _numbers(dims), _numbers(order), _numbers(tile[1] if tile else "")


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _bits(kind: str, bits: str) -> int:
    return 8 if kind == "pred" else int(bits)


def _stacks(lines: list[str]) -> dict[int, tuple[tuple[str, str], ...]]:
    """The tables FileNames, FunctionNames, FileLocations and StackFrames before the first computation."""
    tables: dict[str, dict[int, str]] = {}
    inside: dict[int, str] = {}
    for line in lines[1:]:
        if HEAD.match(line):
            break
        if (record := RECORD.match(line)) is not None:
            inside[int(record[1])] = record[2] if record[2] is not None else record[3]
        elif line.strip():
            inside = tables.setdefault(line.strip(), {})
    files, functions = tables.get("FileNames", {}), tables.get("FunctionNames", {})
    places = {key: _fields(record) for key, record in tables.get("FileLocations", {}).items()}
    frames = {key: _fields(record) for key, record in tables.get("StackFrames", {}).items()}
    # The printer counts parents from 1 higher, so that the first frame, which has none, names itself.
    shift = frames[min(frames)].get("parent_frame_id", 0) if frames else 0
    found = {}
    for first in frames:
        stack, at = [], first
        while at in frames and len(stack) < len(frames):
            place = places.get(frames[at].get("file_location_id", 0), {})
            file, function = place.get("file_name_id", 0), place.get("function_name_id", 0)
            stack.append((files.get(file, ""), functions.get(function, "")))
            at = frames[at].get("parent_frame_id", shift) - shift
        found[first] = tuple(stack)
    return found


def _fields(record: str) -> dict[str, int]:
    return {word: int(number) for word, number in re.findall(r"(\w+)=(\d+)", record)}
