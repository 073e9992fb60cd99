"""Sizes: how dp, cp, sp, tp, pp, moe_ep and moe_tp must fit together and fill the world. (Backend torch: torch.py.)"""

from collections.abc import Callable

from cpjax.mindie.deployment import PARALLEL as SIZES
from cpjax.mindie.models import GEOMETRIES
from cpjax.mindie.rules.rule import CP_PAGE, DEPLOY, MAPPING, Rule, Setting, found, value


def _at_least_1(size: str) -> Rule:
    is_checked = size in ("dp", "cp", "sp")
    return Rule(
        f"{size}-at-least-1", size, "error", True,
        f"{size} ≥ 1" + ("; an explicit -1 is rejected too" if is_checked else ", or -1 for not set"),
        f"give {size} a number from 1, or take it out",
        DEPLOY if is_checked else MAPPING,
        lambda s: found(getattr(s.sizes, size) < 1, s, size),
    )  # fmt: skip


def _local(s: Setting) -> int:
    """Cards of one node."""
    return s.deployment.world_size // max(1, s.deployment.nodes)


def _fits_a_node(s: Setting, size: int) -> bool:
    return size <= _local(s) or size == s.deployment.world_size


def _option(s: Setting, name: str) -> int:
    """A size of models.deepseekv2.parallel_options; 1 and less is off."""
    return max(1, getattr(s.model.models.deepseekv2.parallel_options, name) or 1)


def _atb(broken: Callable[[Setting], str | None]) -> Callable[[Setting], str | None]:
    """The rule holds where atb_llm maps ranks to groups, not with backend torch."""
    return lambda s: None if s.is_torch else broken(s)


