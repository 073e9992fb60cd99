"""What is read from a compiled program's text: programs are drawn, printed as XLA prints them, and read again."""

from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cpjax.inspect.cycles import Cycles
from cpjax.inspect.hlo import logical_bytes, parse, parts, stored_bytes
from cpjax.inspect.schedule import read

CYCLES = st.integers(0, 50)


@dataclass
class Fusion:
    cycles: int
    multiplies: bool = False


@dataclass
class Loop:
    body: list
    trips: int
    begins: int = 0
    how: str = "compare"
    """Where the bound stands: in the condition, in a fusion of it, in the attributes, or nowhere."""


@dataclass
class Branches:
    bodies: list


@dataclass
class Permute:
    """What is `inside` runs between its start and its end; a synchronous one has nothing inside."""

    elements: int
    asynchronous: bool
    inside: list = field(default_factory=list)


FUSIONS = st.builds(Fusion, CYCLES, st.booleans())
HOW = st.sampled_from(["compare", "fusion", "known", "unknown"])


def wider(inner):
    some = st.lists(inner, max_size=3)
    return (
        st.builds(Loop, some, st.integers(0, 4), st.integers(0, 2), HOW)
        | st.builds(Branches, st.lists(some, min_size=1, max_size=3))
        | st.builds(Permute, st.integers(1, 9), st.just(False))
        | st.builds(Permute, st.integers(1, 9), st.just(True), some)
    )


PROGRAMS = st.lists(st.recursive(FUSIONS, wider, max_leaves=8), max_size=4)


class Printer:
    """XLA's text of a drawn program."""

    def __init__(self):
        self.number, self.texts = count(), []

    def computation(self, name, lines, entry=False):
        head = f"{'ENTRY ' if entry else ''}%{name} (p: (s32[], f32[8])) -> f32[8] {{"
        self.texts.append("\n".join([head, *(f"  {line}" for line in lines), "}"]))
        return name

    def new(self, word):
        return f"{word}.{next(self.number)}"

    def body(self, items, entry=False):
        lines = ["%p = (s32[], /*index=1*/f32[8]{0:T(128)}) parameter(0)"]
        for item in items:
            self.item(item, lines)
        return self.computation(
            self.new("region"), [*lines, "ROOT %r = f32[8]{0} get-tuple-element(%p), index=1"], entry
        )

    def item(self, item, lines):
        name, cost = self.new("x"), 'backend_config={"window_config":{"estimated_cycles":"%d","x":"1"}}'
        if isinstance(item, Fusion):
            inner = "convolution(%a, %b), window={}" if item.multiplies else "add(%a, %b)"
            called = self.computation(self.new("fused"), [f"ROOT %c = f32[8]{{0:T(128)S(1)}} {inner}"])
            lines.append(f"%{name} = f32[8]{{0:T(128)}} fusion(%p), kind=kLoop, calls=%{called}, " + cost % item.cycles)
        elif isinstance(item, Branches):
            called = ", ".join(f"%{self.body(body)}" for body in item.bodies)
            lines.append(f"%{name} = f32[8] conditional(%i, %p), branch_computations={{{called}}}")
        elif isinstance(item, Permute):
            shape = f"bf16[{item.elements}]{{0:T(8)(2,1)S(1)}}"
            pairs = "channel_id=1, source_target_pairs={{0,1},{1,0}}"
            lines.append(f"%{name}.in = {shape} copy(%p)")
            if not item.asynchronous:
                lines.append(f"%{name} = {shape} collective-permute(%{name}.in), {pairs}")
                return
            lines.append(f"%{name} = ({shape}, {shape}, u32[]{{:S(2)}}) collective-permute-start(%{name}.in), {pairs}")
            for inner in item.inside:
                self.item(inner, lines)
            lines.append(f"%{name}.end = {shape} collective-permute-done(%{name}), metadata={{}}")
        else:
            self.loop(item, lines, name)

    def loop(self, loop, lines, name):
        body, limit = self.body(loop.body), loop.begins + loop.trips
        index = "%i = s32[]{:T(128)} get-tuple-element(%q), index=0"
        bound = f"%n = s32[]{{:T(128)}} constant({limit})"
        less = "pred[]{:T(512)} compare(%i, %n), direction=LT"
        condition = {
            "compare": [bound, index, f"ROOT %lt = {less}"],
            "known": ["ROOT %lt = pred[] custom-call(%q)"],
            "unknown": ["%n = s32[] get-tuple-element(%q), index=1", index, f"ROOT %lt = {less}"],
        }
        if loop.how == "fusion":
            inner = ["%n = s32[] parameter(1)", "%i = s32[] parameter(0)", f"ROOT %lt = {less}"]
            called = self.computation(self.new("less"), inner)
            condition["fusion"] = [bound, index, f"ROOT %lt = pred[] fusion(%i, %n), kind=kLoop, calls=%{called}"]
        asked = self.computation(self.new("cond"), condition[loop.how])
        known = f', backend_config={{"known_trip_count":{{"n":"{loop.trips}"}}}}' if loop.how == "known" else ""
        lines += [f"%{name}.0 = s32[]{{:T(128)}} constant({loop.begins})", f"%{name}.c = s32[] copy(%{name}.0)"]
        lines.append(f"%{name}.s = (s32[], f32[8]) tuple(%{name}.c, %p)")
        lines.append(f"%{name} = (s32[], f32[8]) while(%{name}.s), condition=%{asked}, body=%{body}{known}")


