"""All cards in one picture: a row per cp rank, a column per tp rank. Needs the extra cpjax[draw], matplotlib."""

from pathlib import Path
from typing import Any

from cpjax.crosscheck.files.pictures import write_picture
from cpjax.mindie.layout import Card, Layout, short

_CHUNKS = ("#cfe3f5", "#fde3c2", "#d8efd3", "#f3d6e4")


def draw(layout: Layout, title: str, path: Path) -> None:
    """Write the grid to `path`, whose suffix (.svg or .png) says in which format; whole, or not at all.

    Raises:
      InputError: another suffix, a file that is there already, or no matplotlib; or it cannot be written.
    """
    write_picture(path, lambda: figure_of(layout, title), dpi=120)


def figure_of(layout: Layout, title: str) -> Any:
    """The grid as a matplotlib Figure, which needs no display."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    sizes = layout.sizes
    rows, columns = sizes.dp * sizes.cp, sizes.tp
    figure = Figure(figsize=(0.6 + 1.45 * columns, 1.1 + 1.35 * rows), layout="constrained")
    axes = figure.add_subplot()
    for card in layout.cards:
        row, color = card.dp * sizes.cp + card.cp, _CHUNKS[card.cp % len(_CHUNKS)]
        axes.add_patch(
            FancyBboxPatch((card.tp + 0.06, row + 0.06), 0.88, 0.88, boxstyle="round,pad=0", fc=color, ec="0.3")
        )
        axes.text(card.tp + 0.12, row + 0.2, f"card {card.rank}", weight="bold", size=9, va="center")
        for line, text in enumerate(_lines(card)):
            axes.text(card.tp + 0.12, row + 0.37 + 0.125 * line, text, size=7, va="center")
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_xticks([column + 0.5 for column in range(columns)], [f"tp {tp}" for tp in range(columns)])
    axes.set_yticks([row + 0.5 for row in range(rows)], [_row_name(layout, row) for row in range(rows)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.set_title(title, size=10)
    return figure


def _row_name(layout: Layout, row: int) -> str:
    cp = layout.sizes.cp
    return f"dp {row // cp}" if layout.sizes.dp > 1 else f"cp {row % cp}"


def _lines(card: Card) -> list[str]:
    heads = "" if card.heads is None else f"heads {card.heads[0]}–{card.heads[1] - 1}"
    tokens = [f"tokens {start}–{end - 1}" for start, end in card.tokens]
    return [heads, *tokens, f"blocks {short(card.blocks, 4)}", f"ep {card.moe_ep}, moe tp {card.moe_tp}"]
