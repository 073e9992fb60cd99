"""The router: which experts may be chosen, where choices are so near that float32 may exchange them, and the weights.

score   =  sigmoid(logit)
choice  =  score + bias                                the bias only chooses (arXiv 2412.19437, §2.1.2)
groups  :  the `topk_group` groups whose two best choices have the largest sum
chosen  :  the `num_experts_per_tok` largest choices in these
weight  =  factor · score / (Σ score of the chosen + 1e-20)          the division only with `norm_topk_prob`
"""

from itertools import combinations, islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from cpjax.crosscheck.layer.expected import EPS, Expected
from cpjax.crosscheck.layer.formulas import EXP_SIGMA, EXP_STEPS, SCALE_SIGMA, SCALE_STEPS, sigmoid
from cpjax.deepseek.config import DeepseekConfig

LEAST_SUM = 1e-20
"""DeepSeek adds it to the sum of scores, against 0/0."""

MOST_TIES = 1000
"""Ways to choose among tied groups that are tried."""


class Gating(NamedTuple):
    """How experts are chosen and weighed; the defaults are what is right."""

    bias_chooses: bool = True
    bias_weighs: bool = False
    has_groups: bool = True
    is_renormalised: bool | None = None
    """None: what the config says."""
    is_scaled: bool = True
    is_softmax: bool = False


def scores_of(logits: Float[np.ndarray, "T E"], how: Gating) -> Float[np.ndarray, "T E"]:
    """Of each expert, before the bias."""
    if how.is_softmax:
        size = np.exp(logits - logits.max(axis=1, keepdims=True))
        return size / size.sum(axis=1, keepdims=True)
    return sigmoid(logits)


def is_choice(
    logits: Float[np.ndarray, "T E"],
    bias: Float[np.ndarray, " E"],
    config: DeepseekConfig,
    index: Int[np.ndarray, "T k"],
    how: Gating | None = None,
) -> Bool[np.ndarray, " T"]:
    """Of each token, whether correct float32 arithmetic may choose these experts, in any order."""
    how = how or Gating()
    score = scores_of(logits, how)
    choice = score + bias[None] * how.bias_chooses
    error = (EPS * (EXP_STEPS * score + SCALE_STEPS * np.abs(choice))).max(axis=1)
    experts = choice.shape[1]
    in_range = (index >= 0) & (index < experts)
    ordered = np.sort(index, axis=1)
    found = in_range.all(axis=1) & (np.diff(ordered, axis=1) > 0).all(axis=1)
    for t in np.flatnonzero(found):
        found[t] = _may_be(choice[t], float(error[t]), index[t], config, has_groups=how.has_groups)
    return found


def _may_be(
    choice: Float[np.ndarray, " E"],
    error: float,
    chosen: Int[np.ndarray, " k"],
    config: DeepseekConfig,
    *,
    has_groups: bool,
) -> bool:
    """Two choices are a tie if they differ by less than both errors."""
    experts = np.arange(len(choice))
    groups = config.groups if has_groups else 1
    group = experts // (len(choice) // groups)
    for some in _groups(choice.reshape(groups, -1), 2 * error, config.chosen_groups if groups > 1 else 1):
        is_in = np.isin(group, some)
        if not is_in[chosen].all():
            continue
        rest = is_in & ~np.isin(experts, chosen)
        if not rest.any() or choice[chosen].min() >= choice[rest].max() - 2 * error:
            return True
    return False


def _groups(choice: Float[np.ndarray, "G e"], error: float, count: int) -> list[tuple[int, ...]]:
    """Every set of `count` groups that may be the best; `error` is that of a sum of two choices."""
    if count == len(choice):
        return [tuple(range(count))]
    size = np.sort(choice, axis=1)[:, -2:].sum(axis=1)
    ordered = np.sort(size)[::-1]
    last, next_one = ordered[count - 1], ordered[count]
    sure = np.flatnonzero(size > next_one + 2 * error)
    tied = np.flatnonzero((size <= next_one + 2 * error) & (size >= last - 2 * error))
    ways = combinations(tied.tolist(), count - len(sure))
    return [(*sure.tolist(), *way) for way in islice(ways, MOST_TIES)]


def weights_of(
    logits: Float[np.ndarray, "T E"],
    bias: Float[np.ndarray, " E"],
    config: DeepseekConfig,
    index: Int[np.ndarray, "T k"],
    how: Gating | None = None,
) -> Expected:
    """The weights of the experts that were chosen; `index` must be in range."""
    how = how or Gating()
    score = scores_of(logits, how) + bias[None] * how.bias_weighs
    exact = np.take_along_axis(score, index, axis=1)
    is_renormalised = config.norm_topk_prob if how.is_renormalised is None else how.is_renormalised
    if is_renormalised:
        exact = exact / (exact.sum(axis=1, keepdims=True) + LEAST_SUM)
    exact = exact * (config.routed_scaling_factor if how.is_scaled else 1.0)
    size, k = EPS * np.abs(exact), index.shape[1]
    most = (2 * EXP_STEPS + SCALE_STEPS * (k + 2)) * size
    return Expected(exact, most, np.hypot(2 * EXP_SIGMA, SCALE_SIGMA * (k + 2)) * size, 0.0, "float32")


def best_groups(choice: Float[np.ndarray, "T E"], config: DeepseekConfig) -> Bool[np.ndarray, "T E"]:
    """Of each expert, whether its group is one of the best of its token; of equal groups the lower."""
    groups = choice.reshape(len(choice), config.groups, -1)
    size = np.sort(groups, axis=2)[:, :, -2:].sum(axis=2)
    best = np.argsort(-size, axis=1, kind="stable")[:, : config.chosen_groups]
    is_in = np.zeros(size.shape, bool)
    np.put_along_axis(is_in, best, True, axis=1)
    return np.repeat(is_in, groups.shape[2], axis=1)
