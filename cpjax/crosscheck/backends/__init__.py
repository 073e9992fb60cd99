"""Who computes a case. Backends are found through entry points; ours are found like anybody's (docs/backends.md).

    [project.entry-points."cpjax.backends"]
    mine = "my_package.attention:MyBackend"       a class without arguments, or a module; see `Backend`

spec, npu, sdpa     ours: the JAX ring, `npu_backend`, PyTorch's fused kernel
compute             one case: problem, run, checked, written; whatever happens becomes an outcome
launch              each backend in a process of its own, so that a crash is an outcome too
"""

import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, runtime_checkable

from cpjax.crosscheck.files.case import Case
from cpjax.crosscheck.files.result import Result
from cpjax.errors import InputError

GROUP = "cpjax.backends"


@runtime_checkable
class Backend(Protocol):
    """What an entry point of the group `cpjax.backends` names: a class without arguments, or a module.

    A backend may also have `prepare(cases: list[Case]) -> None`. It is called once, before the first `run`, with all
    cases that are supported: the place to start processes or devices.
    """

    def supports(self, case: Case) -> str | None:
        """None, or the reason why this case is not computed; asked before `run`. It computes nothing."""
        ...

    def run(self, case: Case) -> Result:
        """Attention of `case` in global token order.

        `out` is `[B, T, N, V]` float16, `lse` `[B, T, N]` float32 or None. `precision` names the profile in which the
        result is judged (docs/precision.md), `order` the order in which chunks were merged, or `unknown`. The name in
        `backend` is replaced by that of the entry point. What is raised becomes the outcome `error`.
        """
        ...


def installed() -> dict[str, EntryPoint]:
    """All backends by name, sorted; nothing is imported.

    Raises:
      InputError: two packages give different backends the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise InputError(f"two backends are named {entry.name!r}: {known.value} and {entry.value}; uninstall one")
    return found


def check_names(names: list[str]) -> None:
    """Raise InputError for a name that no installed backend has."""
    known = installed()
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none; install cpjax again"
            raise InputError(f"backend {name!r} is not installed; installed are {listed} (docs/backends.md)")


def load(name: str) -> Backend:
    """The backend of this name, imported.

    Raises:
      InputError: it is not installed.
      TypeError: what the entry point names is no backend.
      Exception: whatever its import raises.
    """
    check_names([name])
    entry = installed()[name]
    named: Any = entry.load()
    backend = named() if inspect.isclass(named) else named
    if not isinstance(backend, Backend):
        raise TypeError(f"{entry.value} is no backend; it must have supports(case) and run(case)")
    return backend


def about(entry: EntryPoint) -> dict[str, str]:
    """Where a backend comes from: package, version, what the entry point names."""
    package, version = (entry.dist.name, entry.dist.version) if entry.dist is not None else ("–", "–")
    return {"name": entry.name, "package": package, "version": version, "value": entry.value}
