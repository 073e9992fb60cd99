"""The rules that a deployment must keep, as data: what each says, who enforces it, its source, how to mend it."""

from cpjax.mindie.rules.features import FEATURES
from cpjax.mindie.rules.limits import LIMITS
from cpjax.mindie.rules.pairs import PAIRS, PairRule
from cpjax.mindie.rules.parallel import PARALLEL
from cpjax.mindie.rules.rule import VERSIONS, Rule, Setting

RULES: tuple[Rule, ...] = (*PARALLEL, *FEATURES, *LIMITS)

__all__ = ["PAIRS", "PARALLEL", "RULES", "VERSIONS", "PairRule", "Rule", "Setting"]
