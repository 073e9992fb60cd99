"""The two constants from two named points: attention first, of which a point of attention alone speaks."""

from collections.abc import Callable

from cpjax.errors import InputError
from cpjax.plan.constants import Constants
from cpjax.plan.facts import shipped
from cpjax.plan.published import Publication, predicted, publications


def point(of: str) -> tuple[Publication, int, float]:
    """The published point of a constant: its publication, tokens and seconds."""
    name, _, tokens = shipped("constants")["points"][of].partition(" ")
    publication = publications()[name]
    return publication, int(tokens), publication.seconds(dict(publication.points)[int(tokens)])


def fit() -> Constants:
    """Solve predicted = published twice: each prediction falls as its constant grows, so there is one solution."""
    attention = _solved("attention", lambda share: Constants(attention=share, products=1.0))
    return Constants(
        attention=attention,
        products=_solved("products", lambda share: Constants(attention=attention, products=share)),
    )


def _solved(of: str, constants: Callable[[float], Constants]) -> float:
    from scipy.optimize import root_scalar

    publication, tokens, seconds = point(of)

    def difference(share: float) -> float:
        return (predicted(publication, constants(share), tokens) or 0.0) - seconds

    if difference(1e-3) < 0 or difference(1.0) > 0:
        raise InputError(f"no efficiency of {of} up to 1 gives the published {seconds:.4g} s; the data file is wrong")
    return float(root_scalar(difference, bracket=(1e-3, 1.0), xtol=1e-13).root)
