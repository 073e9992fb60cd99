"""A progress bar on stderr: rich's where rich is installed, plain lines on a host without it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[str, int], None]
"""Called with the name of the running case and the number of ring steps done."""


@contextmanager
def progress(steps: int, *, visible: bool = True) -> Iterator[Advance]:
    """A bar of `steps` ring steps; nothing is shown where nothing is to do, or by a rank that is not the first."""
    if steps == 0 or not visible:
        yield lambda name, done: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield _plain(steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ring steps"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("start", total=steps)
        yield lambda name, done: bar.update(task, description=name, completed=done)


def _plain(steps: int) -> Advance:
    def advance(name: str, done: int) -> None:
        print(f"{name}: ring step {done} of {steps}", file=sys.stderr, flush=True)

    return advance
