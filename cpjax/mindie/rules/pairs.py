"""Rules between the configs of one disaggregated deployment: prefill and decode instances that must fit each other."""

from collections.abc import Callable
from typing import NamedTuple

from cpjax.mindie.rules.rule import MTP_PAGE, Level, Setting


class PairRule(NamedTuple):
    """A rule between two configs, the first of which is a prefill node where the roles differ."""

    name: str
    field: str
    level: Level
    enforced: bool
    says: str
    fix: str
    source: str
    broken: Callable[[Setting, Setting], str | None]


def _differ(a: object, b: object) -> str | None:
    return f"{a} and {b}" if a != b else None


def _other_model(a: Setting, b: Setting) -> str | None:
    """Two models that are surely not one; labels may differ."""
    one, two = a.identity, b.identity
    if one.models is None or two.models is None or set(one.models) & set(two.models):
        return None
    return _differ(one.name, two.name)


def _same_role(a: Setting, b: Setting) -> str | None:
    if a.role != b.role:
        return None
    sizes = [f"dp {s.sizes.dp} cp {s.sizes.cp} sp {s.sizes.sp} tp {s.sizes.tp}" for s in (a, b)]
    return _differ(*sizes)


def _link(a: Setting, b: Setting) -> str | None:
    """Without SP on the prefill side, one tp must divide the other."""
    if (a.role, b.role) != ("prefill", "decode") or a.sizes.sp != 1 or min(a.sizes.tp, b.sizes.tp) < 1:
        return None
    small, large = sorted((a.sizes.tp, b.sizes.tp))
    return f"tp {a.sizes.tp} and tp {b.sizes.tp}" if large % small else None


# fmt: off
PAIRS: tuple[PairRule, ...] = (
    PairRule("pair-tp-divides", "tp", "error", True, "without sp on the prefill node, one tp divides the other",
             "make one tp a multiple of the other", "model_wrapper/utils/config.py, generate_link_map", _link),
    PairRule("pair-same-sizes", "tp", "error", False, "all prefill nodes have the same dp, cp, sp and tp, and all "
             "decode nodes", "give them the same sizes", "model_wrapper/utils/config.py, a comment", _same_role),
    PairRule("pair-same-model", "modelWeightPath", "error", False, "prefill and decode nodes serve the same model",
             "give them the same weights", "what is sent is one model's cache", _other_model),
    PairRule("pair-same-block", "cacheBlockSize", "error", False, "prefill and decode nodes have the same blocks",
             "give them the same", "what is sent are whole blocks",
             lambda a, b: _differ(a.deployment.backend.ScheduleConfig.cacheBlockSize,
                                  b.deployment.backend.ScheduleConfig.cacheBlockSize)),
    PairRule("pair-both-mtp", "plugin_params", "error", False, "MTP is on for prefill and decode nodes, or for none",
             "give both the same num_speculative_tokens", MTP_PAGE,
             lambda a, b: _differ(*(f"MTP {s.deployment.num_speculative_tokens}" if s.has("mtp") else "no MTP"
                                    for s in (a, b)))),
)
# fmt: on
