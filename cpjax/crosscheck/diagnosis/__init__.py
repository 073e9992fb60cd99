"""What went wrong, and where; asked only after a failed verdict.

sample                    the rows that are looked at
dictionary, everywhere    the faults that are known: of single key/value chunks, and those that touch all alike
cuts, parts               usual parts of the keys; their results merged in the wrong base
masks, predict, measure   what a fault would have made of the rows, and how well that explains what was handed over
scan, weights, fitted     by how much a mask is off; the weight of every chunk; other numbers that are fitted
runs, row_masks           a run of keys lost, doubled or stale; limits of the mask that differ per row
denominator               one more term in every row's sum
unwritten                 rows that nobody wrote
permutation               heads or ranks exchanged
places, words             ranks, steps and sentences
cause, diagnose           the search: of one query chunk, of all
precision_search          with which precisions a correct result is consistent
guards                    numbers that keep a computation finite
"""

from cpjax.crosscheck.diagnosis.cause import Cause as Cause
from cpjax.crosscheck.diagnosis.diagnose import Diagnosis as Diagnosis
from cpjax.crosscheck.diagnosis.diagnose import diagnose as diagnose
