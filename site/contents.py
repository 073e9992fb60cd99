"""The table of contents: the front page gets it, and a second name, `index.html`. Members of classes have no entry."""

import shutil
from pathlib import Path

import pages
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this. The second step comes before Sphinx collects the entries, at priority 500."""
    app.connect("source-read", _add)
    app.connect("doctree-read", _without_members, priority=100)
    app.connect("build-finished", _index)
    return {"parallel_read_safe": True}


def _add(_app: Sphinx, page: str, source: list[str]) -> None:
    """Add what GitHub, which shows the same file, should not show."""
    if page == pages.FRONT:
        source[0] += "\n\n" + pages.toctree() + "\n"


MEMBERS = ("attribute", "method", "property")


def _without_members(_app: Sphinx, doctree: nodes.document) -> None:
    """Hundreds of fields and methods: with them a third of the build's time went into copying the contents."""
    for node in doctree.findall(addnodes.desc):
        node["no-contents-entry"] = node.get("no-contents-entry") or node["objtype"] in MEMBERS


def _index(app: Sphinx, error: Exception | None) -> None:
    """Both files lie in the same folder, so the links of the one hold in the other."""
    if error is None:
        shutil.copy(Path(app.outdir, f"{pages.FRONT}.html"), Path(app.outdir, "index.html"))
