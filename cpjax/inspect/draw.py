"""A picture of one step: what a chip computes over estimated cycles, and what travels in the meantime.

A step is the computation that sends most: the body of the ring's loop, or the whole program where the ring is no loop.
Needs the extra cpjax[draw], matplotlib.
"""

from pathlib import Path
from typing import Any

from cpjax.crosscheck.files.pictures import write_picture
from cpjax.inspect.inspection import Inspection

ATTENTION, OTHER, ASYNCHRONOUS, SYNCHRONOUS = "#4878a8", "#c8c8c8", "#74a86a", "#c0504d"
SHORT = 1e-3
"""Work shorter than this part of the step is not drawn on its own."""
LANES = 40


def draw(seen: Inspection, path: Path) -> None:
    """Write the picture, whole or not at all.

    Raises:
      InputError: as `check_picture`; or it cannot be written.
    """
    write_picture(path, lambda: figure_of(seen), dpi=120, with_letters=True)


def figure_of(seen: Inspection) -> Any:
    """The step as a matplotlib Figure, which needs no display."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    schedule = seen.schedule
    works = schedule.steps.get(schedule.step or "", ())
    transfers = sorted(
        (x for x in schedule.transfers if x.computation == schedule.step), key=lambda x: (x.start, x.end)
    )
    shown = transfers[:LANES]
    whole = max([work.start + work.cycles for work in works] + [x.end for x in transfers] + [1])
    figure = Figure(figsize=(10, 1.6 + 0.28 * (len(shown) + 2)), layout="constrained")
    axes = figure.add_subplot()
    for attention, color in ((False, OTHER), (True, ATTENTION)):
        chosen = [(x.start, x.cycles) for x in works if x.products == attention and x.cycles >= SHORT * whole]
        axes.broken_barh(chosen, (-0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.4)
    for lane, transfer in enumerate(shown, 1):
        color = ASYNCHRONOUS if transfer.asynchronous else SYNCHRONOUS
        width = max(transfer.end - transfer.start, SHORT * whole)
        axes.broken_barh([(transfer.start, width)], (lane - 0.32, 0.64), facecolors=color)
        link = seen.topology.link_cycles(transfer.stored_bytes)
        if link is not None:
            axes.plot([transfer.start, transfer.start + link], [lane, lane], color="black", linewidth=1.2)
    names = [f"{x.sender}, {x.bytes / 2**20:.2f} MiB" for x in shown]
    axes.set_yticks(range(len(shown) + 1), ["computed", *names], size=7)
    axes.set(ylim=(len(shown) + 0.7, -0.7), xlim=(0, whole))
    axes.set_xlabel("estimated cycles", size=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.offsetText.set_fontsize(7)
    legend = {
        "a product of matrices (attention)": ATTENTION,
        "other work": OTHER,
        "sent while it computes": ASYNCHRONOUS,
    }
    if not all(x.asynchronous for x in shown):
        legend["the chip waits"] = SYNCHRONOUS
    figure.legend(
        [Patch(color=c) for c in legend.values()], list(legend), loc="outside lower center", ncols=4, fontsize=7
    )
    left = f", the first {LANES} of {len(transfers)} transfers" if len(transfers) > LANES else ""
    step = "one step" if any(x.runs > 1 for x in transfers) else "the whole program"
    axes.set_title(
        f"{seen.program}, {seen.topology.name}, {seen.shape.tokens:,} tokens: {step}{left}\n"
        "black: as long as the bytes take on one link at its published rate",
        size=8,
    )
    return figure
