"""Paged caches as they are: blocks of tokens, and a table that says which blocks are a request's."""

from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.dumps.places import Row, read_offsets
from cpjax.crosscheck.dumps.question import Question
from cpjax.crosscheck.dumps.readers import WHOLE, read_array
from cpjax.errors import InputError
from cpjax.wording import counted


class Gathered(NamedTuple):
    """One row of requests, one after the other."""

    key: np.ndarray
    value: np.ndarray
    q_offsets: Row
    kv_offsets: Row


def gathered(question: Question, key: np.ndarray, value: np.ndarray, batch: int, length: int) -> Gathered:
    """The cached tokens of every request, taken from their blocks; unused slots are left where they are.

    Args:
      key, value: `[blocks, block_size, K, H]`.
      batch, length: of the queries: a row a request, or one row of all requests.

    Raises:
      InputError: a table that does not fit the caches, or the lengths.
    """
    assert question.block_table is not None
    table = read_array(question.block_table, "block-table", WHOLE).astype(np.int64)
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2:
        raise InputError(f"--block-table has shape {list(table.shape)}; it must be [requests, blocks]")
    requests, blocks, size = len(table), key.shape[0], key.shape[1]
    lengths = _cached(question)
    if len(lengths) != requests:
        raise InputError(
            f"--block-table has {counted(requests, 'request')}, but the cached tokens are of {len(lengths)}"
        )
    slots = []
    for i, (row, n) in enumerate(zip(table, lengths, strict=True)):
        needed = -(-int(n) // size)
        # 0 is a slot of the batch that no request has: its queries see no key.
        if n < 0 or needed > len(row):
            raise InputError(
                f"request {i} has {counted(n, 'cached token')}; its {counted(len(row), 'block')} of {size} "
                f"{'holds' if len(row) == 1 else 'hold'} 0 to {len(row) * size}"
            )
        used = row[:needed]
        outside = used[(used < 0) | (used >= blocks)]
        if len(outside):
            raise InputError(
                f"--block-table: request {i} has {counted(n, 'cached token')}, which take {counted(needed, 'block')}, "
                f"and one of them is {int(outside[0])}; there are {blocks}, from 0"
            )
        slots.append((used[:, None] * size + np.arange(size)).ravel()[:n])
    flat = np.concatenate(slots)
    if not len(flat):
        raise InputError("no request of --block-table has a cached token; there is nothing to attend to")
    key, value = (x.reshape(-1, *x.shape[2:])[flat][None] for x in (key, value))
    return Gathered(key, value, _queries(question, requests, batch, length), np.cumsum([0, *lengths]))


def _cached(question: Question) -> Row:
    if question.seq_lens is None:
        assert question.cu_seqlens_k is not None  # one of the two was asked for
        return np.diff(read_offsets(question.cu_seqlens_k, "cu-seqlens-k"))
    lengths = read_array(question.seq_lens, "seq-lens", WHOLE)
    if lengths.ndim != 1:
        raise InputError(f"--seq-lens has shape {list(lengths.shape)}; it must be [requests]")
    return lengths.astype(np.int64)


def _queries(question: Question, requests: int, batch: int, length: int) -> Row:
    if question.cu_seqlens_q is not None and batch == 1:
        ends = read_offsets(question.cu_seqlens_q, "cu-seqlens-q", length)
        if len(ends) != requests + 1:
            raise InputError(
                f"--cu-seqlens-q has {counted(len(ends) - 1, 'request')}, --block-table {requests}; make them equal"
            )
        return ends
    if batch == requests:
        return np.arange(requests + 1) * length
    if batch == 1 and length == requests:
        return np.arange(requests + 1)
    raise InputError(
        f"query has batch {batch} and {counted(length, 'token')}, --block-table {counted(requests, 'request')}: "
        "say --cu-seqlens-q"
    )
