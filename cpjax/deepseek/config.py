"""A checkpoint's config.json as one value: shapes, rotary embedding, and the softmax scale that follows. No JAX.

Numbers have the names of the file. Two of them are easily got wrong, and are properties here:

    softmax scale   (D + R)^−½ · g(mscale_all_dim)²       with YaRN; (D + R)^−½ without
    cos and sin     · g(mscale) / g(mscale_all_dim)       both given; · g(1) where one is missing

with g(m) = 0.1 · m · ln factor + 1 for a factor above 1, else 1 (DeepSeek's modeling_deepseek.py, `yarn_get_mscale`;
YaRN, arXiv 2309.00071, §3.4). For DeepSeek-V3 that is 192^−½ · 1.8738 = 0.1352, and 1 for cos and sin.
"""

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cpjax.errors import InputError

MODEL_TYPES = ("deepseek_v3", "deepseekv2")
"""model_type of the same code: Hugging Face's, and the one that the vendor's MindIE format writes."""

_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "scoring_func": ("sigmoid", ("sigmoid",)),
    "topk_method": ("noaux_tc", ("noaux_tc",)),
    "hidden_act": ("silu", ("silu",)),
    "moe_layer_freq": (1, (1,)),
    "attention_bias": (False, (False,)),
    "tie_word_embeddings": (False, (False,)),
}
"""What is computed in one way only: name → the value if it is not said, and the values that are understood."""


