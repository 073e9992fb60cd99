"""The verdict on one stage, and on a layer."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cpjax.crosscheck.layer.stages import Kind

Outcome = Literal["agrees", "WRONG", "not judgeable"]


@dataclass(frozen=True)
class StageVerdict:
    """Whether correct arithmetic on the stage's own inputs gives what it gave."""

    stage: str
    kind: Kind
    outcome: Outcome
    ratio: float
    """The largest |error| / bound."""
    z: float
    """The test for a systematic error; beyond 6 the stage is wrong though each number is within its bound."""
    moved: int = 0
    """Numbers that are not the rounding of the exact value; of attention and of float32 results none is counted."""
    allowed: float = 0.0
    """How many are expected at most."""
    reasons: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    """Tokens, heads, columns, experts."""
    causes: tuple[str, ...] = ()
    """Computations that give this result within their bound; empty: none of the known ones does."""
    remarks: tuple[str, ...] = ()
    """What was found of a stage that agrees."""

    def as_json(self) -> dict[str, Any]:
        """Plain values; what is infinite is null."""
        found = asdict(self)
        for name in ("ratio", "z"):
            found[name] = found[name] if abs(found[name]) < float("inf") else None
        return found


@dataclass(frozen=True)
class LayerVerdict:
    """All stages in order."""

    stages: tuple[StageVerdict, ...]

    @property
    def wrong(self) -> list[StageVerdict]:
        """The wrong stages; the first one's kind is what is said of the layer."""
        return [one for one in self.stages if one.outcome == "WRONG"]

    @property
    def passed(self) -> bool:
        """Whether every stage agrees."""
        return all(one.outcome == "agrees" for one in self.stages)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        wrong = self.wrong
        return {
            "passed": self.passed,
            "first_wrong": wrong[0].stage if wrong else None,
            "kind": wrong[0].kind if wrong else None,
            "stages": [one.as_json() for one in self.stages],
        }

    def sentences(self) -> list[str]:
        """What is wrong: of each wrong stage where, why, and which computation it equals."""
        said = []
        for number, one in enumerate(self.wrong):
            first = "the first wrong stage is" if number == 0 else "also wrong, judged from its own inputs:"
            said.append(f"{first} {one.stage} ({one.kind}), {'; '.join(one.where) or 'everywhere'}")
            said += [f"{one.stage}: {reason}" for reason in one.reasons]
            said += [f"{one.stage}: {cause}" for cause in one.causes]
        for one in self.stages:
            said += [f"{one.stage}: not judgeable: {'; '.join(one.reasons)}"] * (one.outcome == "not judgeable")
        for remark in dict.fromkeys(remark for one in self.stages for remark in one.remarks):
            said.append(f"{', '.join(one.stage for one in self.stages if remark in one.remarks)}: agrees; {remark}")
        return said
