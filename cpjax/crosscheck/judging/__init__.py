"""From a result to a verdict (docs/verdict.md, sections 4 to 10).

logit_checks   softcap, sink, ALiBi slopes and bias, checked
problem        what is problem: the inputs, checked, and how it is said to have been computed
sampling       which rows are judged, in which tiles
statistic      from errors to z-scores
score_tests    tests for one fault each
range_check    every row: can it be an average of what it may see?
evidence       what is measured of every judged row
verdict        the decision, in words
pairwise       two results held against each other
error_budget   one row: what explains its error, term by term
expansion      keys and values that a backend has made of a latent
"""
