"""Gradients on trial: correct ones by the thousand, foreign kernels, and faulty ones beside the rules of others.

Correct gradient `number` of a seed is always the same problem and arithmetic. Kinds of data are those of the tuning set
(`cpjax.trial.kinds`), with random streams of their own; dout is normal, of scale 1e-3 to 10.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cpjax.crosscheck.gradients.asked import asked_of
from cpjax.crosscheck.gradients.exact import exact_gradients
from cpjax.crosscheck.gradients.judge import judge_gradients
from cpjax.crosscheck.gradients.verdict import GradientVerdict
from cpjax.crosscheck.judging.problem import checked_problem
from cpjax.crosscheck.run.workers import each
from cpjax.trial.draw import log_uniform
from cpjax.trial.emulators import PROFILES, attend, dtype_of
from cpjax.trial.foreign_gradients import KERNELS
from cpjax.trial.gradient_emulators import Backward, Gradients, differentiate, drawn
from cpjax.trial.gradient_faults import FAULTS
from cpjax.trial.kinds import TUNING
from cpjax.trial.problem import Problem, visible

JUDGED_IN = ("float32", "flash_fp16", "flash_bf16")
OF_DTYPE = {"float32": "float32", "float16": "flash_fp16", "bfloat16": "flash_bf16"}

STREAM = 4
"""The number that keeps these random streams apart from those of `false_alarms.SETS` and `foreign`."""


class Outcome(NamedTuple):
    """What the judge said of one backward pass; z of dq, dk and dv."""

    number: int
    who: str
    kind: str
    profile: str
    passed: bool
    judgeable: bool
    z: tuple[float, ...]
    of_bound: float
    failed_tests: tuple[str, ...]


def asked(problem: Problem) -> dict[str, Any]:
    """The keyword arguments with which `judge_gradients` is asked about this problem."""
    words = problem.judge_arguments()
    return {name: words[name] for name in words if name not in ("softcap", "alibi", "bias")}


def outcome(seed: int, number: int) -> Outcome:
    """Make one correct backward pass of an emulator, and have it judged."""
    rng = np.random.default_rng([STREAM, seed, number])
    profile = JUDGED_IN[number % len(JUDGED_IN)]
    kind = list(TUNING)[number // len(JUDGED_IN) % len(TUNING)]
    dtype, arithmetic = dtype_of(profile), PROFILES[profile]
    problem = TUNING[kind](rng).cast(dtype)
    given = attend(problem, arithmetic)
    dout = (rng.standard_normal(given.out.shape) * log_uniform(rng, 1e-3, 10.0)).astype(dtype)
    backward = drawn(rng)
    found = differentiate(problem, arithmetic, backward, given, dout)
    tensors = (problem.query, problem.key, problem.value, given.out, given.lse, dout)
    verdict = judge_gradients(*tensors, *found, precision=profile, ds=backward.ds, **asked(problem))
    return _outcome(number, "emulator", kind, profile, verdict)


def outcomes(seed: int, count: int, workers: int) -> Iterator[Outcome]:
    """Results 0 … count−1 of the emulators, in any order."""
    return each(partial(outcome, seed), range(count), workers, chunk=16)


def foreign(seed: int, count: int) -> Iterator[Outcome]:
    """Gradients of foreign kernels, which take turns; normal data of 2 to 300 tokens, causal or not."""
    cases = [(name, dtype) for name, kernel in KERNELS.items() for dtype in kernel.dtypes]
    for number in range(count):
        rng = np.random.default_rng([STREAM, seed, number, 1])
        name, dtype = cases[number % len(cases)]
        length, width = int(rng.integers(2, 300)), int(rng.choice([16, 64, 128]))
        heads, kv_heads = [(1, 1), (2, 2), (4, 2)][rng.integers(3)]
        query, key, value = (rng.standard_normal((1, length, n, width)) for n in (heads, kv_heads, kv_heads))
        problem = Problem(query, key, value, float(width**-0.5), is_causal=bool(rng.random() < 0.5)).cast(dtype)
        dout = rng.standard_normal((1, length, heads, width)).astype(dtype)
        out, found = KERNELS[name].compute(problem, dout)
        profile = OF_DTYPE[dtype]
        # PyTorch's flash kernel takes 32 or 64 queries at a time, and keeps dk and dv in the dtype of the inputs.
        every = (64 if length >= 192 else 32) if name == "torch flash" and dtype != "float32" else None
        tensors = (problem.query, problem.key, problem.value, out, None, dout)
        verdict = judge_gradients(*tensors, *found, precision=profile, **asked(problem), rounded_every=every)
        yield _outcome(number, name, "normal", profile, verdict)


def _outcome(number: int, who: str, kind: str, profile: str, verdict: GradientVerdict) -> Outcome:
    return Outcome(
        number,
        who,
        kind,
        profile,
        verdict.passed,
        verdict.judgeable,
        tuple(one.z for one in verdict.tensors),
        max(one.of_bound for one in verdict.tensors),
        verdict.failed_tests,
    )


class Row(NamedTuple):
    """What is said of one who computes, in one profile."""

    who: str
    profile: str
    results: int
    alarms: int
    not_judgeable: int
    median_z: tuple[float, ...]
    z: tuple[float, ...]
    """The largest."""
    of_bound: float


def table(seen: list[Outcome]) -> list[Row]:
    """One row for each who and profile."""
    rows = []
    for who, profile in dict.fromkeys((one.who, one.profile) for one in sorted(seen, key=lambda one: one.number)):
        some = [one for one in seen if (one.who, one.profile) == (who, profile)]
        judged = [one for one in some if one.judgeable] or some
        z = np.array([one.z for one in judged])
        rows.append(
            Row(
                who,
                profile,
                results=len(some),
                alarms=sum(one.judgeable and not one.passed for one in some),
                not_judgeable=sum(not one.judgeable for one in some),
                median_z=tuple(np.median(z, axis=0)),
                z=tuple(z.max(axis=0)),
                of_bound=max(one.of_bound for one in judged),
            )
        )
    return rows


# Faults --------------------------------------------------------------------------------------------------------------


class Caught(NamedTuple):
    """A fault, and who sees it."""

    fault: str
    profile: str
    judge: bool
    causes: tuple[str, ...]
    named: bool
    """The diagnosis named this fault, and no other."""
    twice_low_precision: bool
    torch_testing: bool


def faults(profile: str, keys: int, seed: int) -> Iterator[Caught]:
    """Every fault at so many keys: 4 heads of 64 on 2, causal, cp 2, normal data. The first line is no fault."""
    rng = np.random.default_rng([STREAM, seed, keys, 2])
    query, key, value = (rng.standard_normal((1, keys, n, 64)) for n in (4, 2, 2))
    problem = Problem(query, key, value, 0.125, is_causal=True, cp=2).cast(dtype_of(profile))
    arithmetic, backward = PROFILES[profile], Backward(64, 128)
    given = attend(problem, arithmetic, "ring")
    dout = rng.standard_normal(given.out.shape).astype(given.out.dtype)
    tensors = (problem.query, problem.key, problem.value)
    reference = exact_gradients(
        asked_of(checked_problem(*tensors, precision=profile, **asked(problem)), None, None, dout)
    )
    plain = _plain(problem, dout)
    right = differentiate(problem, arithmetic, backward, given, dout)
    wrong = {name: (fault(problem, arithmetic, backward, given, dout), says) for name, (fault, says) in FAULTS.items()}
    for name, (found, says) in {"none": (right, ""), **wrong}.items():
        verdict = judge_gradients(*tensors, *given, dout, *found, precision=profile, **asked(problem))
        yield Caught(
            name,
            profile,
            not verdict.passed,
            verdict.causes,
            bool(says) and len(verdict.causes) == 1 and says in verdict.causes[0],
            not twice_low_precision(found, plain, reference),
            not torch_testing(found, reference),
        )


def twice_low_precision(found: Gradients, plain: Gradients, reference: Any) -> bool:
    """Largest error of each at most twice that of plain autograd in low precision (the tests of FlashAttention)."""
    return all(
        np.abs(x.astype(float) - z).max() <= 2 * np.abs(y.astype(float) - z).max() + 1e-5
        for x, y, z in zip(found, plain, reference, strict=True)
    )


def torch_testing(found: Gradients, reference: Any) -> bool:
    """`torch.testing.assert_close` with the tolerances that it has for the dtype."""
    relative, absolute = {"float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5), "bfloat16": (1.6e-2, 1e-5)}[
        found.dq.dtype.name
    ]
    return all(
        np.allclose(x.astype(float), y.astype(x.dtype).astype(float), relative, absolute)
        for x, y in zip(found, reference, strict=True)
    )


def _plain(problem: Problem, dout: np.ndarray) -> Gradients:
    """Softmax and its derivative by autograd, every tensor in the dtype of the inputs."""
    import torch

    from cpjax.arrays import of_torch

    dtype, group = getattr(torch, problem.query.dtype.name), problem.query.shape[2] // problem.key.shape[2]
    arrays = (problem.query, problem.key, problem.value, dout)
    query, key, value, grad = (torch.from_numpy(x.astype(np.float32)).to(dtype).transpose(1, 2) for x in arrays)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    seen = torch.from_numpy(visible(problem, np.arange(problem.key.shape[1])).copy())[:, None]
    score = (query @ key.transpose(2, 3) * problem.scale).masked_fill(~seen, -torch.inf)
    grads = torch.autograd.grad(score.softmax(dim=-1) @ value, inputs, grad)
    return Gradients(*(of_torch(x.transpose(1, 2).contiguous(), "a gradient") for x in grads))
