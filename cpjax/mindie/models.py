"""Which model a deployment serves: what its weights and its names say, and the geometry of its attention."""

import functools
import re
from typing import NamedTuple

from cpjax.deepseek.config import KNOWN, DeepseekConfig
from cpjax.errors import InputError
from cpjax.mindie.json_text import shown


class Geometry(NamedTuple):
    """Attention of one layer: query heads, head dims of query and key (nope + rope) and of value."""

    heads: int
    nope: int
    rope: int
    value_dim: int
    scale_factor: float = 1.0
    """YaRN's mscale²; 1 of a model that is known by its dims only."""

    @property
    def scale(self) -> float:
        """What multiplies q·k.

        >>> round(GEOMETRIES["DeepSeek-R1"].scale, 4), round(Geometry(16, 128, 64, 128).scale, 4)
        (0.1352, 0.0722)
        """
        return (self.nope + self.rope) ** -0.5 * self.scale_factor


def geometry_of(config: DeepseekConfig) -> Geometry:
    """The geometry that a model's own config.json says."""
    return Geometry(
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        1.0 if config.yarn is None else config.yarn.scale_factor,
    )


GEOMETRIES = {name: geometry_of(config) for name, config in KNOWN.items()}

# What may follow the family: a release date, a quantisation, a dtype, a variant with the same attention. Anything else
# is another model (DeepSeek-R1-Distill-Llama-70B, DeepSeek-V3.2-Exp).
_NAME = re.compile(
    r"(?:deepseek|ds)[-_.]?(?P<family>r1|v3(?:[-_.]?1)?)"
    r"(?:[-_.]?(?:\d{4}|w\d{1,2}a\d{1,2}(?:c8)?|bf16|fp16|fp8|int8|float16|bfloat16|base|chat|terminus|mtp|quant|dyn(?:amic)?|mix|per[-_]?(?:token|channel|tensor)))*",
    re.IGNORECASE,
)
_FAMILIES = {"r1": "DeepSeek-R1", "v3": "DeepSeek-V3", "v31": "DeepSeek-V3.1"}


def family(model_name: str) -> str | None:
    """The model that a deployment's name means, or None.

    >>> family("ds_r1_w8a8"), family("DeepSeek-V3.1-W4A8"), family("DeepSeek-R1-Distill-Llama-70B")
    ('DeepSeek-R1', 'DeepSeek-V3.1', None)
    """
    match = _NAME.fullmatch(model_name)
    return _FAMILIES[re.sub(r"[-_.]", "", match["family"].lower())] if match else None


def _v32(name: str) -> str | None:
    is_v32 = re.match(r"(?:deepseek|ds)[-_.]?v3[-_.]?2(?![0-9])", name, re.IGNORECASE)
    return V32 if is_v32 else None


V32 = "DeepSeek-V3.2"
ARCHITECTURES = {"deepseek_v3": tuple(GEOMETRIES), "deepseek_v32": (V32,)}
"""model_type of the weights → the models that have it."""


class Identity(NamedTuple):
    """Which model it may be. `models` are the candidates; None: not known, as of a name that may mean anything."""

    models: tuple[str, ...] | None
    is_told: bool = False  # by the weights themselves, not only by a name

    @property
    def name(self) -> str:
        """For a message."""
        return " or ".join(self.models) if self.models else "a model that is not known"

    @property
    def has_latents(self) -> bool:
        """Is it surely a model with DeepSeek's latent attention, run by the code of DeepSeek-V2 and -V3?"""
        return bool(self.models) and all(model in GEOMETRIES or model == "deepseek_v2" for model in self.models or ())

    @property
    def is_v32(self) -> bool:
        """Is it DeepSeek-V3.2, which has sparse attention and a page of its own?"""
        return self.models == (V32,)


@functools.lru_cache(maxsize=64)
def identify(model_name: str, weight_path: str | None, model_type: str | None) -> Identity:
    """The model: by the weights' model_type; else by the last part of their path; else by the name, which is free text.

    >>> identify("deepseek", "/data/DeepSeek-R1_w8a8", None).models, identify("DeepSeek-R1", None, "qwen2").models
    (('DeepSeek-R1',), ('qwen2',))
    """
    named = _named(model_name, weight_path, is_v3=model_type == "deepseek_v3")
    if model_type is None:
        return Identity(None if named is None else (named,))
    candidates = ARCHITECTURES.get(model_type, (model_type,))
    return Identity((named,) if named is not None and named in candidates else candidates, True)


def _named(model_name: str, weight_path: str | None, is_v3: bool) -> str | None:
    """By the path, then by the name. Of weights that are known to be V3's, `r1_w8a8` is enough."""
    for name in (last_part(weight_path), model_name):
        found = family(name) or _v32(name) or (family(f"deepseek-{name}") if is_v3 else None)
        if found:
            return found
    return None


def last_part(weight_path: str | None) -> str:
    """The folder's own name."""
    return re.split(r"[/\\\\]", (weight_path or "").rstrip("/\\"))[-1]


def quantisation(model_name: str) -> str | None:
    """W8A8, W4A8 or whatever of this form the name has; None if it has none, or more than one.

    >>> quantisation("ds_v31_w4a8")
    'W4A8'
    """
    found = {word.upper() for word in re.findall(r"(?<![A-Za-z0-9])w\d{1,2}a\d{1,2}", model_name, re.IGNORECASE)}
    return found.pop() if len(found) == 1 else None


def geometry(identity: Identity, model_name: str) -> Geometry:
    """The attention geometry of a model.

    Raises:
      InputError: it is none that we know; it says how to give the geometry.
    """
    if identity.models and all(model in GEOMETRIES for model in identity.models):
        return GEOMETRIES[identity.models[0]]
    what = f"the weights' model_type {identity.name}" if identity.is_told else f"modelName {shown(model_name)}"
    raise InputError(
        f"{what} is none of {', '.join(GEOMETRIES)} (a quantisation or date may follow, as in DeepSeek-R1_w8a8); for "
        "another model give --geometry HEADS,NOPE,ROPE,VALUE, such as 128,128,64,128"
    )


def parse_geometry(text: str) -> Geometry:
    """`HEADS,NOPE,ROPE,VALUE` from a command line.

    Raises:
      InputError: it is not four whole numbers, of which only ROPE may be 0.
    """
    if not re.fullmatch(r"\d{1,6}(,\d{1,6}){3}", text, re.ASCII):
        raise InputError(
            f"geometry {shown(text)} is not HEADS,NOPE,ROPE,VALUE; give four numbers, such as 128,128,64,128"
        )
    found = Geometry(*map(int, text.split(",")))
    if min(found.heads, found.nope, found.value_dim) < 1:
        raise InputError(f"geometry {text} has a 0; heads, nope and value must be at least 1")
    return found


def local_heads(heads: int, tp: int) -> int:
    """The query heads of one card.

    Raises:
      InputError: tp does not divide them.
    """
    if tp < 1 or heads % tp:
        raise InputError(f"tp is {tp}, which does not divide the model's {heads} heads; make tp a divisor of {heads}")
    return heads // tp
