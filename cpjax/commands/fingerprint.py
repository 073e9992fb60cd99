"""`cpjax fingerprint`: what a kernel computes, read off."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpjax.commands.common import DONE, Json, console, errors, progress, whole_numbers
from cpjax.errors import InputError

if TYPE_CHECKING:
    from cpjax.fingerprint import Card
    from cpjax.fingerprint.predict import Prediction

app = typer.Typer(add_completion=False)

HELP = """Read off what a kernel computes: rounding, tiles, order of additions, exp, masks; and its precision profile.

KERNEL is torch:flash, torch:efficient, torch:cudnn, torch:math, jax:xla, jax:cudnn, emulator:PROFILE, a backend that
cpjax backends lists, or FILE.py:NAME, a function NAME(query, key, value, scale, is_causal) of tensors [B, T, N, H].

A kernel that is called elsewhere: cpjax cases --preset fingerprint DIR writes the probes, any program computes them
(docs/formats.md), then KERNEL is DIR and RESULTS the folder with its results.

A backend is asked over ranks, too: in which order their results are merged, and how; --cp 1 leaves that out.

Each line has its evidence with --evidence. A line that the probes cannot decide says so.

--predict N asks the kernel N new inputs, computes them from the card alone, and prints the share of equal bits.

Examples:

