"""Features: which model, hardware and dtype, and what goes together with context and sequence parallelism."""

from cpjax.mindie.models import family
from cpjax.mindie.rules.rule import ASYNC_PAGE, CP_PAGE, MTP_PAGE, PREFIX_PAGE, SP_PAGE, Rule, Setting, found, value

HARDWARE = {"800i-a2": 8, "800i-a3": 16}
"""Servers that CP runs on → their NPUs (an A3 module is two). Atlas 800I A2; Atlas 800I A3 SuperPoD."""

SUPPORTED = {("DeepSeek-R1", "W8A8"): "2.1.RC1"} | {
    (model, "W4A8"): "2.3.0" for model in ("DeepSeek-R1", "DeepSeek-V3", "DeepSeek-V3.1")
}
"""(model, quantisation) → the documentation version that first lists it."""


def _model(s: Setting) -> str:
    return family(s.deployment.model_name) or s.deployment.model_name


def _is_supported(s: Setting) -> bool:
    """Unknown quantisation counts as supported where some quantisation of the model is: another rule warns of it."""
    listed = [bits for (model, bits), version in SUPPORTED.items() if model == _model(s) and s.since(version)]
    return bool(listed) and (s.quantisation is None or s.quantisation in listed)


def _mtp(s: Setting) -> int:
    """Draft tokens; 0 without MTP."""
    return s.deployment.num_speculative_tokens or 0 if s.has("mtp") else 0


def _has_lora(s: Setting) -> bool:
    return bool(s.deployment.deploy.maxLoras or s.deployment.deploy.LoraModules)


def _enable_nz(s: Setting) -> bool | None:
    return s.model.models.deepseekv2.kv_cache_options.enable_nz


def _plugins(s: Setting) -> str:
    return f"plugin_type {','.join(s.deployment.plugins)}"


