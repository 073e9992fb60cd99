"""The directive `commands`: every command of `cpjax` with the help that it prints."""

from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

COLUMNS = 100


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_directive("commands", _Commands)
    return {"parallel_read_safe": True}


class _Commands(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        from typer.main import get_command

        from cpjax.cli import app

        return [self._section(*one) for one in _helps("cpjax", get_command(app))]

    def _section(self, name: str, text: str) -> nodes.section:
        section = nodes.section(ids=[name.replace(" ", "-")])
        section += nodes.title("", "", nodes.literal(name, name))
        section += nodes.literal_block(text, text, language="text")
        self.state.document.note_implicit_target(section, section)
        return section


def _helps(name: str, command: Any, above: Any = None) -> Iterator[tuple[str, str]]:
    """The command and those below it, each with its name and its help."""
    settings = {**command.context_settings, "max_content_width": COLUMNS, "terminal_width": COLUMNS}
    context = command.context_class(command, info_name=name.rpartition(" ")[2], parent=above, **settings)
    yield name, command.get_help(context)
    for below in getattr(command, "commands", {}) and command.list_commands(context):
        yield from _helps(f"{name} {below}", command.get_command(context, below), context)
