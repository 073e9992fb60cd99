"""Context-parallel attention beside others on this machine: the same numbers, in turns, each in a process of its own.

Reading order: `setting.py` (what is computed), `contenders.py` (who computes it), `gloo_ring.py` (the
one of several processes), `process.py` (one contender, alone in
a process), `rounds.py` (the turns, and what is made of the times), `table.py`.
"""
