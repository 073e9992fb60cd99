"""How the results of several ranks become one: all probes over ranks, and the lines that are read off them.

ranks           a question to several ranks, whose partial results are known
merge_order     the order of merging for the queries of each rank, as trees, for out and for lse
merge_division  whether what is carried is divided at each merge
merge_carry     what is rounded on the way
merge_weights   the formula of the weights and of lse, bit for bit; the range in which it works
merge_empty     what a rank adds whose keys nobody sees
"""

from cpjax.fingerprint import merge_carry, merge_division, merge_empty, merge_order, merge_weights
from cpjax.fingerprint.merge_order import Orders
from cpjax.fingerprint.probe import Answers, Line, Probe, untold

CARRIED, PARTIAL_LSE, CARRIED_LSE = merge_carry.NAMES[1:]
"""The lines that a precision profile follows from."""


def probes(cp: int) -> dict[str, Probe]:
    """All probes over so many ranks, by name.

    Args:
      cp: 2 to `ranks.MOST_CP`; with 1 there is none.
    """
    if cp == 1:
        return {}
    rooms = merge_order, merge_division, merge_carry, merge_weights, merge_empty
    return {name: asked for room in rooms for name, asked in room.probes(cp).items()}


def read(cp: int, asked: dict[str, Probe], answers: Answers) -> list[Line]:
    """All lines."""
    of_out = merge_order.out_orders(cp, answers.get("merge-order"))
    of_lse = merge_order.lse_orders(cp, answers.get("merge-order-lse"))
    lines = [merge_order.read(cp, of_out, merge_order.OUT), merge_order.read(cp, of_lse, merge_order.LSE)]
    if lines[0].code == "together" and of_lse.level in ("", "sum") and of_lse.trees is not None:
        # The order in which a kernel adds the weights of its keys: no merge either.
        lines[1] = lines[0]._replace(name=merge_order.LSE)
    elif lines[0].code == "together" and of_lse.trees is not None:
        # Lse is merged; out has no order that shows, as where small numbers become 0.
        lines[0] = untold(merge_order.OUT, "beside a large value and its negative nothing survives")
    if lines[0].code == "together":
        names = merge_carry.DIVISION, *merge_carry.NAMES
        carried = [Line(name, "nothing is merged", lines[0].evidence) for name in names]
    else:
        orders = _used(of_out, of_lse)
        trees = orders.trees
        division = None if trees is None else merge_division.read(cp, trees, answers.get("merge-division"))
        carried = merge_carry.read(cp, division, orders, of_lse, asked["merge-carry"], answers.get("merge-carry"))
    lines += carried
    lines += merge_weights.read(cp, asked, answers, carried[2].code, carried[-1].code)
    return lines + merge_empty.read(answers)


def _used(of_out: Orders, of_lse: Orders) -> Orders:
    """The order in which out is merged: lse's, where out's is not told."""
    is_told = of_out.trees is not None and not merge_order.is_star(of_out.trees)
    if is_told and all(map(merge_order.is_binary, of_out.trees or ())):
        return of_out
    return of_lse if of_lse.trees is not None else of_out._replace(trees=None)
