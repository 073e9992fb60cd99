"""The instrument: is a result what correct arithmetic in its precision gives? The derivation is docs/verdict.md.

Rooms, each imports only what stands above it; nothing but `backends` needs JAX or PyTorch:

    exact/          exact attention in float64, taken apart; the formats
    files/          cases, results, notes, checksums (docs/formats.md)
    error_model/    what rounding may do to each element: the terms of σ, and the bound
    judging/        from a result to a verdict: the problem, evidence, statistics, the decision
    diagnosis/      after a failed verdict: what went wrong, and where
    gradients/      the same of a backward pass: dq, dk and dv (docs/gradients.md)
    judge           the public function: judging, then diagnosis
    conformance/    the cases that a kernel author runs, and what they say in words
    dumps/          tensors that any tool has dumped
    run/            cases and results judged: one entry a result, comparisons, error budgets, tables
    report/         a page on what was judged
    backends/       who computes a case (docs/backends.md)
"""

from cpjax.crosscheck.gradients.judge import judge_gradients as judge_gradients
from cpjax.crosscheck.gradients.verdict import GradientVerdict as GradientVerdict
from cpjax.crosscheck.judge import judge as judge
from cpjax.crosscheck.judging.verdict import Verdict as Verdict
