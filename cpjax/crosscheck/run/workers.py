"""A function over many arguments in several processes, one BLAS thread each."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def each(
    function: Callable[[Argument], Answer], arguments: Sequence[Argument], workers: int, *, chunk: int = 1
) -> Iterator[Answer]:
    """`function` of every argument, in any order. Closing the iterator ends the workers."""
    if workers == 1:
        yield from map(function, arguments)
        return
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))  # read when a worker loads its BLAS
    try:
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
            yield from pool.imap_unordered(function, arguments, chunksize=chunk)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
