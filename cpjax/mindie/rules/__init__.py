"""The rules that a deployment must keep, as data: what each says, who enforces it, its source, how to mend it.

They stand in the order of cause and effect: what is wrong first is reported first.
"""

from cpjax.mindie.rules.features import FEATURES
from cpjax.mindie.rules.limits import LIMITS
from cpjax.mindie.rules.models import MODELS, NOT_LISTED
from cpjax.mindie.rules.nodes import NODES
from cpjax.mindie.rules.pairs import PAIRS, PairRule
from cpjax.mindie.rules.parallel import PARALLEL
from cpjax.mindie.rules.plugins import PLUGIN_RULES
from cpjax.mindie.rules.required import REQUIRED
from cpjax.mindie.rules.rule import VERSIONS, Rule, Setting
from cpjax.mindie.rules.schedule import SCHEDULES
from cpjax.mindie.rules.server import SERVERS
from cpjax.mindie.rules.torch import TORCH_RULES

RULES: tuple[Rule, ...] = (
    *REQUIRED, *SERVERS, *LIMITS, *NODES, *SCHEDULES, *PARALLEL, *TORCH_RULES, *MODELS, *PLUGIN_RULES, *FEATURES
)  # fmt: skip

__all__ = ["NOT_LISTED", "PAIRS", "PARALLEL", "RULES", "VERSIONS", "PairRule", "Rule", "Setting"]