def printed(items):
    printer = Printer()
    printer.body(items, entry=True)
    return "\n\n".join(["HloModule jit_f, is_scheduled=true, num_partitions=2", *printer.texts])


def cycles(item):
    """What a reader must find, from the tree."""
    match item:
        case Fusion():
            return item.cycles
        case Loop():
            return turns(item) * sum(map(cycles, item.body))
        case Branches():
            return max(sum(map(cycles, body)) for body in item.bodies)
        case Permute():
            return sum(map(cycles, item.inside))


def turns(loop):
    return 1 if loop.how == "unknown" else loop.trips


def multiplies(item):
    match item:
        case Fusion():
            return item.multiplies
        case Loop():
            return any(map(multiplies, item.body))
        case Branches():
            return any(multiplies(x) for body in item.bodies for x in body)
        case Permute():
            return any(map(multiplies, item.inside))


def permutes(items, runs=1):
    """(bytes, asynchronous, runs, cycles enclosed, attention enclosed) of each."""
    for item in items:
        match item:
            case Loop():
                yield from permutes(item.body, runs * turns(item))
            case Branches():
                for body in item.bodies:
                    yield from permutes(body, runs)
            case Permute():
                # What takes no time is not listed, so it does not count as enclosed.
                around = any(multiplies(x) and cycles(x) > 0 for x in flat(item.inside))
                yield 2 * item.elements, item.asynchronous, runs, sum(map(cycles, item.inside)), around
                yield from permutes(item.inside, runs)


def flat(items):
    """Instructions of one computation: a permute is two, with others between them."""
    for item in items:
        yield from flat(item.inside) if isinstance(item, Permute) else [item]


def loops(items, depth=0):
    for item in items:
        match item:
            case Loop():
                yield depth, None if item.how == "unknown" else item.trips, cycles(item)
                yield from loops(item.body, depth + 1)
            case Branches():
                for body in item.bodies:
                    yield from loops(body, depth)
            case Permute():
                yield from loops(item.inside, depth)


@given(PROGRAMS)
@example([Loop([Permute(3, True, [Loop([Fusion(7, True)], 4)])], 3, how="fusion")])
@example([Permute(3, True, [Permute(2, True, [Fusion(5)]), Fusion(6, True)])])
def test_what_was_drawn_is_read(items):
    schedule = read(parse(printed(items)))
    found = [(x.bytes, x.asynchronous, x.runs, x.cycles_enclosed, x.encloses_attention) for x in schedule.transfers]
    assert sorted(found) == sorted(permutes(items))
    assert schedule.cycles == sum(map(cycles, items))
    assert sorted(map(str, ((x.depth, x.trips, x.cycles) for x in schedule.loops))) == sorted(map(str, loops(items)))
    assert schedule.collectives.get("collective-permute", 0) == len(found)
    assert all(x.end - x.start == x.cycles_enclosed and x.pairs == ((0, 1), (1, 0)) for x in schedule.transfers)


def test_the_step_is_what_sends_most():
    schedule = read(parse(printed([Permute(5, True), Loop([Permute(2, True, [Fusion(4, True)])], 3)])))
    (inside,) = (x for x in schedule.transfers if x.runs == 3)
    assert schedule.step == inside.computation
    assert [work.cycles for work in schedule.steps[inside.computation]] == [4]
    assert read(parse(printed([Fusion(3)]))).step is None


