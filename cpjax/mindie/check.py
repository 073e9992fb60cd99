"""Ask every rule about every config of a deployment, and collect all that is broken."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, get_args

from cpjax.errors import InputError
from cpjax.mindie.config import read_config
from cpjax.mindie.deployment import Deployment, parse_deployment
from cpjax.mindie.json_text import shown
from cpjax.mindie.models import quantisation
from cpjax.mindie.rules import PAIRS, RULES, VERSIONS, PairRule, Rule, Setting
from cpjax.mindie.rules.rule import Level, Role
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


class Checked(NamedTuple):
    """One config, checked. `notes` are what reading had to say: fields that are not known, weights not here."""

    setting: Setting
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def of(self, level: Level) -> list[Finding]:
        """The errors, or the warnings."""
        return [finding for finding in self.findings if finding.level == level]


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
      roles: hybrid, prefill or decode, one per config, or one for all; none: hybrid where inferMode is standard.
      hardware: 800i-a2 or 800i-a3; None: not known.
      dtype: None: as the weights' config.json says.
      async_scheduling: is MINDIE_ASYNC_SCHEDULING_ENABLE set?
      version: of the documentation, one of `VERSIONS`.
      nodes: servers of the rank table; None: as the file implies.

    Raises:
      InputError: a file that cannot be read, or an argument that is not understood.
    """
    known = _roles(roles, len(paths))
    if version not in VERSIONS:
        raise InputError(f"mindie-version {shown(version)} is not known; known are {', '.join(VERSIONS)}")
    if nodes is not None and nodes < 1:
        raise InputError(f"nodes is {nodes}; it must be at least 1")
    given_dtype = None if dtype is None else parse_dtype(dtype)
    checked = []
    for path, role in zip(paths, known, strict=True):
        deployment = parse_deployment(read_config(path), nodes)
        weights = read_weights(deployment.model_weight_path)
        options = (None if hardware is None else hardware.lower(), async_scheduling, version)
        setting = _setting(deployment, role, weights, given_dtype, *options)
        notes = weights.notes if given_dtype is None and setting.is_split else ()
        checked.append(Checked(setting, tuple(check(setting)), (*deployment.warnings, *notes)))
    return _with_pairs(checked) if len(checked) > 1 else checked


def check(setting: Setting) -> list[Finding]:
    """All broken rules of one config, errors first."""
    broken = [(rule, rule.broken(setting)) for rule in RULES]
    findings = [_finding(rule, setting, found) for rule, found in broken if found is not None]
    return sorted(findings, key=lambda finding: finding.level)


def setting_of(deployment: Deployment) -> Setting:
    """A deployment of which only the file and the weights beside it are known."""
    return _setting(deployment, None, read_weights(deployment.model_weight_path), None, None, False, VERSIONS[-1])


def _setting(
    deployment: Deployment,
    role: Role | None,
    weights: Weights,
    dtype: str | None,
    hardware: str | None,
    async_scheduling: bool,
    version: str,
) -> Setting:
    if role is None and deployment.server.inferMode == "standard":
        role = "hybrid"
    return Setting(
        deployment,
        role=role,
        hardware=hardware,
        dtype=dtype or weights.dtype,
        quantisation=weights.quantisation or quantisation(deployment.model_name),
        async_scheduling=async_scheduling,
        version=version,
    )


def _finding(rule: Rule | PairRule, setting: Setting, found: str) -> Finding:
    path = setting.deployment.where(rule.field)
    return Finding(rule.name, rule.level, path, found, rule.says, rule.fix, rule.source, rule.enforced)


def _roles(roles: Sequence[str], count: int) -> list[Role | None]:
    for role in roles:
        if role not in get_args(Role):
            raise InputError(f"role {shown(role)} is not known; known are {', '.join(get_args(Role))}")
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
