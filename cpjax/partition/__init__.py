"""Who holds which tokens, and in which order chunks are merged: a partition is a value. Integers only; no JAX.

partition               what every partition can say: chunks, ranks, order of merging
sequence                one text in equal shards:           contiguous, zigzag, striped
packed                  several requests in a row, each in zigzag, with cached prefixes
cached                  a decode step over the ranks' caches: blocks (MindIE), interleaved (vLLM), pages (a page table)
names                   a partition by its name
kv_cache                MindIE's rule for the blocks of a prompt
packing                 arrays of several requests into one row and back; MindIE's index arrays
schedule                which rank computes which pair of chunks when
moves                   from natural order to shards by the fewest transfers

A new partition is one file, a line in `names`, and it is drawn by the laws in tests/spec/test_partition.py.
"""

from cpjax.partition.blocks import Blocks
from cpjax.partition.contiguous import Contiguous
from cpjax.partition.interleaved import Interleaved
from cpjax.partition.names import PARTITIONS, SEQUENCES, partition_of, sequence_of
from cpjax.partition.packed import Packed
from cpjax.partition.pages import Pages
from cpjax.partition.partition import ORDERS, Order, Partition, inverse
from cpjax.partition.sequence import SequencePartition
from cpjax.partition.striped import Striped
from cpjax.partition.zigzag import Zigzag

__all__ = [
    "ORDERS", "PARTITIONS", "SEQUENCES", "Blocks", "Contiguous", "Interleaved", "Order", "Packed", "Pages", "Partition",
    "SequencePartition", "Striped", "Zigzag", "inverse", "partition_of", "sequence_of",
]  # fmt: skip
