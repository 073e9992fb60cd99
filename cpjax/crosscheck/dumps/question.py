"""Everything that can be said about a dump: one field for each option of `cpjax judge-dump`."""

from dataclasses import dataclass
from pathlib import Path

from cpjax.crosscheck.files.profile import profile_named
from cpjax.crosscheck.judging.problem import number
from cpjax.errors import InputError
from cpjax.partition.names import partition_of
from cpjax.partition.partition import ORDERS

GUESSED = ("bsnd", "bnsd", "tnd")
LAYOUTS = (*GUESSED, "sbnd")
"""Batch, tokens, heads, head dim; batch, heads, tokens, head dim; tokens, heads, head dim; Megatron's tokens, batch,
heads, head dim, whose shapes fit wherever bsnd's do, so that it is never guessed."""

LSE_AXES = ("bsn", "bns", "tn", "nt")
LSE_LAYOUTS = tuple(f"{axes}{last}" for last in ("", "1", "8") for axes in LSE_AXES)
"""The axes of lse; with a trailing axis of 1, or one of 8 equal numbers, as vendors' kernels write it."""

ALIGNS = ("top-left", "bottom-right")
BASES = ("e", "2")


@dataclass(frozen=True)
class Question:
    """What is asked of a dump; None is not said. Files of query and key may be two, their nope and rope parts.

    Raises:
      InputError: an unknown word, a number that is none, options that contradict each other.
    """

    query: tuple[Path, ...]
    key: tuple[Path, ...]
    value: Path
    out: Path
    lse: Path | None = None
    scale: float = 1.0
    is_causal: bool = True
    layout: str | None = None
    positions: Path | None = None
    align: str | None = None
    lengths: tuple[int, ...] | None = None
    segments: Path | None = None
    cu_seqlens_q: Path | None = None
    cu_seqlens_k: Path | None = None
    cu_seqlens_padded: Path | None = None
    block_table: Path | None = None
    seq_lens: Path | None = None
    sink: Path | None = None
    softcap: float | None = None
    window: int | None = None
    alibi: Path | None = None
    bias: Path | None = None
    key_scale: float | None = None
    value_scale: float | None = None
    partition: str | None = None
    cp: int | None = None
    precision: str | None = None
    order: str | None = None
    lse_base: str | None = None
    lse_layout: str | None = None

    def __post_init__(self):
        """Refuse what makes no question."""
        words = (
            ("order", self.order, ORDERS),
            ("layout-of", self.layout, LAYOUTS),
            ("align", self.align, ALIGNS),
            ("lse-base", self.lse_base, BASES),
            ("lse-layout", self.lse_layout, LSE_LAYOUTS),
        )
        for option, word, known in words:
            if word is not None and word not in known:
                raise InputError(f"--{option} {word!r:.60} is unknown; known are {', '.join(known)}")
        if self.precision is not None:
            profile_named(self.precision)
        if self.partition is not None:
            try:
                partition_of(self.partition, self.cp or 1)
            except InputError as error:
                raise InputError(f"--partition: {error}") from None
        for option, x in (("scale", self.scale), ("softcap", self.softcap)):
            if x is not None:
                number(f"--{option}", x)
        for option, x in (("key-scale", self.key_scale), ("value-scale", self.value_scale)):
            if x is not None and not number(f"--{option}", x) > 0:
                raise InputError(f"--{option} is {x}; it must be a positive number")
        said = {
            "--lengths": self.lengths, "--segments": self.segments,
            "--cu-seqlens-q": self.cu_seqlens_q, "--block-table": self.block_table,
        }  # fmt: skip
        given = [name for name, x in said.items() if x is not None and name != "--block-table"]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} both say where requests begin; give one")
        if self.positions is not None and (self.align is not None or self.lengths is not None):
            raise InputError("--positions says where queries are, and so do --align and --lengths; give one")
        if self.block_table is not None and self.cu_seqlens_k is None and self.seq_lens is None:
            raise InputError("--block-table needs the cached tokens of each request: --seq-lens or --cu-seqlens-k")
        if self.block_table is None and self.seq_lens is not None:
            raise InputError("--seq-lens counts the cached tokens of --block-table; give both")
        if self.block_table is not None and (self.lengths is not None or self.segments is not None):
            raise InputError("with --block-table the requests are rows of the table; say the queries by --cu-seqlens-q")
        if self.cu_seqlens_padded is not None and self.cu_seqlens_q is None:
            raise InputError("--cu-seqlens-padded says where padded requests begin; give --cu-seqlens-q, their lengths")
        if self.cu_seqlens_k is not None and self.cu_seqlens_q is None and self.block_table is None:
            raise InputError("--cu-seqlens-k says the requests of the keys; give --cu-seqlens-q, too")
