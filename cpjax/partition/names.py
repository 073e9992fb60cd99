"""Partitions by name, as commands, case files and keyword arguments say them."""

from cpjax.errors import InputError
from cpjax.partition.blocks import Blocks
from cpjax.partition.contiguous import Contiguous
from cpjax.partition.interleaved import Interleaved
from cpjax.partition.packed import Packed
from cpjax.partition.partition import Partition
from cpjax.partition.sequence import SequencePartition
from cpjax.partition.striped import Striped
from cpjax.partition.zigzag import Zigzag

SEQUENCES: dict[str, type[SequencePartition]] = {kind.name: kind for kind in (Contiguous, Zigzag, Striped)}
"""Those that an exchange can run: one text, cut into equal shards."""

PARTITIONS: dict[str, type[Partition]] = {
    **SEQUENCES,
    "packed": Packed,
    "blocks": Blocks,
    "decode": Blocks,
    "interleaved": Interleaved,
}
"""Name → partition; "decode" is the word of case files for `Blocks`. `Pages` needs its table, and has no name here."""

SIZES = {"blocks": "block", "decode": "block", "interleaved": "size"}


def partition_of(name: str | Partition, cp: int = 1) -> Partition:
    """The partition that a name means over `cp` ranks; "blocks:64" and "interleaved:8" say a size, too.

    >>> partition_of("zigzag", 4), partition_of("interleaved:8", 2)
    (Zigzag(cp=4), Interleaved(cp=2, size=8))

    Raises:
      InputError: an unknown name, a size where there is none, a cp that contradicts a given partition.
    """
    if isinstance(name, Partition):
        if cp not in (1, name.cp):
            raise InputError(f"cp is {cp}, but the partition is over {name.cp} ranks; leave cp out")
        return name
    word, colon, size = str(name).partition(":")
    if word not in PARTITIONS:
        raise InputError(f"unknown partition {str(name)[:40]!r}; known are {', '.join(PARTITIONS)}")
    if not colon:
        return PARTITIONS[word](cp)
    if word not in SIZES or not size.isdecimal():
        raise InputError(f"partition {str(name)[:40]!r}: only {', '.join(SIZES)} take a size, as 'interleaved:8'")
    return PARTITIONS[word](cp, **{SIZES[word]: int(size)})


def sequence_of(name: str | Partition, cp: int) -> SequencePartition:
    """As `partition_of`, of one that an exchange can run.

    >>> sequence_of("striped", 2)
    Striped(cp=2)

    Raises:
      InputError: also for a partition that is none of one text.
    """
    found = partition_of(name, cp)
    if not isinstance(found, SequencePartition):
        raise InputError(f"partition {found.name!r} is not that of one text; an exchange takes {', '.join(SEQUENCES)}")
    if found.cp != cp:
        raise InputError(f"the partition is over {found.cp} ranks, the mesh over {cp}; make them equal")
    return found
