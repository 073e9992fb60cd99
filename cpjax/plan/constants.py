"""The two fitted constants: which part of the peak attention reaches, and which part matrix products reach."""

from typing import Annotated

from pydantic import Field

from cpjax.plan.facts import Fact, checked, shipped

Share = Annotated[float, Field(gt=0, le=1)]


class Constants(Fact):
    """Parts of a device's peak. Frozen: docs/plan.md says from which two published points (`cpjax plan --fit`)."""

    attention: Share
    products: Share


def frozen() -> Constants:
    """The constants that are shipped."""
    return checked(Constants, shipped("constants")["efficiency"], "constants.efficiency")