# fmt: off
FEATURES: tuple[Rule, ...] = (
    Rule("model-supported", "modelName", "error", False, "cp or sp > 1 is for DeepSeek-R1 W8A8; since 2.3.0 also for "
         "DeepSeek-R1, -V3 and -V3.1 W4A8", "use such weights, or set cp and sp to 1", f"{CP_PAGE}; {SP_PAGE}",
         lambda s: value(s.is_split and not _is_supported(s), f"{_model(s)} {s.quantisation or ''}".strip())),
    Rule("quantisation-known", "modelName", "warning", False, "the weights must be W8A8 or W4A8, and neither modelName "
         "nor the weights' config.json says what they are", "name it, such as DeepSeek-R1_w8a8", CP_PAGE,
         lambda s: value(s.is_split and _is_supported(s) and s.quantisation is None, s.deployment.model_name)),
    Rule("w4a8-disputed", "modelName", "warning", False, "pages disagree on CP with W4A8: the CP page lists it, the "
         "feature matrix excludes it", "try it before you rely on it", f"{CP_PAGE} against feature/README.md",
         lambda s: value(s.version == "head" and s.is_cp and s.quantisation == "W4A8", f"{_model(s)} W4A8")),
    Rule("fp16-only", "modelWeightPath", "error", False, "cp or sp > 1 is FP16 only, BF16 is not supported",
         'convert the weights and set torch_dtype to "float16" in their config.json', f"{CP_PAGE}; {SP_PAGE}",
         lambda s: value(s.is_split and s.dtype not in (None, "float16"), s.dtype)),
    Rule("dtype-known", "modelWeightPath", "warning", False, "cp or sp > 1 is FP16 only, and the weights' dtype is not "
         "known here", "look up torch_dtype in the weights' config.json, and give it with --dtype", CP_PAGE,
         lambda s: value(s.is_split and s.dtype is None, s.deployment.model_weight_path or "no modelWeightPath")),
    Rule("hardware-supported", "npuDeviceIds", "error", False, "cp or sp > 1 runs on Atlas 800I A2 and Atlas 800I A3 "
         "SuperPoD", "use one of these, or set cp and sp to 1", f"{CP_PAGE}; {SP_PAGE}",
         lambda s: value(s.is_split and s.hardware is not None and s.hardware not in HARDWARE, s.hardware)),
    Rule("cards-of-a-server", "npuDeviceIds", "error", False, "an Atlas 800I A2 has 8 NPUs, an Atlas 800I A3 has 16",
         "use more nodes: multiNodesInferEnabled and a rank table", "MindCluster scheduling guide, node affinity",
         lambda s: value(s.hardware in HARDWARE and s.sizes.world_size > HARDWARE[s.hardware] * s.deployment.nodes,
                         f"{s.sizes.world_size} cards on {s.deployment.nodes} × {s.hardware}")),
    Rule("role-known", "inferMode", "warning", False, "inferMode dmi is one side of a prefill–decode pair, and the "
         "file does not say which", "give --role prefill or --role decode", "http_handler.cpp: POST /v1/role/…",
         lambda s: value(s.role is None, s.deployment.server.inferMode)),
    Rule("role-is-mode", "inferMode", "error", False, "prefill and decode nodes have inferMode dmi, a hybrid one has "
         "standard", "set inferMode, or give the role that is meant", "service_parameter_configuration.md",
         lambda s: value("inferMode" in s.deployment.server.model_fields_set and s.role is not None
                         and (s.role == "hybrid") != (s.deployment.server.inferMode == "standard"),
                         f"inferMode {s.deployment.server.inferMode}, role {s.role}")),
    Rule("decode-without-cp", "cp", "error", False, "with disaggregation, CP is for prefill nodes only",
         "set cp to 1 on the decode node", CP_PAGE, lambda s: found(s.role == "decode" and s.is_cp, s, "cp")),
    Rule("decode-without-sp", "sp", "error", False, "with disaggregation, SP is for prefill nodes only",
         "set sp to 1 on the decode node", SP_PAGE,
         lambda s: found(s.role == "decode" and s.sizes.sp > 1, s, "sp")),
    Rule("decode-without-prefix-cache", "plugin_params", "error", True, "with disaggregation, the prefix cache is for "
         "prefill nodes only", "take prefix_cache out of plugin_type", f"generator.py; {PREFIX_PAGE}",
         lambda s: value(s.role == "decode" and s.has("prefix_cache"), _plugins(s))),
    Rule("hybrid-mtp-is-1", "plugin_params", "error", False, "hybrid, with cp or sp > 1: MTP only with "
         "num_speculative_tokens 1", "set num_speculative_tokens to 1", f"{MTP_PAGE}; {CP_PAGE}, since 2.3.0",
         lambda s: value(s.since("2.3.0") and s.role == "hybrid" and s.is_split and _mtp(s) > 1,
                         f"num_speculative_tokens {_mtp(s)}")),
    Rule("hybrid-listed-2.1", "plugin_params", "error", False, "hybrid, with cp > 1: the page of 2.1.RC1 lists SP and "
         "TP only, no MTP, prefix cache or asynchronous scheduling", "take them out, or use a newer version",
         f"{CP_PAGE} of 2.1.RC1", lambda s: value(
             s.version == "2.1.RC1" and s.role == "hybrid" and s.is_cp
             and (s.has("mtp") or s.has("prefix_cache") or s.async_scheduling),
             _plugins(s) + (", asynchronous scheduling" if s.async_scheduling else ""))),
    Rule("mtp-tokens", "plugin_params", "error", True, "num_speculative_tokens is 0 to 5", "set it to 1",
         "plug-in utils", lambda s: value(s.has("mtp") and not 0 <= _mtp(s) <= 5, f"num_speculative_tokens {_mtp(s)}")),
    Rule("mtp-tokens-documented", "plugin_params", "warning", False, "MTP is documented with num_speculative_tokens 1 "
         "or 2", "give num_speculative_tokens 1 or 2", MTP_PAGE,
         lambda s: value(s.has("mtp") and _mtp(s) not in (1, 2),
                         f"num_speculative_tokens {s.deployment.num_speculative_tokens}")),
    Rule("mtp-alone", "plugin_params", "error", False, "MTP does not go with la or splitfuse", "take one of them out",
         MTP_PAGE, lambda s: value(s.has("mtp") and (s.has("la") or s.has("splitfuse")), _plugins(s))),
    Rule("mtp-without-lora", "maxLoras", "error", False, "MTP does not go with Multi-LoRA", "take one of them out",
         MTP_PAGE, lambda s: value(s.has("mtp") and _has_lora(s), f"{_plugins(s)}, LoRA")),
    Rule("prefix-cache-needs-nz", "models", "error", True, "a DeepSeek model with prefix_cache needs "
         "models.deepseekv2.kv_cache_options.enable_nz true", "set it", f"flash_causal_deepseekv2.py; {PREFIX_PAGE}",
         lambda s: value(s.is_deepseek and s.has("prefix_cache") and not _enable_nz(s), f"enable_nz {_enable_nz(s)}")),
    Rule("prefix-cache-without-splitfuse", "plugin_params", "error", False, "the prefix cache does not go with "
         "splitfuse", "take one of them out", PREFIX_PAGE,
         lambda s: value(s.has("prefix_cache") and s.has("splitfuse"), _plugins(s))),
    Rule("prefix-cache-without-dp", "dp", "error", False, "the prefix cache does not go with dp > 1",
         "set dp to 1, or take prefix_cache out", PREFIX_PAGE,
         lambda s: found(s.has("prefix_cache") and s.sizes.dp > 1, s, "dp")),
    Rule("prefix-cache-without-lora", "maxLoras", "error", False, "the prefix cache does not go with Multi-LoRA",
         "take one of them out", PREFIX_PAGE,
         lambda s: value(s.has("prefix_cache") and _has_lora(s), f"{_plugins(s)}, LoRA")),
    Rule("async-alone", "plugin_params", "error", True, "asynchronous scheduling does not go with la or "
         "memory_decoding", "take the plugin out, or unset MINDIE_ASYNC_SCHEDULING_ENABLE",
         f"plug-in manager; {ASYNC_PAGE}",
         lambda s: value(s.async_scheduling and (s.has("la") or s.has("memory_decoding")), _plugins(s))),
    Rule("async-with-splitfuse", "plugin_params", "warning", True, "with splitfuse, asynchronous scheduling is "
         "silently off", "take one of them out", "plug-in manager",
         lambda s: value(s.async_scheduling and s.has("splitfuse"), _plugins(s))),
    Rule("async-on-decode", "inferMode", "warning", False, "with disaggregation, asynchronous scheduling is to be set "
         "on decode nodes only; the CP page allows it with CP, which only prefill nodes have",
         "unset MINDIE_ASYNC_SCHEDULING_ENABLE here", f"{ASYNC_PAGE} against {CP_PAGE}",
         lambda s: value(s.async_scheduling and s.role == "prefill", "role prefill, asynchronous scheduling")),
    Rule("splitfuse-needs-mix", "templateType", "error", True, 'splitfuse needs templateType "Mix"',
         'set templateType to "Mix"', "llm_manager_impl.cpp",
         lambda s: value(s.has("splitfuse") and s.schedule.templateType != "Mix",
                         s.schedule.templateType)),
    Rule("layerwise-without-prefix-cache", "layerwiseDisaggregated", "error", True, "layerwise disaggregation does not "
         "go with the prefix cache", "take one of them out", "llm_manager_impl.cpp",
         lambda s: value(s.deployment.server.layerwiseDisaggregated and s.has("prefix_cache"), _plugins(s))),
    Rule("layerwise-without-cp", "layerwiseDisaggregated", "error", False, "layerwise disaggregation does not go with "
         "cp or sp > 1: its block manager takes the cloud to have 16 ranks", "set cp and sp to 1", "scheduler.cpp",
         lambda s: found(s.deployment.server.layerwiseDisaggregated and s.is_split, s, "cp", "sp")),
)
# fmt: on
