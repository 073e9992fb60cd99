"""Ask every rule about every config of a deployment, and collect all that is broken."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, get_args

from cpjax.errors import InputError
from cpjax.mindie.config import ConfigFile, read_configs
from cpjax.mindie.deployment import Deployment, parse_deployment
from cpjax.mindie.hardware import MOTOR_TYPES, parse_hardware
from cpjax.mindie.json_text import json_path, shown
from cpjax.mindie.models import last_part, quantisation
from cpjax.mindie.rules import PAIRS, RULES, VERSIONS, PairRule, Rule, Setting
from cpjax.mindie.rules.rule import Level, Role
from cpjax.mindie.text_file import printable
from cpjax.mindie.weights import Weights, parse_dtype, read_weights


class Finding(NamedTuple):
    """A broken rule: where, what was found there, what the rule is, who enforces it, how to mend it."""

    rule: str
    level: Level
    path: str  # JSON path
    found: str
    says: str
    fix: str
    source: str
    enforced: bool
    file: str
    line: int  # of the field; of the object that lacks it, where the file does not have it
    column: int


class Checked(NamedTuple):
    """One config, checked. `notes` are what reading had to say: fields that are not known, weights not here."""

    setting: Setting
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def of(self, level: Level) -> list[Finding]:
        """The errors, or the warnings."""
        return [finding for finding in self.findings if finding.level == level]


class Options(NamedTuple):
    """What is known besides the file; `None`: not known."""

    hardware: str | None = None
    dtype: str | None = None
    async_scheduling: bool = False
    version: str = VERSIONS[-1]


def check_files(
    paths: Sequence[Path],
    *,
    roles: Sequence[str] = (),
    hardware: str | None = None,
    dtype: str | None = None,
    async_scheduling: bool = False,
    version: str = VERSIONS[-1],
    nodes: int | None = None,
) -> list[Checked]:
    """Read and check one config, or all configs of one disaggregated deployment.

    Args:
      paths: configs; MindIE-Motor's user_config.json is two, with roles of its own.
      roles: hybrid, prefill or decode, one per config, or one for all; none: hybrid where inferMode is standard.
      hardware: Atlas 800I A2 or Atlas 800I A3, also as 800i-a2; None: not known, or as MindIE-Motor's file says.
      dtype: None: as the weights' config.json says.
      async_scheduling: is MINDIE_ASYNC_SCHEDULING_ENABLE set?
      version: of MindIE, one of `VERSIONS`.
      nodes: servers of the rank table; None: as the file implies.

    Raises:
      InputError: a file that cannot be read, or an argument that is not understood.
    """
    if version not in VERSIONS:
        raise InputError(f"mindie-version {shown(version)} is not known; known are {', '.join(VERSIONS)}")
    if nodes is not None and nodes < 1:
        raise InputError(f"nodes is {nodes}; it must be at least 1")
    given_dtype = None if dtype is None else parse_dtype(dtype)
    options = Options(None if hardware is None else parse_hardware(hardware), given_dtype, async_scheduling, version)
    checked = []
    for file, role in _files(paths, roles):
        deployment = parse_deployment(file, nodes)
        weights = read_weights(deployment.model_weight_path, file.path)
        setting = _setting(deployment, role, weights, options)
        notes = weights.notes if given_dtype is None and setting.is_split else ()
        checked.append(Checked(setting, tuple(check(setting)), (*deployment.warnings, *notes)))
    return _with_pairs(checked) if len(checked) > 1 else checked


def check(setting: Setting) -> list[Finding]:
    """All broken rules of one config, errors first."""
    broken = [(rule, rule.broken(setting)) for rule in RULES if rule.applies(setting)]
    findings = [_finding(rule, setting, found) for rule, found in broken if found is not None]
    return sorted(findings, key=lambda finding: finding.level)


def setting_of(deployment: Deployment) -> Setting:
    """A deployment of which only the file and the weights beside it are known."""
    weights = read_weights(deployment.model_weight_path, deployment.path)
    return _setting(deployment, _role_of(deployment.file), weights, Options())


def _setting(deployment: Deployment, role: Role | None, weights: Weights, options: Options) -> Setting:
    if role is None and deployment.server.inferMode == "standard":
        role = "hybrid"
    motor = deployment.motor.hardware_type if deployment.motor else None
    server = parse_hardware(motor) if motor in MOTOR_TYPES else None  # another breaks a rule of its own
    named = quantisation(last_part(deployment.model_weight_path)) or quantisation(deployment.model_name)
    return Setting(
        deployment,
        role=role,
        hardware=options.hardware or server,
        dtype=options.dtype or weights.dtype,
        quantisation=weights.quantisation or named,
        async_scheduling=options.async_scheduling,
        version=options.version,
        model_type=weights.model_type,
    )


def _files(paths: Sequence[Path], roles: Sequence[str]) -> Iterator[tuple[ConfigFile, Role | None]]:
    """The configs in the paths, each with its role."""
    for word in roles:
        if word not in get_args(Role):
            raise InputError(f"role {shown(word)} is not known; known are {', '.join(get_args(Role))}")
    read = [read_configs(path) for path in paths]
    motor = next((found[0] for found in read if found[0].role), None)
    if motor is None:
        for found, role in zip(read, _roles(roles, len(paths)), strict=True):
            yield found[0], role
        return
    if len(paths) > 1 or len(roles) > 1:
        raise InputError(
            f"{printable(motor.path)}: is a user_config.json, which has all parts and their roles; check it alone"
        )
    parts = [file for file in read[0] if not roles or file.role == roles[0]]
    if not parts:
        raise InputError(f"{printable(motor.path)}: is a user_config.json, which has no part for role {roles[0]}")
    for file in parts:
        yield file, _role_of(file)


def _role_of(file: ConfigFile) -> Role | None:
    return next((role for role in get_args(Role) if role == file.role), None)


def _finding(rule: Rule | PairRule, setting: Setting, found: str) -> Finding:
    path, file = setting.deployment.path_of(rule.field), setting.deployment.file
    said = (json_path(path), found, rule.says, rule.fix, rule.source, rule.enforced)
    return Finding(rule.name, rule.level, *said, str(file.path), *file.place(path))


def _roles(roles: Sequence[str], count: int) -> list[Role | None]:
    if count > 1 and len(roles) not in (1, count):
        raise InputError(f"{count} configs and {len(roles)} roles; give --role once for each config, in their order")
    if len(roles) > count:
        raise InputError(f"{count} config and {len(roles)} roles; give --role once for each config")
    known: list[Role | None] = [next(role for role in get_args(Role) if role == given) for given in roles]
    return known * count if len(known) == 1 else known or [None] * count


def _with_pairs(checked: list[Checked]) -> list[Checked]:
    """The same, with what is broken between two configs reported at the second of them."""
    more: list[list[Finding]] = [[] for _ in checked]
    for (_, first), (at, second) in combinations(enumerate(checked), 2):
        a, b = first.setting, second.setting
        ordered = (b, a) if (a.role, b.role) == ("decode", "prefill") else (a, b)
        for rule in PAIRS:
            found = rule.broken(*ordered)
            if found is not None:
                more[at].append(_finding(rule, b, f"{found} (here and in {a.deployment.path.name})"))
    return [
        one._replace(findings=tuple(sorted((*one.findings, *new), key=lambda finding: finding.level)))
        for one, new in zip(checked, more, strict=True)
    ]
