"""Time against length, a line for each cp. Needs the extra cpjax[draw], matplotlib."""

from pathlib import Path
from typing import Any

import numpy as np

from cpjax.crosscheck.files.pictures import write_picture
from cpjax.plan.gain import Plan
from cpjax.plan.time import predict

SHORTEST_DRAWN = 1024
LONGEST_DRAWN = 2**20


def draw(plan: Plan, title: str, path: Path) -> None:
    """Write the picture, whole or not at all.

    Raises:
      InputError: as `check_picture`; or it cannot be written.
    """
    write_picture(path, lambda: figure_of(plan, title), dpi=90)


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
