"""What a kernel computes, read off its answers to small questions: `cpjax fingerprint` (docs/fingerprint.md).

A kernel is a function; nothing of its code is read. Each room asks probes whose inputs are made to tell, and reads a
few lines of the card from the answers:

probe       a question, an answer, a line of the card; scores that are exact in any format
scores      rounding of q·k and of the scale, range of the scores
weights     rounding of the probabilities, as the factor of v and in the row sum; how exact exp is
results     rounding of out, subnormal numbers, lse and its base
order       the order of additions, as a tree (after FPRev, arXiv 2411.00442); how many digits the sums keep
tiles       where the running maximum is raised: key tiles, splits, or a maximum that is taken first
masks       the causal mask and its alignment, what hides a key, NaN in hidden keys, heads that share keys
parts       where a product of p and v begins a sum anew
same        bits that change from call to call, or with the rest of the batch
merging     over ranks: order of merging, division, formats, weights, empty ranks (ranks, merge_*: its parts)
last_bits   what only the last bits tell: which exp, the order of the row sum, division
card        all lines, and the profile that follows from them
computes    a card computes: the emulator that follows from it (sums, exponentials: its parts)
predict     new inputs, the bits that a card predicts, and the share that is right
kernels     kernels that are here: PyTorch, JAX, the project's emulators, backends
folder      the probes as case files, answered anywhere
"""

from cpjax.fingerprint.card import Card, card_of
from cpjax.fingerprint.probe import Answer, Line, Probe

__all__ = ["Answer", "Card", "Line", "Probe", "card_of"]
