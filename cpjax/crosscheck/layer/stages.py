"""The stages of a layer in the order in which they are computed, and what each is judged from."""

from typing import Literal, NamedTuple

from cpjax.crosscheck.layer.case import LayerCase
from cpjax.crosscheck.layer.shape import Product, kind_of, products_of
from cpjax.deepseek.description import FLOAT, KINDS

Kind = Literal[
    "norm",
    "projection",
    "rope",
    "quantisation",
    "quantised product",
    "attention",
    "router",
    "expert",
    "activation",
    "sum",
]


class Stage(NamedTuple):
    """One stage."""

    name: str
    kind: Kind
    outputs: tuple[str, ...]
    """Tensors of the result that it gave."""
    inputs: tuple[str, ...]
    """Tensors that it is judged from: the result's own, or `hidden` of the case."""
    product: Product | None = None
    """Of products and of quantisations."""
    weight: str = ""
    """Of norms: the case's tensor."""


def stages_of(case: LayerCase) -> list[Stage]:
    """All stages.

    A product of quantised weights is two stages: its integers, and the product of these.
    """
    config, products = case.config, products_of(case.config, case.is_moe)

    def product(name: str, source: str, kind: Kind = "projection", more: tuple[str, ...] = ()) -> list[Stage]:
        one = products[name]
        quantised = kind_of(one, case.kinds)
        if quantised == FLOAT:
            return [Stage(name, kind, (name,), (source, *more), one)]
        integers = (f"{name}.integers",) + ((f"{name}.token_scale",) if quantised != KINDS[0] else ())
        first = Stage(f"{name}.integers", "quantisation", integers, (source,), one)
        return [first, Stage(name, "quantised product", (name,), (*integers, *more), one)]

    def norm(name: str, source: str, weight: str) -> Stage:
        return Stage(name, "norm", (name,), (source,), weight=f"{weight}.weight")

    def mlp(prefix: str, source: str, kind: Kind, more: tuple[str, ...] = ()) -> list[Stage]:
        return [
            *product(f"{prefix}gate_up", source, kind, more),
            Stage(f"{prefix}activated", "activation", (f"{prefix}activated",), (f"{prefix}gate_up",)),
            *product(f"{prefix}down", f"{prefix}activated", kind, more),
        ]

    found = [norm("input_norm", "hidden", "input_layernorm")]
    if config.q_lora_rank is not None:
        found += [*product("q_a", "input_norm"), norm("q_a_norm", "q_a", "self_attn.q_a_layernorm")]
    found += [
        *product("q", "input_norm" if config.q_lora_rank is None else "q_a_norm"),
        Stage("query", "rope", ("query",), ("q",)),
        *product("kv_a", "input_norm"),
        norm("c_kv", "kv_a", "self_attn.kv_a_layernorm"),
        Stage("k_rope", "rope", ("k_rope",), ("kv_a",)),
        Stage("key_value", "projection", ("key", "value"), ("c_kv",)),
        Stage("attention", "attention", ("attention", "lse"), ("query", "key", "k_rope", "value")),
        *product("o", "attention"),
        Stage("attended", "sum", ("attended",), ("hidden", "o")),
        norm("post_norm", "attended", "post_attention_layernorm"),
    ]
    if not case.is_moe:
        return [*found, *mlp("", "post_norm", "projection"), Stage("out", "sum", ("out",), ("attended", "down"))]
    found += [
        Stage("router_logits", "router", ("router_logits",), ("post_norm",)),
        Stage("router", "router", ("expert_index", "expert_weight"), ("router_logits",)),
        *mlp("expert_", "post_norm", "expert", ("expert_index",)),
        Stage("routed", "sum", ("routed",), ("expert_down", "expert_weight")),
    ]
    summands: tuple[str, ...] = ("attended", "routed")
    if config.n_shared_experts:
        found += mlp("shared_", "post_norm", "projection")
        summands = (*summands, "shared_down")
    return [*found, Stage("out", "sum", ("out",), summands)]
