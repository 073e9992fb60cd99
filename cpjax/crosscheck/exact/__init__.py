"""What exact arithmetic gives, in float64, and the formats that results are rounded to.

formats      unit roundoff, spacing and range of each format
attention    exact attention of some rows, taken apart as the computation that is judged is
"""
