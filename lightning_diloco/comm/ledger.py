"""The ledger: what workers have sent, and how many bytes.

Does not own the sending (``channel.py``). Imports nothing of Lightning.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LedgerEntry:
    """Something that was sent.

    Attributes:
        local_step: local steps done when it was sent.
        what: kind of the tensors: "delta", "weights", "buffers", "inner_state", or a word of the algorithm's.
        payload_bytes: bytes that each participant sends, in one direction; the factors of a ring (2(N−1)/N) and of a
            parameter server (up and down) are not included.
    """

    local_step: int
    what: str
    payload_bytes: int


@dataclass
class Ledger:
    """All that was sent in a fit, in order. Means for evaluation are not communication and don't appear.

    Attributes:
        entries: what was sent; :meth:`add` appends.
        total_bytes: bytes that a worker has sent so far, in one direction. A running total: algorithms may send, and
            loggers ask, at every step.
    """

    entries: list[LedgerEntry] = field(default_factory=list)
    total_bytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.total_bytes = sum(entry.payload_bytes for entry in self.entries)

    def add(self, entry: LedgerEntry) -> None:
        """Appends an entry."""
        self.entries.append(entry)
        self.total_bytes += entry.payload_bytes
