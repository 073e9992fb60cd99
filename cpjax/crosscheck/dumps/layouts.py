"""Which axis is which: a dump in one layout, or in every layout in which its shapes fit together and make sense."""

from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.dumps.question import LAYOUTS
from cpjax.crosscheck.dumps.readers import Read
from cpjax.errors import InputError

MOST_HEADS_PER_TOKEN = 8
"""A guessed layout has at most so many heads a token: 512 heads of 4 tokens are 4 heads of 512 tokens."""


class Arrays(NamedTuple):
    """Tensors `[B, S, N, D]`, one or one for each rank, in one layout."""

    query: list[np.ndarray]
    key: list[np.ndarray]
    value: list[np.ndarray]
    out: list[np.ndarray]
    layout: str
    remarks: tuple[str, ...] = ()
    """What was taken for something else than it is."""

    @property
    def heads(self) -> int:
        """Of the queries."""
        return self.query[0].shape[2]

    @property
    def tokens(self) -> int:
        """Queries or keys, the more of them, of all ranks."""
        return max(sum(x.shape[1] for x in self.query), sum(x.shape[1] for x in self.key))


def natural(array: np.ndarray, layout: str) -> np.ndarray:
    """A tensor as `[B, S, N, D]`."""
    if layout == "tnd":
        return array[None]
    return array.swapaxes(1, 2) if layout == "bnsd" else array


def in_layout(tensors: dict[str, list[Read]], paths: dict[str, str], layout: str, *, paged: bool) -> Arrays:
    """The dump in this layout.

    Args:
      tensors: query, key, value, out, each its parts along the head dimension.
      paths: how each was named, for messages.
      paged: key and value are `[blocks, block_size, K, H]` whatever the layout.

    Raises:
      InputError: shapes that are not those of this layout, or do not fit together.
    """
    found, remarks = {}, {}
    for name, pieces in tensors.items():
        axes = {"bsnd": 4, "bnsd": 4, "tnd": 3}[layout]
        is_cache = paged and name in ("key", "value")
        ranks = []
        for rank in range(len(pieces[0].parts)):
            parts = [piece.parts[rank] for piece in pieces]
            for part in parts:
                if part.ndim != (4 if is_cache else axes) or 0 in part.shape:
                    raise InputError(
                        f"--{name} {paths[name]}: has shape {list(part.shape)}, but --layout-of {layout} has {axes} "
                        f"axes, none empty; name the layout it has with --layout-of {'|'.join(LAYOUTS)}"
                    )
            parts, remark = _of_all_heads(name, parts, 1 if layout == "bnsd" and not is_cache else parts[0].ndim - 2)
            remarks |= {remark: None} if remark else {}
            whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
            ranks.append(whole if is_cache else natural(whole, layout))
        found[name] = ranks
    arrays = Arrays(**found, layout=layout, remarks=tuple(remarks))
    for q, k, v, o in zip(arrays.query, arrays.key, arrays.value, arrays.out, strict=True):
        says = f"query {list(q.shape)}, key {list(k.shape)}, value {list(v.shape)}, out {list(o.shape)} as {layout}"
        hint = "name the right layout with --layout-of"
        batches = len(q) == len(k) == len(v)
        if not (batches or paged):
            hint += "; a paged cache [blocks, block_size, heads, dim] is said by --block-table"
        if not (batches or paged) or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
            raise InputError(f"{says} [B, S, N, D]: they do not fit together; {hint}")
        if q.shape[2] % k.shape[2] or o.shape != (*q.shape[:3], v.shape[3]):
            raise InputError(f"{says} [B, S, N, D]: heads or out do not fit; {hint}")
    return arrays


def _of_all_heads(name: str, parts: list[np.ndarray], axis: int) -> tuple[list[np.ndarray], str | None]:
    """Parts along the head dimension, heads on `axis`; one with a single head, as MLA's rope keys are, for all heads.

    Raises:
      InputError: parts that do not fit.
    """
    heads = max(part.shape[axis] for part in parts)
    whole = [np.repeat(part, heads, axis) if part.shape[axis] == 1 else part for part in parts]
    if len({part.shape[:-1] for part in whole}) != 1:
        raise InputError(
            f"--{name}: its parts have shapes {[list(part.shape) for part in parts]}; all axes but the last must be "
            "equal, or one part have a single head, which is then taken for all"
        )
    single = [i + 1 for i, part in enumerate(parts) if part.shape[axis] < heads]
    return whole, f"{name}: part {single[0]} has one head, which is taken for all {heads}" if single else None


def readable(
    tensors: dict[str, list[Read]], paths: dict[str, str], layout: str | None, *, paged: bool
) -> tuple[list[Arrays], list[str]]:
    """The dump in the layout that was said, or in all that fit and make sense; and what was dropped and why.

    Returns:
      The dumps, and sentences.

    Raises:
      InputError: none fits.
    """
    if layout is not None:
        return [in_layout(tensors, paths, layout, paged=paged)], []
    fits, reasons = [], []
    for name in LAYOUTS:
        try:
            fits.append(in_layout(tensors, paths, name, paged=paged))
        except InputError as error:
            reasons.append(f"{name}: {error}")
    if not fits:
        raise InputError(f"no layout fits all files; name it with --layout-of. {reasons[-1]}")
    sound = [one for one in fits if _is_sound(one)]
    dropped = [f"as {x.layout} it would be {x.heads} heads of {x.tokens} tokens" for x in fits if not _is_sound(x)]
    return (sound, dropped) if sound else (fits, [])


def _is_sound(arrays: Arrays) -> bool:
    return arrays.heads <= MOST_HEADS_PER_TOKEN * arrays.tokens
