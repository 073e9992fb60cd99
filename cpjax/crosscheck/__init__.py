"""The instrument: is a result what correct arithmetic in its precision gives?

formats, order, attention64     the formats, the order of merging, exact attention taken apart
groups, error_model             what rounding may do to each element: a deviation and a bound
statistic, directed             from errors to deviates; tests for single faults
question, extremes, evidence    the inputs, checked; every row in range; every judged row measured
verdict, judge                  the decision, in words
"""

from cpjax.crosscheck.judge import judge as judge
from cpjax.crosscheck.verdict import Verdict as Verdict
