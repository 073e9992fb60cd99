"""plugin_params: which plug-ins there are, what each must be given, and what goes together."""

import difflib

from cpjax.mindie.rules.rule import (
    ASYNC_PAGE,
    MATRIX,
    MTP_PAGE,
    PLUGINS,
    PREFIX_PAGE,
    SPLIT_PAGE,
    V32_PAGE,
    Rule,
    Setting,
    found,
    value,
)

TYPES = ("la", "memory_decoding", "splitfuse", "prefix_cache", "mtp")
_NEEDS = {"la": ("level", "window", "guess_set_size"), "memory_decoding": ("decoding_length",)}
_LONG = 128_000


def _unknown(s: Setting) -> list[str]:
    return [word for word in s.deployment.plugins if word not in TYPES]


def _unknown_text(s: Setting) -> str:
    def one(word: str) -> str:
        near = difflib.get_close_matches(word.strip().lower().replace("-", "_"), TYPES, n=1, cutoff=0.7)
        return f"{word!r}" + (f", did you mean {near[0]}?" if near else "")

    return "; ".join(map(one, _unknown(s)))


def _fields(s: Setting) -> dict:
    return s.deployment.plugin_params.model_extra or {}


def _lacking(s: Setting) -> list[str]:
    return [f"{word} without {name}" for word, names in _NEEDS.items() if s.has(word)
            for name in names if name not in _fields(s)]  # fmt: skip


def _over_gamma(s: Setting) -> str | None:
    """More draft tokens than speculationGamma, where the file says both as numbers."""
    gamma, fields = s.deployment.deploy.speculationGamma, _fields(s)
    tokens = None
    if s.has("la") and all(type(fields.get(name)) is int for name in _NEEDS["la"]):
        tokens = (fields["level"] - 1) * (fields["window"] + fields["guess_set_size"])
    elif s.has("memory_decoding") and type(fields.get("decoding_length")) is int:
        tokens = fields["decoding_length"]
    return value(bool(gamma) and tokens is not None and tokens > (gamma or 0), f"{tokens} tokens, {gamma}")


def _tokens(s: Setting) -> int | None:
    """Draft tokens; None without MTP, or without their number."""
    return s.deployment.num_speculative_tokens if s.has("mtp") else None


def _enable_nz(s: Setting) -> bool | None:
    return s.model.models.deepseekv2.kv_cache_options.enable_nz


def _is_v32_prefill(s: Setting) -> bool:
    """The page of V3.2 has MTP with chunked prefill on prefill nodes."""
    return s.identity.is_v32 and s.is_torch and s.role in (None, "prefill")


