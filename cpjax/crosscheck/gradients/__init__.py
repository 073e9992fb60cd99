"""Are dq, dk and dv what a correct backward pass in its precision gives? The derivation is docs/gradients.md.

asked        what is asked: the inputs of the backward pass, checked
exact        exact gradients by tiles, in float64, and of what is left out or changed
roundings    the terms of σ and of the bound, pair by pair
expected     all terms carried to dq, dk and dv
verdict      the answer
diagnose     after a failed verdict: faults that explain the result to within rounding
judge        the public function
"""
