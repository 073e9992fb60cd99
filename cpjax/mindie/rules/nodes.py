"""Nodes and cards: what must fit where an instance runs on more than one server, and in MindIE-Motor's file."""

from cpjax.mindie.hardware import HARDWARE, MOTOR_TYPES
from cpjax.mindie.rules.rule import BACKEND, VERSIONS, Rule, Setting, value

_MOTOR_SOURCE = "validate_config.py of MindIE-Motor"


def _cards(s: Setting) -> list[int]:
    """The length of each list of npuDeviceIds; nothing where it is not given."""
    return [len(ids) for ids in s.backend.npuDeviceIds or []]


def _are_others(s: Setting) -> bool:
    return any(number != s.model.worldSize for number in _cards(s))


def _twice(s: Setting) -> list[int]:
    return [card for ids in s.backend.npuDeviceIds or [] for card in sorted(set(ids)) if ids.count(card) > 1]


def _local(s: Setting) -> int:
    """Cards of one node."""
    return s.sizes.world_size // max(1, s.deployment.nodes)


def _has_node_without_dp(s: Setting) -> bool:
    """executor.cpp: a data-parallel rank has tp · cp cards, or a node's where tp is not set. It may be larger than a
    node; otherwise each node must have one."""
    size = _local(s) if s.deployment.tp is None else s.sizes.tp * s.sizes.cp
    return s.is_multi_node and size <= _local(s) and 1 <= s.sizes.dp < s.deployment.nodes


def _pods(s: Setting) -> int | None:
    if s.deployment.motor is None:
        return None
    return s.deployment.motor.p_pod_npu_num if s.role == "prefill" else s.deployment.motor.d_pod_npu_num


def _motor_range(field: str, low: int, high: int, role: str) -> Rule:
    """Reported once, with the part that it is for."""

    def broken(s: Setting) -> str | None:
        number = None if s.deployment.motor is None or s.role != role else getattr(s.deployment.motor, field)
        return value(number is not None and not low <= number <= high, number)

    says = f"{field} is {low} to {high}"
    return Rule(f"{field}-range", field, "error", True, says, "give it such a value", _MOTOR_SOURCE, broken)


# fmt: off
NODES: tuple[Rule, ...] = (
    Rule("cards-are-world", "npuDeviceIds", "error", True, "each list of npuDeviceIds has worldSize cards; with "
         "several nodes too, where the server compares them before the rank table replaces both", "list worldSize "
         "cards, and with several nodes set worldSize to the cards of one", BACKEND,
         lambda s: value((not s.is_multi_node or s.since("head")) and _are_others(s),
                         f"{_cards(s)} cards, worldSize {s.model.worldSize}")),
    Rule("cards-of-a-node", "npuDeviceIds", "warning", True, "with several nodes too, the code of head compares "
         "npuDeviceIds with worldSize; pages let worldSize count all nodes' cards",
         "if the server refuses, set worldSize to one node's cards", BACKEND,
         lambda s: value(s.is_multi_node and _are_others(s), f"{_cards(s)} cards, worldSize {s.model.worldSize}"),
         VERSIONS[0], "head"),
    Rule("cards-once", "npuDeviceIds", "error", True, "no card stands twice in a list of npuDeviceIds", "list it once",
         BACKEND, lambda s: value(bool(_twice(s)), f"card {_twice(s)[:5]} twice")),
    Rule("instance-number", "modelInstanceNumber", "error", True, "npuDeviceIds has modelInstanceNumber lists",
         "make it so", BACKEND,
         lambda s: value(s.backend.npuDeviceIds is not None
                         and s.backend.modelInstanceNumber not in (None, len(_cards(s))),
                         f"{len(_cards(s))} lists, modelInstanceNumber {s.backend.modelInstanceNumber}")),
    Rule("nodes-of-a-rank-table", "multiNodesInferEnabled", "error", True, "with multiNodesInferEnabled, server_count "
         "of the rank table is 2 to 60", "give --nodes such a number, or set multiNodesInferEnabled to false",
         "ranktable_config.cpp", lambda s: value(s.is_multi_node and not 2 <= s.deployment.nodes <= 60,
                                                 f"{s.deployment.nodes} nodes")),
    Rule("dp-on-every-node", "dp", "error", True, "with several nodes, each has at least one data-parallel rank, or a "
         "rank is larger than a node (tp · cp above a node's cards; tp must be set); otherwise the server ends with "
         '"Invalid DP number per node: 0"', "set tp, and dp to a multiple of the nodes or tp · cp to all cards",
         "executor.cpp", lambda s: value(_has_node_without_dp(s),
                                         f"dp {s.sizes.dp}, tp {s.deployment.tp or 'not set'}, {s.deployment.nodes} "
                                         f"nodes of {_local(s)} cards"), "head"),
    Rule("cards-of-a-server", "npuDeviceIds", "error", False, "an Atlas 800I A2 has 8 NPUs, an Atlas 800I A3 has 16",
         "use more nodes: multiNodesInferEnabled and a rank table; say here how many with --nodes",
         "MindCluster scheduling guide, node affinity",
         lambda s: value((s.deployment.nodes_known or not s.deployment.is_distributed) and s.hardware in HARDWARE
                         and s.sizes.world_size > HARDWARE[s.hardware] * s.deployment.nodes,
                         f"{s.sizes.world_size} cards on {s.deployment.nodes} × {s.hardware}")),
    Rule("cards-of-a-pod", "worldSize", "error", False, "without multiNodesInferEnabled and distributedEnable, an "
         "instance has one pod, and worldSize is at most its NPUs", "make worldSize smaller, or the pod larger",
         "user_config.json of MindIE-Motor, p_pod_npu_num and d_pod_npu_num",
         lambda s: value(not s.is_multi_node and not s.deployment.is_distributed and _pods(s) is not None
                         and s.model.worldSize > (_pods(s) or 0), f"worldSize {s.model.worldSize}, {_pods(s)} NPUs")),
    Rule("motor-hardware", "hardware_type", "error", True, f"hardware_type is {' or '.join(MOTOR_TYPES)}",
         "give it such a value", _MOTOR_SOURCE,
         lambda s: value(s.deployment.motor is not None and s.role == "prefill"
                         and s.deployment.motor.hardware_type not in (None, *MOTOR_TYPES),
                         s.deployment.motor and repr(s.deployment.motor.hardware_type))),
    _motor_range("p_instances_num", 1, 20, "prefill"),
    _motor_range("d_instances_num", 1, 20, "decode"),
    _motor_range("single_p_instance_pod_num", 1, 8, "prefill"),
    _motor_range("single_d_instance_pod_num", 1, 20, "decode"),
    _motor_range("p_pod_npu_num", 1, 16, "prefill"),
    _motor_range("d_pod_npu_num", 1, 16, "decode"),
    _motor_range("prefill_distribute_enable", 0, 1, "prefill"),
    _motor_range("decode_distribute_enable", 0, 1, "decode"),
)
# fmt: on
