"""What went wrong, and where; asked only after a failed verdict.

sample, dictionary        the rows that are looked at, and the faults that are known
masks, predict, measure   what a fault would have made of them, and how well that explains what was handed over
weights, fitted           the weight of every chunk; faults with a number that is fitted
permutation               heads or ranks exchanged
words, diagnose           places and sentences; the search
"""

from cpjax.crosscheck.diagnosis.diagnose import Cause as Cause
from cpjax.crosscheck.diagnosis.diagnose import Diagnosis as Diagnosis
from cpjax.crosscheck.diagnosis.diagnose import diagnose as diagnose
