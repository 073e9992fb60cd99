"""A case computed by the backend's processes and by the specification: both judged, then held against each other."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpjax.crosscheck.backends.compute import checked
from cpjax.crosscheck.backends.spec import Spec
from cpjax.crosscheck.files.case import Case, read_case
from cpjax.crosscheck.files.result import Result, read_result
from cpjax.crosscheck.judge import judge
from cpjax.crosscheck.judging.pairwise import Agreement
from cpjax.crosscheck.run.compare import compare
from cpjax.crosscheck.run.session import how, judge_result
from npu_backend.rank import Settings
from npu_backend.workers import Workers


class Crosschecked(NamedTuple):
    case: Case
    npu: Result
    spec: Result
    agreement: Agreement

    @property
    def differing(self) -> float:
        """The share of the outputs of real tokens that are not the same FP16 number."""
        real = np.asarray(self.case.q_tokens.segment) >= 0
        return float((self.npu.out[real] != self.spec.out[real]).mean())


def computed(workers: Workers, path: Path, chosen: Settings) -> tuple[Case, Result]:
    """The backend's result, which passes the verdict against dense."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, path.name)
        workers.run(path, result, settings=chosen)
        case = read_case(path)
        judged = judge_result(case, result)
        assert judged.passed, judged.reasons
        return case, read_result(result, case)


def crosschecked(workers: Workers, path: Path, chosen: Settings) -> Crosschecked:
    """Both results pass against dense, and agree with each other. The specification computes in the same profile.

    It has no double ring (`all_to_all_ring` deals out heads inside a node): there its ring takes part, which meets the
    same chunks in another order, and the difference is one of rounding still.
    """
    case, npu = computed(workers, path, chosen)
    spec = specified(case, npu, "gather" if chosen.exchange.name == "gather" else "ring")
    agreement = compare(case, npu, spec)
    assert agreement.agrees, agreement.reasons
    return Crosschecked(case, npu, spec, agreement)


def specified(case: Case, like: Result, exchange: str) -> Result:
    """The specification's result in the profile of another, which passes the verdict against dense."""
    backend, wanted = Spec(exchange), replace(case, precision={"spec": like.precision})
    assert backend.supports(wanted) is None
    result = checked(backend.run(wanted), wanted)
    verdict = judge(
        case.query, case.key, case.value, result.out, result.lse,
        **how(case), precision=result.precision, order=result.order,
    )  # fmt: skip
    assert verdict.passed, verdict.reasons
    return result
