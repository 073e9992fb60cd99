"""What a rule is, and what it is asked about: a deployment, and the facts that its file does not hold."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from cpjax.mindie.deployment import Deployment, Sizes
from cpjax.mindie.models import Identity, identify
from cpjax.mindie.schema import Backend, Model, Schedule, Server

VERSIONS = (
    "1.0.RC1", "1.0.RC2", "1.0.RC3", "1.0.0", "2.0.RC1", "2.0.RC2", "2.1.RC1", "2.1.RC2", "2.2.RC1", "2.3.0", "head"
)  # fmt: skip
"""Versions of MindIE, oldest first; `head` is Ascend/MindIE-LLM of April 2026, the only one whose code was seen."""

Role = Literal["hybrid", "prefill", "decode"]
Level = Literal["error", "warning"]

# Sources, as the rules cite them.
CP_PAGE = "context_parallel.md"
SP_PAGE = "sequence_parallel.md"
MTP_PAGE = "mtp.md"
PREFIX_PAGE = "prefix_cache.md"
ASYNC_PAGE = "asynchronous_scheduling.md"
SPLIT_PAGE = "splitFuse.md"
MATRIX = "feature/README.md"
V32_PAGE = "deepseek_v3.2.md"
PARAMETERS = "service_parameter_configuration.md"
MAPPING = "atb_llm/utils/mapping.py"
TORCH = "parallel_info_manager.py"
DEPLOY = "model_deploy_config.cpp"
BACKEND = "backend_config.cpp"
SCHEDULE = "schedule_config.cpp"
SERVER = "server_config.cpp"
MANAGER = "config_manager_impl.cpp"
PLUGINS = "plug-in utils"


class Setting(NamedTuple):
    """A deployment and what its file does not say. `None`: not known."""

    deployment: Deployment
    role: Role | None = None
    hardware: str | None = None
    dtype: str | None = None
    quantisation: str | None = None
    async_scheduling: bool = False
    version: str = VERSIONS[-1]
    model_type: str | None = None  # of the weights

    @property
    def identity(self) -> Identity:
        """Which model it is, as far as weights and names tell."""
        return identify(self.deployment.model_name, self.deployment.model_weight_path, self.model_type)

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
    def backend(self) -> Backend:
        """The typed BackendConfig."""
        return self.deployment.backend

    @property
    def server(self) -> Server:
        """The typed ServerConfig."""
        return self.deployment.server

    @property
    def is_torch(self) -> bool:
        """Does the PyTorch backend run the model?"""
        return self.deployment.is_torch

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
        return self.identity.has_latents

    @property
    def is_multi_node(self) -> bool:
        """Does one instance run on several nodes?"""
        return self.backend.multiNodesInferEnabled

    @property
    def has_lora(self) -> bool:
        """Are adapters served?"""
        return bool(self.deployment.deploy.maxLoras or self.deployment.deploy.LoraModules)

    @property
    def plugin_type(self) -> str:
        """What was found in plugin_type, for a message."""
        return f"plugin_type {','.join(self.deployment.plugins)}"

    def has(self, plugin: str) -> bool:
        """Is a plugin (mtp, prefix_cache, …) on?"""
        return plugin in self.deployment.plugins

    def since(self, version: str) -> bool:
        """Is the version asked for as new as `version`?"""
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
    since: str = VERSIONS[0]  # the first version that has the rule
    before: str | None = None  # the first that has it no more

    def applies(self, setting: Setting) -> bool:
        """Does the version asked for have the rule?"""
        return setting.since(self.since) and not (self.before and setting.since(self.before))

    @property
    def versions(self) -> str:
        """The versions that have the rule, in words."""
        if self.since == VERSIONS[0]:
            return f"before {self.before}" if self.before else "all"
        if self.before is None:
            return f"since {self.since}"
        last = VERSIONS[VERSIONS.index(self.before) - 1]
        return self.since if last == self.since else f"{self.since} to {last}"


def found(is_broken: bool, setting: Setting, *fields: str) -> str | None:
    """The sizes that break a rule, such as `cp 2, sp 1`; None if it is kept."""
    said = (f"{'worldSize' if field == 'world_size' else field} {getattr(setting.sizes, field)}" for field in fields)
    return ", ".join(said) if is_broken else None


def value(is_broken: bool, what: object) -> str | None:
    """The value that breaks a rule, printable and on one line; None if it is kept."""
    text = str(what)
    return (text if text.isprintable() else ascii(text))[:200] if is_broken else None


def section_of(setting: Setting, field: str) -> Any:
    """The section that has a field."""
    sections = (setting.model, setting.deployment.deploy, setting.backend, setting.schedule, setting.server)
    return next(section for section in sections if field in type(section).model_fields)


def given(setting: Setting, field: str) -> Any:
    """What a field is in the file; None where it is not given."""
    section = section_of(setting, field)
    return getattr(section, field) if field in section.model_fields_set else None


def in_range(field: str, low: int, high: int, source: str, since: str = VERSIONS[0]) -> Rule:
    """The rule that a number, where it is given, is from `low` to `high`."""

    def broken(s: Setting) -> str | None:
        number = given(s, field)
        return value(number is not None and not low <= number <= high, number)

    says = f"{field} is {low}" if low == high else f"{field} is {low} to {high}"
    return Rule(f"{field}-range", field, "error", True, says, "give it such a value", source, broken, since)


def one_of(field: str, allowed: tuple[str, ...], source: str, name: str | None = None) -> Rule:
    """The rule that a word, where it is given, is one of these."""
    words = ", ".join(word or '""' for word in allowed)

    def broken(s: Setting) -> str | None:
        word = given(s, field)
        return value(word is not None and word not in allowed, repr(word))

    says = f"{field} is {words}" if len(allowed) == 1 else f"{field} is one of {words}"
    return Rule(name or f"{field}-word", field, "error", True, says, "give it such a value", source, broken)
