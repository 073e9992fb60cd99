"""The instrument: is a result what correct arithmetic in its precision gives? The derivation is docs/verdict.md.

formats, order, attention64             the formats, the order of merging, exact attention taken apart
arithmetic, groups, stored, weighed,    what rounding may do to each element:
hard_bound, error_model                 a standard deviation and a bound
statistic, directed                     from errors to deviates; tests for single faults
problem, extremes, evidence            the inputs, checked; every row in range; every judged row measured
verdict, judge                          the decision, in words
case, result, outcome                   what goes to a backend and comes back, as files (docs/formats.md)
whole                                   files and folders that are whole or not there
conformance, checksums, readings        the cases a kernel author runs, and what they say in words
backends, session                       who computes a case (docs/backends.md); cases and results judged and shown
"""

from cpjax.crosscheck.judge import judge as judge
from cpjax.crosscheck.judging.verdict import Verdict as Verdict
