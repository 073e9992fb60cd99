"""A precision profile in a file: what `cpjax fingerprint --profile` writes and `judge-dump --precision` takes."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cpjax.crosscheck.files.atomic import write_json
from cpjax.errors import InputError
from cpjax.precision import PROFILES, Precision

MOST_BYTES = 2**16
VERSION = "1"
Half = Literal["float16", "bfloat16"]
Format = Literal["float16", "bfloat16", "float32", "float64"]


class _File(BaseModel):
    """The content; the fields of `cpjax.precision.Precision`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["cpjax.profile"]
    version: Literal["1"]
    name: str = Field(min_length=1, max_length=200)
    compute: Literal["float32", "float64"]
    score: Format
    probability: Format
    out: Format
    carry: Format
    lse: Format
    scale: Format
    distance: Format
    query: Half | Literal[""] = ""
    total: Format
    is_normalised: bool = False


def write_profile(path: Path, precision: Precision) -> None:
    """Write a new file, whole or not at all.

    Raises:
      InputError: it is there already, or cannot be written.
    """
    write_json(path, {"format": "cpjax.profile", "version": VERSION, **vars(precision)})


def read_profile(path: Path) -> Precision:
    """The profile of a file.

    Raises:
      InputError: one line: no such file, no JSON, a field that is no profile's.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} has more than {MOST_BYTES} bytes; it is no profile")
        said = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc'])) or 'as a whole'}: {first['msg']}") from None
    return Precision(**said.model_dump(exclude={"format", "version"}))


def profile_named(text: str) -> Precision:
    """A profile by its name, or the one of a file whose name ends in .json.

    >>> profile_named("flash_fp16").name
    'flash_fp16'

    Raises:
      InputError: neither a name that is known nor such a file.
    """
    if text in PROFILES:
        return PROFILES[text]
    if text.endswith(".json"):
        return read_profile(Path(text))
    raise InputError(
        f"--precision {text!r:.60} is unknown; known are {', '.join(PROFILES)}, or a FILE.json (a profile)"
    )
