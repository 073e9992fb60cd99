"""One program compiled for one topology, and everything that is read from it."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax

from cpjax.errors import InputError
from cpjax.inspect.hlo import parse
from cpjax.inspect.programs import Shape, lowered
from cpjax.inspect.schedule import Schedule, Transfer, read
from cpjax.inspect.topology import Topology


@dataclass(frozen=True)
class Memory:
    """Bytes per chip, from the compiler's buffer assignment (`compiled.memory_analysis()`)."""

    arguments: int
    results: int
    temporaries: int
    """At their peak, beside arguments and results."""
    peak: int
    """All that is alive at the worst moment. Where libtpu does not say it, the sum of the three."""
    program: int
    """The program itself."""


@dataclass(frozen=True)
class Inspection:
    """A compiled program and what its text says."""

    program: str
    topology: Topology
    shape: Shape
    schedule: Schedule
    memory: Memory
    compile_seconds: float
    text_bytes: int

    @property
    def cp(self) -> int:
        """Ranks of the ring."""
        return len(self.topology.devices)

    def hops(self, transfer: Transfer) -> int:
        """Links that the farthest pair of a transfer is apart; 0 where there are no pairs."""
        return max((self.topology.hops(*pair) for pair in transfer.pairs), default=0)

    def as_json(self) -> dict[str, Any]:
        """What `cpjax inspect --json` prints."""
        transfers = [
            {
                "name": transfer.name,
                "kind": transfer.kind,
                "sender": transfer.sender,
                "bytes": transfer.bytes,
                "stored_bytes": transfer.stored_bytes,
                "runs": transfer.runs,
                "hops": self.hops(transfer),
                "asynchronous": transfer.asynchronous,
                "encloses": [_named(work) for work in transfer.encloses],
                "encloses_attention": transfer.encloses_attention,
                "cycles_enclosed": transfer.cycles_enclosed,
                "link_cycles": self.topology.link_cycles(transfer.stored_bytes),
            }
            for transfer in self.schedule.transfers
        ]
        return {
            "program": self.program,
            "topology": self.topology.name,
            "cp": self.cp,
            **asdict(self.shape),
            "collectives": self.schedule.collectives,
            "transfers": transfers,
            "loops": [asdict(loop) for loop in self.schedule.loops],
            "cycles": self.schedule.cycles,
            "kernels": self.schedule.kernels,
            "peak_bytes": self.memory.peak,
            "memory_bytes": asdict(self.memory),
            "compile_seconds": round(self.compile_seconds, 2),
            "text_bytes": self.text_bytes,
        }


def inspect(
    program: str, topology: Topology, shape: Shape, advance: Callable[[str, int, int], Any] | None = None
) -> Inspection:
    """Lower, compile and read one program.

    Args:
      program: a name of `cpjax.inspect.programs.PROGRAMS`.
      advance: told what is being done, as (what, done, total).

    Raises:
      InputError: what the function refuses, and what the compiler does, for instance because memory is too small.
    """
    say = advance or (lambda *_: None)
    say(f"{program}: compiling", 0, 2)
    ready = lowered(program, shape, topology.devices)
    start = time.perf_counter()
    try:
        compiled = ready.compile()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"the TPU compiler gives up ({_first(error)}); take fewer tokens, or more chips") from None
    seconds = time.perf_counter() - start
    say(f"{program}: compiling", 1, 2)
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"JAX cannot read what this libtpu has compiled ({_first(error)}); "
            "install the one that it is released with: pip install 'cpjax[tpu]'"
        ) from None
    schedule = read(parse(text))
    say(f"{program}: compiling", 2, 2)
    return Inspection(program, topology, shape, schedule, _memory(compiled.memory_analysis()), seconds, len(text))


def _memory(said: Any) -> Memory:
    parts = (said.argument_size_in_bytes, said.output_size_in_bytes, said.temp_size_in_bytes)
    peak = getattr(said, "peak_memory_in_bytes", 0) or sum(parts)
    return Memory(*parts, peak, said.generated_code_size_in_bytes)


def _first(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.200}"


def _named(work: Any) -> dict[str, Any]:
    return {"name": work.name, "kind": work.kind, "cycles": work.cycles, "multiplies": work.products}
