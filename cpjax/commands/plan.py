"""`cpjax plan`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from cpjax.commands.common import DONE, Json, console, errors, whole_numbers
from cpjax.errors import InputError

app = typer.Typer()

PLAN_HELP = """Predict the time to first token for several cp: what context parallelism gains. Nothing is measured.

CONFIG is a MindIE config.json: its cards are shared by cp and tp in other ways. Without it give --model and --device,
and --tp (cp brings more cards) or --cards (the same cards for every cp).

Device numbers, their sources and two fitted constants are data files; --devices and --measured replace them by yours.
--published prints how far the model is off from every published time that is known, row by row. docs/plan.md has the
formulas.

Examples:

\b
cpjax plan examples/deepseek-r1-cp2.json --tokens 8192,131072
cpjax plan --model Llama-3.1-405B --device h100 --tp 8 \\
    --tokens 131072 --draw plan.svg
"""


@app.command(help=PLAN_HELP, short_help="predict what context parallelism would gain", epilog=DONE)
def plan(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="a MindIE config.json")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N,…", help="lengths of the prompt")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="a known model, or a DeepSeek checkpoint's config.json")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="h100, h800, a100, tpu7x, v5p, v6e, v5e, 800i-a2, 800i-a3")
    ] = None,
    cp: Annotated[
        str | None,
        typer.Option(metavar="N,…", help="ranks that share the tokens; the others are compared with the first"),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="ranks that share the heads, the same for every cp")
    ] = None,
    cards: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="cards of every cp: tp = cards / cp; CONFIG's if not said")
    ] = None,
    prefix: Annotated[int, typer.Option(min=0, metavar="N", help="tokens that are cached already")] = 0,
    chunk: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="tokens that are prefilled at once; all if not said")
    ] = None,
    partition: Annotated[
        str, typer.Option(metavar="contiguous|zigzag|striped", help="which rank has which tokens")
    ] = "zigzag",
    exchange: Annotated[
        str | None, typer.Option(metavar="ring|gather", help="how keys travel; CONFIG: gather, as MindIE; else ring")
    ] = None,
    devices: Annotated[Path | None, typer.Option(metavar="FILE", help="your devices, TOML")] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="your measurements, TOML: efficiencies, links, times")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="print every published time beside the model's, and the error")
    ] = False,
    fitted: Annotated[
        bool, typer.Option("--fit", help="find the two constants again, from their two published points")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--draw", metavar="FILE", help="draw time against length: .svg or .png")
    ] = None,
    as_json: Json = False,
) -> None:
    """See PLAN_HELP."""
    with errors():
        if published or fitted:
            given = (config, tokens, model, device, cp, tp, cards, chunk, exchange, devices, measured, picture)
            if published and fitted:
                raise InputError("--published and --fit print one thing each; give one of them")
            if any(given):
                raise InputError("--published and --fit rest on the shipped data; only --json goes with them")
            _published(as_json) if published else _fit(as_json)
            return
        lengths = whole_numbers(tokens, "--tokens")
        if lengths is None:
            raise InputError("--tokens is missing; give one length or several with commas, as 8192,131072")
        if min(lengths) < 1:
            raise InputError(f"--tokens has {min(lengths)}; a prompt has at least 1 token")
        if tp is not None and cards is not None:
            raise InputError("give --tp, with which cp brings more cards, or --cards, of which cp takes its share")
        _plan(
            config, lengths, model, device, whole_numbers(cp, "--cp"), tp, cards, prefix, chunk, partition, exchange,
            devices, measured, picture, as_json,
        )  # fmt: skip


def _plan(
    config: Path | None, lengths: tuple[int, ...], model: str | None, device: str | None, cps: tuple[int, ...] | None,
    tp: int | None, cards: int | None, prefix: int, chunk: int | None, partition: str, exchange: str | None,
    devices_file: Path | None, measured_file: Path | None, picture: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from dataclasses import replace

    from cpjax.crosscheck.files.pictures import check_picture
    from cpjax.plan.constants import frozen
    from cpjax.plan.deployment import from_config, model_said
    from cpjax.plan.draw import draw
    from cpjax.plan.gain import plan as planned
    from cpjax.plan.gain import settings, usual_cps
    from cpjax.plan.hardware import device_of, devices
    from cpjax.plan.measured import Measured, read_measured
    from cpjax.plan.report import compared, length_table, plan_json, sentences, times_table
    from cpjax.plan.setting import Setting

    if picture is not None:
        check_picture(picture)
    known = devices(devices_file)
    own = Measured() if measured_file is None else read_measured(measured_file)
    if config is not None:
        if model is not None:
            raise InputError("CONFIG says the model; leave --model or CONFIG out")
        base, remarks = from_config(config, known, device)
        cards = base.cards if tp is None and cards is None else cards
    else:
        if model is None or device is None:
            raise InputError("give CONFIG, or --model and --device")
        base, remarks = Setting(model_said(model), device_of(device, known)), []
    base = replace(
        base, device=own.on(base.device), partition=partition, chunk=chunk, exchange=exchange or base.exchange
    )  # fmt: skip
    if tp is not None and tp != base.tp:
        base = replace(base, tp=tp, moe_ep=None, moe_tp=1)
    if cps is None:
        cps = usual_cps(base, cards)
    result = planned(settings(base, cps, cards), own.constants(frozen()), lengths, prefix)
    for remark in remarks:
        print(f"cpjax: {remark}", file=sys.stderr)
    if picture is not None:
        draw(result, f"{model or (config.name if config else '')} on {base.device.about.partition(',')[0]}", picture)
        print(f"cpjax: drawn: {picture}", file=sys.stderr)
    if as_json:
        said = plan_json(result) | {"remarks": remarks, "your_times": compared(result, own.times)}
        print(json.dumps(said, indent=2, allow_nan=False))
        return
    shown = console()
    for at in range(len(lengths)):
        shown.print(length_table(result, at))
    if own.times:
        shown.print(times_table(result, own.times))
    for line in sentences(result):
        shown.print(line, highlight=False, markup=False)


def _published(as_json: bool) -> None:
    from cpjax.plan.constants import frozen
    from cpjax.plan.published import rows
    from cpjax.plan.report import published_json, published_table, why

    constants = frozen()
    found = list(rows(constants))
    if as_json:
        print(json.dumps(published_json(found, constants), indent=2, allow_nan=False))
        return
    shown = console()
    shown.print(published_table(found))
    for line in why(found):
        shown.print(line, highlight=False, markup=False)


def _fit(as_json: bool) -> None:
    from cpjax.plan.constants import frozen
    from cpjax.plan.fit import fit, point
    from cpjax.plan.report import fit_json

    shipped = frozen()
    said = fit_json(fit(), shipped, {of: point(of) for of in ("attention", "products")})
    if as_json:
        print(json.dumps(said, indent=2, allow_nan=False))
        return
    for of, row in said["points"].items():
        print(f"{of}: fitted {said['fitted'][of]:.9f}, shipped {said['shipped'][of]:.9f}")
        print(f"  {row['point']}, {row['tokens']:,} tokens: ", end="")
        print(f"published {row['published_seconds']:.6g} s, predicted {row['predicted_seconds']:.6g} s")
