"""For each rule the smallest config that breaks it and the smallest that keeps it, and which rules break together."""

from mindie_build import DP2, LA, MIX, NO_SP, NZ, Case, option, plugins
from mindie_startup_cases import STARTUP


def compatible(names: list[str]) -> bool:
    """Can these cases be put together, each breaking what it breaks alone?"""
    topics = [topic for name in names for topic in CASES[name].topics.split() if topic[0] != "+"]
    needs = {topic for name in names for topic in CASES[name].topics.split() if topic[0] == "+"}
    cp = min(CASES[name].breaks.get("cp", 2) for name in names)
    sp = min(CASES[name].breaks.get("sp", 8) for name in names)
    is_on = {"+cp": cp > 1, "+split": cp > 1 or sp > 1}
    if "alone" in topics:
        return len(names) == 1
    return len(topics) == len(set(topics)) and all(is_on[need] for need in needs)


MICRO = {"models": {"deepseekv2": {"stream_options": {"micro_batch": True}}}}
LONG = {"Deploy.maxSeqLen": 128000}
TORCH = {"backendType": "torch", **DP2, "sp": 1}
V32 = {"backendType": "torch", "modelName": "DeepSeek-V3.2_w8a8", "sp": 1}

CASES: dict[str, Case] = STARTUP | {
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
    # sizes with backend torch
    "torch-sizes-divide": Case(
        "sizes backend", TORCH | {"sp": 3}, TORCH | {"moe_ep": 8, "moe_tp": 2}, with_=("torch-decode-without-sp",)
    ),
    "torch-moe-product": Case("sizes backend", TORCH | {"moe_tp": ...}, TORCH | {"moe_ep": ..., "moe_tp": ...}),
    "torch-world-product": Case("sizes backend", TORCH | {"tp": 4}, TORCH | {"tp": 4, "dp": 4}),
    "torch-without-pp": Case("sizes backend", TORCH | {"pp": 2}, TORCH | {"pp": 1}),
    "torch-decode-without-sp": Case("sizes backend role", TORCH | {"sp": 8}, TORCH | {"sp": 1}),
    "torch-sp-undocumented": Case(
        "sizes backend role plugins", TORCH | {"sp": 8, "--roles": ["prefill"]}, TORCH | {"--roles": ["prefill"]}
    ),
    "torch-cp-without-dp": Case("sizes backend model version", V32 | {"dp": 2, "tp": 4}, V32 | {"cp": 4, "tp": 4}),
    "torch-cp-alone": Case("sizes backend model version async", V32 | {"--async_scheduling": True}, V32),
    # features
    "model-supported": Case(
        "model version +split", {"modelName": "DeepSeek-V3_w8a16"}, {"modelName": "DeepSeek-V3_w4a8"}
    ),
    "model-known": Case("model +split", {"modelName": "r1"}, {"modelName": "r1", "modelWeightPath": "a/ds_r1_w8a8/"}),
    "cp-first-seen": Case("alone", {"--version": "2.0.RC2"}, {"--version": "2.0.RC2", **NO_SP}),
    "v3-w8a8-disputed": Case(
        "model version +split", {"modelName": "DeepSeek-V3_w8a8"}, {"modelName": "DeepSeek-V3_w8a8", **NO_SP}
    ),
    "v32-needs-torch": Case(
        "model version backend sizes",
        {"modelName": "DeepSeek-V3.2_w8a8"},
        {"modelName": "DeepSeek-V3.2_w8a8", "backendType": "torch", "sp": 1},
    ),
    "v32-without-w4a8": Case(
        "model version backend sizes",
        {"modelName": "DeepSeek-V3.2_w4a8", **TORCH},
        {"modelName": "DeepSeek-V3.2_w8a8", **TORCH},
    ),
    "cp-with-torch": Case("model backend sizes", {"backendType": "torch", "sp": 1}, TORCH),
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
        "role async",
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
    "mtp-alone": Case("plugins version", plugins("mtp,la", 1, **LA), plugins("la", **LA)),
    "mtp-long-disputed": Case(
        "plugins version lengths", plugins("mtp", 1) | LONG, plugins("mtp", 1) | LONG | {"Deploy.maxSeqLen": 65536}
    ),
    "mtp-without-lora": Case("plugins lora", plugins("mtp", 1) | {"Deploy.maxLoras": 1}, {"Deploy.maxLoras": 1}),
    "prefix-cache-needs-nz": Case("plugins models model sizes", plugins("prefix_cache"), plugins("prefix_cache") | NZ),
    "prefix-cache-with-splitfuse": Case(
        "plugins models model template sizes",
        plugins("prefix_cache,splitfuse") | NZ | MIX | NO_SP,
        plugins("splitfuse") | MIX | NO_SP,
    ),
    "prefix-cache-with-dp": Case(
        "plugins models model sizes", plugins("prefix_cache") | NZ | DP2, plugins("prefix_cache") | NZ | {"dp": 1}
    ),
    "prefix-cache-without-lora": Case(
        "plugins models model lora sizes",
        plugins("prefix_cache") | NZ | {"Deploy.LoraModules": [{}]},
        {"Deploy.LoraModules": [{}]},
    ),
    "async-alone": Case(
        "plugins async role", plugins("la", **LA) | {"--async_scheduling": True}, {"--async_scheduling": True}
    ),
    "async-with-splitfuse": Case(
        "plugins async template role sizes",
        plugins("splitfuse") | MIX | NO_SP | {"--async_scheduling": True},
        plugins("splitfuse") | MIX | NO_SP,
    ),
    "async-on-decode": Case(
        "role async plugins", {"--roles": ["prefill"], "--async_scheduling": True}, {"--async_scheduling": True}
    ),
    "splitfuse-needs-mix": Case(
        "plugins template sizes", plugins("splitfuse") | NO_SP, plugins("splitfuse") | NO_SP | MIX
    ),
    "splitfuse-chunks": Case(
        "plugins template sizes",
        plugins("splitfuse") | NO_SP | MIX | {"Schedule.splitChunkTokens": 0},
        plugins("splitfuse") | NO_SP | MIX | {"Schedule.splitChunkTokens": 1},
    ),
    "splitfuse-without-cp": Case(
        "plugins template sizes", plugins("splitfuse") | MIX, plugins("splitfuse") | MIX | NO_SP
    ),
    "splitfuse-without-lora": Case(
        "plugins template sizes lora",
        plugins("splitfuse") | MIX | NO_SP | {"Deploy.maxLoras": 1},
        {"Deploy.maxLoras": 1},
    ),
    "splitfuse-without-async-write": Case(
        "plugins template sizes pool version",
        plugins("splitfuse") | MIX | NO_SP | {"Backend.kvPoolConfig": {"asyncWrite": True}},
        {"Backend.kvPoolConfig": {"asyncWrite": True}},
    ),
    "micro-batch-without-cp": Case("models sizes", MICRO, MICRO | NO_SP),
    "layerwise-without-prefix-cache": Case(
        "plugins models model sizes layerwise template backend nodes",
        plugins("prefix_cache") | NZ | NO_SP | {"Server.layerwiseDisaggregated": True},
        plugins("prefix_cache") | NZ | NO_SP | {"Server.layerwiseDisaggregated": False},
    ),
    "layerwise-without-cp": Case(
        "sizes layerwise plugins template backend nodes",
        {"Server.layerwiseDisaggregated": True},
        {"Server.layerwiseDisaggregated": True, **NO_SP},
    ),
}
