"""What runs on what: a model on cards of a device, cut by cp and tp."""

from dataclasses import dataclass

from cpjax.errors import InputError
from cpjax.partition import SEQUENCES, SequencePartition, sequence_of
from cpjax.partition.partition import MOST_CP
from cpjax.plan.hardware import Device
from cpjax.plan.model import ModelShape

EXCHANGES = ("ring", "gather")
"""ring: keys and values travel from rank to rank, behind the attention of the last that came. gather: all of them come
first (MindIE, docs/design.md)."""


@dataclass(frozen=True)
class Setting:
    """cp ranks share the tokens, tp ranks, which are neighbours, the heads; all moe_ep · moe_tp cards the experts.

    `sp` cuts the cache once more; `chunk` is how many tokens of the prompt are prefilled at once, None: all.

    Raises:
      InputError: sizes that do not fit the model, or each other.
    """

    model: ModelShape
    device: Device
    cp: int = 1
    tp: int = 1
    moe_ep: int | None = None
    moe_tp: int = 1
    sp: int = 1
    partition: str = "zigzag"
    exchange: str = "ring"
    chunk: int | None = None

    def __post_init__(self):
        """Refuse what nobody could run."""
        if not 1 <= self.cp <= MOST_CP:
            raise InputError(f"cp is {self.cp}; it must be from 1 to {MOST_CP}")
        if self.tp < 1 or self.model.heads % self.tp:
            raise InputError(f"tp is {self.tp}, which does not divide the model's {self.model.heads} heads")
        if self.partition not in SEQUENCES:
            raise InputError(f"partition {self.partition!r:.40} is not known here; known are {', '.join(SEQUENCES)}")
        if self.exchange not in EXCHANGES:
            raise InputError(f"exchange {self.exchange!r:.40} is not known here; known are {', '.join(EXCHANGES)}")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk is {self.chunk}; it must be at least 1 token")
        if self.moe_ep is not None and self.model.experts and self.moe_ep * self.moe_tp != self.cards:
            raise InputError(
                f"moe_ep {self.moe_ep} · moe_tp {self.moe_tp} is not cp {self.cp} · tp {self.tp}, {self.cards} cards"
            )

    @property
    def cards(self) -> int:
        """Of one instance: cp · tp."""
        return self.cp * self.tp

    @property
    def ep(self) -> int:
        """Groups of cards over which experts are dealt; all cards if it is not said. 1 without experts."""
        return (self.cards if self.moe_ep is None else self.moe_ep) if self.model.experts else 1

    @property
    def sequence(self) -> SequencePartition:
        """Who holds which tokens."""
        return sequence_of(self.partition, self.cp)

    def padded(self, tokens: int) -> int:
        """Tokens with the pads that make all shards equal; pads are computed like tokens, as MindIE does."""
        parts = self.sequence.chunk_count
        return -(-tokens // parts) * parts

    def chunks(self, tokens: int, prefix: int = 0) -> list[tuple[int, int]]:
        """The chunks of a prompt over `prefix` cached tokens: (its tokens, tokens before it), in order.

        Raises:
          InputError: there is no token.
        """
        if tokens < 1 or prefix < 0:
            raise InputError(
                f"{tokens} tokens over a prefix of {prefix}; give at least 1 token, and a prefix from 0 on"
            )
        size = self.chunk or tokens
        return [(min(size, tokens - start), prefix + start) for start in range(0, tokens, size)]
