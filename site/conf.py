"""The site, for Sphinx: `make docs`. Its source folder is the root of the repository, so that the pages' links hold.

What is ours stands beside this file, one idea a file:

    pages        what stands where
    contents     the front page gets the table of contents
    commands     the helps of the commands
    docstrings   plain text to reStructuredText
    sources      a page for each file that pages link to
    mathml       formulas without JavaScript
"""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import pages  # noqa: E402

project = "cpjax"
author = "The cpjax authors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
html_title = f"cpjax {version}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "commands",
    "contents",
    "docstrings",
    "mathml",
    "sources",
]

root_doc = pages.FRONT
include_patterns = [f"{page}.*" for page in pages.EVERY]
exclude_patterns = [".*", "build", "dist"]

# Every link must lead somewhere: `make docs` turns warnings into errors. Types of other packages have no page here, and
# a word in backticks in a docstring need not be a name.
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*"), ("py:(class|exc|data|func|meth)", ".*")]

nb_execution_mode = "off"  # the stored outputs are shown; `make notebooks` executes them
nb_merge_streams = True  # where a stream was cut into pieces is a matter of time
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_param = False  # "query, key, value: …" stays one entry
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
pygments_dark_style = "github-dark"  # the default underlines names of modules
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
