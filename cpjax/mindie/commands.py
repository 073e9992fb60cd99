"""`cpjax mindie …`: check, ranks, link, enable, rules and schema.

Exit status: 0 accepted (warnings too) or done, 1 a config that MindIE does not take, 2 bad input.
"""

import difflib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cpjax.errors import InputError
from cpjax.mindie.check import Checked, check_files, setting_of
from cpjax.mindie.deployment import MOST_CARDS, read_deployment
from cpjax.mindie.models import geometry, parse_geometry
from cpjax.mindie.rules import VERSIONS
from cpjax.mindie.text_file import printable
from cpjax.wording import counted

CHECKED = (
    "Exit status: 0 accepted (warnings too) or done, 1 a config that MindIE does not take, 2 bad input (one line says "
    "what and how to mend it)."
)
DONE = "Exit status: 0 done, 2 bad input (one line says what and how to mend it)."

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="A MindIE config.json, checked and explained.",
    epilog=CHECKED,
)

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="config.json, the vendor's fragment of one, or user_config.json")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Nodes = Annotated[
    int | None, typer.Option(metavar="N", help="servers in the rank table (default: as the file implies)")
]
Tokens = Annotated[int | None, typer.Option(metavar="N", help="tokens of the prompt (default: maxInputTokenLen)")]
RoleOption = Annotated[
    list[str] | None, typer.Option("--role", metavar="hybrid|prefill|decode", help="once for each CONFIG")
]
OneRole = Annotated[str | None, typer.Option("--role", metavar="prefill|decode", help="of a user_config.json")]
Hardware = Annotated[
    str | None, typer.Option(metavar="NAME", help='"Atlas 800I A2" or "Atlas 800I A3", or 800i-a2 and 800i-a3')
]
Dtype = Annotated[
    str | None,
    typer.Option(metavar="float16|bfloat16", help="of the model (default: as the weights' config.json says)"),
]
Async = Annotated[bool, typer.Option("--async-scheduling", help="MINDIE_ASYNC_SCHEDULING_ENABLE=1 is set")]
Version = Annotated[str, typer.Option("--mindie-version", metavar="VERSION", help=f"of MindIE: {', '.join(VERSIONS)}")]


def user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print an InputError as one line on stderr and exit with 2."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            typer.echo(f"cpjax mindie: {error}", err=True)
            raise typer.Exit(2) from None

    return wrapped


