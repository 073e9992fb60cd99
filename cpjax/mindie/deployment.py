"""What a config file says of one deployment, as typed values; and the sizes that follow where it says nothing."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from cpjax.errors import InputError
from cpjax.mindie import json_text
from cpjax.mindie.config import ConfigFile, read_config
from cpjax.mindie.json_text import json_path, kind, shown
from cpjax.mindie.known import misspelt, unknown_fields
from cpjax.mindie.schema import Backend, Deploy, Model, Motor, PluginParams, Section, Server
from cpjax.mindie.text_file import printable
from cpjax.mindie.world import World, world_of

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
    nodes_known: bool  # False: `nodes` is only the least that can be
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
    plugin_params: PluginParams
    model: Model
    deploy: Deploy
    backend: Backend
    server: Server
    motor: Motor | None  # deploy_config, in MindIE-Motor's file
    warnings: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def sizes(self) -> Sizes:
        """All sizes, by the vendor's defaults: tp → worldSize, moe_tp → tp if set, else worldSize; the others → 1.

        With backend torch, moe_tp → worldSize, whatever tp is. (atb_llm/utils/mapping.py and
        runtime/utils/distributed/parallel_info_manager.py of Ascend/MindIE-LLM.)
        """
        tp = self.world_size if self.tp is None else self.tp
        moe_tp = self.world_size if self.is_torch else tp
        given = (self.dp, self.cp, self.sp, tp, self.pp, self.moe_ep, moe_tp if self.moe_tp is None else self.moe_tp)
        return Sizes(self.world_size, *(1 if size is None else size for size in given))

    @property
    def is_torch(self) -> bool:
        """Is the model run by the PyTorch backend, which has rules of its own?"""
        return self.model.backendType == "torch"

    @property
    def is_distributed(self) -> bool:
        """Does each process serve a part of a world that only the rank table knows?"""
        return self.backend.ScheduleConfig.distributedEnable

    def path_of(self, field: str) -> json_text.Path:
        """Where a field stands, by its name in the file: `path_of("cp")`, `path_of("maxSeqLen")`."""
        for section, prefix in self._sections():
            if field in type(section).model_fields:
                return (*prefix, field)
        raise KeyError(field)

    def where(self, field: str) -> str:
        """The same as a JSON path."""
        return json_path(self.path_of(field))

    def _sections(self) -> Iterator[tuple[Section, json_text.Path]]:
        at, root = self.file.at, self.file.root
        yield self.model, (*at, "ModelConfig", 0)
        yield self.deploy, at
        yield self.backend, (*root, "BackendConfig")
        yield self.backend.ScheduleConfig, (*root, "BackendConfig", "ScheduleConfig")
        yield self.server, (*root, "ServerConfig")
        if self.motor is not None:
            yield self.motor, ("deploy_config",)


def read_deployment(path: Path, nodes: int | None = None, role: str | None = None) -> Deployment:
    """Read the deployment that a config file describes, and refuse what nobody could compute.

    Whether MindIE would take it is another question (rules/): cp 3 is read.

    Args:
      nodes: servers of the rank table; None: as the file implies.
      role: prefill or decode: which part of MindIE-Motor's user_config.json.

    Raises:
      InputError: one line that names the file, the JSON path, the value, the rule and the fix.
    """
    deployment = parse_deployment(read_config(path, role), nodes)
    for field in ("worldSize", *PARALLEL, "maxSeqLen", "maxInputTokenLen"):
        value = getattr(deployment.deploy if field.startswith("max") else deployment.model, field)
        if value is not None and value < 1 and not _is_unset(field, value):
            place = deployment.file.place(deployment.path_of(field))
            raise InputError(
                f"{printable(path)}: {deployment.where(field)} is {value}; it must be at least 1 ({place})"
            )
    return deployment


def parse_deployment(file: ConfigFile, nodes: int | None = None) -> Deployment:
    """The typed values of a config file, whatever they are. `nodes`: servers of the rank table; None: see world.py.

    Raises:
      InputError: a field is missing, or is not of its type.
    """
    problems: list[str] = []
    motor_at, backend_at, server_at = ("deploy_config",), (*file.root, "BackendConfig"), (*file.root, "ServerConfig")
    deploy = _section(Deploy, file, file.at, problems)
    backend = _section(Backend, file, backend_at, problems)
    server = _section(Server, file, server_at, problems)
    motor = _section(Motor, file, motor_at, problems) if file.role else None
    plugins_at = (*file.at, "ModelConfig", 0, "plugin_params")
    plugins = _plugins(file, plugins_at, problems)
    if deploy is None or backend is None or server is None or plugins is None or (file.role and motor is None):
        more = f" ({len(problems) - 1} more: {'; '.join(problems[1:4])})" if len(problems) > 1 else ""
        raise InputError(f"{printable(file.path)}: {problems[0]}{more}")
    model = deploy.ModelConfig[0]
    world: World = world_of(model, backend, motor, file.role, nodes)
    sections = [(deploy, file.at), (backend, backend_at), (server, server_at), (plugins, plugins_at)]
    return Deployment(
        file=file,
        model_name=model.modelName,
        model_weight_path=model.modelWeightPath,
        nodes=world.nodes,
        nodes_known=world.is_known,
        world_size=world.cards,
        **{field: _set(field, getattr(model, field)) for field in PARALLEL},
        max_seq_len=deploy.maxSeqLen,
        max_input_token_len=deploy.maxInputTokenLen,
        # As the server splits it: a comma, and the space behind it.
        plugins=tuple(word for word in re.split(r",\s*", plugins.plugin_type or "") if word),
        num_speculative_tokens=plugins.num_speculative_tokens,
        plugin_params=plugins,
        model=model,
        deploy=deploy,
        backend=backend,
        server=server,
        motor=motor,
        warnings=(*file.warnings, *world.notes, *unknown_fields(file, sections)),
    )


def _set(field: str, value: int | None) -> int | None:
    return None if value is not None and _is_unset(field, value) else value


def _is_unset(field: str, value: int) -> bool:
    """−1 is "not set", except for dp, cp and sp, of which the server rejects it."""
    return value == -1 and field in ("tp", "pp", "moe_ep", "moe_tp")


def _section(cls: type[S], file: ConfigFile, at: json_text.Path, problems: list[str]) -> S | None:
    """The object at a place as `cls`; `{}` where there is none. What is wrong is added to `problems`."""
    value: Any = file.document
    for step in at:
        value = value.get(step, {})
    return _validated(cls, value, file, at, problems)


def _validated(cls: type[S], value: Any, file: ConfigFile, at: json_text.Path, problems: list[str]) -> S | None:
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        seen: dict[str, None] = {}
        for found in error.errors(include_url=False):
            seen.setdefault(_problem(found, file, at))
        problems += seen
        return None


_RULES = {
    "int_type": "must be a whole number, without quotes, point or exponent",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "model_type": "must be an object",
}


def _problem(found: Any, file: ConfigFile, at: json_text.Path) -> str:
    """pydantic's error as `JSON path is value; it must … (line …)`."""
    steps = (*at, *(step for step in found["loc"] if not _is_union_arm(step)))
    path, place = json_path(steps), file.place(steps)
    if found["type"] == "missing":
        near = misspelt(str(steps[-1]), found["input"])
        return f"{path} is missing; it must be given ({place})" + (f"; is it {shown(near)}?" if near else "")
    said = found["msg"][0].lower() + found["msg"][1:]
    value = found["input"]
    what = "null" if value is None else f"the {kind(value)} {shown(value, 40)}"
    rule = _RULES.get(found["type"], said.replace("input should be", "must be"))
    return f"{path} is {what}; it {rule} ({place})"


def _is_union_arm(step: str | int) -> bool:
    """pydantic names the alternatives of a union within the path: `bool`, `constrained-int`."""
    return step in ("bool", "str", "constrained-int", "int", "dict[str,any]")


def _plugins(file: ConfigFile, at: json_text.Path, problems: list[str]) -> PluginParams | None:
    """`plugin_params`, which is a string that holds JSON, or an object."""
    given = file.model.get("plugin_params")
    if given is None or given == "":
        return PluginParams(plugin_type="")
    try:
        value = json_text.parse(given) if isinstance(given, str) else given
    except InputError as error:
        problems.append(
            f"{json_path(at)} is the string {shown(given, 40)}; it must hold JSON, but {error} ({file.place(at)})"
        )
        return None
    return _validated(PluginParams, value, file, at, problems)
