"""The page. Everything that comes from a file is escaped by the template; nothing is fetched, no script runs."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cpjax.crosscheck.files.atomic import atomic_write, is_free
from cpjax.crosscheck.judging.asked import sentences
from cpjax.crosscheck.report.figures import EDGES, Figures, figures
from cpjax.crosscheck.run.session import Judged
from cpjax.crosscheck.run.summary import BACKENDS, all_passed, sentence
from cpjax.errors import InputError

WORDS = {"pass": "agrees", "fail": "WRONG", "unsupported": "unsupported", "error": "ERROR"}
MOST_CELLS = 4096
"""A larger map is not drawn."""

LABELLED = 16
"""With more rows or columns, cells get smaller and not each has its number."""


def check_free(folder: Path) -> None:
    """Raise InputError if a report would overwrite something; asked before anything is computed."""
    if not is_free(folder):
        raise InputError(f"--report {folder} is there already; nothing is overwritten, name another folder")


def write_report(folder: Path, judged: list[Judged], title: str) -> Path:
    """Write `folder/index.html`, whole or not at all.

    Raises:
      InputError: the folder is there and not empty, or cannot be written.
    """
    check_free(folder)
    try:
        with atomic_write(folder) as unfinished:
            unfinished.mkdir()
            (unfinished / "index.html").write_text(html(judged, title), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--report {folder} cannot be written ({error.strerror})") from None
    return folder / "index.html"


def html(judged: list[Judged], title: str) -> str:
    """The whole page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cpjax.crosscheck.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    versions = {"python": platform.python_version(), "cpjax": version("cpjax"), "numpy": version("numpy")}
    return environment.get_template("report.html").render(
        title=title,
        sentence=sentence(judged),
        passed=all_passed(judged),
        sections=[_section(one) for one in judged],
        versions=versions | {"jax": version("jax"), "machine": platform.machine()},
    )


def _section(one: Judged) -> dict[str, Any]:
    verdict, drawn = one.verdict, None if one.shown is None else figures(one.shown.problem, one.shown.out)
    numbers = {}
    if verdict is not None:
        numbers = {
            "max error": f"{verdict.max_error:.3g}", "of bound": f"{verdict.hard_ratio:.3g}", "z": f"{verdict.z:.3f}",
            "lse max error": f"{verdict.lse_max_error:.3g}", "lse of bound": f"{verdict.lse_hard_ratio:.3g}",
            "lse z": f"{verdict.lse_z:.3f}", "rows judged": f"{verdict.rows_judged:,} of {verdict.rows:,}",
        }  # fmt: skip
        numbers = {name: "–" if text == "nan" else text for name, text in numbers.items()}
    weights = verdict.chunk_weights if verdict is not None else None
    word = "not judgeable" if verdict is not None and not verdict.judgeable else WORDS[one.outcome]
    return {
        "case": one.case, "backend": BACKENDS.get(one.backend, one.backend), "outcome": one.outcome, "word": word,
        "precision": one.precision or "–", "order": one.order or "–", "numbers": numbers,
        "reasons": one.reasons if one.outcome != "pass" else [], "remarks": one.remarks,
        "diagnosis": verdict.diagnosis if verdict is not None else [],
        "maps": [] if drawn is None else list(_maps(drawn, weights)),
        "bars": [] if drawn is None else _bars(drawn), "rows": 0 if drawn is None else drawn.rows,
        "about": {str(k): _short(x) for k, x in (_asked(one) | (one.about or {})).items()},
    }  # fmt: skip


def _asked(one: Judged) -> dict[str, str]:
    """What was asked and assumed, unless the result says nothing that was judged."""
    if one.verdict is None or not one.verdict.asked:
        return {}
    return {name: said for name, _, said in (line.partition(": ") for line in sentences(one.verdict.asked))}


def _maps(drawn: Figures, weights: np.ndarray | None):
    if weights is not None and np.isfinite(weights).any():
        yield _map("Weight with which each chunk entered (1 is right)", "query chunk", "key/value chunk", weights, _far)
    yield _map("Pull of the errors towards a chunk, in σ (beyond ±6 it is wrong)", "query chunk", "key/value chunk",
               drawn.pull, lambda x: abs(x) / 6)  # fmt: skip
    if drawn.steps is not None:
        yield _map("Largest pull, in σ", "rank", "ring step", drawn.steps, lambda x: x / 6)
    yield _map("RMS(error / σ), about 1 or below is right", "first query of a run", "head", drawn.bands,
               lambda x: (x - 1) / 2, drawn.band_starts)  # fmt: skip


def _far(weight: float) -> float:
    return abs(weight - 1) * 2


def _map(
    title: str, down: str, across: str, values: np.ndarray, heat, row_names: Sequence[int] | None = None
) -> dict[str, Any]:
    """Cells as (row, column, number in words, heat in 0 … 1). Many rows or columns are drawn smaller, fewer named."""
    cells = [
        (i, j, _brief(float(x)), round(float(np.clip(heat(x), 0, 1)), 3))
        for (i, j), x in np.ndenumerate(values)
        if np.isfinite(x)
    ]
    drawn = values.size <= MOST_CELLS
    (height, down_step), (width, across_step) = map(_size, values.shape)
    return {
        "title": title, "down": down, "across": across, "rows": values.shape[0], "columns": values.shape[1],
        "names": list(range(values.shape[0]) if row_names is None else row_names),
        "height": height, "width": width, "down_step": down_step, "across_step": across_step,
        "cells": cells if drawn else [], "labelled": values.shape[1] <= LABELLED and drawn, "drawn": drawn,
    }  # fmt: skip


def _size(count: int) -> tuple[float, int]:
    """Of a cell, and of how many cells one has its number at the edge."""
    return (40.0, 1) if count <= LABELLED else (max(LABELLED * 40 / count, 5.0), -(-count // LABELLED))


def _bars(drawn: Figures) -> list[tuple[float, float, float, float]]:
    """For each bin: its left edge, its share, the share of a standard normal, and the largest of all."""
    from scipy.special import ndtr

    inside = np.diff(ndtr(EDGES))
    # The outermost bars hold everything beyond, and may leave the figure.
    top = float(max(drawn.histogram[1:-1].max(), inside.max()))
    return [
        (round(float(x), 3), min(float(share), top), float(normal), top)
        for x, share, normal in zip(EDGES[:-1], drawn.histogram, inside, strict=True)
    ]


def _brief(x: float) -> str:
    """At most five characters, for a cell of the map: 0.98, 12.3, -457, 2e3."""
    for digits, largest in ((2, 9.995), (1, 99.95), (0, 9999.5)):
        if abs(x) < largest:
            return f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0: not -0.00
    return f"{x:.0e}".replace("e+0", "e").replace("e+", "e")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 300 else text[:300] + " …"
