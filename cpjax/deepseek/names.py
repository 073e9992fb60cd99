"""The tensors of a checkpoint: their names, shapes and places in `ModelWeights`, as Hugging Face writes them.

    model.embed_tokens.weight  model.layers.<i>.{input_layernorm, self_attn.…, post_attention_layernorm, mlp.…}.weight
    model.norm.weight          lm_head.weight          model.layers.<i ≥ num_hidden_layers>.…      the MTP modules

Linear weights are `[out, in]`. Every name ends in `.weight` but the router's `e_score_correction_bias`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from cpjax.deepseek.attention import MlaWeights
from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.model import LayerWeights, ModelWeights
from cpjax.deepseek.moe import MlpWeights, MoeWeights
from cpjax.deepseek.mtp import MtpWeights

Get = Callable[[str], Any]
"""Name of a tensor → whatever stands for it."""

BIAS = "e_score_correction_bias"

_ROWS = {"q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"}
_COLUMNS = {"o_proj", "down_proj"}


def cut_axis(name: str) -> int | None:
    """The axis along which ranks of tensor parallelism cut a weight by heads or inner columns; None: all have it.

    >>> [cut_axis(f"model.layers.0.self_attn.{name}.weight") for name in ("kv_b_proj", "o_proj", "kv_a_layernorm")]
    [0, 1, None]
    """
    last = name.removesuffix(".weight").rpartition(".")[2]
    return 0 if last in _ROWS else 1 if last in _COLUMNS else None


def shapes(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the model, in the order of the layers; without the MTP modules.

    >>> from cpjax.deepseek.config import KNOWN
    >>> found = shapes(KNOWN["DeepSeek-V3"])
    >>> len(found), found["model.layers.60.self_attn.kv_b_proj.weight"]
    (45395, (32768, 512))
    """
    wide = (config.vocab_size, config.hidden_size)
    found = {"model.embed_tokens.weight": wide}
    for number in range(config.num_hidden_layers):
        found |= layer_shapes(config, number)
    return found | {"model.norm.weight": (config.hidden_size,), "lm_head.weight": wide}


def layer_shapes(config: DeepseekConfig, number: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors of one decoder layer."""
    wide, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    inner: dict[str, tuple[int, ...]] = {"input_layernorm": (wide,), "post_attention_layernorm": (wide,)}
    if config.q_lora_rank is None:
        inner["self_attn.q_proj"] = (heads * config.head_dim, wide)
    else:
        inner["self_attn.q_a_proj"] = (config.q_lora_rank, wide)
        inner["self_attn.q_a_layernorm"] = (config.q_lora_rank,)
        inner["self_attn.q_b_proj"] = (heads * config.head_dim, config.q_lora_rank)
    inner["self_attn.kv_a_proj_with_mqa"] = (latent + config.qk_rope_head_dim, wide)
    inner["self_attn.kv_a_layernorm"] = (latent,)
    inner["self_attn.kv_b_proj"] = (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    inner["self_attn.o_proj"] = (wide, heads * config.v_head_dim)
    if not config.is_moe(number):
        inner |= _mlp("mlp", wide, config.intermediate_size)
    else:
        inner["mlp.gate"] = (config.n_routed_experts, wide)
        for expert in range(config.n_routed_experts):
            inner |= _mlp(f"mlp.experts.{expert}", wide, config.moe_intermediate_size)
        if config.n_shared_experts:
            shared = config.moe_intermediate_size * config.n_shared_experts
            inner |= _mlp("mlp.shared_experts", wide, shared)
    found = {f"model.layers.{number}.{name}.weight": shape for name, shape in inner.items()}
    if config.is_moe(number):
        found[f"model.layers.{number}.mlp.gate.{BIAS}"] = (config.n_routed_experts,)
    return found


def mtp_shapes(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors of all MTP modules; embedding and head, which they share with the model, left out.

    >>> from cpjax.deepseek.config import KNOWN
    >>> found = mtp_shapes(KNOWN["DeepSeek-V3"])
    >>> len(found), found["model.layers.61.eh_proj.weight"]
    (786, (7168, 14336))
    """
    found, wide = {}, config.hidden_size
    for number in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        found |= layer_shapes(config, number)
        parts = {"enorm": (wide,), "hnorm": (wide,), "eh_proj": (wide, 2 * wide), "shared_head.norm": (wide,)}
        found |= {f"model.layers.{number}.{name}.weight": shape for name, shape in parts.items()}
    return found


def _mlp(name: str, wide: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gate_proj": (inner, wide), f"{name}.up_proj": (inner, wide), f"{name}.down_proj": (wide, inner)}


def weights_of(config: DeepseekConfig, get: Get, stack: Callable[[list], Any]) -> ModelWeights:
    """`ModelWeights` of whatever `get` finds by name; `stack` joins what it finds for the experts of a layer."""
    layers = tuple(layer_of(config, number, get, stack) for number in range(config.num_hidden_layers))
    return ModelWeights(get("model.embed_tokens.weight"), layers, get("model.norm.weight"), get("lm_head.weight"))


def mtp_of(config: DeepseekConfig, get: Get, stack: Callable[[list], Any]) -> tuple[MtpWeights, ...]:
    """All MTP modules, as `weights_of` gives the model."""

    def module(number: int) -> MtpWeights:
        enorm, hnorm, eh_proj, norm = (
            get(f"model.layers.{number}.{name}.weight") for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        )
        return MtpWeights(enorm, hnorm, eh_proj, layer_of(config, number, get, stack), norm)

    return tuple(module(config.num_hidden_layers + k) for k in range(config.num_nextn_predict_layers))


def layer_of(config: DeepseekConfig, number: int, get: Get, stack: Callable[[list], Any]) -> LayerWeights:
    """One layer of it."""
    at = lambda name: get(f"model.layers.{number}.{name}.weight")  # noqa: E731
    one = lambda name: MlpWeights(*(at(f"{name}.{part}") for part in MlpWeights._fields))  # noqa: E731
    if config.is_moe(number):
        experts = MlpWeights(*(stack(list(same)) for same in zip(*_experts(config, one), strict=True)))
        shared = one("mlp.shared_experts") if config.n_shared_experts else None
        feed = MoeWeights(at("mlp.gate"), get(f"model.layers.{number}.mlp.gate.{BIAS}"), experts, shared)
    else:
        feed = one("mlp")
    there = {"q_proj"} if config.q_lora_rank is None else {"q_a_proj", "q_a_layernorm", "q_b_proj"}
    always = {"kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
    attention = MlaWeights(**{name: at(f"self_attn.{name}") for name in sorted(there | always)})
    return LayerWeights(at("input_layernorm"), attention, at("post_attention_layernorm"), feed)


def _experts(config: DeepseekConfig, one: Callable[[str], MlpWeights]) -> Iterator[MlpWeights]:
    return (one(f"mlp.experts.{expert}") for expert in range(config.n_routed_experts))
