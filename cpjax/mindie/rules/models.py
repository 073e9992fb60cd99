"""Which model, quantisation, dtype and hardware context and sequence parallelism are documented for."""

from cpjax.mindie.hardware import HARDWARE
from cpjax.mindie.models import V32
from cpjax.mindie.rules.rule import CP_PAGE, MATRIX, SP_PAGE, V32_PAGE, VERSIONS, Rule, Setting, found, value

SUPPORTED = {("DeepSeek-R1", "W8A8"): "2.1.RC1"} | {
    (model, "W4A8"): "2.3.0" for model in ("DeepSeek-R1", "DeepSeek-V3", "DeepSeek-V3.1")
}
"""(model, quantisation) → the version whose page on CP first lists it."""

DISPUTED = {("DeepSeek-V3", "W8A8"), ("DeepSeek-V3.1", "W8A8")}
"""What another page of `head` lists and the page on CP does not."""

NOT_LISTED = ("model-known", "quantisation-known", "v3-w8a8-disputed", "cp-with-torch", "cp-first-seen")
"""Warnings that the page on CP does not list, or may not list, this model: nothing to turn CP on with."""


def _bits(s: Setting, model: str) -> set[str]:
    """The quantisations of a model that some page of the version lists with CP."""
    if model == V32 and s.is_torch:
        return {"W8A8"}
    listed = {bits for (name, bits), version in SUPPORTED.items() if name == model and s.since(version)}
    return listed | {bits for name, bits in DISPUTED if name == model and s.since("head")}


def _supporting(s: Setting) -> list[bool]:
    """For each model that it may be: is it listed? Quantisation that is not known counts as listed if any is."""
    listed = [_bits(s, model) for model in s.identity.models or ()]
    return [bool(bits) and s.quantisation in (None, *bits) for bits in listed]


def _is_refused(s: Setting) -> bool:
    """V3.2 has a page of its own, and is refused with atb for another reason."""
    is_v32_elsewhere = s.identity.is_v32 and s.since("head") and not s.is_torch
    return s.is_split and s.identity.models is not None and not is_v32_elsewhere and not any(_supporting(s))


def _may_be_disputed(s: Setting) -> bool:
    models = s.identity.models or ()
    return len(models) == 1 and (models[0], s.quantisation) in DISPUTED


def _what(s: Setting) -> str:
    return f"{s.identity.name} {s.quantisation or ''}".strip()


def _named(s: Setting) -> str:
    """The labels of a model that is not known."""
    return f"modelName {s.deployment.model_name}, weights {s.deployment.model_weight_path or 'not given'}"


# fmt: off
MODELS: tuple[Rule, ...] = (
    Rule("model-supported", "modelWeightPath", "error", False, "cp or sp > 1 is for DeepSeek-R1 W8A8; since 2.3.0 also "
         "for DeepSeek-R1, -V3 and -V3.1 W4A8; with backend torch for DeepSeek-V3.2 W8A8", "use such weights, or set "
         "cp and sp to 1", f"{CP_PAGE}; {SP_PAGE}; {V32_PAGE}", lambda s: value(_is_refused(s), _what(s)), "2.1.RC1"),
    Rule("model-known", "modelWeightPath", "warning", False, "cp or sp > 1 is for some models only; modelName is free "
         "text, and neither the weights' config.json nor the last part of their path says which model this is",
         "give modelWeightPath a folder with a config.json, or end it in a name such as DeepSeek-R1_w8a8", CP_PAGE,
         lambda s: value(s.is_split and (s.identity.models is None or len(set(_supporting(s))) > 1
                                         or (len(s.identity.models) > 1 and s.quantisation == "W8A8")),
                         _named(s) if s.identity.models is None else _what(s)), "2.1.RC1"),
    Rule("quantisation-known", "modelWeightPath", "warning", False, "cp or sp > 1 is for some quantisations only, and "
         "neither the weights' config.json nor a name says what they are", "end modelWeightPath in a name such as "
         "DeepSeek-R1_w8a8", CP_PAGE,
         lambda s: value(s.is_split and not _is_refused(s) and s.identity.models is not None
                         and s.quantisation is None, _named(s)), "2.1.RC1"),
    Rule("cp-first-seen", "cp", "warning", False, "the pages of this version were not seen here; the first that were, "
         "of 2.1.RC1, have cp and sp", "look them up in the pages of your version", CP_PAGE,
         lambda s: found(s.is_split, s, "cp", "sp"), VERSIONS[0], "2.1.RC1"),
    Rule("w4a8-disputed", "modelWeightPath", "warning", False, "pages disagree on CP with W4A8: the CP page lists it, "
         "the feature matrix excludes it", "try it before you rely on it", f"{CP_PAGE} against {MATRIX}",
         lambda s: value(s.is_cp and s.quantisation == "W4A8" and any(_supporting(s)), _what(s)), "head"),
    Rule("v3-w8a8-disputed", "modelWeightPath", "warning", False, "pages disagree on CP and SP with W8A8 of "
         "DeepSeek-V3 and -V3.1: the CP page does not list it, the one on tuning does", "try it before you rely on it",
         f"{CP_PAGE} against optimization_and_tuning.md", lambda s: value(s.is_split and _may_be_disputed(s), _what(s)),
         "head"),
    Rule("v32-needs-torch", "backendType", "error", False, "DeepSeek-V3.2 needs backendType torch",
         'set backendType to "torch"', V32_PAGE,
         lambda s: value(s.identity.is_v32 and s.model.backendType not in (None, "torch"), s.model.backendType),
         "head"),
    Rule("v32-without-w4a8", "modelWeightPath", "error", False, "DeepSeek-V3.2 is not supported as W4A8",
         "use the W8A8 weights", V32_PAGE,
         lambda s: value(s.identity.is_v32 and not s.is_split and s.quantisation == "W4A8", _what(s)), "head"),
    Rule("cp-with-torch", "backendType", "warning", False, "with backend torch, CP is documented for DeepSeek-V3.2 "
         "only", 'set backendType to "atb"', f"{V32_PAGE}; {CP_PAGE}",
         lambda s: value(s.is_torch and s.is_cp and s.identity.models is not None and not s.identity.is_v32,
                         _what(s))),
    Rule("fp16-only", "modelWeightPath", "error", False, "cp or sp > 1 is FP16 only, BF16 is not supported",
         'convert the weights and set torch_dtype to "float16" in their config.json', f"{CP_PAGE}; {SP_PAGE}",
         lambda s: value(s.is_split and not s.identity.is_v32 and s.dtype not in (None, "float16"), s.dtype),
         "2.1.RC1"),
    Rule("dtype-known", "modelWeightPath", "warning", False, "cp or sp > 1 is FP16 only, and the weights' dtype is not "
         "known here", "look up torch_dtype in the weights' config.json, and give it with --dtype", CP_PAGE,
         lambda s: value(s.is_split and not s.identity.is_v32 and s.dtype is None,
                         s.deployment.model_weight_path or "no modelWeightPath"), "2.1.RC1"),
    Rule("hardware-supported", "npuDeviceIds", "error", False, "cp or sp > 1 runs on Atlas 800I A2 and Atlas 800I A3 "
         "SuperPoD", "use one of these, or set cp and sp to 1", f"{CP_PAGE}; {SP_PAGE}",
         lambda s: value(s.is_split and s.hardware is not None and s.hardware not in HARDWARE, s.hardware), "2.1.RC1"),
)
# fmt: on
