"""Pages link to files of the repository that are no pages: each such file is shown as a page of the site.

On GitHub the same relative links lead to the files themselves.
"""

import html
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.builders.html import StandaloneHTMLBuilder

LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml"}

_shown: set[str] = set()


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this. Our step comes before Sphinx's own, which would copy the files as downloads."""
    _shown.clear()
    app.connect("doctree-read", _link, priority=100)
    app.connect("html-collect-pages", _forget_modules_without_source, priority=100)
    app.connect("html-collect-pages", _pages)
    return {"parallel_read_safe": False}


def _link(app: Sphinx, doctree: nodes.document) -> None:
    page = app.env.docname
    for node in list(doctree.findall(addnodes.download_reference)):
        # The target is relative to the page, or, with a slash before it, to the root.
        path = posixpath.normpath(posixpath.join("/", posixpath.dirname(page), node["reftarget"])).lstrip("/")
        if not Path(app.srcdir, path).is_file():
            continue  # Sphinx reports it
        _shown.add(path)
        uri = app.builder.get_relative_uri(page, f"source/{path}")
        node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def _forget_modules_without_source(app: Sphinx) -> list[Any]:
    """Sphinx's viewcode lists `builtins`, the module of some constants' types, in its index, and has no page for it."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, entry in modules.items() if not entry]:
        del modules[name]
    return []


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    highlighter = cast("StandaloneHTMLBuilder", app.builder).highlighter
    for path in sorted(_shown):
        text = Path(app.srcdir, path).read_text()
        language = LANGUAGES.get(Path(path).suffix, "text")
        listing = highlighter.highlight_block(text, language)
        yield f"source/{path}", {"title": path, "body": f"<h1>{html.escape(path)}</h1>{listing}"}, "page.html"
