"""Numbers in sentences: one row is, two rows are."""

from operator import index
from typing import SupportsIndex


def counted(n: SupportsIndex, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    >>> counted(1, "row"), counted(2048, "row"), counted(2, "query", "queries")
    ('1 row', '2,048 rows', '2 queries')
    """
    return f"{index(n):,} {noun if index(n) == 1 else plural or noun + 's'}"


def is_are(n: SupportsIndex) -> str:
    """The verb for so many.

    >>> is_are(1), is_are(0), is_are(2)
    ('is', 'are', 'are')
    """
    return "is" if index(n) == 1 else "are"
