"""BackendConfig and its ScheduleConfig: batches, queues, templates, processes, the pool of keys and values."""

import re

from cpjax.mindie.rules.rule import (
    BACKEND,
    MANAGER,
    PARAMETERS,
    SCHEDULE,
    Rule,
    Setting,
    given,
    in_range,
    one_of,
    value,
)

MOST_TOKENS = 4 * 1024 * 1024
_POOLS = ("", "unifiedcache", "mooncake", "memcache")
_BACKEND_NAME = re.compile(r"(?=.{1,50}\Z)[a-z]+(_[a-z]+)*")


def _both(s: Setting, small: str, large: str, *, is_wrong: bool = True) -> str | None:
    """`small` above `large`, where the file has both."""
    low, high = given(s, small), given(s, large)
    wrong = is_wrong and low is not None and high is not None and low > high
    return value(wrong, f"{small} {low}, {large} {high}")


def _is_mix(s: Setting) -> bool:
    return s.schedule.templateType == "Mix"


# fmt: off
SCHEDULES: tuple[Rule, ...] = (
    Rule("backend-name", "backendName", "error", True, "backendName has at most 50 characters, a-z and single _ "
         "between them", 'set it to "mindieservice_llm_engine"', BACKEND,
         lambda s: value(s.backend.backendName is not None and not _BACKEND_NAME.fullmatch(s.backend.backendName),
                         repr((s.backend.backendName or "")[:60]))),
    in_range("modelInstanceNumber", 1, 10, BACKEND),
    in_range("tokenizerProcessNumber", 1, 32, BACKEND),
    in_range("multiNodesInferPort", 1024, 65535, BACKEND),
    Rule("kv-pool-backend", "kvPoolConfig", "error", True, "the backend of kvPoolConfig is unifiedcache, mooncake, "
         "memcache or empty", "give it such a value, or take kvPoolConfig out", BACKEND,
         lambda s: value(s.backend.kvPoolConfig.backend not in (None, *_POOLS), repr(s.backend.kvPoolConfig.backend))),
    Rule("kv-pool-path", "kvPoolConfig", "error", True, "configPath of kvPoolConfig has at most 500 characters",
         "shorten it", BACKEND, lambda s: value(len(s.backend.kvPoolConfig.configPath or "") > 500,
                                                f"{len(s.backend.kvPoolConfig.configPath or '')} characters")),
    one_of("templateType", ("Standard", "Mix"), SCHEDULE),
    one_of("templateName", ("Standard_LLM",), SCHEDULE),
    in_range("cacheBlockSize", 1, 128, SCHEDULE),
    Rule("cache-block-is-128", "cacheBlockSize", "error", True, "DeepSeek models need cacheBlockSize 128",
         "set it to 128", "multi_latent_attention_operation.cpp of ATB",
         lambda s: value(s.is_deepseek and not s.is_torch and s.schedule.cacheBlockSize != 128,
                         s.schedule.cacheBlockSize)),
    in_range("maxPrefillTokens", 1, MOST_TOKENS, SCHEDULE),
    Rule("prefill-tokens-hold-a-prompt", "maxPrefillTokens", "error", True, "maxPrefillTokens is at least "
         "maxInputTokenLen (except with templateType Mix)", "make maxPrefillTokens larger, or maxInputTokenLen smaller",
         f"{MANAGER}; {PARAMETERS}",
         lambda s: _both(s, "maxInputTokenLen", "maxPrefillTokens", is_wrong=not _is_mix(s))),
    Rule("prefill-tokens-with-mix", "maxPrefillTokens", "warning", False, "earlier code than head's refuses "
         "maxPrefillTokens below maxInputTokenLen with templateType Mix too", "make maxPrefillTokens larger", MANAGER,
         lambda s: _both(s, "maxInputTokenLen", "maxPrefillTokens", is_wrong=_is_mix(s)), before="head"),
    in_range("maxBatchSize", 1, 819200, SCHEDULE),
    Rule("maxBatchSize-was-5000", "maxBatchSize", "warning", True, "earlier code than head's takes at most 5000; the "
         "page has 819200", "make maxBatchSize smaller", f"{SCHEDULE} against {PARAMETERS}",
         lambda s: value(5000 < s.schedule.maxBatchSize <= 819200, s.schedule.maxBatchSize), before="head"),
    Rule("prefill-batch-within-batch", "maxPrefillBatchSize", "error", True, "maxPrefillBatchSize is at most "
         "maxBatchSize (0: the same)", "make maxPrefillBatchSize smaller", f"{SCHEDULE}; {PARAMETERS}",
         lambda s: _both(s, "maxPrefillBatchSize", "maxBatchSize")),
    Rule("preempt-within-batch", "maxPreemptCount", "error", True, "maxPreemptCount is at most maxBatchSize",
         "make it smaller; 0 turns it off", f"{SCHEDULE}; {PARAMETERS}",
         lambda s: _both(s, "maxPreemptCount", "maxBatchSize")),
    Rule("preempt-needs-cpu", "maxPreemptCount", "error", True, "maxPreemptCount above 0 needs cpuMemSize above 0",
         "set maxPreemptCount to 0, or cpuMemSize to GB that the host has", MANAGER,
         lambda s: value(s.schedule.maxPreemptCount > 0 and s.model.cpuMemSize == 0,
                         f"maxPreemptCount {s.schedule.maxPreemptCount}, cpuMemSize 0")),
    Rule("no-swap", "maxPreemptCount", "error", True, "cp · sp > 1 cannot swap to the CPU: maxPreemptCount 0",
         "set it to 0", "cpu_npu_block_allocator.cpp",
         lambda s: value(s.is_split and s.schedule.maxPreemptCount > 0, s.schedule.maxPreemptCount)),
    Rule("max-iter-times", "maxIterTimes", "error", True, "maxIterTimes is not 0", "set it to the tokens of an answer",
         f"{MANAGER}; {PARAMETERS}", lambda s: value(s.schedule.maxIterTimes == 0, 0)),
    Rule("max-iter-within-sequence", "maxIterTimes", "warning", False, "maxIterTimes is at most maxSeqLen",
         "make it smaller", PARAMETERS, lambda s: _both(s, "maxIterTimes", "maxSeqLen")),
    in_range("prefillTimeMsPerReq", 0, 1000, SCHEDULE),
    in_range("decodeTimeMsPerReq", 0, 1000, SCHEDULE),
    in_range("prefillPolicyType", 0, 0, "scheduler.cpp"),
    in_range("decodePolicyType", 0, 0, "scheduler.cpp"),
    in_range("maxQueueDelayMicroseconds", 500, 1000000, SCHEDULE),
    in_range("maxFirstTokenWaitTime", 0, 3600000, SCHEDULE),
    in_range("maxN", 1, 8192, SCHEDULE, "head"),
    Rule("max-n-within-batch", "maxN", "error", True, "maxN is at most maxBatchSize", "make maxN smaller", SCHEDULE,
         lambda s: _both(s, "maxN", "maxBatchSize"), "head"),
    Rule("policy-type", "policyType", "error", True, "policyType is 0 or 4 to 7", "set it to 0", SCHEDULE,
         lambda s: value(given(s, "policyType") not in (None, 0, 4, 5, 6, 7), s.schedule.policyType)),
    in_range("stageSelectPolicy", 0, 2, SCHEDULE),
    in_range("prefillExpectedTime", 1, 10000, SCHEDULE),
    in_range("decodeExpectedTime", 1, 10000, SCHEDULE),
    in_range("maxNumPartialPrefills", 1, 64, SCHEDULE),
    Rule("long-partial-within-partial", "maxLongPartialPrefills", "error", True, "maxLongPartialPrefills is 1 to "
         "maxNumPartialPrefills (64 where that is not given)", "make it smaller", SCHEDULE,
         lambda s: value(given(s, "maxLongPartialPrefills") is not None and not
                         1 <= (s.schedule.maxLongPartialPrefills or 0) <= (s.schedule.maxNumPartialPrefills or 64),
                         s.schedule.maxLongPartialPrefills)),
    in_range("longPrefillTokenThreshold", 1, 8192, SCHEDULE),
)
# fmt: on
