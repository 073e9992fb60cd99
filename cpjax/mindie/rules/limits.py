"""Fields one by one: what the server demands of names, cards, lengths and the scheduler."""

import re

from cpjax.mindie.rules.rule import BACKEND, CP_PAGE, DEPLOY, SCHEDULE, Rule, Setting, value

INSTANCE_TYPES = ("Standard", "StandardMock", "TargetModel", "AssistantModel")
REQUIRED = ("modelWeightPath", "cpuMemSize", "npuMemSize", "backendType", "trustRemoteCode")
_NAME = re.compile(r"(?=.{1,256}\Z)[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", re.ASCII)
MOST_TOKENS = 4 * 1024 * 1024


def _missing(s: Setting) -> list[str]:
    given = s.model.model_fields_set
    lengths = {"maxSeqLen", "maxInputTokenLen"} - s.deployment.deploy.model_fields_set
    return [field for field in REQUIRED if field not in given] + sorted(lengths)


def _cards(s: Setting) -> list[int]:
    """The length of each list of npuDeviceIds; nothing where it is not given."""
    return [len(ids) for ids in s.deployment.backend.npuDeviceIds or []]


def _is_multi_node(s: Setting) -> bool:
    return s.deployment.backend.multiNodesInferEnabled


def _twice(s: Setting) -> list[int]:
    return [card for ids in s.deployment.backend.npuDeviceIds or [] for card in sorted(set(ids)) if ids.count(card) > 1]


def _unaligned(s: Setting) -> list[str]:
    """Lengths that the server will round up to a multiple of 2·cp."""
    cp, schedule = s.sizes.cp, s.schedule
    lengths = {"maxSeqLen": s.deployment.max_seq_len, "maxPrefillTokens": schedule.maxPrefillTokens}
    return [f"{name} {length}" for name, length in lengths.items() if cp > 1 and length % (2 * cp)]


def _range(field: str, low: int, high: int, source: str) -> Rule:
    def broken(s: Setting) -> str | None:
        given = getattr(s.schedule, field)
        return value(not low <= given <= high, given)

    return Rule(
        f"{field}-range",
        field,
        "error",
        True,
        f"{field} is {low} to {high}",
        f"give {field} such a value",
        source,
        broken,
    )


