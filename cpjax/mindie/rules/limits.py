"""ModelDeployConfig and ModelConfig, field by field: names, paths, memory and lengths."""

import re

from cpjax.mindie.rules.rule import CP_PAGE, DEPLOY, PARAMETERS, Rule, Setting, value
from cpjax.mindie.rules.schedule import MOST_TOKENS

INSTANCE_TYPES = ("Standard", "StandardMock", "TargetModel", "AssistantModel")
_NAME = re.compile(r"(?=.{1,256}\Z)[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", re.ASCII)
_PLACEHOLDER = re.compile(r"[<>{}$*?]|\.\.\.|…|路径|权重|(?<![a-z])(x{2,}|path[-_/]?to|your)(?![a-z])", re.IGNORECASE)


def _unaligned(s: Setting) -> list[str]:
    """Lengths that the server will round up to a multiple of 2·cp."""
    cp, schedule = s.sizes.cp, s.schedule
    lengths = {"maxSeqLen": s.deployment.max_seq_len, "maxPrefillTokens": schedule.maxPrefillTokens}
    return [f"{name} {length}" for name, length in lengths.items() if cp > 1 and length % (2 * cp)]


def _loras(s: Setting) -> list[str]:
    """What is wrong with the adapters' entries."""
    found = []
    for number, entry in enumerate(s.deployment.deploy.LoraModules or []):
        if not isinstance(entry, dict):
            continue
        name, base = entry.get("name"), entry.get("baseModelName")
        if isinstance(name, str) and not _NAME.fullmatch(name):
            found.append(f"name {name[:40]!r} of entry {number}")
        if isinstance(base, str) and base != s.deployment.model_name:
            found.append(f"baseModelName {base[:40]!r} of entry {number}")
    return found


# fmt: off
LIMITS: tuple[Rule, ...] = (
    Rule("model-name", "modelName", "error", True,
         "modelName has 1 to 256 of A-Z a-z 0-9 _ . -, a letter or digit at both ends", "rename it", DEPLOY,
         lambda s: value(not _NAME.fullmatch(s.deployment.model_name), repr(s.deployment.model_name[:40]))),
    Rule("weights-are-named", "modelWeightPath", "warning", False, "modelWeightPath looks like a placeholder of a "
         "page; the server refuses a folder that is not there", "write the folder of the weights", DEPLOY,
         lambda s: value(bool(_PLACEHOLDER.search(s.deployment.model_weight_path or "")),
                         s.deployment.model_weight_path)),
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
    Rule("lora-modules", "LoraModules", "error", True, "an entry of LoraModules has a name as modelName may be, and "
         "modelName as baseModelName", "correct it", DEPLOY, lambda s: value(bool(_loras(s)), ", ".join(_loras(s)))),
    Rule("max-seq-len", "maxSeqLen", "error", True, "maxSeqLen is not 0", "set it to prompt and answer", DEPLOY,
         lambda s: value(s.deployment.max_seq_len == 0, 0)),
    Rule("max-input-token-len", "maxInputTokenLen", "error", True, f"maxInputTokenLen is 1 to {MOST_TOKENS}",
         "set it to the longest prompt", DEPLOY,
         lambda s: value(not 1 <= s.deployment.max_input_token_len <= MOST_TOKENS, s.deployment.max_input_token_len)),
    Rule("input-within-sequence", "maxInputTokenLen", "warning", False, "a prompt of maxInputTokenLen should leave "
         "room for an answer in maxSeqLen", "make maxSeqLen larger", PARAMETERS,
         lambda s: value(s.deployment.max_input_token_len > s.deployment.max_seq_len > 0,
                         f"{s.deployment.max_input_token_len}, maxSeqLen {s.deployment.max_seq_len}")),
    Rule("lengths-aligned", "maxSeqLen", "warning", False, "maxSeqLen and maxPrefillTokens are multiples of 2 · cp; "
         "the server silently rounds them up", "round them up here", "llm_manager_impl.cpp, UpdateEngineConfig",
         lambda s: value(bool(_unaligned(s)), ", ".join(_unaligned(s)))),
    Rule("truncation", "truncation", "error", True, "truncation is -1, 0, 1, true or false", "set it to 0",
         PARAMETERS,
         lambda s: value(s.deployment.deploy.truncation not in (-1, 0, 1), s.deployment.deploy.truncation)),
    Rule("truncation-was-bool", "truncation", "warning", False, "before head, truncation is true or false",
         "set it to false", f"the example of {CP_PAGE} of 2.1.RC1 and 2.3.0",
         lambda s: value("truncation" in s.deployment.deploy.model_fields_set
                         and not isinstance(s.deployment.deploy.truncation, bool), s.deployment.deploy.truncation),
         before="head"),
)
# fmt: on
