"""Numbers that keep a computation finite. None of them decides anything (docs/diagnosis.md)."""

LARGEST_LOG = 600.0
"""exp of more is not far from the largest float64."""

LEAST_SUM = 1e-300
"""A sum of weights is taken to be at least this, to be divided by."""

LARGEST_OUT = 1e100
"""A row that loses all its keys is no output at all."""

LARGEST_GROWTH = 1e6
"""Of σ, where a row loses nearly all of its weight."""

LARGEST_SQUARE = 1e18
"""Of an error in standard deviations; a NaN explains as little as this."""

LEAST_SPACING = 1e-100
"""Of the out format, where something is divided by its square: beside 0, that of float64 is no number."""
