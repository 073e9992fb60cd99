"""The cases of the rules on single fields: what the server checks of each section before it starts."""

import json
from pathlib import Path
from typing import Any

from mindie_build import CARDS, LA, MIX, NO_SP, Case, plugins

EXAMPLE = json.loads((Path(__file__).parents[2] / "examples" / "deepseek-r1-cp2.json").read_text())
BACKEND = {name: value for name, value in EXAMPLE["BackendConfig"].items() if name != "ModelDeployConfig"}
WHOLE = {"Root.Version": "1.0.0", "Root.ServerConfig": EXAMPLE["ServerConfig"], "Root.BackendConfig": BACKEND}
SECTIONS = ("required-server-fields", "required-backend-fields", "required-schedule-fields")

MULTI = {"Backend.multiNodesInferEnabled": True}
NODES = MULTI | {"Backend.npuDeviceIds": [CARDS[:8]], "worldSize": 8, "--nodes": 2}
LWD = {"Server.layerwiseDisaggregated": True, **NO_SP}
LAYERWISE = "layerwise sizes template backend nodes plugins"
DECODE = {"Motor.role": "decode", **NO_SP}


RANGES: dict[str, tuple[int, int, dict[str, Any]]] = {}
"""Field → its least and its largest value, and what else must be so."""


def a_range(field: str, low: int, high: int, topics: str, section: str = "Schedule", **more: Any) -> dict[str, Case]:
    """The case of a range: the number above it, and its ends are fine."""
    name = f"{section}.{field}"
    RANGES[name] = (low, high, more)
    return {f"{field}-range": Case(topics, {name: high + 1} | more, {name: low} | more)}


def motor(field: str, wrong: int, right: int, role: dict[str, Any]) -> dict[str, Case]:
    return {f"{field}-range": Case("alone", {f"Motor.{field}": wrong} | role, {f"Motor.{field}": right} | role)}


