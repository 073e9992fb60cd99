"""One HTML page on what was judged: needs no network, reads well on a laptop, a phone, in print and in the dark.

figures           errors by query chunk, key/value chunk, head, rank and step, from a sample of rows
page              the page, whole or not at all
"""