# fmt: off
PLUGIN_RULES: tuple[Rule, ...] = (
    Rule("plugin-params-length", "plugin_params", "error", True, "plugin_params has at most 1024 characters",
         "shorten it", "param_checker.cpp",
         lambda s: value(isinstance(s.model.plugin_params, str) and len(s.model.plugin_params) > 1024,
                         f"{len(str(s.model.plugin_params))} characters")),
    Rule("plugin-type-given", "plugin_params", "error", True, "plugin_params that is not empty has plugin_type",
         'add plugin_type, such as "mtp"; "" is none', PLUGINS,
         lambda s: value(s.deployment.plugin_params.plugin_type is None, "no plugin_type")),
    Rule("plugin-types", "plugin_params", "error", True, f"plug-ins are {', '.join(TYPES)}, written so",
         "write such names, with commas between them", PLUGINS,
         lambda s: value(bool(_unknown(s)), _unknown_text(s))),
    Rule("mtp-tokens-given", "plugin_params", "error", True, "mtp needs num_speculative_tokens",
         "add num_speculative_tokens 1", f"{PLUGINS}; {MTP_PAGE}",
         lambda s: value(s.has("mtp") and _tokens(s) is None, "mtp without num_speculative_tokens")),
    Rule("plugin-fields-given", "plugin_params", "error", True, "la needs level, window and guess_set_size, "
         "memory_decoding decoding_length", "add them", PLUGINS,
         lambda s: value(bool(_lacking(s)), ", ".join(_lacking(s)))),
    Rule("speculation-within-gamma", "speculationGamma", "error", True, "speculationGamma is at least (level - 1) · "
         "(window + guess_set_size) for la, and decoding_length for memory_decoding", "make speculationGamma larger",
         PLUGINS, _over_gamma),
    Rule("mtp-tokens", "plugin_params", "error", True, "num_speculative_tokens is 0 to 5", "set it to 1", PLUGINS,
         lambda s: value(not 0 <= (_tokens(s) or 0) <= 5, f"num_speculative_tokens {_tokens(s)}")),
    Rule("mtp-tokens-documented", "plugin_params", "warning", False, "MTP is documented with num_speculative_tokens 1 "
         "or 2", "give num_speculative_tokens 1 or 2", MTP_PAGE,
         lambda s: value(_tokens(s) not in (None, 1, 2), f"num_speculative_tokens {_tokens(s)}")),
    Rule("mtp-alone", "plugin_params", "error", False, "MTP does not go with la or splitfuse (DeepSeek-V3.2: except "
         "splitfuse on a prefill node)", "take one of them out", f"{MTP_PAGE}; {V32_PAGE}",
         lambda s: value(s.has("mtp") and (s.has("la") or (s.has("splitfuse") and not _is_v32_prefill(s))),
                         s.plugin_type)),
    Rule("mtp-without-lora", "maxLoras", "error", False, "MTP does not go with Multi-LoRA", "take one of them out",
         MTP_PAGE, lambda s: value(s.has("mtp") and s.has_lora, f"{s.plugin_type}, LoRA")),
    Rule("mtp-long-disputed", "plugin_params", "warning", False, "pages disagree on MTP with sequences of 128K: the "
         "matrix of features excludes it, MTP's page does not", "try it before you rely on it",
         f"{MATRIX} against {MTP_PAGE}", lambda s: value(s.has("mtp") and s.deployment.max_seq_len >= _LONG,
                                                         f"MTP, maxSeqLen {s.deployment.max_seq_len}"), "head"),
    Rule("splitfuse-needs-mix", "templateType", "error", True, 'splitfuse needs templateType "Mix"',
         'set templateType to "Mix"', "llm_manager_impl.cpp",
         lambda s: value(s.has("splitfuse") and s.schedule.templateType == "Standard", s.schedule.templateType)),
    Rule("splitfuse-chunks", "splitChunkTokens", "error", True, "with splitfuse, splitChunkTokens is above 0",
         "give it such a value, or take it out", "llm_manager_impl.cpp",
         lambda s: value(s.has("splitfuse") and s.schedule.splitChunkTokens == 0, 0)),
    Rule("splitfuse-without-cp", "plugin_params", "error", False, "splitfuse does not go with long sequences (cp or sp "
         "> 1)", "take one of them out", SPLIT_PAGE,
         lambda s: found(s.has("splitfuse") and s.is_split and not s.identity.is_v32, s, "cp", "sp")),
    Rule("splitfuse-without-lora", "maxLoras", "error", True, "splitfuse does not go with Multi-LoRA",
         "take one of them out", f"generator.py; {SPLIT_PAGE}",
         lambda s: value(s.has("splitfuse") and s.has_lora and not s.is_torch, f"{s.plugin_type}, LoRA")),
    Rule("splitfuse-without-async-write", "kvPoolConfig", "error", True, "splitfuse does not go with asyncWrite of "
         "kvPoolConfig", "take one of them out", "generator.py",
         lambda s: value(s.has("splitfuse") and s.backend.kvPoolConfig.asyncWrite, "asyncWrite true"), "head"),
    Rule("prefix-cache-needs-nz", "models", "error", True, "a DeepSeek model with prefix_cache needs "
         "models.deepseekv2.kv_cache_options.enable_nz true", "set it", f"flash_causal_deepseekv2.py; {PREFIX_PAGE}",
         lambda s: value(s.is_deepseek and not s.is_torch and s.has("prefix_cache") and not _enable_nz(s),
                         f"enable_nz {_enable_nz(s)}")),
    Rule("prefix-cache-with-splitfuse", "plugin_params", "warning", False, "the page on the prefix cache lists "
         "splitfuse as one that it goes with and as one that it does not", "try it before you rely on it",
         f"{PREFIX_PAGE} against itself, and {MATRIX}",
         lambda s: value(s.has("prefix_cache") and s.has("splitfuse"), s.plugin_type)),
    Rule("prefix-cache-with-dp", "dp", "warning", False, "pages disagree on the prefix cache with dp > 1: its own page "
         "excludes it, the matrix of features has it", "try it before you rely on it",
         f"{PREFIX_PAGE} against {MATRIX}",
         lambda s: found(s.has("prefix_cache") and s.sizes.dp > 1, s, "dp")),
    Rule("prefix-cache-without-lora", "maxLoras", "error", False, "the prefix cache does not go with Multi-LoRA",
         "take one of them out", PREFIX_PAGE,
         lambda s: value(s.has("prefix_cache") and s.has_lora, f"{s.plugin_type}, LoRA")),
    Rule("micro-batch-without-cp", "models", "error", False, "micro batch (stream_options.micro_batch) does not go "
         "with cp or sp > 1", "take it out", MATRIX,
         lambda s: found(bool(s.model.models.deepseekv2.stream_options.micro_batch) and s.is_split, s, "cp", "sp")),
    Rule("async-alone", "plugin_params", "error", True, "asynchronous scheduling does not go with la or "
         "memory_decoding", "take the plugin out, or unset MINDIE_ASYNC_SCHEDULING_ENABLE",
         f"plug-in manager; {ASYNC_PAGE}",
         lambda s: value(s.async_scheduling and (s.has("la") or s.has("memory_decoding")), s.plugin_type)),
    Rule("async-with-splitfuse", "plugin_params", "warning", True, "with splitfuse, asynchronous scheduling is "
         "silently off", "take one of them out", "plug-in manager",
         lambda s: value(s.async_scheduling and s.has("splitfuse"), s.plugin_type)),
)
# fmt: on
