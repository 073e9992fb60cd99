"""The card: what each room reads, and the profile in which the kernel should be judged."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cpjax.crosscheck.exact.formats import FORMATS
from cpjax.fingerprint import last_bits, masks, merging, order, parts, results, same, scores, tiles, weights
from cpjax.fingerprint.probe import Answers, Kernel, Line, Probe, answered
from cpjax.precision import PROFILES, Precision

ROOMS = (scores, weights, results, order, parts, tiles, masks, same)


@dataclass(frozen=True)
class Card:
    """What a kernel computes, in one dtype of its inputs."""

    kernel: str
    dtype: str
    lines: tuple[Line, ...]
    failures: dict[str, str]
    """Probe → why the kernel gave no answer."""
    cp: int = 1
    """Over how many ranks it was asked, and answered; 1: it has no lines on merging."""

    def line(self, name: str) -> Line:
        """The line of that name.

        Raises:
          KeyError: there is none.
        """
        return {line.name: line for line in self.lines}[name]

    @property
    def profile(self) -> Precision | None:
        """The precision profile in which the kernel should be judged; None if a line that says so cannot be told."""
        return profile_of(self)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "kernel": self.kernel,
            "dtype": self.dtype,
            "cp": self.cp,
            "profile": None if self.profile is None else vars(self.profile),
            "lines": [line._asdict() for line in self.lines],
            "failures": self.failures,
        }


def all_probes(dtype: str) -> dict[str, Probe]:
    """Every probe, by name."""
    fmt = FORMATS[dtype]
    return {name: asked for room in (*ROOMS, last_bits) for name, asked in room.probes(fmt).items()}


def card_of(
    kernel: Kernel, dtype: str, name: str = "", advance: Callable[..., None] = lambda *_: None, cp: int = 1
) -> Card:
    """Ask the kernel everything, and read its answers.

    Args:
      kernel: takes a `Probe` and gives an `Answer`; what it raises is written down, and its lines cannot be told.
      dtype: of query, key and value: float16, bfloat16 or float32.
      name: of the kernel, for the card.
      advance: called with what is done, how much, of how much.
      cp: over how many ranks it is asked, too; a kernel of one device has nothing to merge.

    >>> from cpjax.fingerprint.kernels import emulator
    >>> card_of(emulator("flash_fp16"), "float16").line("p as the factor of v").code
    'float16'
    """
    probes = all_probes(dtype) | merging.probes(cp)
    answers, failures = answered(kernel, probes, advance)
    return read_card(name, dtype, probes, answers, failures)


def read_card(name: str, dtype: str, asked: dict[str, Probe], answers: Answers, failures: dict[str, str]) -> Card:
    """The card of answers that are there already; `asked` is `all_probes(dtype)`, and `merging.probes(cp)` with it.

    A kernel that answers no probe over ranks is one of one device.
    """
    fmt = FORMATS[dtype]
    lines = [line for room in ROOMS for line in room.read(fmt, asked, answers)]
    lines += last_bits.read(fmt, {line.name: line for line in lines}, asked, answers)
    cp = max((asked[probe].cp for probe in answers), default=1)
    if cp > 1:
        lines += merging.read(cp, asked, answers)
    return Card(name, dtype, tuple(lines), failures, cp)


NEEDED = ("scale", "scores", "p as the factor of v", "p in the row sum")
"""The lines that a profile follows from."""


def profile_of(card: Card) -> Precision | None:
    """The profile whose roundings are those of the card, of `PROFILES` if one is; None if a line it needs is not told.

    Where merging is not asked or not told, `carry` is the format of out, and lse is not rounded.
    """
    codes = [card.line(name).code for name in NEEDED]
    over_ranks = {line.name: line.code for line in card.lines}
    carry, lse, carried = (
        over_ranks.get(name, "") for name in (merging.CARRIED, merging.PARTIAL_LSE, merging.CARRIED_LSE)
    )
    # An lse that is rounded at each merge is in no profile.
    if not all(codes) or carried in ("float16", "bfloat16"):
        return None
    scale, score, factor, total = codes
    p = factor.removeprefix("normalised ")
    half = (card.dtype,) if card.dtype != "float32" else ()
    # What a profile can say: formats of the inputs or float32, to nearest; the scale rounded where scores are.
    if not {score, p} <= {"float32", *half} or scale not in ("score", "rounded", "query"):
        return None
    if scale == "rounded" and score == "float32":
        return None
    apart = "float32" if scale == "score" and score != "float32" else ""
    found = Precision(
        name="fingerprint",
        compute="float32",
        score=score,
        probability=p,
        out=card.dtype,
        carry=carry,
        lse=lse,
        scale=apart,
        distance=apart,
        query=card.dtype if scale == "query" else "",
        total=card.dtype if total == "rounded" else "",
        is_normalised=factor != p,
    )
    same = [known for known in PROFILES.values() if replace(known, name="fingerprint") == found]
    return same[0] if same else found


def described(precision: Precision) -> str:
    """The roundings of a profile in a line."""
    return ", ".join(f"{name} {fmt}" for name, fmt in vars(precision).items() if fmt and name != "name")
