"""Numbers in sentences and tables: one row is, two rows are; 42%, 226×."""

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


def share(ratio: float) -> str:
    """A ratio in percent; from a hundred times on as a factor, from a million times on with two digits.

    >>> share(0.415), share(99.5), share(226.4), share(3.08e5), share(3.08e6)
    ('42%', '9950%', '226×', '308,000×', '3.1e+06×')
    >>> share(float("inf")), share(float("nan"))
    ('inf×', 'nan×')
    """
    if ratio < 100:
        return f"{ratio:.0%}"
    return f"{ratio:,.0f}×" if ratio < 1e6 else f"{ratio:.2g}×"
