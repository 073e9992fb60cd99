"""What a rule is, and what it is asked about: a deployment, and the facts that its file does not hold."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from cpjax.mindie.deployment import Deployment, Sizes
from cpjax.mindie.models import family
from cpjax.mindie.schema import Model, Schedule

VERSIONS = ("2.1.RC1", "2.3.0", "head")
"""Versions of the vendor's documentation, oldest first; `head` is Ascend/MindIE-LLM of April 2026."""

Role = Literal["hybrid", "prefill", "decode"]
Level = Literal["error", "warning"]

# Sources, as the rules cite them.
CP_PAGE = "context_parallel.md"
SP_PAGE = "sequence_parallel.md"
MTP_PAGE = "mtp.md"
PREFIX_PAGE = "prefix_cache.md"
ASYNC_PAGE = "asynchronous_scheduling.md"
MAPPING = "atb_llm/utils/mapping.py"
DEPLOY = "model_deploy_config.cpp"
BACKEND = "backend_config.cpp"
SCHEDULE = "schedule_config.cpp"


class Setting(NamedTuple):
    """A deployment and what its file does not say. `None`: not known."""

    deployment: Deployment
    role: Role | None = None
    hardware: str | None = None
    dtype: str | None = None
    quantisation: str | None = None
    async_scheduling: bool = False
    version: str = VERSIONS[-1]

    @property
    def sizes(self) -> Sizes:
        """All parallel sizes, defaults in."""
        return self.deployment.sizes

    @property
    def model(self) -> Model:
        """The typed ModelConfig."""
        return self.deployment.model

    @property
    def schedule(self) -> Schedule:
        """The typed ScheduleConfig."""
        return self.deployment.backend.ScheduleConfig

    @property
    def is_cp(self) -> bool:
        """Is context parallelism on?"""
        return self.sizes.cp > 1

    @property
    def is_split(self) -> bool:
        """Is the sequence or its cache split over cards?"""
        return self.sizes.cp > 1 or self.sizes.sp > 1

    @property
    def is_deepseek(self) -> bool:
        """Is it a model with DeepSeek's latent attention?"""
        return family(self.deployment.model_name) is not None

    def has(self, plugin: str) -> bool:
        """Is a plugin (mtp, prefix_cache, …) on?"""
        return plugin in self.deployment.plugins

    def since(self, version: str) -> bool:
        """Is the documentation asked for as new as `version`?"""
        return VERSIONS.index(self.version) >= VERSIONS.index(version)


class Rule(NamedTuple):
    """One rule. `broken` returns what was found, or None where the rule is kept or does not apply."""

    name: str
    field: str  # as the file calls it; the JSON path is `deployment.where(field)`
    level: Level
    enforced: bool  # does the server check it? If not, it is only documented
    says: str
    fix: str
    source: str
    broken: Callable[[Setting], str | None]


def found(is_broken: bool, setting: Setting, *fields: str) -> str | None:
    """The sizes that break a rule, such as `cp 2, sp 1`; None if it is kept."""
    return ", ".join(f"{field} {getattr(setting.sizes, field)}" for field in fields) if is_broken else None


def value(is_broken: bool, what: object) -> str | None:
    """The value that breaks a rule, printable and on one line; None if it is kept."""
    text = str(what)
    return (text if text.isprintable() else ascii(text))[:200] if is_broken else None
