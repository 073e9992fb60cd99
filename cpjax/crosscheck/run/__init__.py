"""Cases and results judged.

session     one entry a result
compare     the results of several backends, held against each other
explain     the error budget of single rows
summary     all of it as a table and a sentence
"""
