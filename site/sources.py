"""Pages link to files and folders of the repository that are no pages: each is shown as a page of the site.

A folder's page lists its files, and they are shown, too.

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
    to_files = list(doctree.findall(addnodes.download_reference))
    to_folders = [node for node in doctree.findall(addnodes.pending_xref) if node.get("reftype") == "myst"]
    for node in [*to_files, *to_folders]:
        # The target is relative to the page, or, with a slash before it, to the root.
        path = posixpath.normpath(posixpath.join("/", posixpath.dirname(page), node["reftarget"])).lstrip("/")
        if not path or not _files(app.srcdir, path):
            continue  # a page; or it is not there, and Sphinx reports it
        _shown.update([path, *_files(app.srcdir, path)])
        uri = app.builder.get_relative_uri(page, f"source/{path}")
        node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def _files(root: str | Path, path: str) -> list[str]:
    """The file with a path, or the files of the folder with it, from the root of the repository."""
    found = Path(root, path)
    files = [found] if found.is_file() else [one for one in sorted(found.glob("[!.]*")) if one.is_file()]
    return [one.relative_to(root).as_posix() for one in files]


def _forget_modules_without_source(app: Sphinx) -> list[Any]:
    """Sphinx's viewcode lists `builtins`, the module of some constants' types, in its index, and has no page for it."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, entry in modules.items() if not entry]:
        del modules[name]
    return []


def _pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    highlighter = cast("StandaloneHTMLBuilder", app.builder).highlighter
    for path in sorted(_shown):
        name = f"source/{path}"
        if Path(app.srcdir, path).is_dir():
            links = [
                (app.builder.get_relative_uri(name, f"source/{file}"), posixpath.basename(file))
                for file in _files(app.srcdir, path)
            ]
            items = (f'<li><a href="{html.escape(uri)}">{html.escape(file)}</a></li>' for uri, file in links)
            listing = f"<ul>{''.join(items)}</ul>"
        else:
            language = LANGUAGES.get(Path(path).suffix, "text")
            listing = highlighter.highlight_block(Path(app.srcdir, path).read_text(), language)
        yield name, {"title": path, "body": f"<h1>{html.escape(path)}</h1>{listing}"}, "page.html"
