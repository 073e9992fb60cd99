"""Fields of which nothing is concluded: those that are known and fine; and those that are not, which are named."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel

from cpjax.mindie import json_text
from cpjax.mindie.config import MOTOR, ConfigFile
from cpjax.mindie.json_text import json_path
from cpjax.mindie.schema import Backend, Deploy, Model, ParallelOptions, Schedule, Server

KNOWN = {
    "": """
        Version ServerConfig BackendConfig ModelDeployConfig LogConfig EnableDynamicAdjustTimeoutConfig
        version deploy_config mindie_ms_controller_config mindie_ms_coordinator_config
        mindie_server_prefill_config mindie_server_decode_config
    """,
    "ServerConfig": """
        fullTextEnabled tlsCaPath tlsCert tlsPk tlsPkPwd tlsCrlPath tlsCrl
        managementTlsCaFile managementTlsCert managementTlsPk managementTlsPkPwd managementTlsCrlPath
        managementTlsCrlFiles managementTlsCrl metricsTlsCaFile metricsTlsCert metricsTlsPk metricsTlsPkPwd
        metricsTlsCrlPath metricsTlsCrlFiles interCommTlsCaPath interCommTlsCaFiles interCommTlsCaFile
        interCommTlsCert interCommPk interCommPkPwd interCommTlsCrlPath interCommTlsCrlFiles interCommTlsCrl
        kmcKsfMaster kmcKsfStandby npuUsageThreshold
    """,
    "BackendConfig": """
        interNodeTlsCaPath interNodeTlsCaFile interNodeTlsCert interNodeTlsPk interNodeTlsPkPwd interNodeTlsCrlPath
        interNodeTlsCrl interNodeKmcKsfMaster interNodeKmcKsfStandby ModelDeployConfig LogConfig
        layerwiseDisaggregated layerwiseDisaggregatedMultiNodesCtrlPort lwdMultiNodesEnabled modelCutPolicy dpScheduling
    """,
    "ScheduleConfig": """
        dynamicBatchSizeEnable enablePrefixCache enableSplit enablChunkedPrefill enableChunkedPrefill splitType
        splitStartType splitStartBatchSize prefillChunkSize layerwiseDisaggregated nextPHeadPrior dpScheduling
    """,
    "ModelConfig": "pluginParams kv_rdma_sl kv_rdma_tc dpScheduling modelCutPolicy",
    "plugin_params": "level window guess_set_size decoding_length dynamic_algo",
    "deepseekv2": """
        ep_level enable_init_routing_cutoff topk_scaling_factor alltoall_ep_buffer_scale_factors eplb h3p
        communication_backend mix_shared_routing enable_mlapo_prefetch enable_oproj_prefetch
    """,
    "parallel_options": "hccl_buffer hccl_moe_ep_buffer hccl_moe_tp_buffer",
    "models": "layerwiseDisaggregatedMasterDeviceNum layerwiseDisaggregatedSlaveDeviceNum qwen qwen3",
}
"""Section → fields of the vendor's own configs, pages and code that say nothing about how attention is deployed."""

_HOMES = {"ModelConfig[0]": Model, "ModelDeployConfig": Deploy, "ScheduleConfig": Schedule}
_HOMES |= {"BackendConfig": Backend, "ServerConfig": Server, "parallel_options": ParallelOptions}


def unknown_fields(file: ConfigFile, sections: Iterable[tuple[Any, json_text.Path]]) -> Iterator[str]:
    """Fields that we do not know: named with their place, so that a misspelt one is seen, and what may be meant."""
    # Where the file is a ModelDeployConfig itself, its keys are that section's.
    for key in file.document if len(file.at) > len(file.root) else ():
        if key not in KNOWN[""].split() and not (file.role and key in MOTOR.values()):
            yield _named(file, (key,), KNOWN[""].split())
    for section, at in sections:
        yield from _unknown_in(file, section, at)


def _unknown_in(file: ConfigFile, section: Any, at: json_text.Path) -> Iterator[str]:
    if isinstance(section, list):
        for index, entry in enumerate(section):
            yield from _unknown_in(file, entry, (*at, index))
    if not isinstance(section, BaseModel):
        return
    fields = type(section).model_fields
    name = next((step for step in reversed(at) if isinstance(step, str)), "")
    known = KNOWN.get(name, "").split()
    for key in section.model_extra or {}:
        if key not in known:
            yield _named(file, (*at, key), [*fields, *known])
    for field in fields:
        yield from _unknown_in(file, getattr(section, field), (*at, field))


def misspelt(field: str, keys: Iterable[str]) -> str | None:
    """Of the keys that stand where a field is missing, the one that is nearly it."""
    return next((key for key in keys if _meant(key, [field]) == field), None)


def _named(file: ConfigFile, path: json_text.Path, known: list[str]) -> str:
    meant = _meant(str(path[-1]), known)
    said = f"{json_path(path)} is not a field known here; nothing was concluded from it ({file.place(path)})"
    return f"{said}; did you mean {meant}?" if meant else said


def _meant(key: str, known: list[str]) -> str | None:
    """A known field that is nearly this one, or the same one in the section where it belongs."""
    plain = {_plain(field): field for field in reversed(known)}
    near = [size for size in _SIZES if size in plain and _is_size(key, size)]
    if near:
        return plain[near[0]]
    near = difflib.get_close_matches(_plain(key), plain, n=2, cutoff=0.75)
    if near:
        # cpp is as near to cp as to pp.
        alike = [word for word in near if _likeness(key, word) == _likeness(key, near[0])]
        return " or ".join(sorted(plain[word] for word in alike))
    home = next((name for name, section in _HOMES.items() if key in section.model_fields), None)
    return f"{key} in {home}" if home else None


_SIZES = {"cp": "context", "sp": "sequence", "dp": "data", "tp": "tensor", "pp": "pipeline"}


def _is_size(key: str, size: str) -> bool:
    """`cp_size`, `cpSize`, `context_parallel_size` for cp."""
    return _plain(key) in [name + end for name in (size, f"{_SIZES[size]}parallel") for end in ("size", "")]


def _likeness(key: str, word: str) -> float:
    """As difflib ranks words."""
    return difflib.SequenceMatcher(None, word, _plain(key)).ratio()


def _plain(key: str) -> str:
    return key.replace("_", "").replace("-", "").lower()
