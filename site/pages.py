"""Which page stands where on the site: the headings of its sidebar, and the pages below each, in reading order.

A page is named by its path without the ending, from the root of the repository. tests/project/test_site.py checks that
every page is listed once.
"""

FRONT = "README"
"""The first page; the site's `index.html` is a copy of it."""

SECTIONS = {
    "The book": (
        "notebooks/00-why-split",
        "notebooks/01-the-path",
        "notebooks/02-online-softmax",
        "notebooks/03-layouts",
        "notebooks/04-precision",
        "notebooks/05-three-families",
        "notebooks/06-sixteen-cards",
        "notebooks/07-break-it",
        "notebooks/08-scale",
        "notebooks/09-fingerprint",
        "notebooks/10-one-token",
        "notebooks/11-exchanges",
        "notebooks/12-backward-ring",
        "notebooks/13-latent",
    ),
    "Guides": (
        "docs/install",
        "docs/testing",
        "docs/reading-a-verdict",
        "docs/dumps",
        "docs/jax",
        "docs/deepseek",
        "docs/backends",
        "docs/atlas",
        "docs/mindie",
    ),
    "Reference": (
        "site/reference/judge",
        "site/reference/attention",
        "site/reference/values",
        "site/reference/partition",
        "site/reference/deepseek",
        "site/reference/npu_backend",
        "site/reference/packages",
        "site/reference/commands",
        "docs/specification",
        "docs/precision",
        "docs/formats",
        "docs/operators",
        "docs/mindie-rules",
        "docs/glossary",
    ),
    "Explanation": (
        "docs/design",
        "docs/verdict",
        "docs/gradients",
        "docs/fingerprint",
        "docs/diagnosis",
        "docs/trial",
        "docs/scale",
        "docs/plan",
        "docs/npu-backend",
        "docs/peers",
    ),
    "Development": (
        "docs/README",
        "CONTRIBUTING",
        "docs/tests",
        "docs/mutation",
        "CHANGELOG",
    ),
}

EVERY = (FRONT, *(page for listed in SECTIONS.values() for page in listed))


def toctree() -> str:
    """The sections as MyST directives, to be added to the front page, which shows none of them itself."""
    return "\n\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *(f"/{page}" for page in pages), "```"])
        for caption, pages in SECTIONS.items()
    )
