"""What the commands share: exit statuses, errors and progress bars."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from cpjax.errors import InputError

DONE = "Exit status: 0 done, 2 bad input (one line says what and how to mend it)."
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


def whole_numbers(text: str | None, option: str = "--lengths") -> tuple[int, ...] | None:
    """--lengths, --prompt-ids."""
    try:
        return None if text is None else tuple(int(n) for n in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text!r:.80} must be whole numbers with commas, as 512,300") from None


def console() -> Any:
    """A rich Console; into a file or a pipe 140 columns wide, so that tables are not folded."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


@contextmanager
def errors() -> Iterator[None]:
    """An InputError is one line on stderr and exit status 2; Ctrl-C is 130."""
    try:
        yield
    except InputError as error:
        print(f"cpjax: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("cpjax: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def usage_errors() -> Iterator[None]:
    """An option that is missing, unknown or no number is one line, too, and exit status 2.

    The library would print three lines of usage. Its classes of errors are private, so they are known by what they say;
    an error without a message is the help itself, where a command was given nothing.
    """
    try:
        yield
    except Exception as error:
        says = getattr(error, "format_message", lambda: "")().strip()
        if not says or getattr(error, "exit_code", None) != 2 or type(error).__name__ == "NoArgsIsHelpError":
            raise
        words, context = [], getattr(error, "ctx", None)
        while context is not None and context.parent is not None:
            words, context = [context.info_name, *words], context.parent
        command, line = " ".join(["cpjax", *words]), " ".join(says.split()).rstrip(".")
        print(f"cpjax: {line}; {command} --help lists what there is", file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr; `advance(what, done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield advance
