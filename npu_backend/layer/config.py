"""What a config.json says of one layer, as Hugging Face and DeepSeek spell it, and what the operators do not take.

    softmax scale   (D + R)^−½ · g(mscale_all_dim)²       with YaRN (arXiv 2309.00071, §3.4); (D + R)^−½ without
    cos and sin     · g(mscale) / g(mscale_all_dim)       both given; · g(1) where one is missing

with g(m) = 0.1 · m · ln factor + 1 for a factor above 1, else 1 (DeepSeek's modeling_deepseek.py, `yarn_get_mscale`).
"""

import math
from dataclasses import dataclass
from typing import Any

from npu_backend.contracts.ring_mla import NOPE, ROPE, VALUE
from npu_backend.errors import InputError

MODEL_TYPES = ("deepseek_v3", "deepseekv2")
"""Hugging Face's, and what the vendor's MindIE format writes for the same code."""
HEADS = 128
"""Most heads of npu_ring_mla."""


@dataclass(frozen=True)
class Yarn:
    """How the rotary embedding is stretched; names as in config.json."""

    factor: float
    original_max_position_embeddings: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def g(self, m: float) -> float:
        """YaRN's correction."""
        return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def cos_factor(self) -> float:
        """Multiplies cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.g(self.mscale) / self.g(self.mscale_all_dim)
        return self.g(1.0)


@dataclass(frozen=True)
class LayerConfig:
    """Numbers of a layer, named as in config.json. `q_lora_rank` None: queries are one projection."""

    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    q_lora_rank: int | None
    rms_norm_eps: float
    rope_theta: float
    yarn: Yarn | None
    intermediate_size: int  # of a dense layer
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float

    @property
    def softmax_scale(self) -> float:
        """What multiplies q·k."""
        factor = self.yarn.g(self.yarn.mscale_all_dim) ** 2 if self.yarn and self.yarn.mscale_all_dim else 1.0
        return (NOPE + ROPE) ** -0.5 * factor


def config_of(document: Any, is_moe: bool) -> LayerConfig:
    """The numbers that a layer of this kind needs.

    Raises:
      InputError: a number that is missing or has no meaning, and what the vendor's operators cannot compute.
    """
    if not isinstance(document, dict):
        raise InputError(f"config is a JSON {type(document).__name__}; it must be an object, a model's config.json")
    if document.get("model_type") not in MODEL_TYPES:
        raise InputError(f"model_type is {document.get('model_type')!r:.60}; it must be {' or '.join(MODEL_TYPES)}")
    _check_ways(document, is_moe)
    theta, yarn = _rope(document)
    shared = _whole(document, "n_shared_experts", 0, least=0) if is_moe else 0
    config = LayerConfig(
        hidden_size=_whole(document, "hidden_size"),
        num_attention_heads=_whole(document, "num_attention_heads"),
        kv_lora_rank=_whole(document, "kv_lora_rank"),
        q_lora_rank=None if document.get("q_lora_rank") is None else _whole(document, "q_lora_rank"),
        rms_norm_eps=_positive(document, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        yarn=yarn,
        intermediate_size=0 if is_moe else _whole(document, "intermediate_size"),
        moe_intermediate_size=_whole(document, "moe_intermediate_size") if is_moe else 0,
        n_routed_experts=_whole(document, "n_routed_experts") if is_moe else 0,
        n_shared_experts=shared,
        num_experts_per_tok=_whole(document, "num_experts_per_tok") if is_moe else 0,
        n_group=_whole(document, "n_group", 1) if is_moe else 1,
        topk_group=_whole(document, "topk_group", _whole(document, "n_group", 1)) if is_moe else 1,
        routed_scaling_factor=_positive(document, "routed_scaling_factor", 1.0),
    )
    if config.num_attention_heads > HEADS:
        raise InputError(f"num_attention_heads is {config.num_attention_heads}; npu_ring_mla takes at most {HEADS}")
    if is_moe:
        _check_router(config)
    return config


def _check_ways(document: dict[str, Any], is_moe: bool) -> None:
    dims = {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
    for name, size in dims.items():
        if document.get(name) != size:
            raise InputError(f"{name} is {document.get(name)!r:.60}; npu_ring_mla takes {size} and nothing else")
    ways = {"hidden_act": "silu", "attention_bias": False, "rope_interleave": True}
    ways |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True} if is_moe else {}
    for name, understood in ways.items():
        if document.get(name, understood) != understood:
            raise InputError(
                f"{name} is {document[name]!r:.60}; the operators compute {understood!r} only, leave the case out"
            )


def _check_router(config: LayerConfig) -> None:
    experts, groups = config.n_routed_experts, config.n_group
    if experts % groups or experts // groups <= 2:
        raise InputError(
            f"n_group is {groups} of {experts} experts; npu_moe_gating_top_k wants equal groups of more than 2"
        )
    if config.topk_group > groups:
        raise InputError(f"topk_group is {config.topk_group}, above n_group, {groups}")
    if config.num_experts_per_tok > experts // groups * config.topk_group:
        raise InputError(
            f"num_experts_per_tok is {config.num_experts_per_tok}, but {config.topk_group} of {groups} groups have "
            f"only {experts // groups * config.topk_group} experts"
        )


def _rope(document: dict[str, Any]) -> tuple[float, Yarn | None]:
    """rope_theta, and YaRN if it is said, in either spelling."""
    said = document.get("rope_parameters") or document.get("rope_scaling") or {}
    if not isinstance(said, dict):
        raise InputError(f"the rotary embedding is {said!r:.60}; it must be an object")
    theta = _positive({"rope_theta": said.get("rope_theta", document.get("rope_theta"))}, "rope_theta", 10000.0)
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise InputError(f"the rotary embedding is {kind!r:.60}; only 'yarn' and 'default' are computed")
    longest = _positive(document, "max_position_embeddings", 4096.0)
    original = _positive(said, "original_max_position_embeddings", longest)
    optional = {name: said.get(name) for name in ("mscale", "mscale_all_dim", "attention_factor")}
    yarn = Yarn(
        factor=_positive(said, "factor", longest / original),
        original_max_position_embeddings=original,
        beta_fast=_positive(said, "beta_fast", 32.0),
        beta_slow=_positive(said, "beta_slow", 1.0),
        truncate=said.get("truncate", True) is not False,
        **{name: None if x is None else _finite(name, x) for name, x in optional.items()},
    )
    if yarn.beta_fast < yarn.beta_slow:
        raise InputError(f"beta_fast is {yarn.beta_fast:g}, below beta_slow, {yarn.beta_slow:g}")
    return theta, yarn


def _whole(document: dict[str, Any], name: str, default: int | None = None, *, least: int = 1) -> int:
    value = document.get(name)
    value = default if value is None else value
    if type(value) is not int or value < least:
        raise InputError(f"{name} is {value!r:.60}; it must be a whole number, at least {least}")
    return value


def _finite(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise InputError(f"{name} is {value!r:.60}; it must be a finite number")
    return float(value)


def _positive(document: dict[str, Any], name: str, default: float) -> float:
    value = document.get(name)
    value = _finite(name, default if value is None else value)
    if value <= 0:
        raise InputError(f"{name} is {value:g}; it must be above 0")
    return value
