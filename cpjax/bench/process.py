"""One contender alone in a process: its threads, its allocator and its devices are nobody else's."""

import multiprocessing
import time
from typing import NamedTuple

from cpjax.bench.contenders import CONTENDERS, Prepared
from cpjax.bench.setting import Setting


class Times(NamedTuple):
    """Of one run, in seconds: on the wall, and of all cores together, which repeats better on a shared machine."""

    wall: float
    cpu: float


class Contender:
    """A process that computes a setting when it is asked, and answers with `Times`.

    `unsupported` says why it cannot; then it must not be asked. `first` are the times of the first run, which compiles.
    """

    def __init__(self, name: str, setting: Setting):
        """Start the process and wait for its first run."""
        spawn = multiprocessing.get_context("spawn")
        self._here, there = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(name, setting, there))
        self._process.start()
        there.close()
        answer = self._answer()
        self.unsupported = answer if isinstance(answer, str) else ""
        self.first = answer if isinstance(answer, Times) else None

    def run(self) -> Times:
        """Once more."""
        self._here.send(True)
        answer = self._answer()
        if not isinstance(answer, Times):
            raise RuntimeError(answer)
        return answer

    def _answer(self) -> Times | str:
        try:
            return self._here.recv()
        except EOFError:
            self._process.join()
            return f"its process ended with status {self._process.exitcode}; is there memory enough?"

    def __enter__(self) -> "Contender":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._here.close()
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()


def _serve(name: str, setting: Setting, parent) -> None:
    try:
        prepared = CONTENDERS[name](setting)
        parent.send(_timed(prepared))
        while parent.recv():
            parent.send(_timed(prepared))
    except EOFError:  # the bench is over
        return
    except (ValueError, RuntimeError, ImportError, MemoryError) as error:
        parent.send(next(iter(str(error).splitlines()), "") or type(error).__name__)


def _timed(prepared: Prepared) -> Times:
    wall, cpu, others = time.perf_counter(), time.process_time(), prepared.others()
    prepared.run()
    return Times(time.perf_counter() - wall, time.process_time() - cpu + prepared.others() - others)
