"""What a person sees of a layout or a link: tables, and lines that say the rest in words."""

from collections.abc import Iterator

from rich import box
from rich.table import Table

from cpjax.mindie.deployment import Sizes
from cpjax.mindie.layout import Layout, short
from cpjax.mindie.link import Transfer
from cpjax.partition.kv_cache import tokens_per_rank
from cpjax.wording import counted


def cards_table(layout: Layout) -> Table:
    """A row per card."""
    title = f"{counted(len(layout.cards), 'card')}, a prompt of {counted(layout.tokens, 'token')}"
    table = Table(
        title=title + (f", padded to {layout.padded}" if layout.padded > layout.tokens else ""),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("card", "dp", "cp", "tp", "ep", "etp", "heads", "tokens", "cached", "blocks"):
        table.add_column(column, justify="right" if column in ("card", "heads", "cached") else "left", no_wrap=True)
    held = tokens_per_rank(layout.tokens, layout.sizes.cp * layout.sizes.sp, layout.block)
    for card in layout.cards:
        heads = "?" if card.heads is None else f"{card.heads[0]}–{card.heads[1] - 1}"
        tokens = ", ".join(f"{start}–{end - 1}" for start, end in card.tokens)
        coordinates = (card.rank, card.dp, card.cp, card.tp, card.moe_ep, card.moe_tp)
        table.add_row(*map(str, coordinates), heads, tokens, str(held[card.scp]), short(card.blocks, 3))
    return table


def groups_text(layout: Layout) -> Iterator[str]:
    """A line per kind of group."""
    for kind, found in layout.groups.items():
        shown = " ".join(
            f"[{short(tuple(group), 4)}]" for group in (found if len(found) <= 3 else [*found[:2], found[-1]])
        )
        yield f"{kind:21} {f'{len(found)} × {len(found[0])}':8} {shown}" + ("" if len(found) <= 3 else "   (…)")


def transfers_table(pulled: list[Transfer], title: str, most: int) -> Table:
    """A row per block that one decode rank fetches; the middle is left out where there are more than `most`."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("prompt block", "tokens", "prefill rank", "block there", "decode block"):
        table.add_column(column, justify="right")
    shown = pulled if len(pulled) <= most else [*pulled[: most - 1], None, pulled[-1]]
    for transfer in shown:
        row = (
            ("…",) * 5
            if transfer is None
            else map(str, (transfer.block, transfer.tokens, transfer.source, transfer.slot, transfer.target))
        )
        table.add_row(*row)
    return table


def link_text(links: dict[int, list[int]], pulled: list[Transfer], prefill: Sizes) -> Iterator[str]:
    """Who is linked with whom, and why the last block lives where it lives."""
    for d, sources in list(links.items())[:8]:
        yield f"decode tp rank {d} fetches from prefill ranks {short(tuple(sources), 6)}, in this order"
    if len(links) > 8:
        yield f"… and so on, {counted(len(links), 'decode tp rank')}"
    last, ranks = pulled[-1], prefill.cp * prefill.sp
    yield (
        f"The prompt's last block, {last.block}, has {counted(last.tokens, 'token')}. It lives on prefill rank "
        f"{last.source}, the "
        f"last of the {ranks} cache ranks that has any block, so that it is fetched last and becomes decode block "
        f"{last.target}, the last: only there may a block be partly filled, because the decode node's cache is read up "
        "to a length."
    )
