"""The figures of a dumped call: its question is asked again, as `judge_dump` found it out."""

from pathlib import Path

from cpjax.crosscheck.dumped import Said, places_of
from cpjax.crosscheck.question import question
from cpjax.crosscheck.report.figures import Figures, figures


def dumped_figures(
    said: Said, *, scale: float, is_causal: bool, positions: Path | None, lengths: list[int] | None, cp: int
) -> Figures | None:
    """Figures of what `judge_dump` judged; None where the result was no result at all."""
    if "form" in said.verdict.failed_tests:
        return None
    places = {"q_positions": None, "kv_positions": None, "segment_ids": None}
    places |= places_of(said.dump, positions, lengths, is_causal=is_causal)
    asked = question(
        said.dump.query, said.dump.key, said.dump.value, scale=scale, is_causal=is_causal, window=None, cp=cp,
        layout="zigzag", precision=said.verdict.precision, order=said.verdict.order, **places,
    )  # fmt: skip
    return figures(asked, said.dump.out)
