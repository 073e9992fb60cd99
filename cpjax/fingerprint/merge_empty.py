"""What a rank adds whose keys nobody sees: nothing, NaN, or something.

Under a causal mask the queries of chunk 0 see no key of any other rank; in a text of one chunk all other ranks hold
pads. The first key of each chunk has the score 0 and a value of its own, whether it is seen or not.
"""

import numpy as np

from cpjax.fingerprint.probe import HEAD_DIM, UNTOLD, Answer, Answers, Line, Probe, missing
from cpjax.fingerprint.ranks import CHUNK, chunks, lse_of, out_of, over_ranks

MASKED, PADS = "a rank that the mask hides", "a rank of pads"


def probes(cp: int) -> dict[str, Probe]:
    """One causal, one with pads; the key of each chunk has a column of its own for a value of 1."""
    value = np.eye(chunks(cp), HEAD_DIM)[None, :, None]
    scores = np.zeros((1, chunks(cp)))
    return {
        "merge-masked": over_ranks(scores, value, is_causal=True),
        "merge-pads": over_ranks(scores, value, length=CHUNK),
    }


def read(answers: Answers) -> list[Line]:
    """Two lines; codes are `nothing`, `nan` and `something`."""
    return [_line(MASKED, answers.get("merge-masked")), _line(PADS, answers.get("merge-pads"))]


def _line(name: str, answer: Answer | None) -> Line:
    """Of the queries of chunk 0, which see its key alone: out is its value, and lse is 0."""
    if answer is None:
        return missing(name)
    out, lse = out_of(answer, 1)[0, 0], lse_of(answer, 1, must_be_finite=False)
    has_nan = bool(np.isnan(out).any()) or (lse is not None and bool(np.isnan(lse[0, 0]).any()))
    evidence = f"{CHUNK} queries of rank 0, whose keys alone they see: out is off by at most "
    if has_nan:
        return Line(
            name, "NaN: it makes out or lse one", f"{CHUNK} queries of rank 0, whose keys alone they see", "nan"
        )
    error = float(np.abs(out - np.eye(1, out.shape[-1])).max())
    evidence += f"{error:.1e}"
    off = 0.0 if lse is None else float(np.abs(lse[0, 0]).max())
    if error <= 2.0**-9 and off <= 2.0**-6:
        return Line(name, "nothing", evidence, "nothing")
    if np.isfinite(out).all():
        return Line(name, "something: its keys are seen, or weigh", f"{evidence}, lse by {off:.1e}", "something")
    return Line(name, f"{UNTOLD}: out is infinite", evidence)