@app.command(short_help="say whether MindIE will take a config, and what is wrong", epilog=CHECKED)
@user_errors
def check(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG", help="one config, or all of one deployment")],
    role: RoleOption = None,
    hardware: Hardware = None,
    dtype: Dtype = None,
    async_scheduling: Async = False,
    mindie_version: Version = VERSIONS[-1],
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Say whether MindIE will take a config, and all that is wrong with it.

    Example: cpjax mindie check prefill.json decode.json --role prefill --role decode --hardware 800i-a3
    """
    checked = check_files(
        configs,
        roles=role or (),
        hardware=hardware,
        dtype=dtype,
        async_scheduling=async_scheduling,
        version=mindie_version,
        nodes=nodes,
    )
    if as_json:
        typer.echo(json.dumps([_checked_json(one) for one in checked], indent=2))
    else:
        from cpjax.mindie.report import findings_text

        for one in checked:
            for line in findings_text(one):
                typer.echo(line)
    if any(one.of("error") for one in checked):
        raise typer.Exit(1)


def _checked_json(one: Checked) -> dict[str, Any]:
    setting = one.setting
    return {
        "config": str(setting.deployment.path),
        "accepted": not one.of("error"),
        "role": setting.role,
        "version": setting.version,
        "sizes": setting.sizes._asdict(),
        "errors": [finding._asdict() for finding in one.of("error")],
        "warnings": [finding._asdict() for finding in one.of("warning")],
        "notes": list(one.notes),
    }


@app.command(short_help="say what each card holds, and its groups", epilog=DONE)
@user_errors
def ranks(
    config: Config,
    tokens: Tokens = None,
    geometry_option: Annotated[
        str | None, typer.Option("--geometry", metavar="HEADS,NOPE,ROPE,VALUE", help="of a model not known here")
    ] = None,
    nodes: Nodes = None,
    role: OneRole = None,
    as_json: Json = False,
    picture: Annotated[Path | None, typer.Option("--draw", metavar="FILE", help="draw the cards: .svg or .png")] = None,
) -> None:
    """Say where each card stands: its coordinates and groups, its heads, tokens and cache blocks.

    Example: cpjax mindie ranks examples/deepseek-r1-cp2.json --draw cards.svg
    """
    from cpjax.mindie.layout import as_json as layout_json
    from cpjax.mindie.layout import lay_out

    deployment = read_deployment(config, nodes, role)
    if deployment.world_size > MOST_CARDS:
        raise InputError(
            f"{deployment.where('worldSize')} is {deployment.world_size}; at most {MOST_CARDS} are printed"
        )
    identity = setting_of(deployment).identity
    known = parse_geometry(geometry_option) if geometry_option else None
    if known is None and identity.has_latents:
        known = geometry(identity, deployment.model_name)
    layout = lay_out(
        deployment,
        deployment.max_input_token_len if tokens is None else tokens,
        known.heads if known else None,
        deployment.backend.ScheduleConfig.cacheBlockSize,
    )
    if picture is not None:
        from cpjax.mindie.draw import draw

        draw(layout, f"{printable(config)}: {counted(layout.tokens, 'token')}, cache blocks of {layout.block}", picture)
    if as_json:
        typer.echo(json.dumps(layout_json(layout)))
        return
    from rich.console import Console

    from cpjax.mindie.tables import cards_table, groups_text

    Console().print(cards_table(layout))
    for line in groups_text(layout):
        typer.echo(line)
    if picture is not None:
        typer.echo(f"drawn: {printable(picture)}")


@app.command(short_help="say which prefill rank sends what to which decode rank", epilog=DONE)
@user_errors
def link(
    prefill: Annotated[Path, typer.Argument(metavar="PREFILL", help="config of the prefill instance")],
    decode: Annotated[
        Path | None,
        typer.Argument(metavar="DECODE", help="of the decode instance; PREFILL may be user_config.json alone"),
    ] = None,
    tokens: Tokens = None,
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Say which prefill rank sends which cache blocks to which decode rank, and why the last block is where it is.

    Example: cpjax mindie link examples/prefill-cp2.json examples/decode.json --tokens 1305
    """
    from cpjax.mindie.link import inverted, link_map, read_pair, transfers

    p, d = read_pair(prefill, decode, nodes)
    length = p.max_input_token_len if tokens is None else tokens
    links = link_map(p.sizes.tp, d.sizes.tp, p.sizes.sp, p.sizes.cp)
    pulled = transfers(p.sizes, d.sizes, length, p.backend.ScheduleConfig.cacheBlockSize)
    if as_json:
        blocks = {rank: [transfer._asdict() for transfer in found] for rank, found in pulled.items()}
        typer.echo(json.dumps({"decode": links, "prefill": inverted(links), "transfers": blocks}))
        return
    from rich.console import Console

    from cpjax.mindie.tables import link_text, transfers_table

    Console().print(
        transfers_table(pulled[0], f"what decode rank 0 fetches of a prompt of {counted(length, 'token')}", 24)
    )
    for line in link_text(links, pulled[0], p.sizes):
        typer.echo(line)


@app.command(short_help="turn context parallelism on by the smallest edit", epilog=CHECKED)
@user_errors
def enable(
    config: Config,
    cp: Annotated[int, typer.Option(metavar="N", help="the number of parts of the sequence")] = 2,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="write the new config; never over a file")
    ] = None,
    role: RoleOption = None,
    hardware: Hardware = None,
    dtype: Dtype = None,
    async_scheduling: Async = False,
    mindie_version: Version = VERSIONS[-1],
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Turn context parallelism on by the smallest edit, shown as a diff; all other bytes stay.

    Example: cpjax mindie enable config.json --cp 2 -o config-cp2.json
    """
    from cpjax.mindie.enable import HOW_TO_START
    from cpjax.mindie.enable import enable as turn_on

    options = {"hardware": hardware, "dtype": dtype, "async_scheduling": async_scheduling, "version": mindie_version}
    # Of a user_config.json the prefill part comes first, and CP is for it only.
    checked = check_files([config], roles=role or (), nodes=nodes, **options)[0]
    enabled = turn_on(checked.setting, cp)
    old = checked.setting.deployment.file.text
    if output is not None and enabled.text != old:
        _write_new(output, enabled.text)
    name = printable(output or config)
    diff = difflib.unified_diff(old.splitlines(), enabled.text.splitlines(), printable(config), name, lineterm="")
    if as_json:
        changes = [change._asdict() for change in enabled.changes]
        warnings = [finding._asdict() for finding in enabled.warnings]
        typer.echo(json.dumps({"changes": changes, "diff": list(diff), "warnings": warnings}, indent=2))
        return
    for line in diff:
        typer.echo(line)
    if enabled.text == old:
        typer.echo(
            f"{printable(config)}: context parallelism is on already, with cp {cp}; nothing to change, nothing written"
        )
        return
    for finding in enabled.warnings:
        typer.echo(f"warning {finding.rule}: {finding.found}; {finding.says}; {finding.fix}")
    if output is None:
        typer.echo("Nothing was written: say -o FILE to write the new config, or edit the lines above by hand.")
    else:
        typer.echo(f"Written: {printable(output)}")
        typer.echo(HOW_TO_START)


def _write_new(path: Path, text: str) -> None:
    """Write a file whole or not at all, and never over one that is there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(text.encode())
        os.link(unfinished, path)  # unlike a rename, this fails if the name is taken
    except FileExistsError:
        raise InputError(f"{printable(path)} is there already; move it away, or give another name") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{printable(path)} cannot be written ({getattr(error, 'strerror', error)})") from None
    finally:
        unfinished.unlink(missing_ok=True)


@app.command(short_help="print all rules, with their sources, as Markdown", epilog=DONE)
def rules() -> None:
    """Print all rules as a Markdown table: what each says, its source, and whether the server checks it.

    Example: cpjax mindie rules
    """
    from cpjax.mindie.report import rules_markdown

    for line in rules_markdown():
        typer.echo(line)


@app.command(short_help="print the JSON schema of a config", epilog=DONE)
@user_errors
def schema() -> None:
    """Print the JSON schema of a config, for an editor.

    Example: cpjax mindie schema > mindie.schema.json
    """
    from cpjax.mindie.schema import ConfigJson

    typer.echo(
        json.dumps(
            {"$schema": "https://json-schema.org/draft/2020-12/schema"} | ConfigJson.model_json_schema(), indent=2
        )
    )