# fmt: off
PARALLEL: tuple[Rule, ...] = (*map(_at_least_1, SIZES), *(rule._replace(broken=_atb(rule.broken)) for rule in (
    Rule("cp-1-or-2", "cp", "error", False, "cp is 1 or 2", "set cp to 2 (on) or 1 (off)", CP_PAGE,
         lambda s: found(s.sizes.cp > 2, s, "cp"), "2.1.RC1"),
    Rule("cp-without-dp", "dp", "error", True, "cp > 1 needs dp = 1", "set dp to 1", f"{MAPPING}; {CP_PAGE}",
         lambda s: found(s.is_cp and s.sizes.dp > 1, s, "cp", "dp")),
    Rule("cp-needs-sp", "sp", "error", False, "cp > 1 needs sp > 1: CP cannot be enabled alone", "set sp to tp",
         CP_PAGE, lambda s: found(s.is_cp and s.sizes.sp == 1, s, "cp", "sp"), "2.3.0"),
    Rule("cp-sp-is-tp", "sp", "error", False, "cp > 1 needs sp = tp", "set sp to tp", CP_PAGE,
         lambda s: found(s.is_cp and s.sizes.sp != s.sizes.tp, s, "sp", "tp"), "2.3.0"),
    Rule("sp-is-tp", "sp", "error", True, "sp > 1 needs sp = tp", "set sp to tp, or to 1 (off)", MAPPING,
         lambda s: found(s.sizes.sp > 1 and s.sizes.sp != s.sizes.tp, s, "sp", "tp")),
    Rule("world-product", "worldSize", "error", True, "cp · dp · tp = worldSize (of all nodes)",
         "make tp = worldSize / (cp · dp)", f"{MAPPING}; {CP_PAGE}",
         lambda s: found(
             (s.sizes.pp == 1 or s.is_cp) and s.sizes.cp * s.sizes.dp * s.sizes.tp != s.sizes.world_size,
             s, "cp", "dp", "tp", "world_size")),
    Rule("cp-without-pp", "pp", "error", False, "cp > 1 needs pp = 1: no page combines them, and with pp > 1 the "
         "server checks neither sp nor the MoE sizes", "take pp out", f"{MAPPING}, validate_pp",
         lambda s: found(s.is_cp and s.sizes.pp > 1, s, "cp", "pp")),
    Rule("pp-without-dp", "pp", "error", True, "pp > 1 needs dp = 1", "set dp to 1, or take pp out", MAPPING,
         lambda s: found(s.sizes.pp > 1 and s.sizes.dp > 1, s, "pp", "dp")),
    Rule("pp-product", "pp", "error", True, "pp > 1 needs pp · tp = worldSize", "make tp = worldSize / pp", MAPPING,
         lambda s: found(s.sizes.pp > 1 and s.sizes.pp * s.sizes.tp != s.sizes.world_size,
                         s, "pp", "tp", "world_size")),
    Rule("pp-moe-fits", "moe_ep", "error", False, "with pp > 1, moe_ep and moe_tp divide worldSize, or cards are in no "
         "group", "take moe_ep and moe_tp out", f"{MAPPING}, get_tp_group and get_dp_group",
         lambda s: found(s.sizes.pp > 1 and any(size > 0 and s.sizes.world_size % size for size in s.sizes[-2:]),
                         s, "moe_ep", "moe_tp", "world_size")),
    Rule("tp-in-a-node", "tp", "error", True, "tp is at most a node's cards, or worldSize",
         "make tp a divisor of a node's cards", MAPPING,
         lambda s: found(s.sizes.pp == 1 and not _fits_a_node(s, s.sizes.tp), s, "tp", "world_size")),
    Rule("tp-divides-heads", "tp", "error", False, "tp divides the model's query heads, 128",
         "make tp a power of 2, at most 128", "num_attention_heads of the model",
         lambda s: found(s.is_deepseek and s.sizes.tp > 0 and GEOMETRIES["DeepSeek-R1"].heads % s.sizes.tp != 0,
                         s, "tp")),
    Rule("moe-product", "moe_ep", "error", True, "moe_ep > 1 needs moe_ep · moe_tp = worldSize",
         "set moe_ep to worldSize and moe_tp to 1", MAPPING,
         lambda s: found(s.sizes.pp == 1 and s.sizes.moe_ep > 1
                         and s.sizes.moe_ep * s.sizes.moe_tp != s.sizes.world_size,
                         s, "moe_ep", "moe_tp", "world_size")),
    Rule("moe-tp-is-world", "moe_tp", "error", True,
         "without moe_ep, moe_tp = worldSize; mind that moe_tp defaults to tp where tp is set",
         "set moe_ep to worldSize and moe_tp to 1, or moe_tp to worldSize", MAPPING,
         lambda s: found(s.sizes.pp == 1 and s.sizes.moe_ep == 1 and s.sizes.moe_tp != s.sizes.world_size,
                         s, "moe_ep", "moe_tp", "world_size")),
    Rule("moe-tp-in-a-node", "moe_tp", "error", True, "with moe_ep > 1, moe_tp is at most a node's cards, or worldSize",
         "set moe_ep to worldSize and moe_tp to 1", MAPPING,
         lambda s: found(s.sizes.pp == 1 and s.sizes.moe_ep > 1 and not _fits_a_node(s, s.sizes.moe_tp), s, "moe_tp")),
    Rule("nodes-divide-world", "worldSize", "error", True, "the number of nodes divides worldSize",
         "make worldSize a multiple of the rank table's server_count", MAPPING,
         lambda s: value(s.sizes.world_size % max(1, s.deployment.nodes) != 0,
                         f"worldSize {s.sizes.world_size} on {s.deployment.nodes} nodes")),
    Rule("o-proj-in-a-node", "models", "error", True, "o_proj_local_tp is at most a node's cards",
         "make o_proj_local_tp smaller", MAPPING,
         lambda s: value(_option(s, "o_proj_local_tp") > max(1, _local(s)),
                         f"o_proj_local_tp {_option(s, 'o_proj_local_tp')}")),
    Rule("lm-head-without-tp", "models", "error", True, "lm_head_local_tp needs tp = 1", "take lm_head_local_tp out",
         MAPPING, lambda s: value(s.sizes.pp == 1 and _option(s, "lm_head_local_tp") > 1 and s.sizes.tp > 1,
                                  f"lm_head_local_tp {_option(s, 'lm_head_local_tp')}, tp {s.sizes.tp}")),
    Rule("dense-in-a-node", "models", "error", True, "dense_mlp_local_tp is at most a node's cards, or worldSize",
         "make dense_mlp_local_tp smaller", MAPPING,
         lambda s: value(_option(s, "dense_mlp_local_tp") > 1 and not _fits_a_node(s, _option(s, "dense_mlp_local_tp")),
                         f"dense_mlp_local_tp {_option(s, 'dense_mlp_local_tp')}")),
    Rule("dense-divides-world", "models", "error", True, "dense_mlp_local_tp divides worldSize",
         "make dense_mlp_local_tp a divisor of worldSize", MAPPING,
         lambda s: value(s.sizes.world_size % _option(s, "dense_mlp_local_tp") != 0,
                         f"dense_mlp_local_tp {_option(s, 'dense_mlp_local_tp')}, worldSize {s.sizes.world_size}")),
    Rule("dense-above-tp", "models", "error", True, "dense_mlp_local_tp is above tp where tp > 1",
         "take dense_mlp_local_tp out", MAPPING,
         lambda s: value(1 < _option(s, "dense_mlp_local_tp") <= s.sizes.tp and s.sizes.tp > 1,
                         f"dense_mlp_local_tp {_option(s, 'dense_mlp_local_tp')}, tp {s.sizes.tp}")),
)))
# fmt: on
