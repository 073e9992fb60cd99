"""What exact arithmetic gives, in float64, and the formats that results are rounded to.

formats      unit roundoff, spacing and range of each format
logits       what a logit is made of besides scale · q·k
attention    exact attention of some rows, taken apart as the computation that is judged is
"""
