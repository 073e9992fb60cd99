"""The linear weights of a layer, and which tensors a case and a result have: names, dtypes, shapes."""

from typing import NamedTuple

from cpjax.deepseek.config import DeepseekConfig
from cpjax.deepseek.description import FLOAT, KINDS, PARTS

Form = tuple[str, tuple[int, ...]]
"""Dtype as safetensors writes it, and shape."""

SCALE = "F32"
"""Dtype of scales and offsets in a case."""


class Matrix(NamedTuple):
    """`[rows, columns]` of a linear weight."""

    rows: int
    columns: int


class Product(NamedTuple):
    """A product of the layer, and the weights whose results stand side by side in it."""

    weights: tuple[str, ...]
    """Names without `.weight`; of experts with `{e}` in place of the number."""
    is_expert: bool = False


def products_of(config: DeepseekConfig, is_moe: bool) -> dict[str, Product]:
    """Tensor of a result → the product that it is, in the order in which they are computed.

    >>> from cpjax.deepseek.config import SMALL
    >>> list(products_of(SMALL, False))
    ['q_a', 'q', 'kv_a', 'o', 'gate_up', 'down']
    """
    attention = {"q_a": "q_a_proj", "q": "q_b_proj"} if config.q_lora_rank is not None else {"q": "q_proj"}
    attention |= {"kv_a": "kv_a_proj_with_mqa", "o": "o_proj"}
    found = {name: Product((f"self_attn.{weight}",)) for name, weight in attention.items()}
    if not is_moe:
        return found | _mlp("", "mlp.", False)
    found |= _mlp("expert_", "mlp.experts.{e}.", True)
    return found | (_mlp("shared_", "mlp.shared_experts.", False) if config.n_shared_experts else {})


def _mlp(prefix: str, where: str, is_expert: bool) -> dict[str, Product]:
    return {
        f"{prefix}gate_up": Product((f"{where}gate_proj", f"{where}up_proj"), is_expert),
        f"{prefix}down": Product((f"{where}down_proj",), is_expert),
    }


def linears_of(config: DeepseekConfig, is_moe: bool) -> dict[str, Matrix]:
    """Every weight that may be quantised, without `.weight` → its matrix."""
    width, heads = config.hidden_size, config.num_attention_heads
    queries = Matrix(heads * config.head_dim, config.q_lora_rank or width)
    found = {"self_attn.q_proj": queries}
    if config.q_lora_rank is not None:
        found = {"self_attn.q_a_proj": Matrix(config.q_lora_rank, width), "self_attn.q_b_proj": queries}
    found["self_attn.kv_a_proj_with_mqa"] = Matrix(config.kv_lora_rank + config.qk_rope_head_dim, width)
    found["self_attn.o_proj"] = Matrix(width, heads * config.v_head_dim)
    inner = {"mlp.": config.intermediate_size}
    if is_moe:
        inner = {f"mlp.experts.{e}.": config.moe_intermediate_size for e in range(config.n_routed_experts)}
        if config.n_shared_experts:
            inner["mlp.shared_experts."] = config.moe_intermediate_size * config.n_shared_experts
    for where, size in inner.items():
        found |= {f"{where}{name}_proj": Matrix(size, width) for name in ("gate", "up")}
        found[f"{where}down_proj"] = Matrix(width, size)
    return found


def norms_of(config: DeepseekConfig) -> dict[str, int]:
    """Weights of norms → their length."""
    found = {"input_layernorm.weight": config.hidden_size, "post_attention_layernorm.weight": config.hidden_size}
    found["self_attn.kv_a_layernorm.weight"] = config.kv_lora_rank
    return found | ({} if config.q_lora_rank is None else {"self_attn.q_a_layernorm.weight": config.q_lora_rank})


def case_tensors(config: DeepseekConfig, is_moe: bool, kinds: dict[str, str], tokens: int) -> dict[str, list[Form]]:
    """Every tensor that a case must have → the forms that it may have; of `may_have` see below."""
    width = config.hidden_size
    found: dict[str, list[Form]] = {"hidden": [("F16", (tokens, width))], "position": [("I32", (tokens,))]}
    found |= {name: [("F16", (size,))] for name, size in norms_of(config).items()}
    rows = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    found["self_attn.kv_b_proj.weight"] = [("F16", (rows, config.kv_lora_rank))]
    if is_moe:
        found["mlp.gate.weight"] = [("F32", (config.n_routed_experts, width))]
        found["mlp.gate.e_score_correction_bias"] = [("F32", (config.n_routed_experts,))]
    for name, matrix in linears_of(config, is_moe).items():
        found |= {f"{name}.{last}": forms for last, forms in _stored(kinds.get(name, FLOAT), matrix).items()}
    return found


