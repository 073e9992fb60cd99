"""Roles: what an instance does, and what goes with context and sequence parallelism on each side of a pair."""

from cpjax.mindie.rules.rule import (
    ASYNC_PAGE,
    CP_PAGE,
    MTP_PAGE,
    PARAMETERS,
    PREFIX_PAGE,
    SP_PAGE,
    Rule,
    Setting,
    found,
    given,
    value,
)


def _mtp(s: Setting) -> int:
    """Draft tokens; 0 without MTP."""
    return s.deployment.num_speculative_tokens or 0 if s.has("mtp") else 0


def _is_other_mode(s: Setting) -> bool:
    """Is inferMode one that the role does not have? A mode that does not exist breaks another rule."""
    mode = given(s, "inferMode")
    return mode in ("standard", "dmi") and s.role is not None and (s.role == "hybrid") != (mode == "standard")


# fmt: off
FEATURES: tuple[Rule, ...] = (
    Rule("role-known", "inferMode", "warning", False, "inferMode dmi is one side of a prefill–decode pair, and the "
         "file does not say which", "give --role prefill or --role decode", "http_handler.cpp: POST /v1/role/…",
         lambda s: value(s.role is None and s.server.inferMode == "dmi", s.server.inferMode)),
    Rule("role-is-mode", "inferMode", "error", False, "prefill and decode nodes have inferMode dmi, a hybrid one has "
         "standard", "set inferMode, or give the role that is meant", PARAMETERS,
         lambda s: value(_is_other_mode(s), f"inferMode {s.server.inferMode}, role {s.role}")),
    Rule("decode-without-cp", "cp", "error", False, "with disaggregation, CP is for prefill nodes only",
         "set cp to 1 on the decode node", CP_PAGE,
         lambda s: found(s.role == "decode" and s.is_cp, s, "cp"), "2.1.RC1"),
    Rule("decode-without-sp", "sp", "error", False, "with disaggregation, SP is for prefill nodes only",
         "set sp to 1 on the decode node", SP_PAGE,
         lambda s: found(s.role == "decode" and s.sizes.sp > 1 and not s.is_torch, s, "sp"), "2.1.RC1"),
    Rule("decode-without-prefix-cache", "plugin_params", "error", True, "with disaggregation, the prefix cache is for "
         "prefill nodes only", "take prefix_cache out of plugin_type", f"generator.py; {PREFIX_PAGE}",
         lambda s: value(s.role == "decode" and s.has("prefix_cache"), s.plugin_type)),
    Rule("hybrid-mtp-is-1", "plugin_params", "error", False, "hybrid, with cp or sp > 1: MTP only with "
         "num_speculative_tokens 1", "set num_speculative_tokens to 1", f"{MTP_PAGE}; {CP_PAGE}",
         lambda s: value(s.role == "hybrid" and s.is_split and not s.identity.is_v32 and _mtp(s) > 1,
                         f"num_speculative_tokens {_mtp(s)}"), "2.3.0"),
    Rule("hybrid-listed-2.1", "plugin_params", "error", False, "hybrid, with cp > 1: the page of 2.1.RC1 lists SP and "
         "TP only, no MTP, prefix cache or asynchronous scheduling", "take them out, or use a newer version",
         f"{CP_PAGE} of 2.1.RC1", lambda s: value(
             s.role == "hybrid" and s.is_cp and (s.has("mtp") or s.has("prefix_cache") or s.async_scheduling),
             s.plugin_type + (", asynchronous scheduling" if s.async_scheduling else "")), "2.1.RC1", "2.1.RC2"),
    Rule("async-on-decode", "inferMode", "warning", False, "with disaggregation, asynchronous scheduling is to be set "
         "on decode nodes only; the CP page allows it with CP, which only prefill nodes have",
         "unset MINDIE_ASYNC_SCHEDULING_ENABLE here", f"{ASYNC_PAGE} against {CP_PAGE}",
         lambda s: value(s.async_scheduling and s.role == "prefill", "role prefill, asynchronous scheduling")),
    Rule("layerwise-without-prefix-cache", "layerwiseDisaggregated", "error", True, "layerwise disaggregation does not "
         "go with the prefix cache", "take one of them out", "llm_manager_impl.cpp",
         lambda s: value(s.server.layerwiseDisaggregated and s.has("prefix_cache"), s.plugin_type)),
    Rule("layerwise-without-cp", "layerwiseDisaggregated", "error", False, "layerwise disaggregation does not go with "
         "cp or sp > 1: its block manager takes the cloud to have 16 ranks", "set cp and sp to 1", "scheduler.cpp",
         lambda s: found(s.server.layerwiseDisaggregated and s.is_split, s, "cp", "sp")),
)
# fmt: on