STARTUP: dict[str, Case] = {
    # what must be given
    "format-of-version": Case("alone", {"--version": "1.0.RC2", **NO_SP}, {"--version": "1.0.RC3", **NO_SP}),
    "required-fields": Case("required", {"trustRemoteCode": ...}),
    **{
        name: Case("alone", {"Root.Version": "1.0.0"}, WHOLE, tuple(other for other in SECTIONS if other != name))
        for name in SECTIONS
    },
    # ServerConfig
    "infer-mode": Case("role", {"Server.inferMode": "prefill"}, {"Server.inferMode": "standard"}),
    "ipAddress-is-one": Case("address", {"Server.ipAddress": "127.0.0"}, {"Server.ipAddress": "::1"}),
    "managementIpAddress-is-one": Case(
        "management", {"Server.managementIpAddress": "{ip}"}, {"Server.managementIpAddress": "[fe80::1]"}
    ),
    "ipAddress-is-not-zero": Case(
        "address zero",
        {"Server.ipAddress": "0.0.0.0"},
        {"Server.ipAddress": "0.0.0.0", "Server.allowAllZeroIpListening": True},
    ),
    "managementIpAddress-is-not-zero": Case(
        "management zero",
        {"Server.managementIpAddress": "::"},
        {"Server.managementIpAddress": "::", "Server.allowAllZeroIpListening": True},
    ),
    **a_range("port", 1024, 65535, "port", "Server"),
    **a_range("managementPort", 1024, 65535, "managementPort", "Server"),
    **a_range("metricsPort", 1024, 65535, "metricsPort", "Server"),
    **a_range("interCommPort", 1024, 65535, "interCommPort", "Server"),
    "port-is-not-the-nodes": Case("port", {"Server.port": 1120}, {"Server.port": 1121}),
    **a_range("maxLinkNum", 1, 4096, "links", "Server"),
    **a_range("tokenTimeout", 1, 3600, "tokenTimeout", "Server"),
    **a_range("e2eTimeout", 1, 65535, "e2eTimeout", "Server"),
    **a_range("maxRequestLength", 1, 100, "request", "Server"),
    **a_range("maxJsonDepth", 10, 100, "depth version", "Server"),
    "npuUsageThreshold-range": Case(
        "health", {"Server.HealthCheckConfig": {"npuUsageThreshold": 101}}, {"Server.HealthCheckConfig": {}}
    ),
    "certificate-lists": Case(
        "tls",
        {"Server.httpsEnabled": True, "Server.tlsCaFile": []},
        {"Server.httpsEnabled": True, "Server.tlsCaFile": ["ca.pem"]},
    ),
    "layerwiseDisaggregatedRoleType-word": Case(
        "layerwise-role",
        {"Server.layerwiseDisaggregatedRoleType": "boss"},
        {"Server.layerwiseDisaggregatedRoleType": "slave"},
    ),
    "layerwise-addresses": Case(
        LAYERWISE,
        LWD | {"Server.layerwiseDisaggregatedSlaveIpAddress": ["0.0.0.0"]},
        LWD | {"Server.layerwiseDisaggregatedSlaveIpAddress": ["10.0.0.1"]},
    ),
    "layerwise-alone": Case(LAYERWISE, LWD | {"Schedule.supportSelectBatch": True}, LWD),
    # BackendConfig
    "backend-name": Case("backendName", {"Backend.backendName": "llm__engine"}, {"Backend.backendName": "llm_engine"}),
    "modelInstanceNumber-range": Case(
        "cards nodes", {"Backend.modelInstanceNumber": 11}, {"Backend.modelInstanceNumber": 1}
    ),
    **a_range("tokenizerProcessNumber", 1, 32, "tokenizer", "Backend"),
    **a_range("multiNodesInferPort", 1024, 65535, "port", "Backend"),
    "kv-pool-backend": Case(
        "pool", {"Backend.kvPoolConfig": {"backend": "redis"}}, {"Backend.kvPoolConfig": {"backend": "mooncake"}}
    ),
    "kv-pool-path": Case(
        "pool",
        {"Backend.kvPoolConfig": {"configPath": 501 * "a"}},
        {"Backend.kvPoolConfig": {"configPath": 500 * "a"}},
    ),
    # ScheduleConfig
    "templateType-word": Case("template", {"Schedule.templateType": "mix"}, MIX),
    "templateName-word": Case(
        "templateName", {"Schedule.templateName": "LLM"}, {"Schedule.templateName": "Standard_LLM"}
    ),
    "cacheBlockSize-range": Case(
        "block model backend", {"Schedule.cacheBlockSize": 129}, with_=("cache-block-is-128",)
    ),
    "cache-block-is-128": Case(
        "block model backend", {"Schedule.cacheBlockSize": 64}, {"Schedule.cacheBlockSize": 128}
    ),
    "maxPrefillTokens-range": Case(
        "prefill lengths template",
        {"Schedule.maxPrefillTokens": 0},
        {"Schedule.maxPrefillTokens": 4, "Deploy.maxInputTokenLen": 4},
        with_=("prefill-tokens-hold-a-prompt",),
    ),
    "prefill-tokens-hold-a-prompt": Case(
        "prefill lengths template", {"Schedule.maxPrefillTokens": 2044}, {"Schedule.maxPrefillTokens": 2048}
    ),
    "prefill-tokens-with-mix": Case(
        "prefill lengths template version",
        {"Schedule.maxPrefillTokens": 2044, "--version": "2.3.0", **MIX},
        {"Schedule.maxPrefillTokens": 2044, **MIX},
    ),
    **a_range("maxBatchSize", 1, 819200, "batch"),
    "maxBatchSize-was-5000": Case(
        "batch version",
        {"Schedule.maxBatchSize": 5001, "--version": "2.3.0"},
        {"Schedule.maxBatchSize": 5000, "--version": "2.3.0"},
    ),
    "prefill-batch-within-batch": Case(
        "batch",
        {"Schedule.maxPrefillBatchSize": 21, "Schedule.maxBatchSize": 20},
        {"Schedule.maxPrefillBatchSize": 0, "Schedule.maxBatchSize": 20},
    ),
    "preempt-within-batch": Case(
        "batch swap sizes",
        {"Schedule.maxPreemptCount": 21, "Schedule.maxBatchSize": 20, **NO_SP},
        {"Schedule.maxPreemptCount": 20, "Schedule.maxBatchSize": 20, **NO_SP},
    ),
    "preempt-needs-cpu": Case(
        "swap memory sizes",
        {"Schedule.maxPreemptCount": 1, "cpuMemSize": 0, **NO_SP},
        {"Schedule.maxPreemptCount": 1, "cpuMemSize": 1, **NO_SP},
    ),
    "no-swap": Case("swap sizes", {"Schedule.maxPreemptCount": 1}, {"Schedule.maxPreemptCount": 1, **NO_SP}),
    "max-iter-times": Case("iterations", {"Schedule.maxIterTimes": 0}, {"Schedule.maxIterTimes": 1}),
    "max-iter-within-sequence": Case(
        "iterations lengths", {"Schedule.maxIterTimes": 2561}, {"Schedule.maxIterTimes": 2560}
    ),
    **a_range("prefillTimeMsPerReq", 0, 1000, "prefillTime"),
    **a_range("decodeTimeMsPerReq", 0, 1000, "decodeTime"),
    **a_range("prefillPolicyType", 0, 0, "prefillPolicy"),
    **a_range("decodePolicyType", 0, 0, "decodePolicy"),
    **a_range("maxQueueDelayMicroseconds", 500, 1000000, "queue"),
    **a_range("maxFirstTokenWaitTime", 0, 3600000, "first"),
    "maxN-range": Case(
        "batch version",
        {"Schedule.maxN": 8193, "Schedule.maxBatchSize": 9000},
        {"Schedule.maxN": 8192, "Schedule.maxBatchSize": 9000},
    ),
    "max-n-within-batch": Case(
        "batch version",
        {"Schedule.maxN": 21, "Schedule.maxBatchSize": 20, "Schedule.maxPrefillBatchSize": 20},
        {"Schedule.maxN": 20, "Schedule.maxBatchSize": 20, "Schedule.maxPrefillBatchSize": 20},
    ),
    "policy-type": Case("policy", {"Schedule.policyType": 3}, {"Schedule.policyType": 7}),
    **a_range("stageSelectPolicy", 0, 2, "stage"),
    **a_range("prefillExpectedTime", 1, 10000, "expectedPrefill"),
    **a_range("decodeExpectedTime", 1, 10000, "expectedDecode"),
    **a_range("maxNumPartialPrefills", 1, 64, "partial"),
    "long-partial-within-partial": Case(
        "partial",
        {"Schedule.maxLongPartialPrefills": 9, "Schedule.maxNumPartialPrefills": 8},
        {"Schedule.maxLongPartialPrefills": 64},
    ),
    **a_range("longPrefillTokenThreshold", 1, 8192, "threshold"),
    # ModelDeployConfig and ModelConfig
    "model-name": Case("model sizes", {"modelName": "llama 65b", **NO_SP}, {"modelName": "llama_65b", **NO_SP}),
    "weights-are-named": Case(
        "weights", {"modelWeightPath": "/path/to/weights"}, {"modelWeightPath": "/path/tools/weights"}
    ),
    "instance-type": Case("instance", {"modelInstanceType": "Mock"}, {"modelInstanceType": "StandardMock"}),
    "backend-type": Case("backend", {"backendType": "vllm"}, {"backendType": "ms"}),
    "npu-mem-size": Case("memory", {"npuMemSize": 0}, {"npuMemSize": 8}),
    "world-size": Case(
        "sizes model",
        {"modelName": "a", "worldSize": 2**20 + 1, "cp": 1, "sp": 1, "tp": -1, "moe_ep": -1, "moe_tp": -1},
        {"modelName": "a", "worldSize": 2**20, "cp": 1, "sp": 1, "tp": -1, "moe_ep": -1, "moe_tp": -1},
    ),
    "lora-modules": Case(
        "lora plugins",
        {"Deploy.LoraModules": [{"name": "a b"}]},
        {"Deploy.LoraModules": [{"name": "a", "baseModelName": "DeepSeek-R1_w8a8"}]},
    ),
    "max-seq-len": Case("lengths", {"Deploy.maxSeqLen": 0}),
    "max-input-token-len": Case("lengths prefill", {"Deploy.maxInputTokenLen": 0}, {"Deploy.maxInputTokenLen": 1}),
    "input-within-sequence": Case("lengths", {"Deploy.maxInputTokenLen": 2561}, {"Deploy.maxInputTokenLen": 2560}),
    "lengths-aligned": Case("lengths sizes", {"Deploy.maxSeqLen": 2561}, {"Deploy.maxSeqLen": 2564}),
    "truncation": Case("truncation version", {"Deploy.truncation": 2}, {"Deploy.truncation": True}),
    "truncation-was-bool": Case(
        "truncation version", {"Deploy.truncation": 0, "--version": "2.3.0"}, {"Deploy.truncation": 0}
    ),
    # nodes and cards
    "cards-are-world": Case(
        "cards sizes nodes", {"Backend.npuDeviceIds": [CARDS[:8]]}, {"Backend.npuDeviceIds": [CARDS]}
    ),
    "cards-of-a-node": Case(
        "cards sizes nodes version",
        MULTI | {"Backend.npuDeviceIds": [CARDS[:8]], "--version": "2.3.0"},
        NODES | {"--version": "2.3.0"},
    ),
    "cards-once": Case(
        "cards sizes nodes", {"Backend.npuDeviceIds": [[*CARDS[:15], 0]]}, {"Backend.npuDeviceIds": [CARDS]}
    ),
    "instance-number": Case(
        "cards sizes nodes",
        {"Backend.npuDeviceIds": [CARDS], "Backend.modelInstanceNumber": 2},
        {"Backend.npuDeviceIds": [CARDS, CARDS], "Backend.modelInstanceNumber": 2},
    ),
    "nodes-of-a-rank-table": Case("sizes nodes", MULTI | {"--nodes": 1}, MULTI | {"--nodes": 2}),
    "dp-on-every-node": Case(
        "cards sizes nodes version", NODES | NO_SP | {"tp": ...}, NODES | NO_SP | {"tp": 8, "dp": 2}
    ),
    "cards-of-a-server": Case(
        "hardware sizes nodes", {"--hardware": "Atlas 800I A2"}, {"--hardware": "Atlas 800I A2", "--nodes": 2}
    ),
    "cards-of-a-pod": Case("alone", {"Motor.p_pod_npu_num": 8}, {"Motor.p_pod_npu_num": 16}),
    "motor-hardware": Case("alone", {"Motor.hardware_type": "800I_A1"}, {"Motor.hardware_type": "800I_A3"}),
    **motor("p_instances_num", 21, 20, {}),
    **motor("d_instances_num", 0, 20, DECODE),
    **motor("single_p_instance_pod_num", 9, 8, {}),
    **motor("single_d_instance_pod_num", 21, 20, DECODE),
    **motor("p_pod_npu_num", 17, 16, {}),
    **motor("d_pod_npu_num", 17, 16, DECODE),
    **motor("prefill_distribute_enable", 2, 1, {}),
    **motor("decode_distribute_enable", -1, 0, DECODE),
    # plugin_params
    "plugin-params-length": Case(
        "plugins",
        {"plugin_params": '{"plugin_type":""' + 1007 * " " + "}"},
        {"plugin_params": '{"plugin_type":""' + 1006 * " " + "}"},
    ),
    "plugin-type-given": Case("plugins", {"plugin_params": "{}"}, {"plugin_params": ""}),
    "plugin-types": Case("plugins", plugins("MTP", 1), plugins("mtp", 1)),
    "mtp-tokens-given": Case("plugins", plugins("mtp"), plugins("mtp", 1)),
    "plugin-fields-given": Case("plugins", plugins("la", level=2), plugins("la", **LA)),
    "speculation-within-gamma": Case(
        "plugins",
        plugins("memory_decoding", decoding_length=9) | {"Deploy.speculationGamma": 8},
        plugins("la", **LA) | {"Deploy.speculationGamma": 4},
    ),
}
