"""What rounding may do to each element: a standard deviation, and a bound. Derivation: docs/verdict.md.

arithmetic                          the precision at work on some rows; what several terms need
ties, running_max, row_covariance   roundings that are alike: of equal scores, of a common maximum, in several rows
terms                               what a term is
probabilities, outputs, scores,     the terms of σ, one file for each sort of rounding (§3)
sums, lse
model                               all terms added up: the tolerance of every element
bound                               the worst case (§5): between which numbers an output must lie
"""
