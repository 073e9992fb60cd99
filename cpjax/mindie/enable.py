"""The smallest edit of a config that turns context parallelism on validly, or why there is none."""

from itertools import product
from typing import NamedTuple

from cpjax.errors import InputError
from cpjax.mindie import edit, json_text
from cpjax.mindie.check import Finding, check
from cpjax.mindie.config import ConfigFile
from cpjax.mindie.deployment import MOST_CARDS, PARALLEL, Deployment, parse_deployment
from cpjax.mindie.rules import NOT_LISTED, Setting
from cpjax.mindie.text_file import printable


class Change(NamedTuple):
    """A field of ModelConfig that gets another value; `old` is None where it was not set."""

    field: str
    old: int | None
    new: int


class Enabled(NamedTuple):
    """The edited text (the old one if nothing had to change), what was changed, and the warnings that remain."""

    text: str
    changes: list[Change]
    warnings: list[Finding]


def enable(setting: Setting, cp: int = 2) -> Enabled:
    """Turn CP on with the fewest changed fields: dp becomes 1, tp worldSize / cp, sp tp, and the MoE sizes must fit.

    With backend torch sp becomes 1. Besides sizes only two things are changed, if they stand in the way:
    num_speculative_tokens becomes 1 (hybrid), and enable_nz true (prefix cache). Order, formatting and all other fields
    stay as they are. A config in which CP is on already, validly, stays as it is.

    Raises:
      InputError: no such edit makes a config that keeps all rules; it names those that stay broken.
    """
    deployment = setting.deployment
    world = deployment.world_size
    if cp < 2:
        raise InputError(f"cp is {cp}; it must be at least 2 to turn context parallelism on")
    if not 1 <= world <= MOST_CARDS:
        raise InputError(f"worldSize is {world}; it must be 1 to {MOST_CARDS}")
    if world % cp:
        raise InputError(f"worldSize is {world}, which cp {cp} does not divide; no edit of the sizes can turn CP on")
    fewest: list[Finding] = []
    for changes in _candidates(deployment, cp):
        text = _edited(setting, changes)
        broken = check(setting._replace(deployment=_again(deployment, text)))
        # A warning that the page may not list this model is no ground to turn CP on.
        errors = [finding for finding in broken if finding.level == "error" or (changes and finding.rule in NOT_LISTED)]
        if not errors:
            return Enabled(text, changes, broken)
        if not fewest or len(errors) < len(fewest):
            fewest = errors
    names = "; ".join(f"{finding.rule} ({finding.found})" for finding in fewest[:4])
    raise InputError(f"{printable(deployment.path)}: no edit of the sizes makes CP valid; still broken: {names}")


def _candidates(deployment: Deployment, cp: int) -> list[list[Change]]:
    """All settings of the sizes that may do, those with the fewest changes first."""
    world, tp = deployment.world_size, deployment.world_size // cp
    fixed = {"dp": 1, "cp": cp, "sp": 1 if deployment.is_torch else tp, "tp": tp, "pp": 1}
    now = {field: getattr(deployment, field) for field in PARALLEL}
    optional = ("dp", "pp", "sp")  # 1 is what they are when they are not set
    must = [
        Change(field, now[field], size)
        for field, size in fixed.items()
        if now[field] != size and not (field in optional and size == 1 and now[field] is None)
    ]
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    found = []
    for moe_ep, moe_tp in product({now["moe_ep"], *divisors}, {now["moe_tp"], *divisors}):
        ep, mt = moe_ep or 1, moe_tp or (world if deployment.is_torch else tp)
        fits = ep * mt == world
        goes = not (now["moe_ep"] is not None and moe_ep is None) and not (now["moe_tp"] is not None and moe_tp is None)
        if fits and goes:
            moe = [("moe_ep", moe_ep), ("moe_tp", moe_tp)]
            found.append(must + [Change(f, now[f], size) for f, size in moe if size is not None and size != now[f]])
    # Of equally many changes, the most expert parallelism: it is what the vendor's example has.
    return sorted(found, key=lambda changes: (len(changes), [-c.new for c in changes if c.field == "moe_ep"]))


def _edited(setting: Setting, changes: list[Change]) -> str:
    file, deployment = setting.deployment.file, setting.deployment
    at, text = (*file.at, "ModelConfig", 0), setting.deployment.file.text
    for change in changes:
        text = edit.with_value(file, text, (*at, change.field), change.new)
    broken = {finding.rule for finding in check(setting._replace(deployment=_again(deployment, text)))}
    if "hybrid-mtp-is-1" in broken:
        text = _with_one_draft_token(file, text, at)
    if "prefix-cache-needs-nz" in broken:
        text = edit.with_value(file, text, (*at, "models", "deepseekv2", "kv_cache_options", "enable_nz"), True)
    return text


def _with_one_draft_token(file: ConfigFile, text: str, at: json_text.Path) -> str:
    if isinstance(file.model["plugin_params"], str):
        return edit.with_number(file, text, (*at, "plugin_params"), "num_speculative_tokens", 1)
    return edit.with_value(file, text, (*at, "plugin_params", "num_speculative_tokens"), 1)


def _again(deployment: Deployment, text: str) -> Deployment:
    """The deployment that an edited text describes."""
    file = deployment.file
    document = json_text.parse(file.as_json(text))
    nodes = None if file.role else deployment.nodes  # MindIE-Motor's file says it
    return parse_deployment(file._replace(text=text, document=document), nodes)


HOW_TO_START = """Start the service with the new config (a running one must be restarted):
  whl package:  mindie_llm_server              (config in <MindIE>/mindie_llm/conf/config.json)
  run package:  ./bin/mindieservice_daemon     (config in <MindIE>/latest/mindie-service/conf/config.json)"""
"""As the vendor's page says it. The config is read when the service starts."""