def _stored(kind: str, matrix: Matrix) -> dict[str, list[Form]]:
    n, k = matrix
    if kind == FLOAT:
        return {"weight": [("F16", (n, k))]}
    if kind == KINDS[0]:
        one, row = (1,), (n,)
        scales: dict[str, list[Form]] = {"input_scale": [(SCALE, one)], "input_offset": [(SCALE, one)]}
        return scales | {
            "weight": [("I8", (n, k))],
            "deq_scale": [("I64", row), ("F32", row)],
            "quant_bias": [("I32", row)],
        }
    found: dict[str, list[Form]] = {"weight": [("I8", (n, k))], "weight_scale": [(SCALE, (n, 1))]}
    if kind == KINDS[2]:
        found["weight"] = [("I8", (n // 2, k))]
        found["scale_bias"] = [(SCALE, (n, parts)) for parts in PARTS if k % parts == 0]
    return found


def may_have(config: DeepseekConfig, is_moe: bool, kinds: dict[str, str]) -> dict[str, list[Form]]:
    """What a case may have besides: offsets of weights, which are 0; scales of groups, in W4A8."""
    found: dict[str, list[Form]] = {}
    for name, (n, k) in linears_of(config, is_moe).items():
        kind = kinds.get(name, FLOAT)
        if kind != FLOAT:
            found[f"{name}.weight_offset"] = [(SCALE, (n, 1))]
        if kind == KINDS[2]:
            groups: list[Form] = [(SCALE, (n, g)) for g in range(1, k + 1) if k % g == 0]
            found |= {f"{name}.weight_scale_second": groups, f"{name}.weight_offset_second": groups}
    return found


def kind_of(product: Product, kinds: dict[str, str]) -> str:
    """How the weights of a product are quantised; those of one product alike."""
    return kinds.get(product.weights[0].format(e=0), FLOAT)


def result_tensors(config: DeepseekConfig, is_moe: bool, kinds: dict[str, str], tokens: int) -> dict[str, Form]:
    """Every tensor that a result has → its form."""
    t, width, heads, rank = tokens, config.hidden_size, config.num_attention_heads, config.q_lora_rank
    found: dict[str, Form] = {"input_norm": ("F16", (t, width))}
    if rank is not None:
        found |= {"q_a": ("F16", (t, rank)), "q_a_norm": ("F16", (t, rank))}
    query = ("F16", (t, heads, config.head_dim))
    found |= {"q": query, "query": query}
    found["kv_a"] = ("F16", (t, config.kv_lora_rank + config.qk_rope_head_dim))
    found |= {"c_kv": ("F16", (t, config.kv_lora_rank)), "k_rope": ("F16", (t, config.qk_rope_head_dim))}
    found |= {"key": ("F16", (t, heads, config.qk_nope_head_dim)), "value": ("F16", (t, heads, config.v_head_dim))}
    found |= {"attention": ("F16", (t, heads, config.v_head_dim)), "lse": ("F32", (t, heads))}
    found |= dict.fromkeys(("o", "attended", "post_norm"), ("F16", (t, width)))
    if is_moe:
        some = (t, config.num_experts_per_tok)
        found |= {"router_logits": ("F32", (t, config.n_routed_experts))}
        found |= {"expert_index": ("I32", some), "expert_weight": ("F32", some)}
        found |= _mlp_tensors("expert_", some, config.moe_intermediate_size, width)
        found["routed"] = ("F16", (t, width))
        if config.n_shared_experts:
            found |= _mlp_tensors("shared_", (t,), config.moe_intermediate_size * config.n_shared_experts, width)
    else:
        found |= _mlp_tensors("", (t,), config.intermediate_size, width)
    found["out"] = ("F16", (t, width))
    for name, product in products_of(config, is_moe).items():
        if (kind := kind_of(product, kinds)) == FLOAT:
            continue
        columns = linears_of(config, is_moe)[product.weights[0].format(e=0)].columns
        batch = found[name][1][:2] if name == "expert_down" else (t,)
        found[f"{name}.integers"] = ("I8", (*batch, columns))
        if kind != KINDS[0]:
            found[f"{name}.token_scale"] = ("F32", batch)
    return found


def _mlp_tensors(prefix: str, batch: tuple[int, ...], inner: int, width: int) -> dict[str, Form]:
    return {
        f"{prefix}gate_up": ("F16", (*batch, 2 * inner)),
        f"{prefix}activated": ("F16", (*batch, inner)),
        f"{prefix}down": ("F16", (*batch, width)),
    }
