"""A plan and the published rows as tables, lines and JSON. Units stand in every heading."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cpjax.plan.constants import Constants
from cpjax.plan.gain import FARTHEST, SHORTEST, Choice, Plan
from cpjax.plan.measured import Time
from cpjax.plan.published import Row, predicted
from cpjax.plan.time import predict
from cpjax.wording import counted

LARGE = 0.15
"""Relative errors above this are explained."""


def length_table(plan: Plan, at: int) -> Table:
    """A row for each cp at one length."""
    over = f" over {counted(plan.prefix, 'cached token')}" if plan.prefix else ""
    table = Table(
        title=f"{counted(plan.tokens[at], 'token')}{over}: predicted time to first token, not measured",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in (
        *("cp", "tp", "cards", "time s", "speed-up", "attention s", "products s", "exposed s", "reductions s"),
        *("received GB", "card GB", "fits", "longest"),
    ):
        table.add_column(heading, justify="right")
    for choice in plan.choices:
        found, held = choice.predictions[at], choice.memories[at]
        seconds = (found.attention, found.products, found.exposed, found.reductions)
        table.add_row(
            *map(str, (choice.setting.cp, choice.setting.tp, choice.setting.cards)),
            f"{found.seconds:.4g}", f"{plan.speedup(choice, at):.2f}", *(f"{x:.3g}" for x in seconds),
            f"{found.received / 1e9:.3g}", f"{held.total / 1e9:.1f}", "yes" if choice.fits[at] else "no",
            f"{choice.longest:,}",
        )  # fmt: skip
    return table


def sentences(plan: Plan) -> Iterator[str]:
    """From which length on each cp pays; on what all of it rests."""
    first = plan.choices[0].setting
    for choice in plan.choices[1:]:
        who = f"cp {choice.setting.cp} on {counted(choice.setting.cards, 'card')}"
        base = f"cp {first.cp} on {counted(first.cards, 'card')}"
        if choice.pays is None:
            yield f"{who} does not pay against {base} up to {FARTHEST:,} tokens."
        elif choice.pays <= SHORTEST:
            yield f"{who} pays against {base} from {SHORTEST} tokens on, the shortest that was tried."
        else:
            yield f"{who} pays against {base} from {choice.pays:,} tokens on."
    device = first.device
    yield (
        f"Predicted for {device.about}: {device.tflops_16bit:g} TFLOP/s in 16 bits, {device.memory_gb_s:g} GB/s "
        f"memory, {device.ring_link_gb_s:g} GB/s ring, {device.all_links_gb_s:g} GB/s all links, "
        f"{device.memory_gb:g} GB. Source: {device.source}."
    )
    for what in (*device.assumed, *first.model.assumed):
        yield f"Assumed: {what}."
    yield (
        f"Attention reaches {plan.constants.attention:.3f} of the peak, matrix products {plan.constants.products:.3f}. "
        "How far such predictions are off from published times: cpjax plan --published."
    )


def times_table(plan: Plan, times: Sequence[Time]) -> Table:
    """A user's own measured times beside the predictions, for those cp that are planned."""
    table = Table(title="your times beside the predictions", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("cp", "tokens", "measured s", "predicted s", "error"):
        table.add_column(heading, justify="right")
    for row in compared(plan, times):
        table.add_row(
            str(row["cp"]), f"{row['tokens']:,}", f"{row['measured_s']:.4g}", f"{row['predicted_s']:.4g}",
            f"{row['error']:+z.1%}",
        )  # fmt: skip
    return table


def compared(plan: Plan, times: Sequence[Time]) -> list[dict[str, Any]]:
    """The rows of that table."""
    chosen = {choice.setting.cp: choice.setting for choice in plan.choices}
    found = []
    for time in times:
        if time.cp in chosen:
            seconds = predict(chosen[time.cp], plan.constants, time.tokens, plan.prefix).seconds
            error = seconds / time.seconds - 1
            row = {"cp": time.cp, "tokens": time.tokens, "measured_s": time.seconds, "predicted_s": seconds}
            found.append(row | {"error": error})
    return found


def plan_json(plan: Plan) -> dict[str, Any]:
    """All of it; seconds and bytes."""
    first = plan.choices[0].setting
    return {
        "says": "predicted, not measured",
        "units": {"seconds": "s", "bytes": "B", "rates": "TFLOP/s and GB/s, 1e9 bytes"},
        "constants": plan.constants.model_dump(),
        "device": first.device.model_dump(mode="json"),
        "model": first.model.model_dump(mode="json"),
        "prefix": plan.prefix,
        "choices": [_choice_json(plan, choice) for choice in plan.choices],
    }


def _choice_json(plan: Plan, choice: Choice) -> dict[str, Any]:
    setting = choice.setting
    lengths = [
        {
            "tokens": found.tokens,
            "seconds": found.seconds,
            "attention_seconds": found.attention,
            "products_seconds": found.products,
            "exposed_seconds": found.exposed,
            "reductions_seconds": found.reductions,
            "received_bytes": found.received,
            "balance": found.balance,
            "speedup": plan.speedup(choice, at),
            "memory_bytes": choice.memories[at]._asdict() | {"total": choice.memories[at].total},
            "fits": choice.fits[at],
        }
        for at, found in enumerate(choice.predictions)
    ]
    return {
        "cp": setting.cp, "tp": setting.tp, "cards": setting.cards, "partition": setting.partition,
        "exchange": setting.exchange, "chunk": setting.chunk, "pays_from_tokens": choice.pays,
        "longest_prompt": choice.longest, "lengths": lengths,
    }  # fmt: skip


def published_table(rows: Sequence[Row]) -> Table:
    """Every published time, its prediction, its error."""
    table = Table(title="published times, and what the model predicts", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("row", "tokens", "published s", "predicted s", "error", "counted"):
        table.add_column(heading, justify="left" if heading in ("row", "counted") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def published_markdown(rows: Sequence[Row]) -> str:
    """The same for docs/plan.md."""
    lines = [
        "| row | tokens | published s | predicted s | error | counted |",
        "| --- |" + " ---: |" * 4 + " --- |",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)])


def _cells(row: Row) -> tuple[str, ...]:
    seconds = "" if row.predicted is None else f"{row.predicted:.4g}"
    error = "" if row.error is None else f"{row.error:+z.1%}"
    counted = "fitted" if row.fitted else "yes" if row.counted else "no"
    return (row.name, f"{row.tokens:,}", f"{row.published:.4g}", seconds, error, counted)


def why(rows: Sequence[Row]) -> Iterator[str]:
    """What each publication is, why it is not counted, why the model misses it."""
    for name, publication in {row.name: row.publication for row in rows}.items():
        yield f"{name}: {publication.about}. Source: {publication.source}."
        for what in publication.assumed:
            yield f"  assumed: {what}."
        if publication.not_counted:
            yield f"  not counted: {publication.not_counted}."
        large = [row for row in rows if row.name == name and row.counted and abs(row.error or 0.0) > LARGE]
        if large and publication.misses:
            yield f"  off by more than {LARGE:.0%}: {publication.misses}."


def published_json(rows: Sequence[Row], constants: Constants) -> dict[str, Any]:
    """All rows; seconds."""
    return {
        "constants": constants.model_dump(),
        "rows": [
            {
                "row": row.name, "tokens": row.tokens, "published_seconds": row.published,
                "predicted_seconds": row.predicted, "error": row.error, "fitted": row.fitted, "counted": row.counted,
                "about": row.publication.about, "source": row.publication.source,
                "not_counted": row.publication.not_counted, "misses": row.publication.misses,
            }
            for row in rows
        ],
    }  # fmt: skip


def fit_json(found: Constants, shipped: Constants, points: dict[str, Any]) -> dict[str, Any]:
    """The fit beside what is shipped, and its two points."""
    rows = {}
    for of, (publication, tokens, seconds) in points.items():
        rows[of] = {
            "point": publication.about, "tokens": tokens, "published_seconds": seconds,
            "predicted_seconds": predicted(publication, shipped, tokens),
        }  # fmt: skip
    return {"fitted": found.model_dump(), "shipped": shipped.model_dump(), "points": rows}
