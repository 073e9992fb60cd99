"""Checks of types and shapes for the tests: those of jaxtyping's import hook, made so that they cost little.

The hook of `--jaxtyping-packages` decorates every function of cpjax with `jaxtyping.jaxtyped`, which binds the
arguments several times a call, and makes the checks of a function inside a function anew whenever its `def` is met:
two thirds of the time of the judge's tests. `install` puts `checked` in its place. The same annotations are held to
the same values, by beartype, but

- only a function that names the shape of an array opens a scope for the sizes of its axes;
- an inner function's checks are made once and then tied to each new closure of the same code.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, config

SCOPE = jaxtyping.jaxtyped
CHECKS: dict[tuple, Callable] = {}
FUNCTION = "__beartype_func"  # where beartype's wrapper keeps what it wraps


def install() -> None:
    """Before cpjax is imported."""
    jaxtyping.jaxtyped = lambda *, typechecker: checked


def checked(of: Any) -> Any:
    """A function that checks what it is given and what it gives; of classes, the `__init__` of a dataclass."""
    if inspect.isclass(of):
        if dataclasses.is_dataclass(of) and "__init__" in vars(of):
            of.__init__ = checked(of.__init__)
        return of
    if not isinstance(of, FunctionType):
        raise TypeError(f"{of}: the hook decorates functions and classes, before any other decorator")
    check = checks_of(of)
    return in_a_scope(of, check) if any(map(names_a_shape, of.__annotations__.values())) else check


def checks_of(function: FunctionType) -> Callable:
    """By beartype; for a closure of a code that was met before, by the checks that were made then."""
    if any(isinstance(hint, str) or "ForwardRef" in repr(hint) for hint in function.__annotations__.values()):
        return function  # names that are imported for the type checker alone
    if function.__closure__ is None and "<locals>" not in function.__qualname__:
        return beartype(function)
    key = function.__code__.co_filename, function.__code__
    if key not in CHECKS:
        CHECKS[key] = beartype(function)
        return CHECKS[key]
    first = CHECKS[key]
    if FUNCTION not in (first.__kwdefaults__ or {}):  # nothing is annotated: beartype gave the function itself back
        return function
    again = FunctionType(first.__code__, first.__globals__, first.__name__, first.__defaults__, first.__closure__)
    again.__kwdefaults__ = first.__kwdefaults__ | {FUNCTION: function}
    return functools.update_wrapper(again, function)


def in_a_scope(function: FunctionType, check: Callable) -> Callable:
    """With sizes of axes of its own, which hold for its arguments and its result."""
    scope = SCOPE("context")

    @functools.wraps(function)
    def either(*args, **kwargs):
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        with scope:
            return check(*args, **kwargs)

    return either


def names_a_shape(hint: Any) -> bool:
    """Whether an array's shape stands in it, at any depth."""
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(names_a_shape, get_args(hint)))
