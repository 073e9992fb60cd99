"""What a config file says of one deployment, as typed values; and the sizes that follow where it says nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from cpjax.errors import InputError
from cpjax.mindie import json_text
from cpjax.mindie.config import ConfigFile, printable, read_config
from cpjax.mindie.json_text import json_path, kind, shown
from cpjax.mindie.schema import KNOWN, Backend, Deploy, Model, PluginParams, Section, Server

S = TypeVar("S", bound=Section)

MOST_CARDS = 4096
"""More are not printed or searched: nobody would read the table."""

PARALLEL = ("dp", "cp", "sp", "tp", "pp", "moe_ep", "moe_tp")


class Sizes(NamedTuple):
    """How many cards each kind of parallelism uses, with the vendor's defaults in place of what is not set."""

    world_size: int
    dp: int
    cp: int
    sp: int
    tp: int
    pp: int
    moe_ep: int
    moe_tp: int


@dataclass(frozen=True)
class Deployment:
    """One deployment, as its file says; `None`: not set there. Lengths in tokens, `npu_mem_size` in GB.

    `sizes` has the defaults in. `raw` has the whole config, `where(field)` says where in it a field stands.
    """

    file: ConfigFile
    model_name: str
    model_weight_path: str | None
    nodes: int
    world_size: int  # cards of all nodes
    dp: int | None
    cp: int | None
    sp: int | None
    tp: int | None
    pp: int | None
    moe_ep: int | None
    moe_tp: int | None
    max_seq_len: int
    max_input_token_len: int
    plugins: tuple[str, ...]  # of plugin_params.plugin_type: mtp, prefix_cache, …
    num_speculative_tokens: int | None
    model: Model
    deploy: Deploy
    backend: Backend
    server: Server
    warnings: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def sizes(self) -> Sizes:
        """All sizes, by the vendor's defaults: tp → worldSize, moe_tp → tp if set, else worldSize; the others → 1.

        (examples/atb_models/atb_llm/utils/mapping.py of Ascend/MindIE-LLM.)
        """
        tp = self.world_size if self.tp is None else self.tp
        given = (self.dp, self.cp, self.sp, tp, self.pp, self.moe_ep, tp if self.moe_tp is None else self.moe_tp)
        return Sizes(self.world_size, *(1 if size is None else size for size in given))

    def where(self, field: str) -> str:
        """The JSON path of a field, by its name in the file: `where("cp")`, `where("maxSeqLen")`."""
        for section, prefix in self._sections():
            if field in type(section).model_fields:
                return json_path((*prefix, field))
        raise KeyError(field)

    def _sections(self) -> Iterator[tuple[Section, json_text.Path]]:
        at = self.file.at
        yield self.model, (*at, "ModelConfig", 0)
        yield self.deploy, at
        yield self.backend, ("BackendConfig",)
        yield self.backend.ScheduleConfig, ("BackendConfig", "ScheduleConfig")
        yield self.server, ("ServerConfig",)


def read_deployment(path: Path, nodes: int | None = None) -> Deployment:
    """Read the deployment that a config file describes, and refuse what nobody could compute.

    Whether MindIE would take it is another question (rules.py): cp 3 is read.

    Raises:
      InputError: one line that names the file, the JSON path, the value, the rule and the fix.
    """
    deployment = parse_deployment(read_config(path), nodes)
    for field in ("worldSize", *PARALLEL, "maxSeqLen", "maxInputTokenLen"):
        value = getattr(deployment.deploy if field.startswith("max") else deployment.model, field)
        if value is not None and value < 1 and not _is_unset(field, value):
            raise InputError(f"{printable(path)}: {deployment.where(field)} is {value}; it must be at least 1")
    return deployment


def parse_deployment(file: ConfigFile, nodes: int | None = None) -> Deployment:
    """The typed values of a config file, whatever they are. `nodes`: servers of the rank table; None: see `_nodes`.

    Raises:
      InputError: a field is missing, or is not of its type.
    """
    problems: list[str] = []
    deploy = _section(Deploy, file.document, file.at, problems)
    backend = _section(Backend, file.document, ("BackendConfig",), problems)
    server = _section(Server, file.document, ("ServerConfig",), problems)
    plugin_params = (*file.at, "ModelConfig", 0, "plugin_params")
    plugins = _plugins(file.model.get("plugin_params"), plugin_params, problems)
    if deploy is None or backend is None or server is None or plugins is None:
        more = f" ({len(problems) - 1} more: {'; '.join(problems[1:4])})" if len(problems) > 1 else ""
        raise InputError(f"{printable(file.path)}: {problems[0]}{more}")
    model = deploy.ModelConfig[0]
    nodes = _nodes(model, backend) if nodes is None else nodes
    unknown = (*_unknown(file, deploy, backend, server), *_unknown_in(plugins, plugin_params))
    return Deployment(
        file=file,
        model_name=model.modelName,
        model_weight_path=model.modelWeightPath,
        nodes=nodes,
        world_size=model.worldSize * nodes if _is_per_node(model, backend) else model.worldSize,
        **{field: _set(field, getattr(model, field)) for field in PARALLEL},
        max_seq_len=deploy.maxSeqLen,
        max_input_token_len=deploy.maxInputTokenLen,
        plugins=tuple(word.strip() for word in plugins.plugin_type.split(",") if word.strip()),
        num_speculative_tokens=plugins.num_speculative_tokens,
        model=model,
        deploy=deploy,
        backend=backend,
        server=server,
        warnings=(*file.warnings, *unknown),
    )


