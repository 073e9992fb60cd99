"""Which columns of the values are wrong, where the others are right."""

import numpy as np

from cpjax.crosscheck.diagnosis.measure import Measured
from cpjax.crosscheck.diagnosis.places import numbers
from cpjax.wording import is_are

WRONG, RIGHT = 4.0, 2.0
"""RMS(error / σ) of the rows that are looked at from which on a column is wrong, and up to which it is right."""


def wrong_columns(wrong: list[Measured]) -> list[str]:
    """A sentence, if every column is clearly wrong or clearly right, and some are right."""
    errors = [(one.sample.out - one.model.rows.out) / one.sigma for one in wrong]
    rms = np.sqrt(np.mean(np.concatenate(errors) ** 2, axis=0))
    is_wrong = rms > WRONG
    count = int(is_wrong.sum())
    if not 0 < count < len(rms) or (rms[~is_wrong] > RIGHT).any():
        return []
    which = numbers(np.flatnonzero(is_wrong))
    return [f"Of {len(rms)} columns only column{'s' * (count > 1)} {which} {is_are(count)} wrong."]
