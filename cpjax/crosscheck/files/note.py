"""What stands in the place of a result where there is none: a note that says why (docs/formats.md)."""

from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cpjax.crosscheck.files.atomic import write_json
from cpjax.crosscheck.files.case import VERSION
from cpjax.errors import InputError

MOST_BYTES = 2**20


@runtime_checkable
class Named(Protocol):
    """A case of attention or of a layer: what a note says of it."""

    @property
    def name(self) -> str:
        """The file's."""
        ...

    @property
    def digest(self) -> str:
        """Of the content."""
        ...


class Note(NamedTuple):
    """`unsupported`: the backend says beforehand that it does not compute such cases. `error`: it failed."""

    outcome: Literal["unsupported", "error"]
    reason: str


class _File(BaseModel):
    """The content of a note."""

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["cpjax.outcome"]
    version: Literal["1"]
    name: str
    digest: str
    backend: str
    outcome: Literal["unsupported", "error"]
    reason: str = Field(min_length=1)


def write_note(folder: Path, case: Named, backend: str, note: Note) -> Path:
    """Write `folder/name.json`, whole or not at all.

    Raises:
      InputError: a file is there already, or the folder cannot be written.
    """
    path = folder / f"{case.name}.json"
    content = {"format": "cpjax.outcome", "version": VERSION, "name": case.name, "digest": case.digest}
    content |= {"backend": backend, "outcome": note.outcome, "reason": note.reason}
    write_json(path, content)
    return path


def note_beside(path: Path) -> Path | None:
    """The note in the place of a result at `path`; None if there is none.

    Raises:
      InputError: both are there.
    """
    note = path.with_suffix(".json")
    if note.exists() and path.exists():
        raise InputError(f"is there, and a note that there is none ({note.name}); remove one of them")
    return note if note.exists() else None


def read_note(path: Path, case: Named) -> tuple[str, Note]:
    """The backend that left a note, and what it says.

    Raises:
      InputError: one line: no note, or one on another case.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"has more than {MOST_BYTES} bytes; it is no note on a case")
        said = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, first['loc'])) or 'as a whole'}: {first['msg']}") from None
    if (said.name, said.digest) != (case.name, case.digest):
        raise InputError(f"is a note on another case (digest {said.digest[:8]}…, not {case.digest[:8]}…)")
    return said.backend, Note(said.outcome, said.reason)