# fmt: off
LIMITS: tuple[Rule, ...] = (
    Rule("required-fields", "ModelConfig", "error", True, "these fields must be given", "add them", DEPLOY,
         lambda s: value(bool(_missing(s)), "no " + ", ".join(_missing(s)))),
    Rule("model-name", "modelName", "error", True,
         "modelName has 1 to 256 of A-Z a-z 0-9 _ . -, a letter or digit at both ends", "rename it", DEPLOY,
         lambda s: value(not _NAME.fullmatch(s.deployment.model_name), repr(s.deployment.model_name[:40]))),
    Rule("instance-type", "modelInstanceType", "error", True,
         "modelInstanceType is Standard, StandardMock, TargetModel or AssistantModel", 'set it to "Standard"', DEPLOY,
         lambda s: value(s.model.modelInstanceType not in INSTANCE_TYPES,
                         repr(s.model.modelInstanceType))),
    Rule("backend-type", "backendType", "error", True, "backendType is atb, ms or torch", 'set it to "atb"', DEPLOY,
         lambda s: value(s.model.backendType not in (None, "atb", "ms", "torch"), repr(s.model.backendType))),
    Rule("npu-mem-size", "npuMemSize", "error", True, "npuMemSize is -1 (as much as there is) or above 0",
         "set it to -1", DEPLOY, lambda s: value((s.model.npuMemSize or -1) < -1 or s.model.npuMemSize == 0,
                                 s.model.npuMemSize)),
    Rule("world-size", "worldSize", "error", True, "worldSize is 1 to 1048576", "set it to the number of cards", DEPLOY,
         lambda s: value(not 1 <= s.model.worldSize <= 1048576, s.model.worldSize)),
    Rule("cards-are-world", "npuDeviceIds", "error", True, "each list of npuDeviceIds has worldSize cards",
         "list worldSize cards", BACKEND,
         lambda s: value(not _is_multi_node(s) and any(n != s.model.worldSize for n in _cards(s)),
                         f"{_cards(s)} cards, worldSize {s.model.worldSize}")),
    Rule("cards-of-a-node", "npuDeviceIds", "warning", True, "with several nodes too, the server compares npuDeviceIds "
         "with worldSize before the rank table replaces both; other pages let worldSize count all nodes' cards",
         "if the server refuses, set worldSize to one node's cards", BACKEND,
         lambda s: value(_is_multi_node(s) and any(n != s.model.worldSize for n in _cards(s)),
                         f"{_cards(s)} cards, worldSize {s.model.worldSize}")),
    Rule("cards-once", "npuDeviceIds", "error", True, "no card stands twice in a list of npuDeviceIds", "list it once",
         BACKEND, lambda s: value(bool(_twice(s)), f"card {_twice(s)[:5]} twice")),
    Rule("instance-number", "modelInstanceNumber", "error", True, "npuDeviceIds has modelInstanceNumber lists",
         "make it so", BACKEND,
         lambda s: value(s.deployment.backend.npuDeviceIds is not None
                         and s.deployment.backend.modelInstanceNumber not in (None, len(_cards(s))),
                         f"{len(_cards(s))} lists, modelInstanceNumber {s.deployment.backend.modelInstanceNumber}")),
    Rule("max-seq-len", "maxSeqLen", "error", True, "maxSeqLen is not 0", "set it to prompt and answer", DEPLOY,
         lambda s: value(s.deployment.max_seq_len == 0, 0)),
    Rule("max-input-token-len", "maxInputTokenLen", "error", True, f"maxInputTokenLen is 1 to {MOST_TOKENS}",
         "set it to the longest prompt", DEPLOY,
         lambda s: value(not 1 <= s.deployment.max_input_token_len <= MOST_TOKENS, s.deployment.max_input_token_len)),
    Rule("input-within-sequence", "maxInputTokenLen", "warning", False, "a prompt of maxInputTokenLen should leave "
         "room for an answer in maxSeqLen", "make maxSeqLen larger", "service_parameter_configuration.md",
         lambda s: value(s.deployment.max_input_token_len > s.deployment.max_seq_len > 0,
                         f"{s.deployment.max_input_token_len}, maxSeqLen {s.deployment.max_seq_len}")),
    Rule("lengths-aligned", "maxSeqLen", "warning", False, "maxSeqLen and maxPrefillTokens are multiples of 2 · cp; "
         "the server silently rounds them up", "round them up here", "llm_manager_impl.cpp, UpdateEngineConfig",
         lambda s: value(bool(_unaligned(s)), ", ".join(_unaligned(s)))),
    Rule("truncation", "truncation", "error", True, "truncation is -1, 0, 1, true or false", "set it to 0",
         "service_parameter_configuration.md",
         lambda s: value(s.deployment.deploy.truncation not in (-1, 0, 1), s.deployment.deploy.truncation)),
    Rule("truncation-was-bool", "truncation", "warning", False, "before head, truncation is true or false",
         "set it to false", f"the example of {CP_PAGE} of 2.1.RC1 and 2.3.0",
         lambda s: value(not s.since("head") and "truncation" in s.deployment.deploy.model_fields_set
                         and not isinstance(s.deployment.deploy.truncation, bool), s.deployment.deploy.truncation)),
    Rule("plugin-params-length", "plugin_params", "error", True, "plugin_params has at most 1024 characters",
         "shorten it", "param_checker.cpp",
         lambda s: value(isinstance(s.model.plugin_params, str) and len(s.model.plugin_params) > 1024,
                         f"{len(str(s.model.plugin_params))} characters")),
    _range("cacheBlockSize", 1, 128, SCHEDULE),
    Rule("cache-block-is-128", "cacheBlockSize", "error", True, "DeepSeek models need cacheBlockSize 128",
         "set it to 128", "multi_latent_attention_operation.cpp of ATB",
         lambda s: value(s.is_deepseek and s.schedule.cacheBlockSize != 128,
                         s.schedule.cacheBlockSize)),
    _range("maxPrefillTokens", 1, MOST_TOKENS, SCHEDULE),
    _range("maxBatchSize", 1, 819200, SCHEDULE),
    _range("prefillPolicyType", 0, 0, "scheduler.cpp"),
    _range("decodePolicyType", 0, 0, "scheduler.cpp"),
    Rule("no-swap", "maxPreemptCount", "error", True, "cp · sp > 1 cannot swap to the CPU: maxPreemptCount 0",
         "set it to 0", "cpu_npu_block_allocator.cpp",
         lambda s: value(s.is_split and s.schedule.maxPreemptCount > 0,
                         s.schedule.maxPreemptCount)),
)
# fmt: on
