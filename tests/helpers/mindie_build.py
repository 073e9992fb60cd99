"""Configs of the tests: one that breaks no rule, and changes of it.

A change is `field: value` on `BASE`, which breaks nothing. `Deploy.`, `Backend.`, `Schedule.`, `Server.` and `Root.`
name another section than ModelConfig, `Motor.` makes it a part of MindIE-Motor's file, `--` is an option; `...` takes a
field away. `with_` are the rules that such a config cannot help breaking too. `topics` is what the rule looks at: cases
that share no topic do not touch each other, except that one with `+cp` or `+split` needs cp, or cp or sp, to be on; one
that is `alone` goes with no other.
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


def plugins(names: str, tokens: int | None = None, **fields) -> dict[str, Any]:
    given = {"plugin_type": names} | ({} if tokens is None else {"num_speculative_tokens": tokens})
    return {"plugin_params": given | fields}


NZ = {"models": {"deepseekv2": {"kv_cache_options": {"enable_nz": True}}}}
MIX = {"Schedule.templateType": "Mix"}
DP2 = {"cp": 1, "dp": 2}
NO_SP = {"cp": 1, "sp": 1, "tp": 16}
CARDS = list(range(16))
LA = {"level": 2, "window": 2, "guess_set_size": 2}


def option(**parallel_options: int) -> dict[str, Any]:
    return {"models": {"deepseekv2": {"parallel_options": parallel_options}}}


def build(changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document and the options of some changes."""
    document, options = copy.deepcopy(BASE), dict(OPTIONS)
    deploy = document["ModelDeployConfig"]
    role, motor = "prefill", {}
    for name, value in changes.items():
        section, _, field = name.rpartition(".")
        if name.startswith("--"):
            options[name[2:]] = value
            continue
        if section == "Motor":
            role, motor = (value, motor) if field == "role" else (role, motor | {field: value})
            continue
        target = {
            "Root": lambda: document,
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
    if motor:
        document = {"deploy_config": motor, f"mindie_server_{role}_config": document}
    return document, options