def _is_per_node(model: Model, backend: Backend) -> bool:
    """Is worldSize the number of one node's cards?

    With several nodes it is, where npuDeviceIds is as long (src/config_manager/backend_config.cpp demands that, before
    the rank table replaces both). Where npuDeviceIds is shorter, as in the vendor's pages, worldSize counts all cards.
    """
    ids = backend.npuDeviceIds
    return backend.multiNodesInferEnabled and bool(ids) and len(ids[0]) == model.worldSize


def _nodes(model: Model, backend: Backend) -> int:
    """The number of nodes that the file implies; the rank table, which knows, is no part of it."""
    if not backend.multiNodesInferEnabled:
        return 1
    whole, ids = model.worldSize, backend.npuDeviceIds
    if _is_per_node(model, backend):
        part, whole = whole, math.prod(max(1, size or 1) for size in (model.dp, model.cp, model.tp))
    else:
        part = len(ids[0]) if ids else whole
    return whole // part if part and whole >= part and whole % part == 0 else 1


def _set(field: str, value: int | None) -> int | None:
    return None if value is not None and _is_unset(field, value) else value


def _is_unset(field: str, value: int) -> bool:
    """−1 is "not set", except for dp, cp and sp, of which the server rejects it."""
    return value == -1 and field in ("tp", "pp", "moe_ep", "moe_tp")


def _section(cls: type[S], document: Any, at: json_text.Path, problems: list[str]) -> S | None:
    """The object at a place as `cls`; `{}` where there is none. What is wrong is added to `problems`."""
    value = document
    for step in at:
        value = value.get(step, {})
    return _validated(cls, value, at, problems)


def _validated(cls: type[S], value: Any, at: json_text.Path, problems: list[str]) -> S | None:
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        seen: dict[str, None] = {}
        for found in error.errors(include_url=False):
            seen.setdefault(_problem(found, at))
        problems += seen
        return None


_RULES = {
    "int_type": "must be a whole number, without quotes, point or exponent",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "model_type": "must be an object",
}


def _problem(found: Any, at: json_text.Path) -> str:
    """pydantic's error as `JSON path is value; it must …`."""
    path = json_path((*at, *(step for step in found["loc"] if not _is_union_arm(step))))
    if found["type"] == "missing":
        return f"{path} is missing; it must be given"
    said = found["msg"][0].lower() + found["msg"][1:]
    value = found["input"]
    what = "null" if value is None else f"the {kind(value)} {shown(value, 40)}"
    rule = _RULES.get(found["type"], said.replace("input should be", "must be"))
    return f"{path} is {what}; it {rule}"


def _is_union_arm(step: str | int) -> bool:
    """pydantic names the alternatives of a union within the path: `bool`, `constrained-int`."""
    return step in ("bool", "str", "constrained-int", "int", "dict[str,any]")


def _plugins(given: Any, at: json_text.Path, problems: list[str]) -> PluginParams | None:
    """`plugin_params`, which is a string that holds JSON, or an object."""
    if given is None or given == "":
        return PluginParams()
    try:
        value = json_text.parse(given) if isinstance(given, str) else given
    except InputError as error:
        problems.append(f"{json_path(at)} is the string {shown(given, 40)}; it must hold JSON, but {error}")
        return None
    return _validated(PluginParams, value, at, problems)


def _unknown(file: ConfigFile, *sections: Section | None) -> Iterator[str]:
    """Fields that we do not know: named, so that a misspelt one is seen."""
    for key in file.document:
        if key not in KNOWN[""].split():
            yield f"{json_path((key,))} is not a field known here; nothing was concluded from it"
    places = (file.at, ("BackendConfig",), ("ServerConfig",))
    for section, at in zip(sections, places, strict=True):
        yield from _unknown_in(section, at)


def _unknown_in(section: Any, at: json_text.Path) -> Iterator[str]:
    if isinstance(section, list):
        for index, entry in enumerate(section):
            yield from _unknown_in(entry, (*at, index))
    if not isinstance(section, BaseModel):
        return
    for key in section.model_extra or {}:
        if key not in KNOWN.get(str(at[-1]), "").split():
            yield f"{json_path((*at, key))} is not a field known here; nothing was concluded from it"
    for field in type(section).model_fields:
        yield from _unknown_in(getattr(section, field), (*at, field))