@dataclass(frozen=True)
class Yarn:
    """YaRN: how the rotary embedding is stretched to `factor` times the length that the model was trained with.

    `attention_factor`, where given, replaces g(mscale) / g(mscale_all_dim) on cos and sin. `truncate` rounds the ends
    of the ramp to whole dimensions.

    Raises:
      InputError: a number that has no meaning.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        """Refuse what would make an angle NaN."""
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            _positive(f"YaRN's {name}", getattr(self, name))
        if self.beta_fast < self.beta_slow:
            raise InputError(
                f"YaRN's beta_fast is {self.beta_fast}, below beta_slow, {self.beta_slow}; exchange them, as 32 and 1"
            )

    def mscale_of(self, m: float) -> float:
        """g(m).

        >>> round(Yarn(40.0, 4096).mscale_of(1.0) ** 2, 4)
        1.8739
        """
        return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def cos_factor(self) -> float:
        """Multiplies cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.mscale_of(self.mscale) / self.mscale_of(self.mscale_all_dim)
        return self.mscale_of(1.0)

    @property
    def scale_factor(self) -> float:
        """Multiplies the softmax scale."""
        return self.mscale_of(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class DeepseekConfig:
    """A model's shape. Letters elsewhere: D_model `hidden_size`, N heads, D nope, R rope, V value, C latent, E experts.

    `q_lora_rank` None: queries are one projection. `n_group` None: experts are not grouped. `yarn` None: plain rope.
    `num_nextn_predict_layers` counts the MTP modules, which stand behind the layers in the file.

    >>> KNOWN["DeepSeek-V3"].softmax_scale
    0.1352337788608801

    Raises:
      InputError: numbers that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    n_shared_experts: int
    n_routed_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    first_k_dense_replace: int
    q_lora_rank: int | None = None
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    num_nextn_predict_layers: int = 0
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    yarn: Yarn | None = None

    def __post_init__(self):
        """Refuse a shape that no weights can have, and a router that cannot choose."""
        may_be_0 = ("n_shared_experts", "n_routed_experts", "first_k_dense_replace", "num_nextn_predict_layers")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and field.name not in may_be_0:
                _positive(field.name, value)
        if self.qk_rope_head_dim % 2:
            raise InputError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; pairs are rotated, make it even")
        if self.first_k_dense_replace < self.num_hidden_layers:
            self._check_router()

    def _check_router(self):
        experts, groups, chosen = self.n_routed_experts, self.groups, self.chosen_groups
        if experts < 1:
            raise InputError(
                f"n_routed_experts is {experts}, but layers from {self.first_k_dense_replace} on have experts; "
                f"set first_k_dense_replace to num_hidden_layers, {self.num_hidden_layers}, for a dense model"
            )
        if experts % groups or (groups > 1 and experts // groups < 2):
            raise InputError(f"n_group is {groups}; it must divide the {experts} experts into groups of at least 2")
        if not 1 <= chosen <= groups:
            raise InputError(f"topk_group is {chosen}; it must be from 1 to n_group, {groups}")
        if self.num_experts_per_tok > experts // groups * chosen:
            raise InputError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but {chosen} of {groups} groups have only "
                f"{experts // groups * chosen} experts; choose fewer experts or more groups"
            )

    @property
    def head_dim(self) -> int:
        """D + R, of queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def groups(self) -> int:
        """Groups of experts; 1 where they are not grouped."""
        return self.n_group or 1

    @property
    def chosen_groups(self) -> int:
        """Groups of which experts are chosen for a token."""
        return self.topk_group or self.groups

    @property
    def softmax_scale(self) -> float:
        """What multiplies q·k."""
        return self.head_dim**-0.5 * (1.0 if self.yarn is None else self.yarn.scale_factor)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts; the MTP modules, behind the last layer, have."""
        return layer >= self.first_k_dense_replace

    def as_json(self) -> dict[str, Any]:
        """As DeepSeek's own config.json has it, with `rope_scaling`.

        >>> config_of(KNOWN["DeepSeek-V3"].as_json()) == KNOWN["DeepSeek-V3"]
        True
        """
        plain = asdict(self)
        yarn = plain.pop("yarn")
        said = {name: value for name, (value, _) in _FIXED.items()}
        scaling = None if yarn is None else {"type": "yarn"} | {k: v for k, v in yarn.items() if v is not None}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": MODEL_TYPES[0],
            "num_key_value_heads": self.num_attention_heads,
            **plain,
            **said,
            "rope_scaling": scaling,
        }


def read_config(path: Path) -> DeepseekConfig:
    """The config of a checkpoint: `path` is its folder, or the file itself.

    Raises:
      InputError: it is not there, is no JSON object, or says what is not understood; the file is named.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there; give the folder of a checkpoint, with its config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({next(iter(str(error).splitlines()), '')})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no JSON object; give the config.json of a checkpoint")
    try:
        return config_of(document)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def config_of(document: dict[str, Any]) -> DeepseekConfig:
    """The config that a parsed config.json says.

    Both spellings of the rotary embedding are read: `rope_theta` with `rope_scaling {"type": …}`, as DeepSeek writes
    it, and `rope_parameters {"rope_type": …, "rope_theta": …}`, as Hugging Face transformers 5 does.

    Raises:
      InputError: another model, a number that is missing or of the wrong kind, a way to compute that is not known here.
    """
    model_type = document.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InputError(f"model_type is {model_type!r:.60}; it must be {' or '.join(MODEL_TYPES)}")
    for name, (usual, understood) in _FIXED.items():
        if (value := document.get(name, usual)) not in understood:
            raise InputError(f"{name} is {value!r:.60}, which is not computed here; only {understood[0]!r} is")
    found: dict[str, Any] = {}
    for field in fields(DeepseekConfig):
        if field.name in ("yarn", "rope_theta"):
            continue
        if field.name in document:
            found[field.name] = _typed(field.name, document[field.name], field.type)
        elif field.default is MISSING:
            raise InputError(f"{field.name} is missing; take the config.json that came with the weights")
    heads = document.get("num_key_value_heads")
    if heads not in (None, found["num_attention_heads"]):
        raise InputError(
            f"num_key_value_heads is {heads!r:.60}; latent attention has as many as heads, "
            f"{found['num_attention_heads']}"
        )
    config = DeepseekConfig(**found)
    theta, yarn = _rope(document, config.max_position_embeddings)
    return replace(config, rope_theta=theta, yarn=yarn)


def _rope(document: dict[str, Any], longest: int) -> tuple[float, Yarn | None]:
    """`rope_theta` and YaRN, whichever spelling says them."""
    said = []
    if document.get("rope_parameters") is not None:
        said.append(_rope_of("rope_parameters", document["rope_parameters"], document, longest))
    if document.get("rope_scaling") is not None or not said:
        said.append(_rope_of("rope_scaling", document.get("rope_scaling") or {}, document, longest))
    if len(set(said)) > 1:
        raise InputError("rope_parameters and rope_scaling say different things; leave one of them out")
    return said[0]


def _rope_of(where: str, found: Any, document: dict[str, Any], longest: int) -> tuple[float, Yarn | None]:
    if not isinstance(found, dict):
        raise InputError(f"{where} is {found!r:.60}; it must be an object, or null for plain rope")
    theta = _typed("rope_theta", found.get("rope_theta", document.get("rope_theta", 10000.0)), float)
    _positive("rope_theta", theta)
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise InputError(f"{where} has type {kind!r:.60}; only 'yarn' and 'default' are computed here")
    original = found.get("original_max_position_embeddings") or longest
    numbers: dict[str, Any] = {
        "original_max_position_embeddings": original,
        "factor": found.get("factor") or longest / original,
        "beta_fast": found.get("beta_fast") or 32.0,
        "beta_slow": found.get("beta_slow") or 1.0,
        "truncate": found.get("truncate", True),
    }
    numbers |= {name: found.get(name) for name in ("mscale", "mscale_all_dim", "attention_factor")}
    kinds = {field.name: field.type for field in fields(Yarn)}
    return theta, Yarn(**{name: _typed(f"{where}'s {name}", value, kinds[name]) for name, value in numbers.items()})


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` if it is of this kind, a type or a type | None; whole numbers are floats, true is no number.

    Raises:
      InputError: it is not.
    """
    kinds = kind.__args__ if hasattr(kind, "__args__") else (kind,)
    if value is None and type(None) in kinds:
        return None
    if bool in kinds and isinstance(value, bool):
        return value
    if float in kinds and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if int in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value
    words = {bool: "true or false", float: "a finite number", int: "a whole number", type(None): "null"}
    raise InputError(f"{name} is {value!r:.60}; it must be {' or '.join(words[x] for x in kinds)}")


def _positive(name: str, value: int | float) -> None:
    if not 0 < value < math.inf:
        raise InputError(f"{name} is {value}; it must be a positive number")


_V3 = DeepseekConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=128,
    n_shared_experts=1,
    n_routed_experts=256,
    num_experts_per_tok=8,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    first_k_dense_replace=3,
    q_lora_rank=1536,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    max_position_embeddings=163840,
    num_nextn_predict_layers=1,
    yarn=Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0),
)

KNOWN = {"DeepSeek-R1": _V3, "DeepSeek-V3": _V3, "DeepSeek-V3.1": _V3}
"""Models by name, with the numbers of their own config.json: the three have the same."""

SMALL = replace(
    _V3,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_routed_experts=16,
    num_experts_per_tok=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
    q_lora_rank=48,
    n_group=4,
    topk_group=2,
)
"""DeepSeek-V3's structure with small numbers: a checkpoint of this is written in a second."""