WRAPPED = """HloModule f, is_scheduled=true

%wrapped (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%p), dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %s = ((f32[4]{0}), f32[8]{0}) async-start(%p), calls=%wrapped
  %k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %d = f32[8]{0} async-done(%s)
  %r = f32[4]{0} all-reduce(%k), to_apply=%wrapped
  ROOT %e = f32[8]{0} all-gather(%r), dimensions={0}
}"""


def test_other_collectives_and_kernels_are_told():
    schedule = read(parse(WRAPPED))
    assert schedule.collectives == {"all-gather": 2, "all-reduce": 1}
    told = [(x.kind, x.bytes, x.asynchronous, [work.kind for work in x.encloses]) for x in schedule.transfers]
    assert told == [("all-gather", 16, True, ["kernel"]), ("all-reduce", 16, False, []), ("all-gather", 16, False, [])]
    assert schedule.transfers[0].encloses_attention


# As libtpu prints a Pallas kernel: its metadata has line breaks, and a line that begins with } belongs to it.
PALLAS = """HloModule f, is_scheduled=true

%host (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}, execution_thread="host"

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %s = (f32[4]{0}, f32[4]{0}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %k = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="splash"}, backend_config={"estimated_cycles":"7"}
  ROOT %d = f32[4]{0} collective-permute-done(%s)
}"""


def test_an_instruction_may_have_line_breaks():
    program = parse(PALLAS)
    assert [line.name for line in program.computations["main"]] == ["p", "s", "k", "d"]
    assert program.computations["main"][2].number("estimated_cycles") == 7
    assert program.computations["main"][3].root
    (transfer,) = read(program).transfers
    assert (transfer.asynchronous, transfer.encloses_attention, transfer.cycles_enclosed) == (True, True, 7)


STACKS = """HloModule f, is_scheduled=true

FileNames
1 "/src/cpjax/parallel.py"
2 "/src/cpjax/exchange/ring.py"
3 "/src/cpjax/exchange/blocks.py"
4 "/src/cpjax/exchange/device.py"

FunctionNames
1 "outer"
2 "inner"

FileLocations
1 {file_name_id=1 function_name_id=1 line=5 end_line=5 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=5 end_line=5 column=1 end_column=2}
3 {file_name_id=3 function_name_id=2 line=5 end_line=5 column=1 end_column=2}
4 {file_name_id=4 function_name_id=2 line=5 end_line=5 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=4 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=3}
4 {file_location_id=3 parent_frame_id=4}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %a = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1}}, metadata={op_name="jit(f)/x" stack_frame_id=4}
  %b = f32[4]{0} collective-permute(%a), source_target_pairs={{0,1}}, metadata={op_name="transpose(x)" stack_frame_id=2}
  ROOT %c = f32[4]{0} collective-permute(%b), source_target_pairs={}
}"""


def test_the_sender_is_the_innermost_file_of_the_exchange():
    assert [x.sender for x in read(parse(STACKS)).transfers] == ["ring", "exchange, backwards", "exchange"]
    assert parse(STACKS).stacks[4][0] == ("/src/cpjax/exchange/blocks.py", "inner")
    assert [function for _, function in parse(STACKS).stacks[4]] == ["inner", "inner", "inner", "outer"]


@pytest.mark.parametrize(
    ("shape", "logical", "stored"),
    [
        ("f32[]", 4, 4),
        ("pred[3]", 3, 3),
        ("s4[6]{0}", 3, 3),
        ("f8e4m3fn[2,2]{1,0}", 4, 4),
        ("bf16[2,3,130]{2,1,0:T(8,128)(2,1)}", 1560, 2 * 8 * 256 * 2),
        ("bf16[2,3,130]{1,2,0:T(8,128)(2,1)S(1)}", 1560, 2 * 136 * 128 * 2),
        ("(f32[8,128]{1,0:T(8,128)}, (u32[], s32[2]))", 4096 + 4 + 8, 4096 + 4 + 8),
    ],
)
def test_bytes_of_shapes(shape, logical, stored):
    assert (logical_bytes(shape), stored_bytes(shape)) == (logical, stored)
    assert sum(map(logical_bytes, parts(shape))) == logical


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "is_scheduled"), ("HloModule f", "is_scheduled"), ("HloModule f, is_scheduled=true", "no ENTRY")],
)
def test_what_is_no_schedule_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)


def test_a_loop_that_counts_otherwise_is_of_unknown_length():
    text = printed([Loop([Fusion(3)], 4)]).replace("direction=LT", "direction=GE")
    program = parse(text)
    line = next(line for line in program.computations[program.entry] if line.opcode == "while")
    assert Cycles(program).trips(program.entry, line) is None
