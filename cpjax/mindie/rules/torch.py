"""Sizes and features with backendType torch, whose groups are made by code of its own, and DeepSeek-V3.2."""

from collections.abc import Callable

from cpjax.mindie.rules.rule import TORCH, V32_PAGE, Rule, Setting, found, value

_SIZES = ("dp", "cp", "sp", "tp", "moe_ep", "moe_tp")


def _torch(broken: Callable[[Setting], str | None]) -> Callable[[Setting], str | None]:
    return lambda s: broken(s) if s.is_torch else None


def _odd(s: Setting) -> list[str]:
    """Sizes that do not divide the world."""
    return [size for size in _SIZES if getattr(s.sizes, size) > 0 and s.sizes.world_size % getattr(s.sizes, size)]


def _beside_cp(s: Setting) -> list[str]:
    """Features that V3.2 does not have together with CP."""
    found = ["splitfuse", "prefix_cache"]
    return [name for name in found if s.has(name)] + ["asynchronous scheduling"] * s.async_scheduling


# fmt: off
TORCH_RULES: tuple[Rule, ...] = tuple(rule._replace(broken=_torch(rule.broken)) for rule in (
    Rule("torch-sizes-divide", "worldSize", "error", True, "with backend torch, dp, cp, sp, tp, moe_ep and moe_tp each "
         "divide worldSize", "make them divisors of worldSize", TORCH,
         lambda s: found(bool(_odd(s)), s, *_odd(s), "world_size")),
    Rule("torch-moe-product", "moe_tp", "error", True, "with backend torch, moe_ep · moe_tp = worldSize; mind that "
         "moe_tp defaults to worldSize and moe_ep to 1", "set both, such as moe_ep worldSize and moe_tp 1", TORCH,
         lambda s: found(s.sizes.moe_ep * s.sizes.moe_tp != s.sizes.world_size, s, "moe_ep", "moe_tp", "world_size")),
    Rule("torch-world-product", "worldSize", "error", False, "cp · dp · tp = worldSize (of all nodes); with "
         "disaggregation the server checks it when it links", "make tp = worldSize / (cp · dp)",
         f"model_wrapper/utils/config.py, set_pd_link_info; {V32_PAGE}",
         lambda s: found(s.sizes.cp * s.sizes.dp * s.sizes.tp != s.sizes.world_size,
                         s, "cp", "dp", "tp", "world_size")),
    Rule("torch-without-pp", "pp", "error", False, "backend torch makes no pipeline groups", "take pp out", TORCH,
         lambda s: found(s.sizes.pp > 1, s, "pp")),
    Rule("torch-decode-without-sp", "sp", "error", True, "with backend torch, decode raises an error where sp > 1",
         "set sp to 1", "generator_aclgraph.py",
         lambda s: found(s.role in ("hybrid", "decode") and s.sizes.sp > 1, s, "sp")),
    Rule("torch-sp-undocumented", "sp", "warning", False, "with backend torch, no page has sp > 1, and decode raises "
         "an error", "set sp to 1", f"generator_aclgraph.py; {V32_PAGE}",
         lambda s: found(s.role not in ("hybrid", "decode") and s.sizes.sp > 1, s, "sp")),
    Rule("torch-cp-without-dp", "dp", "error", False, "DeepSeek-V3.2: cp > 1 does not go with dp > 1", "set dp to 1",
         V32_PAGE, lambda s: found(s.identity.is_v32 and s.is_cp and s.sizes.dp > 1, s, "cp", "dp"), "head"),
    Rule("torch-cp-alone", "cp", "error", False, "DeepSeek-V3.2: cp > 1 does not go with asynchronous scheduling, "
         "splitfuse or the prefix cache", "take them out, or set cp to 1", V32_PAGE,
         lambda s: value(s.identity.is_v32 and s.is_cp and bool(_beside_cp(s)),
                         f"cp {s.sizes.cp}, {', '.join(_beside_cp(s))}"), "head"),
))
# fmt: on
