"""For each rule the smallest config that breaks it and the smallest that keeps it, and which rules break together.

A change is `field: value` on `BASE`, which breaks nothing. `Deploy.`, `Backend.`, `Schedule.` and `Server.` name
another section than ModelConfig, `--` an option; `...` takes a field away. `with_` are the rules that such a config
cannot help breaking too. `topics` is what the rule looks at: cases that share no topic do not touch each other,
except that one with `+cp` or `+split` needs cp, or cp or sp, to be on.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

BASE: dict[str, Any] = {
    "ModelDeployConfig": {
        "maxSeqLen": 2560,
        "maxInputTokenLen": 2048,
        "ModelConfig": [
            {
                "modelName": "DeepSeek-R1_w8a8",
                "modelWeightPath": "no/such/folder",
                "worldSize": 16,
                "cpuMemSize": 5,
                "npuMemSize": -1,
                "backendType": "atb",
                "trustRemoteCode": False,
                "dp": 1,
                "cp": 2,
                "sp": 8,
                "tp": 8,
                "moe_ep": 16,
                "moe_tp": 1,
            }
        ],
    }
}
OPTIONS: dict[str, Any] = {"dtype": "float16"}


class Case(NamedTuple):
    topics: str
    breaks: dict[str, Any]
    keeps: Mapping[str, Any] = MappingProxyType({})
    with_: tuple[str, ...] = ()


def plugins(names: str, tokens: int | None = None, **more) -> dict[str, Any]:
    given = {"plugin_type": names} | ({} if tokens is None else {"num_speculative_tokens": tokens})
    return {"plugin_params": given, **more}


NZ = {"models": {"deepseekv2": {"kv_cache_options": {"enable_nz": True}}}}
MIX = {"Schedule.templateType": "Mix"}
DP2 = {"cp": 1, "dp": 2}
NO_SP = {"cp": 1, "sp": 1, "tp": 16}
CARDS = list(range(16))


def option(**parallel_options: int) -> dict[str, Any]:
    return {"models": {"deepseekv2": {"parallel_options": parallel_options}}}


def compatible(names: list[str]) -> bool:
    """Can these cases be put together, each breaking what it breaks alone?"""
    topics = [topic for name in names for topic in CASES[name].topics.split() if topic[0] != "+"]
    needs = {topic for name in names for topic in CASES[name].topics.split() if topic[0] == "+"}
    cp = min(CASES[name].breaks.get("cp", 2) for name in names)
    sp = min(CASES[name].breaks.get("sp", 8) for name in names)
    is_on = {"+cp": cp > 1, "+split": cp > 1 or sp > 1}
    return len(topics) == len(set(topics)) and all(is_on[need] for need in needs)


CASES: dict[str, Case] = {
    # sizes
    "dp-at-least-1": Case("sizes", {"dp": -1}, with_=("world-product",)),
    "cp-at-least-1": Case("sizes", {"cp": 0}, with_=("world-product",)),
    "sp-at-least-1": Case("sizes", {"sp": 0}, with_=("cp-sp-is-tp",)),
    "tp-at-least-1": Case("sizes", {"tp": 0}, with_=("world-product", "cp-sp-is-tp", "sp-is-tp")),
    "pp-at-least-1": Case("sizes", {"pp": 0}, {"pp": -1}),
    "moe_ep-at-least-1": Case("sizes", {"moe_ep": 0}),
    "moe_tp-at-least-1": Case("sizes", {"moe_tp": 0}, with_=("moe-product",)),
    "cp-1-or-2": Case("sizes", {"cp": 4, "worldSize": 32, "moe_ep": 32}, {"cp": 1, "worldSize": 8, "moe_ep": 8}),
    "cp-without-dp": Case("sizes", {"dp": 2, "worldSize": 32, "moe_ep": 32}, DP2),
    "cp-needs-sp": Case(
        "sizes", {"sp": 1, "tp": 1, "worldSize": 2, "moe_ep": 2}, {"sp": 2, "tp": 2, "worldSize": 4, "moe_ep": 4}
    ),
    "cp-sp-is-tp": Case("sizes", {"sp": 1}, with_=("cp-needs-sp",)),
    "sp-is-tp": Case("sizes", {**DP2, "sp": 4}, {**DP2, "sp": 1}),
    "world-product": Case("sizes", {"worldSize": 32, "moe_ep": 32}),
    "cp-without-pp": Case("sizes", {"pp": 2}, {"pp": 1}),
    "pp-without-dp": Case("sizes", {**DP2, "pp": 2}, {"cp": 1, "pp": 2}),
    "pp-product": Case("sizes", {"cp": 1, "pp": 4}, {"cp": 1, "pp": 2}),
    "pp-moe-fits": Case("sizes", {"cp": 1, "pp": 2, "moe_ep": 3}, {"cp": 1, "pp": 2, "moe_ep": 2}),
    "tp-in-a-node": Case("sizes nodes", {"--nodes": 4}, {"--nodes": 2}),
    "tp-divides-heads": Case(
        "sizes model",
        {"tp": 3, "sp": 3, "worldSize": 6, "moe_ep": 6},
        {"tp": 2, "sp": 2, "worldSize": 4, "moe_ep": 4},
    ),
    "moe-product": Case("sizes", {"moe_ep": 8}, {"moe_ep": 8, "moe_tp": 2}),
    "moe-tp-is-world": Case("sizes", {"moe_ep": ..., "moe_tp": ...}, {"moe_ep": ..., "moe_tp": 16}),
    "moe-tp-in-a-node": Case(
        "sizes nodes",
        {"--nodes": 4, "cp": 1, "dp": 4, "tp": 4, "sp": 1, "moe_ep": 2, "moe_tp": 8},
        {"--nodes": 4, "cp": 1, "dp": 4, "tp": 4, "sp": 1, "moe_ep": 4, "moe_tp": 4},
    ),
    "nodes-divide-world": Case("sizes nodes", {"--nodes": 3, "cp": 1, "dp": 16, "tp": 1, "sp": 1}, {"--nodes": 2}),
    "o-proj-in-a-node": Case("sizes nodes models", option(o_proj_local_tp=32), option(o_proj_local_tp=16)),
    "lm-head-without-tp": Case("sizes models", option(lm_head_local_tp=2), option(lm_head_local_tp=1)),
    "dense-in-a-node": Case(
        "sizes nodes models",
        {**DP2, "dp": 4, "worldSize": 32, "moe_ep": 32, "--nodes": 4, **option(dense_mlp_local_tp=16)},
        {**DP2, "dp": 4, "worldSize": 32, "moe_ep": 32, "--nodes": 2, **option(dense_mlp_local_tp=16)},
    ),
    "dense-divides-world": Case("sizes models", option(dense_mlp_local_tp=12), option(dense_mlp_local_tp=16)),
    "dense-above-tp": Case("sizes models", option(dense_mlp_local_tp=8), option(dense_mlp_local_tp=16)),
    # features
    "model-supported": Case(
        "model version +split", {"modelName": "DeepSeek-V3_w8a8"}, {"modelName": "DeepSeek-V3_w4a8"}
    ),
    "quantisation-known": Case("model +split", {"modelName": "DeepSeek-R1"}),
    "w4a8-disputed": Case(
        "model version +cp", {"modelName": "ds_r1_w4a8"}, {"modelName": "ds_r1_w4a8", "--version": "2.3.0"}
    ),
    "fp16-only": Case("dtype +split", {"--dtype": "bf16"}),
    "dtype-known": Case("dtype +split", {"--dtype": None}),
    "hardware-supported": Case("hardware +split", {"--hardware": "300i-duo"}, {"--hardware": "800I-A3"}),
    "cards-of-a-server": Case(
        "hardware sizes nodes", {"--hardware": "800i-a2"}, {"--hardware": "800i-a2", "--nodes": 2}
    ),
    "role-known": Case("role", {"Server.inferMode": "dmi"}, {"Server.inferMode": "dmi", "--roles": ["prefill"]}),
    "role-is-mode": Case(
        "role",
        {"Server.inferMode": "standard", "--roles": ["prefill"]},
        {"Server.inferMode": "dmi", "--roles": ["prefill"]},
    ),
    "decode-without-cp": Case(
        "role sizes plugins", {"--roles": ["decode"]}, {"--roles": ["decode"], **NO_SP}, with_=("decode-without-sp",)
    ),
    "decode-without-sp": Case(
        "role sizes plugins", {"--roles": ["decode"], **DP2}, {"--roles": ["decode"], **DP2, "sp": 1}
    ),
    "decode-without-prefix-cache": Case(
        "role sizes plugins models",
        {"--roles": ["decode"], **NO_SP, **plugins("prefix_cache"), **NZ},
        {"--roles": ["prefill"], **NO_SP, **plugins("prefix_cache"), **NZ},
    ),
    "hybrid-mtp-is-1": Case("role plugins version +split", plugins("mtp", 2), plugins("mtp", 1)),
    "hybrid-listed-2.1": Case(
        "role plugins version +cp sizes",
        {"--version": "2.1.RC1", **plugins("mtp", 1)},
        {"--version": "2.3.0", **plugins("mtp", 1)},
    ),
    "mtp-tokens": Case(
        "role plugins",
        {"--roles": ["prefill"], **plugins("mtp", 6)},
        {"--roles": ["prefill"], **plugins("mtp", 5)},
        with_=("mtp-tokens-documented",),
    ),
    "mtp-tokens-documented": Case(
        "role plugins", {"--roles": ["prefill"], **plugins("mtp", 3)}, {"--roles": ["prefill"], **plugins("mtp", 2)}
    ),
    "mtp-alone": Case("plugins version", plugins("mtp,la", 1), plugins("la")),
    "mtp-without-lora": Case("plugins lora", plugins("mtp", 1) | {"Deploy.maxLoras": 1}, {"Deploy.maxLoras": 1}),
    "prefix-cache-needs-nz": Case("plugins models model sizes", plugins("prefix_cache"), plugins("prefix_cache") | NZ),
    "prefix-cache-without-splitfuse": Case(
        "plugins models model template sizes", plugins("prefix_cache,splitfuse") | NZ | MIX, plugins("splitfuse") | MIX
    ),
    "prefix-cache-without-dp": Case(
        "plugins models model sizes", plugins("prefix_cache") | NZ | DP2, plugins("prefix_cache") | NZ | {"dp": 1}
    ),
    "prefix-cache-without-lora": Case(
        "plugins models model lora sizes",
        plugins("prefix_cache") | NZ | {"Deploy.LoraModules": [{}]},
        {"Deploy.LoraModules": [{}]},
    ),
    "async-alone": Case(
        "plugins async role", plugins("la") | {"--async_scheduling": True}, {"--async_scheduling": True}
    ),
    "async-with-splitfuse": Case(
        "plugins async template role",
        plugins("splitfuse") | MIX | {"--async_scheduling": True},
        plugins("splitfuse") | MIX,
    ),
    "async-on-decode": Case(
        "role async plugins", {"--roles": ["prefill"], "--async_scheduling": True}, {"--async_scheduling": True}
    ),
    "splitfuse-needs-mix": Case("plugins template", plugins("splitfuse"), plugins("splitfuse") | MIX),
    "layerwise-without-prefix-cache": Case(
        "plugins models model sizes layerwise",
        plugins("prefix_cache") | NZ | NO_SP | {"Server.layerwiseDisaggregated": True},
        plugins("prefix_cache") | NZ | NO_SP | {"Server.layerwiseDisaggregated": False},
    ),
    "layerwise-without-cp": Case(
        "sizes layerwise plugins",
        {"Server.layerwiseDisaggregated": True},
        {"Server.layerwiseDisaggregated": True, **NO_SP},
    ),
    # fields one by one
    "required-fields": Case("required", {"trustRemoteCode": ...}),
    "model-name": Case("model sizes", {"modelName": "llama 65b", **NO_SP}, {"modelName": "llama_65b", **NO_SP}),
    "instance-type": Case("instance", {"modelInstanceType": "Mock"}, {"modelInstanceType": "StandardMock"}),
    "backend-type": Case("backend", {"backendType": "vllm"}, {"backendType": "torch"}),
    "npu-mem-size": Case("memory", {"npuMemSize": 0}, {"npuMemSize": 8}),
    "world-size": Case(
        "sizes model",
        {"modelName": "a", "worldSize": 2**20 + 1, "cp": 1, "sp": 1, "tp": -1, "moe_ep": -1, "moe_tp": -1},
        {"modelName": "a", "worldSize": 2**20, "cp": 1, "sp": 1, "tp": -1, "moe_ep": -1, "moe_tp": -1},
    ),
    "cards-are-world": Case(
        "cards sizes nodes", {"Backend.npuDeviceIds": [CARDS[:8]]}, {"Backend.npuDeviceIds": [CARDS]}
    ),
    "cards-of-a-node": Case(
        "cards sizes nodes",
        {"Backend.multiNodesInferEnabled": True, "Backend.npuDeviceIds": [CARDS[:8]]},
        {"Backend.multiNodesInferEnabled": True, "Backend.npuDeviceIds": [CARDS[:8]], "worldSize": 8},
    ),
    "cards-once": Case(
        "cards sizes nodes", {"Backend.npuDeviceIds": [[*CARDS[:15], 0]]}, {"Backend.npuDeviceIds": [CARDS]}
    ),
    "instance-number": Case(
        "cards sizes nodes",
        {"Backend.npuDeviceIds": [CARDS], "Backend.modelInstanceNumber": 2},
        {"Backend.npuDeviceIds": [CARDS, CARDS], "Backend.modelInstanceNumber": 2},
    ),
    "max-seq-len": Case("lengths", {"Deploy.maxSeqLen": 0}),
    "max-input-token-len": Case("lengths", {"Deploy.maxInputTokenLen": 0}, {"Deploy.maxInputTokenLen": 1}),
    "input-within-sequence": Case("lengths", {"Deploy.maxInputTokenLen": 2561}, {"Deploy.maxInputTokenLen": 2560}),
    "lengths-aligned": Case("lengths sizes", {"Deploy.maxSeqLen": 2561}, {"Deploy.maxSeqLen": 2564}),
    "truncation": Case("truncation version", {"Deploy.truncation": 2}, {"Deploy.truncation": True}),
    "truncation-was-bool": Case(
        "truncation version", {"Deploy.truncation": 0, "--version": "2.3.0"}, {"Deploy.truncation": 0}
    ),
    "plugin-params-length": Case(
        "plugins", {"plugin_params": "{" + 1023 * " " + "}"}, {"plugin_params": "{" + 1022 * " " + "}"}
    ),
    "cacheBlockSize-range": Case("block model", {"Schedule.cacheBlockSize": 129}, with_=("cache-block-is-128",)),
    "cache-block-is-128": Case("block model", {"Schedule.cacheBlockSize": 64}, {"Schedule.cacheBlockSize": 128}),
    "maxPrefillTokens-range": Case("prefill", {"Schedule.maxPrefillTokens": 0}, {"Schedule.maxPrefillTokens": 4}),
    "maxBatchSize-range": Case("batch", {"Schedule.maxBatchSize": 819201}, {"Schedule.maxBatchSize": 819200}),
    "prefillPolicyType-range": Case(
        "prefill policy", {"Schedule.prefillPolicyType": 1}, {"Schedule.prefillPolicyType": 0}
    ),
    "decodePolicyType-range": Case("decode policy", {"Schedule.decodePolicyType": 1}, {"Schedule.decodePolicyType": 0}),
    "no-swap": Case("swap sizes", {"Schedule.maxPreemptCount": 1}, {"Schedule.maxPreemptCount": 1, **NO_SP}),
}


def build(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document and the options of some changes."""
    document, options = copy.deepcopy(BASE), dict(OPTIONS)
    deploy = document["ModelDeployConfig"]
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        if name.startswith("--"):
            options[name[2:]] = value
            continue
        target = {
            "": lambda: deploy["ModelConfig"][0],
            "Deploy": lambda: deploy,
            "Backend": lambda: document.setdefault("BackendConfig", {}),
            "Schedule": lambda: document.setdefault("BackendConfig", {}).setdefault("ScheduleConfig", {}),
            "Server": lambda: document.setdefault("ServerConfig", {}),
        }[section]()
        if value is ...:
            del target[field]
        else:
            target[field] = copy.deepcopy(value)
    return document, options
