"""How many cards and nodes a deployment has: the rank table, which knows, is no part of the config."""

import math
from typing import NamedTuple

from cpjax.errors import InputError
from cpjax.mindie.schema import Backend, Model, Motor


class World(NamedTuple):
    """Cards of all nodes; `is_known` False: `nodes` is only the least that can be."""

    cards: int
    nodes: int
    is_known: bool
    notes: tuple[str, ...] = ()


def world_of(model: Model, backend: Backend, motor: Motor | None, role: str | None, nodes: int | None) -> World:
    """The world that the file and `--nodes` imply.

    - MindIE-Motor's file has the pods and their NPUs.
    - With distributedEnable a process has one data-parallel rank, and worldSize is its own cards: the world is what the
      sizes fill.
    - With several nodes worldSize is one node's cards where npuDeviceIds is as long (src/config_manager/
      backend_config.cpp demands that, before the rank table replaces both). Where npuDeviceIds is shorter, as on some
      of the vendor's pages, worldSize counts all cards.

    Raises:
      InputError: `nodes` is given for a file that says it.
    """
    is_distributed = backend.ScheduleConfig.distributedEnable
    if motor is not None:
        if nodes is not None:
            raise InputError("--nodes is given, but a user_config.json has the pods of an instance; take --nodes out")
        pods, npus = _pods(motor, role)
        if pods and npus and (is_distributed or backend.multiNodesInferEnabled):
            return World(pods * npus, pods, True)
    if is_distributed:
        return World(_product(model, tp=model.worldSize), nodes or 1, nodes is not None)
    if not backend.multiNodesInferEnabled:
        return World(model.worldSize, nodes or 1, True)
    implied = _implied(model, backend) if nodes is None else nodes
    # A rank table has two servers or more: what is wrong with two is wrong with all.
    found = implied or 2
    cards = model.worldSize * found if _is_per_node(model, backend) else model.worldSize
    return World(cards, found, implied is not None, () if nodes is not None else (_note(found, implied),))


def _note(found: int, implied: int | None) -> str:
    how = "as the sizes imply" if implied else "the fewest that a rank table may have"
    return f"multiNodesInferEnabled is true: {found} nodes were taken, {how}; --nodes gives their number"


def _pods(motor: Motor, role: str | None) -> tuple[int | None, int | None]:
    if role == "prefill":
        return motor.single_p_instance_pod_num, motor.p_pod_npu_num
    return motor.single_d_instance_pod_num, motor.d_pod_npu_num


def _product(model: Model, tp: int) -> int:
    """dp · cp · tp, with `tp` where it is not set."""
    given = model.tp if model.tp not in (None, -1) else tp
    return math.prod(max(1, size or 1) for size in (model.dp, model.cp, given))


def _is_per_node(model: Model, backend: Backend) -> bool:
    """Is worldSize the number of one node's cards?"""
    ids = backend.npuDeviceIds
    return bool(ids) and len(ids[0]) == model.worldSize


def _implied(model: Model, backend: Backend) -> int | None:
    """The number of nodes that the sizes imply; None: they imply none above 1."""
    whole, ids = model.worldSize, backend.npuDeviceIds
    if _is_per_node(model, backend):
        part, whole = whole, _product(model, tp=1)
    else:
        part = len(ids[0]) if ids else whole
    return whole // part if part and whole > part and whole % part == 0 else None