\b
cpjax fingerprint torch:flash --dtype float16
cpjax fingerprint my_kernel.py:attention --dtype bfloat16 --device cuda
cpjax fingerprint torch:flash --dtype float32 --predict 20
cpjax fingerprint DIR RESULTS --profile mine.json
"""


@app.command("fingerprint", help=HELP, short_help="read off what a kernel computes", epilog=DONE)
def fingerprint(
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="a kernel's name, or the folder of the probes")],
    results: Annotated[Path | None, typer.Argument(metavar="[RESULTS]", help="results of the folder KERNEL")] = None,
    dtype: Annotated[str, typer.Option(metavar="float16|bfloat16|float32", help="of query, key and value")] = "float16",
    device: Annotated[str, typer.Option(metavar="NAME", help="where PyTorch computes: cpu, cuda, npu")] = "cpu",
    head_dims: Annotated[
        str, typer.Option(metavar="QK,V", help="for a kernel that takes no other head dims; each 64 or more")
    ] = "64,64",
    cp: Annotated[
        int | None, typer.Option(metavar="1-4", help="ranks over which a backend is asked how it merges; 4 unless said")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="write the precision profile for judge-dump --precision; a new file"),
    ] = None,
    evidence: Annotated[bool, typer.Option("--evidence", help="print what each line was read from")] = False,
    predict: Annotated[
        int, typer.Option(metavar="N", min=0, help="predict the bits of N new inputs; print the share that is right")
    ] = 0,
    as_json: Json = False,
) -> None:
    """See HELP."""
    from cpjax.crosscheck.backends import installed
    from cpjax.crosscheck.files.profile import write_profile
    from cpjax.fingerprint.backend import answers_of_backend, card_of_backend
    from cpjax.fingerprint.card import card_of
    from cpjax.fingerprint.folder import read_folder
    from cpjax.fingerprint.kernels import kernel_of
    from cpjax.fingerprint.predict import drawn, predicted
    from cpjax.fingerprint.probe import answered, with_head_dims

    with errors():
        if profile is not None and profile.exists():
            raise InputError(f"{profile} is there already; nothing is overwritten, name another file")
        prediction = None
        if results is not None:
            if cp is not None:
                raise InputError("--cp of a folder was said when it was written, to cpjax cases; leave it out")
            if predict:
                raise InputError("--predict asks the kernel new inputs, and a folder is not asked; name the kernel")
            card = read_folder(Path(kernel), results)
        else:
            dims = checked_head_dims(head_dims)
            ranks = checked_ranks(cp)
            asked = None if kernel in installed() else kernel_of(kernel, dtype, device)
            if asked is not None and cp not in (None, 1):
                raise InputError(f"--cp {cp} is of backends; {kernel:.60} is one device, which has nothing to merge")
            with progress() as advance:
                if asked is None:
                    card = card_of_backend(kernel, dtype, dims, advance, ranks)
                else:
                    card = card_of(with_head_dims(asked, dims), dtype, kernel, advance)
                if predict:
                    new = drawn(dtype, predict, dims)
                    if asked is None:
                        given = answers_of_backend(kernel, new, advance, "new inputs")
                    else:
                        given = answered(asked, new, advance, "new inputs")
                    prediction = predicted(card, new, *given)
        if profile is not None:
            if card.profile is None:
                raise InputError("no profile follows from this card, so none is written; see its lines (--evidence)")
            write_profile(profile, card.profile)
    if as_json:
        more = {} if prediction is None else {"prediction": prediction.as_json()}
        print(json.dumps(card.as_json() | more, indent=2, ensure_ascii=False))
    else:
        _show(card, evidence)
        if prediction is not None:
            _show_prediction(prediction)


def checked_head_dims(text: str) -> tuple[int, int]:
    """--head-dims as two numbers."""
    dims = whole_numbers(text, "--head-dims") or ()
    if len(dims) != 2 or min(dims) < 64 or max(dims) > 1024:
        raise InputError(f"--head-dims {text!r:.40} must be two numbers from 64 to 1024, as 192,128")
    return dims[0], dims[1]


def checked_ranks(cp: int | None) -> int:
    """--cp, or what is taken where it is not said."""
    from cpjax.fingerprint.ranks import CP, MOST_CP

    if cp is not None and not 1 <= cp <= MOST_CP:
        raise InputError(f"--cp {cp} must be 1 to {MOST_CP}: so many ranks tell one order from another; 1 asks nothing")
    return CP if cp is None else cp


def _show(card: "Card", evidence: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    from cpjax.fingerprint.card import described

    table = Table(title=escape(f"{card.kernel}, {card.dtype}"), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    for line in card.lines:
        table.add_row(escape(line.name), escape(line.value))
        if evidence and line.evidence:
            table.add_row("", f"[dim]{escape(line.evidence)}[/dim]")
    out = console()
    out.print(table)
    reasons: dict[str, list[str]] = {}
    for name, reason in card.failures.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        out.print(f"not answered: {', '.join(names)} ({reason})", markup=False)
    if card.cp == 1:
        out.print("merging over ranks: not asked, or not answered; one device has nothing to merge")
    if card.profile is None:
        out.print("profile: none follows; one of its lines cannot be told, or no profile has these roundings")
    else:
        out.print(f"profile: {card.profile.name} ({described(card.profile)})", markup=False)


def _show_prediction(prediction: "Prediction") -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table(title="bits predicted from the card alone", title_justify="left")
    for name in ("input", "out: equal bits", "within one spacing", "lse: equal bits"):
        table.add_column(name, justify="left" if name == "input" else "right")
    for one in prediction.inputs:
        mask = ", causal" if one.is_causal else ""
        small = ", small" if one.is_small else ""
        what = f"{one.queries} queries, {one.keys} keys, {one.heads} heads, batch {one.batch}{mask}{small}"
        table.add_row(what, *map(_percent, (one.out, one.within_one, one.lse)))
    names = ("out", "within_one", "lse")
    table.add_section()
    table.add_row("all but small ones", *(_percent(prediction.share(name)) for name in names))
    if any(one.is_small for one in prediction.inputs):
        table.add_row("small ones", *(_percent(prediction.share(name, is_small=True)) for name in names))
    out.print(table)
    for one in prediction.assumed:
        out.print(f"assumed, for the card does not tell it: {escape(one.line)}: {escape(one.taken)}")
    for name, reason in prediction.failures.items():
        out.print(f"not answered: {name} ({reason})", markup=False)


def _percent(share: float | None) -> str:
    """100 % only if it is all."""
    if share is None:
        return "none"
    return "100 %" if share == 1 else f"{min(share, 0.9999):.2%}".replace("%", " %")
