"""What the weights' own config.json says, where it is there: the model, the dtype, and the quantisation."""

from pathlib import Path
from typing import Any, NamedTuple

from cpjax.errors import InputError
from cpjax.mindie import json_text
from cpjax.mindie.json_text import shown
from cpjax.mindie.models import quantisation
from cpjax.mindie.text_file import printable, read_text

DTYPES = {
    "float16": "float16", "fp16": "float16", "half": "float16", "torch.float16": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16", "torch.bfloat16": "bfloat16",
    "float32": "float32", "fp32": "float32", "float": "float32", "torch.float32": "float32",
}  # fmt: skip
"""Spelling → name of a dtype."""


UNQUANTISED = "unquantised"


class Weights(NamedTuple):
    """What is known; `None`: not known. `notes` say why not."""

    dtype: str | None = None
    quantisation: str | None = None
    model_type: str | None = None
    notes: tuple[str, ...] = ()


def read_weights(folder: str | None, beside: Path | None = None) -> Weights:
    """Read what a weights folder's config.json says, if there is one; never an error.

    Args:
      folder: modelWeightPath; a relative one is looked for from here, then from the folder of the config.
      beside: the config file.
    """
    if not folder:
        return Weights()
    places = [Path(folder)] + ([beside.parent / folder] if beside is not None else [])
    try:
        home = next((place for place in places if (place / "config.json").exists()), places[0])
        path = home / "config.json"
        if not path.exists():
            return Weights(notes=(f"{printable(path)} is not here: the weights' dtype is not known",))
        document = json_text.parse(read_text(path))
        if not isinstance(document, dict):
            raise InputError(f"is a {json_text.kind(document)}, no object")
        has_description = any(home.glob("quant_model_description*.json"))
    except (InputError, OSError, ValueError) as error:
        return Weights(notes=(f"{printable(Path(folder) / 'config.json')} {error}: the weights' dtype is not known",))
    given = document.get("torch_dtype", document.get("dtype"))
    known = DTYPES.get(given.lower()) if isinstance(given, str) else None
    notes = () if known else (f"{printable(path)}: torch_dtype is {shown(given)}, no dtype known here",)
    model_type = document.get("model_type")
    return Weights(
        known,
        _bits(document, has_description),
        model_type if isinstance(model_type, str) and model_type else None,
        notes,
    )


def _bits(document: dict[str, Any], has_description: bool) -> str | None:
    """How the weights are quantised: `quantize`, or the method of a quantisation that MindIE does not read."""
    bits, other = document.get("quantize"), document.get("quantization_config")
    if isinstance(bits, str) and bits:
        return quantisation(bits) or shown(bits, 20)
    if isinstance(other, dict):
        return shown(other.get("quant_method"), 20).strip('"').upper()
    # Without model_type it is no whole config of weights; nothing follows from what it lacks.
    return UNQUANTISED if "model_type" in document and not has_description else None


def parse_dtype(text: str) -> str:
    """A dtype as a user spells it.

    Raises:
      InputError: no known spelling.
    """
    if text.lower() not in DTYPES:
        raise InputError(f"dtype {shown(text)} is not known; give float16, bfloat16 or float32")
    return DTYPES[text.lower()]
