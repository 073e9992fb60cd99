"""Time against length, a line for each cp. Needs the extra cpjax[draw], matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from cpjax.crosscheck.files.atomic import atomic_write
from cpjax.errors import InputError
from cpjax.plan.gain import Plan
from cpjax.plan.time import predict

SHORTEST_DRAWN = 1024
LONGEST_DRAWN = 2**20


def check_drawable(path: Path) -> None:
    """Refuse before anything is computed.

    Raises:
      InputError: a suffix that is none of ours, a file that is there already, or no matplotlib.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise InputError(f"--draw {path} must end in .svg or .png")
    if path.exists():
        raise InputError(f"--draw {path} is there already; move it away, or give another name")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError('drawing needs matplotlib; pip install "cpjax[draw]"') from None


def draw(plan: Plan, title: str, path: Path) -> None:
    """Write the picture, whole or not at all; `.svg` without a date, so that it is the same each time.

    Raises:
      InputError: as `check_drawable`; or it cannot be written.
    """
    check_drawable(path)
    from matplotlib import rc_context

    figure = figure_of(plan, title)
    kind = path.suffix.lower()[1:]
    try:
        # The same picture has the same bytes: no date, and names of its parts that are not random.
        with atomic_write(path) as unfinished, rc_context({"svg.hashsalt": "cpjax"}):
            figure.savefig(unfinished, format=kind, dpi=90, metadata={"Date": None} if kind == "svg" else None)
    except OSError as error:
        raise InputError(f"--draw {path} cannot be written ({error.strerror or error})") from None


def figure_of(plan: Plan, title: str) -> Any:
    """Seconds against tokens, both logarithmic; dashed where the prompt does not fit on the cards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    chunk = plan.choices[0].setting.chunk
    last = LONGEST_DRAWN if chunk is None else min(LONGEST_DRAWN, 256 * max(chunk, SHORTEST_DRAWN))
    lengths = [int(n) for n in np.geomspace(SHORTEST_DRAWN, last, 2 * int(np.log2(last / SHORTEST_DRAWN)) + 1)]
    for number, choice in enumerate(plan.choices):
        seconds = [predict(choice.setting, plan.constants, n, plan.prefix).seconds for n in lengths]
        inside = [n for n in lengths if n <= choice.longest]
        label = f"cp {choice.setting.cp}, tp {choice.setting.tp}, {choice.setting.cards} cards"
        axes.plot(lengths, seconds, "--", color=f"C{number}", linewidth=1)
        axes.plot(inside, seconds[: len(inside)], color=f"C{number}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="predicted time to first token, s")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(title="dashed: does not fit", fontsize=8, title_fontsize=8)
    axes.set_title(f"{title}\npredicted, not measured", size=10)
    return figure
