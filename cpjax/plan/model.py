"""A model's shape: what the cost of a prompt depends on. Numbers of parameters follow from the shape."""

from typing import Annotated, Literal

from pydantic import Field

from cpjax.deepseek.config import KNOWN, DeepseekConfig
from cpjax.errors import InputError
from cpjax.plan.facts import Fact, checked, shipped

Count = Annotated[int, Field(ge=1)]


class ModelShape(Fact):
    """A decoder. Attention has `heads` of `key_dim` (queries and keys) and `value_dim`.

    Keys and values are `kv_heads` heads, or with `latent` > 0 made from a latent of `latent` + `rope` numbers a token
    (MLA: 512 + 64). `weight_bits` is how weights lie in memory, `product_bits` which peak rate their products have.

    >>> models()["DeepSeek-R1"].active / 1e9, models()["DeepSeek-R1"].total / 1e9
    (35.697917952, 671.02539776)
    """

    source: str
    assumed: tuple[str, ...] = Field(default=(), strict=False)
    layers: Count
    attention_layers: Count | None = None  # those with attention over all keys, if not all
    hidden: Count
    heads: Count
    kv_heads: Count
    key_dim: Count
    value_dim: Count
    latent: Annotated[int, Field(ge=0)] = 0
    rope: Annotated[int, Field(ge=0)] = 0
    query_latent: Annotated[int, Field(ge=0)] = 0  # 0: queries are one projection
    intermediate: Count  # of a dense layer
    dense_layers: Annotated[int, Field(ge=0)] | None = None  # None: all are dense
    experts: Annotated[int, Field(ge=0)] = 0
    experts_a_token: Annotated[int, Field(ge=0)] = 0
    shared_experts: Annotated[int, Field(ge=0)] = 0
    expert_intermediate: Annotated[int, Field(ge=0)] = 0
    vocabulary: Count
    weight_bits: Literal[4, 8, 16]
    product_bits: Literal[8, 16]
    cache_bits: Literal[8, 16] = 16
    stated_active: Annotated[float, Field(gt=0)] | None = None  # parameters a token, where the shape is not all
    stated_total: Annotated[float, Field(gt=0)] | None = None

    @property
    def full_layers(self) -> int:
        """Layers with attention over all keys."""
        return self.layers if self.attention_layers is None else self.attention_layers

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return 0 if not self.experts else self.layers - (self.dense_layers or 0)

    @property
    def attention_parameters(self) -> int:
        """Of one layer's projections; with a latent, without those that make keys and values of it.

        What is up-projected is the tokens that a rank meets, not those it holds (`up_projection`).
        """
        out = self.heads * self.value_dim * self.hidden
        queries = self.heads * self.key_dim
        into = self.query_latent * (self.hidden + queries) if self.query_latent else self.hidden * queries
        if self.latent:
            return into + self.hidden * (self.latent + self.rope) + out
        return into + self.hidden * self.kv_heads * (self.key_dim + self.value_dim) + out

    @property
    def up_projection(self) -> int:
        """Parameters that make one layer's keys (without rope) and values of latents; 0 without latents."""
        return self.latent * self.heads * (self.key_dim - self.rope + self.value_dim) if self.latent else 0

    @property
    def expert_parameters(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.hidden * self.expert_intermediate

    @property
    def ends(self) -> int:
        """Embedding and head."""
        return 2 * self.vocabulary * self.hidden

    @property
    def routed(self) -> int:
        """All routed experts."""
        return self.moe_layers * self.experts * self.expert_parameters

    @property
    def total(self) -> float:
        """All parameters; norms are left out, and MTP modules."""
        return self.stated_total or float(self.ends + self.routed + self._always)

    @property
    def active(self) -> float:
        """Parameters that one token is multiplied with, without embedding and head."""
        if self.stated_active is not None:
            return self.stated_active - self.ends
        return float(self._always + self.moe_layers * self.experts_a_token * self.expert_parameters)

    @property
    def _always(self) -> int:
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.intermediate
        every = self.shared_experts * self.expert_parameters + self.hidden * self.experts
        return self.layers * (self.attention_parameters + self.up_projection) + dense + self.moe_layers * every

    def cache_numbers(self, tp: int) -> int:
        """Numbers a token and layer in the cache of one of `tp` cards: the latent whole, of the heads a part."""
        if self.latent:
            return self.latent + self.rope
        return -(-self.kv_heads // tp) * (self.key_dim + self.value_dim)

    def cache_bytes(self, tp: int) -> float:
        """The same in bytes: 1,152 for DeepSeek's latent."""
        return self.cache_numbers(tp) * self.cache_bits / 8


def models() -> dict[str, ModelShape]:
    """The models that are known by name: DeepSeek's by their config, others from the data file."""
    ours = {name: checked(ModelShape, table, f"models.{name}") for name, table in shipped("models")["models"].items()}
    return {name: shape_of(config) for name, config in KNOWN.items()} | ours


def shape_of(config: DeepseekConfig, weight_bits: Literal[4, 8, 16] = 8, cache_bits: Literal[8, 16] = 16) -> ModelShape:
    """The shape of a DeepSeek model, from its own config.json. 4-bit weights have 8-bit products (W4A8)."""
    return ModelShape(
        source="the model's config.json",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        key_dim=config.head_dim,
        value_dim=config.v_head_dim,
        latent=config.kv_lora_rank,
        rope=config.qk_rope_head_dim,
        query_latent=config.q_lora_rank or 0,
        intermediate=config.intermediate_size,
        dense_layers=min(config.first_k_dense_replace, config.num_hidden_layers),
        experts=config.n_routed_experts,
        experts_a_token=config.num_experts_per_tok,
        shared_experts=config.n_shared_experts,
        expert_intermediate=config.moe_intermediate_size,
        vocabulary=config.vocab_size,
        weight_bits=weight_bits,
        product_bits=8 if weight_bits < 16 else 16,
        cache_bits=cache_bits,
    )


def model_of(name: str) -> ModelShape:
    """The model of a name.

    Raises:
      InputError: none has it.
    """
    known = {key.lower(): shape for key, shape in models().items()}
    if name.lower() not in known:
        raise InputError(f"model {name!r:.60} is not known; known are {', '.join(models())}, or give its config.json")
    return known[name.lower()]
