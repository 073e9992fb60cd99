"""The ranks as processes of this host: started once, used for many cases, none left behind.

The parent only tells each rank which files to work on and listens. A rank tells what it begins to do, that it is done,
or why it failed. When something goes wrong every rank soon hears of it, so the parent listens a moment longer and then
names the rank where it began: one that died, one that failed by itself, one that is silent while it computes; and
only if there is none of these, one whose transfer failed.
"""

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from npu_backend.errors import InputError, LinkError, RankError
from npu_backend.rank import Settings, compute_case, join

START_SECONDS = 120.0
GRACE_SECONDS = 1.0

Listener = Callable[[int, str, int], None]
"""Called with a rank, what it begins to do, and the step."""


class _Doing(NamedTuple):
    what: str
    step: int


class _Done(NamedTuple):
    pass


class _Failed(NamedTuple):
    blame: int
    text: str


_DIED, _FAILED, _SILENT, _LINK = range(4)  # whom to blame first when several ranks report


class Workers:
    """A pool of cp processes, one per rank, connected by gloo (cpu) or HCCL (npu) on this host.

        with Workers(cp=4) as workers:
            workers.run(case_path, result_path)

    Processes start with the first `run`, and again with the next `run` after a failure.
    """

    def __init__(self, cp: int, *, device: str = "cpu", timeout: float = 600.0, settings: Settings = Settings()):  # noqa: B008
        """`timeout`: seconds in which at least one rank must begin something new, else the run fails."""
        self._cp, self._device, self._timeout, self._settings = cp, device, timeout, settings
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._meeting_place: TemporaryDirectory | None = None

    def __enter__(self) -> "Workers":
        """Nothing is started yet."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the processes: politely if all is well, else at once."""
        self.close(at_once=exception[0] is not None)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty when none run."""
        return [process.pid for process in self._processes]

    def run(
        self,
        case_path: Path,
        result_path: Path,
        listener: Listener = lambda rank, what, step: None,
        settings: Settings | None = None,
    ) -> None:
        """Compute a case, by `settings` or those of the pool; the result is at `result_path` when this returns.

        Raises:
          RankError: a rank failed, died or fell silent; the message names it. No process is left.
        """
        try:
            if not self._processes:
                self._start()
                self._listen(START_SECONDS, listener)
            for connection in self._connections:
                try:
                    connection.send((case_path, result_path, settings or self._settings))
                except OSError:  # it is dead, which _listen will find out and name
                    continue
            self._listen(self._timeout, listener)
        except BaseException:
            self.close(at_once=True)
            raise

    def close(self, *, at_once: bool = False) -> None:
        """End all processes."""
        for connection in self._connections:
            connection.close()  # a rank that waits for work takes this for the end
        for process in self._processes:
            if at_once:
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self._processes, self._connections = [], []
        if self._meeting_place is not None:
            self._meeting_place.cleanup()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._meeting_place = TemporaryDirectory(prefix="npu_backend-")
        init_method = Path(self._meeting_place.name, "ranks").as_uri()
        for rank in range(self._cp):
            here, there = context.Pipe()
            arguments = (rank, self._cp, self._device, init_method, self._timeout, there)
            process = context.Process(target=_serve, args=arguments, name=f"npu_backend rank {rank}", daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def _listen(self, timeout: float, listener: Listener) -> None:
        """Until every rank is done. Raises RankError for the rank to blame."""
        doing = [_Doing("start", 0)] * self._cp
        working, failures = set(range(self._cp)), {}
        deadline = time.monotonic() + timeout
        while working:
            by_connection: dict[Any, int] = {self._connections[rank]: rank for rank in working}
            ready = wait(list(by_connection), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = by_connection[connection]
                message = self._receive(rank)
                if isinstance(message, _Doing):
                    doing[rank] = message
                    listener(rank, *message)
                else:
                    working.remove(rank)
                if isinstance(message, _Failed):
                    failures[rank] = message
            now = time.monotonic()
            deadline = min(deadline, now + GRACE_SECONDS) if failures else now + timeout
        if not failures:
            failures = {rank: _silent(doing[rank], timeout) for rank in working}
        if failures:
            first = min(failure.blame for failure in failures.values())
            to_blame = [rank for rank in sorted(failures) if failures[rank].blame == first]
            texts = (
                f"{failures[rank].text} (last heard: {doing[rank].what}, step {doing[rank].step})" for rank in to_blame
            )
            raise RankError("; ".join(f"rank {rank}: {text}" for rank, text in zip(to_blame, texts, strict=True)))

    def _receive(self, rank: int) -> Any:
        try:
            return self._connections[rank].recv()
        except (EOFError, OSError):
            process = self._processes[rank]
            process.join(GRACE_SECONDS)
            code = process.exitcode
            how = f"was killed by signal {-code}" if code is not None and code < 0 else f"died with exit code {code}"
            return _Failed(_DIED, how)


def _silent(doing: _Doing, timeout: float) -> _Failed:
    """A rank that waits for another is not the one to blame."""
    blame = _LINK if doing.what == "wait" else _SILENT
    return _Failed(blame, f"silent for {timeout:g} s")


def _serve(rank: int, cp: int, device: str, init_method: str, timeout: float, connection: Connection) -> None:
    """The life of one rank: join, then work on case after case until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the ranks
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ["GLOO_SOCKET_IFNAME"] = name  # all ranks are on this host: nothing listens to the outside
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // cp))
    try:
        # The parent sees a stuck ring before a rank does; this only ends ranks whose parent is gone.
        place = join(device, rank, timeout=10 * timeout, init_method=init_method, rank=rank, cp=cp)
        connection.send(_Done())
        while True:
            case_path, result_path, settings = connection.recv()
            report = lambda what, step: connection.send(_Doing(what, step))  # noqa: E731
            compute_case(case_path, result_path, place, report, settings)
            connection.send(_Done())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        if dist.is_initialized():  # the parent has closed the connection, or is gone
            dist.destroy_process_group()
    except LinkError as error:
        _tell(connection, _Failed(_LINK, str(error)))
    except (InputError, RankError, OSError) as error:
        _tell(connection, _Failed(_FAILED, str(error)))
    except Exception as error:
        traceback.print_exc()
        _tell(connection, _Failed(_FAILED, f"{type(error).__name__}: {error}"))


def _tell(connection: Connection, message: _Failed) -> None:
    try:
        connection.send(message)
    except OSError:
        return
