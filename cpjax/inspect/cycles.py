"""How long instructions take by the compiler's own estimates, how often loops turn, and what multiplies matrices.

Cycles are `estimated_cycles` of each instruction, summed with the trip counts of the loops; of a conditional the
dearest branch counts. A kernel written by hand (Pallas) has no estimate and counts as 0.

Two other sources are not used. `compiled.cost_analysis()` counts the body of a loop once, so that its flops are the
same for every cp, and its `optimal_seconds` has been negative. Formulas give what one hopes for, not what was compiled.
"""

from functools import cached_property

from cpjax.inspect.hlo import Instruction, Program

PRODUCTS = ("convolution", "dot", "ragged-dot")
"""What a product of matrices is called; on a TPU it is a convolution."""
PARAMETER = "parameter"
KERNELS = ("tpu_custom_call",)
BRANCHES = ("branch_computations", "true_computation", "false_computation", "to_apply")


class Cycles:
    """Of one program; what has been summed once is kept."""

    def __init__(self, program: Program) -> None:
        """Nothing is summed yet."""
        self.program = program
        self._totals: dict[str, int] = {}
        self._multiplying: dict[str, bool] = {}

    @cached_property
    def lines(self) -> dict[str, dict[str, Instruction]]:
        """Computation → name → instruction."""
        return {name: {line.name: line for line in body} for name, body in self.program.computations.items()}

    def total(self, computation: str) -> int:
        """Cycles of one run of a computation."""
        if computation not in self._totals:
            lines = self.program.computations[computation]
            self._totals[computation] = sum(self.of(computation, line) for line in lines)
        return self._totals[computation]

    def of(self, computation: str, line: Instruction) -> int:
        """Cycles of one execution of an instruction, all trips of a loop."""
        cycles = line.number("estimated_cycles") or 0
        if line.opcode == "while":
            return cycles + (1 if (trips := self.trips(computation, line)) is None else trips) * (
                self.total(line.called("body")[0]) + self.total(line.called("condition")[0])
            )
        if line.opcode in ("conditional", "call"):
            return cycles + max((self.total(below) for below in line.called(*BRANCHES)), default=0)
        return cycles

    def trips(self, computation: str, line: Instruction) -> int | None:
        """The bound with which the condition compares the counter, less where the counter begins; None if computed.

        A loop of JAX with a known length is `while i < n: i += 1` in XLA. Its `known_trip_count` is used where it is
        said; libtpu's text does not say it.
        """
        known = line.attributes.partition("known_trip_count")[2]
        if known and (said := Instruction("", "", "", (), known).number("n")) is not None:
            return said
        condition = line.called("condition")[0]
        bound = self._bound(condition)
        if bound is None:
            return None
        counter, limit = bound
        start = self._begins(computation, line, counter)
        return max(limit - (start or 0), 0)

    def multiplies(self, line: Instruction) -> bool:
        """Whether it multiplies matrices, or is a kernel; attention does, and nothing else in these programs."""
        if line.opcode in PRODUCTS or is_kernel(line):
            return True
        below = line.called("calls", "body", *BRANCHES)
        return any(self._contains_product(name) for name in below)

    def _contains_product(self, computation: str) -> bool:
        if computation not in self._multiplying:
            self._multiplying[computation] = any(map(self.multiplies, self.program.computations[computation]))
        return self._multiplying[computation]

    def _bound(self, condition: str) -> tuple[int | None, int] | None:
        """Of `counter < bound`: which element of the loop's state the counter is, and the bound."""
        lines = self.lines[condition]
        root = next((line for line in lines.values() if line.root), None)
        if root is None:
            return None
        if root.opcode == "fusion":
            inner = {line.name: line for name in root.called("calls") for line in self.program.computations[name]}
            # A parameter says which operand it is: %p = s32[] parameter(1).
            outer = {
                line.name: root.operands[int(line.operands[0])] for line in inner.values() if line.opcode == PARAMETER
            }
            compare = next((line for line in inner.values() if line.root), None)
        else:
            inner, outer, compare = {}, {}, root
        if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return None
        sides = [inner.get(name) or lines.get(name) for name in compare.operands]
        sides = [
            lines.get(outer[side.name], side) if side is not None and side.name in outer else side for side in sides
        ]
        counter, limit = sides
        if limit is None or limit.opcode != "constant" or not limit.operands[0].lstrip("-").isdigit():
            return None
        return (None if counter is None else counter.number("index")), int(limit.operands[0])

    def _begins(self, computation: str, line: Instruction, counter: int | None) -> int | None:
        state = self.lines[computation].get(line.operands[0])
        if counter is None or state is None or state.opcode != "tuple":
            return None
        first = self.lines[computation].get(state.operands[counter])
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = self.lines[computation].get(first.operands[0])
        if first is None or first.opcode != "constant" or not first.operands[0].lstrip("-").isdigit():
            return None
        return int(first.operands[0])


def is_kernel(line: Instruction) -> bool:
    """Whether it is written by hand: there is no estimate of its cycles."""
    return line.opcode == "custom-call" and any(f'custom_call_target="{name}"' in line.attributes for name in KERNELS)
