"""Text to token ids and back, with the checkpoint's own `tokenizer.json`. Needs the extra cpjax[text], tokenizers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from cpjax.errors import InputError


class TextTokenizer(NamedTuple):
    """A checkpoint's tokenizer, and the token with which its texts begin."""

    tokenizer: Any
    """A `tokenizers.Tokenizer`."""
    begin: int | None
    """Id of the begin-of-sentence token, where `tokenizer_config.json` says `add_bos_token`; else None."""

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text.

        Raises:
          InputError: there is not one.
        """
        ids = self.tokenizer.encode(text).ids
        # Some files add the token themselves; it must not be there twice.
        if self.begin is not None and ids[:1] != [self.begin]:
            ids = [self.begin, *ids]
        if not ids:
            raise InputError(f"the text {text!r:.60} has no token; give another")
        return tuple(ids)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, special tokens left out."""
        return self.tokenizer.decode(ids)


def open_tokenizer(folder: Path) -> TextTokenizer:
    """Read `tokenizer.json` of a checkpoint's folder, and `tokenizer_config.json` if it is there.

    Raises:
      InputError: no such file, a damaged one, a begin token that the vocabulary has not, or no `tokenizers` package.
    """
    path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError("a text needs the package tokenizers; pip install 'cpjax[text]', or give token ids") from None
    if not path.is_file():
        raise InputError(f"{path} is not there, so that no text can be read; give token ids")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exceptions
        raise InputError(f"{path} is no tokenizer ({next(iter(str(error).splitlines()), '')})") from None
    said = _settings(settings) if settings.is_file() else {}
    if said.get("add_bos_token") is not True:
        return TextTokenizer(tokenizer, None)
    token = said.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    begin = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if begin is None:
        raise InputError(f"{settings}: add_bos_token is true, but bos_token {token!r:.60} is none of the vocabulary's")
    return TextTokenizer(tokenizer, begin)


def _settings(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not JSON ({next(iter(str(error).splitlines()), '')})") from None
    if not isinstance(said, dict):
        raise InputError(f"{path} holds a JSON {type(said).__name__}; it must be an object")
    return said
