"""What the weights' own config.json says, where it is there: the dtype, and how they are quantised."""

from pathlib import Path
from typing import NamedTuple

from cpjax.errors import InputError
from cpjax.mindie import json_text
from cpjax.mindie.config import printable, read_text
from cpjax.mindie.json_text import shown
from cpjax.mindie.models import quantisation

DTYPES = {
    "float16": "float16", "fp16": "float16", "half": "float16", "torch.float16": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16", "torch.bfloat16": "bfloat16",
    "float32": "float32", "fp32": "float32", "float": "float32", "torch.float32": "float32",
}  # fmt: skip
"""Spelling → name of a dtype."""


class Weights(NamedTuple):
    """What is known; `None`: not known. `notes` say why not."""

    dtype: str | None = None
    quantisation: str | None = None
    notes: tuple[str, ...] = ()


def read_weights(folder: str | None) -> Weights:
    """Read `torch_dtype` and `quantize` from a weights folder, if there is a config.json in it; never an error."""
    if not folder:
        return Weights()
    path = Path(folder) / "config.json"
    try:
        if not path.exists():
            return Weights(notes=(f"{printable(path)} is not here: the weights' dtype is not known",))
        document = json_text.parse(read_text(path))
        if not isinstance(document, dict):
            raise InputError(f"is a {json_text.kind(document)}, no object")
    except (InputError, OSError, ValueError) as error:
        return Weights(notes=(f"{printable(path)} {error}: the weights' dtype is not known",))
    given = document.get("torch_dtype", document.get("dtype"))
    known = DTYPES.get(given.lower()) if isinstance(given, str) else None
    notes = () if known else (f"{printable(path)}: torch_dtype is {shown(given)}, no dtype known here",)
    bits = document.get("quantize")
    return Weights(known, quantisation(bits) if isinstance(bits, str) else None, notes)


def parse_dtype(text: str) -> str:
    """A dtype as a user spells it.

    Raises:
      InputError: no known spelling.
    """
    if text.lower() not in DTYPES:
        raise InputError(f"dtype {shown(text)} is not known; give float16, bfloat16 or float32")
    return DTYPES[text.lower()]
