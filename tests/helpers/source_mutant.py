"""A function broken on purpose: a piece of its text is exchanged."""

import inspect
from types import ModuleType

import pytest


def mutant(patch: pytest.MonkeyPatch, where: ModuleType, function: str, old: str, new: str) -> None:
    """Put the broken function into the module that calls it by name; its decorators are made anew."""
    source = inspect.getsource(inspect.unwrap(getattr(where, function)))
    assert source.count(old) == 1, old
    names = dict(vars(where))
    exec(compile(source.replace(old, new), function, "exec"), names)
    patch.setattr(where, function, names[function])
