"""What a verdict answers, said: every verdict carries it, so that nobody reads an answer to another question."""

from typing import Any

import numpy as np

from cpjax.crosscheck.judging.problem import Problem

OPTIONS = ("sink", "softcap", "bias", "alibi")
"""What attention may have besides a mask, by the names of `judge`'s arguments."""


def asked_of(problem: Problem) -> dict[str, Any]:
    """The question as plain values; "assumed" names what was not said and taken to be absent.

    "rounded_scale" is there if the profile keeps the scale in a format coarser than float32 that does not have it.

    >>> from cpjax.crosscheck.judging.problem import checked_problem
    >>> x = np.ones((1, 4, 2, 8), np.float16)
    >>> asked_of(checked_problem(x, x, x))["assumed"]
    'no sink, no softcap, no bias, no alibi, no window'
    """
    precision, mask = problem.precision, problem.mask
    options = {name: getattr(problem, name, None) for name in OPTIONS}
    absent = [name for name, value in options.items() if value is None] + ["window"] * (mask.window is None)
    formats = ("compute", "score", "probability", "out", "carry", "lse")
    dtypes = problem.dtypes or tuple(x.dtype.name for x in (problem.query, problem.key, problem.value))
    arrays = zip(("query", "key", "value"), (problem.query, problem.key, problem.value), dtypes, strict=True)
    return {
        **{name: f"{dtype} {list(x.shape)}" for name, x, dtype in arrays},
        "scale": problem.stated_scale,
        **({"rounded_scale": problem.scale} if _is_coarser(problem) else {}),
        "mask": "causal" if mask.is_causal else "full",
        "window": mask.window,
        **{name: _plain(value) for name, value in options.items() if value is not None},
        "positions": "natural" if _is_natural(problem) else "given",
        "requests": int(max(np.max(t.segment) for t in (problem.q_tokens, problem.kv_tokens))) + 1,
        "pads": int((~problem.is_judged).sum()),
        **problem.partition.as_json(),
        "order": problem.order,
        "precision": precision.name,
        "formats": {name: getattr(precision, name) for name in formats},
        "assumed": ", ".join(f"no {name}" for name in absent) or "nothing",
    }


def sentences(asked: dict[str, Any]) -> list[str]:
    """Two lines for people: what was asked, what was assumed.

    >>> sentences({"mask": "full", "scale": 0.5, "formats": {"out": "float16"}, "assumed": "no sink"})
    ['asked: mask full, scale 0.5', 'assumed: no sink']
    """
    told = {k: v for k, v in asked.items() if k not in ("formats", "assumed", "pads", "requests") and v is not None}
    told |= {k: asked[k] for k in ("pads", "requests") if asked.get(k, 0) > (k == "requests")}
    words = (
        f"{name.replace('_', ' ')} {f'{value:.9g}' if isinstance(value, float) else value}"
        for name, value in told.items()
    )
    return [f"asked: {', '.join(words)}", f"assumed: {asked['assumed']}"]


def _is_coarser(problem: Problem) -> bool:
    return problem.scale not in (problem.stated_scale, float(np.float32(problem.stated_scale)))


def _is_natural(problem: Problem) -> bool:
    places = (problem.q_tokens, problem.kv_tokens)
    return all((np.asarray(t.position) == np.arange(np.asarray(t.position).shape[1])).all() for t in places)


def _plain(value: Any) -> Any:
    """A number as it is, an array by its form."""
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else f"{array.dtype} {list(array.shape)}"
