"""Which axis is which: a dump in one layout, or in every layout in which its shapes fit together and make sense."""

from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.dumps.question import GUESSED
from cpjax.crosscheck.dumps.readers import Read
from cpjax.errors import InputError

MOST_HEADS_PER_TOKEN = 8
"""A guessed layout has at most so many heads a token: 512 heads of 4 tokens are 4 heads of 512 tokens."""


AXES = {"bsnd": 4, "bnsd": 4, "tnd": 3, "sbnd": 4}


class OtherAxesError(InputError):
    """An array has another number of axes than the layout: another layout is meant, or none."""


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
    if layout == "sbnd":
        return array.swapaxes(0, 1)
    return array.swapaxes(1, 2) if layout == "bnsd" else array


def natural_out(
    array: np.ndarray, layout: str, shape: tuple[int, int, int, int]
) -> tuple[np.ndarray, str | None] | None:
    """out as `[B, T, N, V]`, and a sentence if it lies otherwise than the inputs do; None if it is nothing known.

    Models hand on what the next layer takes: `[B, T, N, V]` whatever the layout of query, key and value was (Hugging
    Face), or heads and their dimension in one axis (vLLM).

    Args:
      array: out as it was dumped.
      layout: of query, key and value.
      shape: what it must have, `[B, T, N, V]`.

    >>> natural_out(np.zeros((2, 3, 8)), "bsnd", (2, 3, 2, 4))[1]
    'out: [2, 3, 8] is taken as [2, 3, 2, 4], the heads one after the other'
    """
    batch, length, heads, width = shape
    if array.ndim == AXES[layout] and natural(array, layout).shape == shape:
        return natural(array, layout), None
    if layout == "bnsd" and array.shape == shape:
        return array, "out: [B, T, N, V], tokens before heads, whereas query, key and value have heads first"
    flat = {"tnd": (length, heads * width), "sbnd": (length, batch, heads * width)}
    if array.shape == flat.get(layout, (batch, length, heads * width)) and (batch == 1 or layout != "tnd"):
        whole = array.reshape(*array.shape[:-1], heads, width)
        says = f"out: {list(array.shape)} is taken as {list(whole.shape)}, the heads one after the other"
        return natural(whole, "bsnd" if layout == "bnsd" else layout), says
    return None


def in_layout(tensors: dict[str, list[Read]], paths: dict[str, str], layout: str, *, paged: bool) -> Arrays:
    """The dump in this layout.

    Args:
      tensors: query, key, value, out, each its parts along the head dimension.
      paths: how each was named, for messages.
      paged: key and value are `[blocks, block_size, K, H]` whatever the layout, or without K where there is one head.

    Raises:
      InputError: shapes that are not those of this layout, or do not fit together.
    """
    found, remarks = {}, {}
    for name, pieces in tensors.items():
        axes = AXES[layout]
        is_cache = paged and name in ("key", "value")
        ranks = []
        for rank in range(len(pieces[0].parts)):
            parts = [piece.parts[rank] for piece in pieces]
            if is_cache and any(part.ndim == 3 for part in parts):
                parts = [part[:, :, None] if part.ndim == 3 else part for part in parts]
                remarks |= {f"{name}: a cache of 3 axes is taken as [blocks, block_size, 1, dim], one head": None}
            if name == "out" and parts[0].size:
                q, v = found["query"][rank], found["value"][rank]
                lying = natural_out(parts[0], layout, (*q.shape[:3], v.shape[3]))
                if lying is not None:
                    remarks |= {lying[1]: None} if lying[1] else {}
                    ranks.append(lying[0])
                    continue
            for part in parts:
                if part.ndim != (4 if is_cache else axes) or 0 in part.shape:
                    kind, has = ("a cache", 4) if is_cache else (f"--layout-of {layout}", axes)
                    raise OtherAxesError(
                        f"--{name} {paths[name]}: has shape {list(part.shape)}, but {kind} has {has} axes, none empty; "
                        "known are bsnd [batch, tokens, heads, dim], bnsd, sbnd and tnd [tokens, heads, dim]: reshape "
                        "it to one, and name it with --layout-of"
                    )
            parts, remark = _of_all_heads(name, parts, 1 if layout == "bnsd" and not is_cache else parts[0].ndim - 2)
            remarks |= {remark: None} if remark else {}
            whole = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
            ranks.append(whole if is_cache else natural(whole, layout))
        found[name] = ranks
    arrays = Arrays(**found, layout=layout, remarks=tuple(remarks))
    for rank, (k, v) in enumerate(zip(arrays.key, arrays.value, strict=True)):
        # Every rank has all queries where the cache alone is cut.
        q, o = (x[rank if len(x) > 1 else 0] for x in (arrays.query, arrays.out))
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
    for name in GUESSED:
        try:
            fits.append(in_layout(tensors, paths, name, paged=paged))
        except InputError as error:
            # What fails by its sizes is nearer than what has other axes, and of these what has as many as the query.
            far = (isinstance(error, OtherAxesError), AXES[name] != tensors["query"][0].parts[0].ndim)
            reasons.append((far, f"{name}, {error}" if far == (False, False) else str(error)))
    if not fits:
        raise InputError(f"no layout fits all files. {min(reasons, key=lambda one: one[0])[1]}")
    sound = [one for one in fits if _is_sound(one)]
    dropped = [f"as {x.layout} it would be {x.heads} heads of {x.tokens} tokens" for x in fits if not _is_sound(x)]
    return (sound, dropped) if sound else (fits, [])


def _is_sound(arrays: Arrays) -> bool:
    return arrays.heads <= MOST_HEADS_PER_TOKEN * arrays.tokens
