"""The ledger: what workers have sent, and how many bytes.

Does not own the sending (``channel.py``). Imports nothing of Lightning.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

Pattern = Literal["ring", "all_gather", "server"]


@dataclass(frozen=True)
class LedgerEntry:
    """Something that was sent.

    Attributes:
        local_step: local steps done when it was sent.
        what: kind of the tensors: "delta", "weights", "buffers", "inner_state", or a word of the algorithm's.
        payload_bytes: bytes that each participant sends, in one direction: the message itself, once. What crosses links
            depends on how the messages travel: see :meth:`Ledger.wire_bytes`.
        participants: how many workers had a share in the mean (of several groups: in the largest).
        dense_bytes: bytes of the mean, uncoded; equal to ``payload_bytes`` without a codec.
        gathered: whether every message had to reach whoever averages: coded ones, and those of a robust mean.
        part: the part of the workers that send at this time, where they do so at different times; else 1.
    """

    local_step: int
    what: str
    payload_bytes: int
    participants: int
    dense_bytes: int
    gathered: bool = False
    part: float = 1.0


class WireBytes(NamedTuple):
    """Bytes that cross the link of a worker.

    Attributes:
        sent: by the worker.
        received: by the worker.
    """

    sent: int
    received: int


@dataclass(repr=False)
class Ledger:
    """All that was sent in a fit, in order. Means for evaluation are not communication and don't appear.

    >>> Ledger([LedgerEntry(10, "delta", 1000, 4, 1000), LedgerEntry(20, "buffers", 24, 4, 24)])
    <Ledger: 2 entries, 1,024 bytes (delta 1,000, buffers 24), local steps 10 to 20>

    Attributes:
        entries: what was sent; :meth:`add` appends.
    """

    entries: list[LedgerEntry] = field(default_factory=list)
    _total: float = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self._total = sum(entry.payload_bytes * entry.part for entry in self.entries)

    @property
    def total_bytes(self) -> int:
        """Bytes that a worker has sent so far, in one direction: the mean, if workers send at different times."""
        return round(self._total)

    def add(self, entry: LedgerEntry) -> None:
        """Appends an entry."""
        self.entries.append(entry)
        self._total += entry.payload_bytes * entry.part  # a running total: loggers may ask at every step

    def wire_bytes(self, pattern: Pattern) -> WireBytes:
        """What has crossed the link of a worker that took part in everything, had the messages travelled like this.

        ================  ==============  ==============  =============================================
        pattern           sent            received        for messages
        ================  ==============  ==============  =============================================
        ``"ring"``        2(n−1)/n · P    2(n−1)/n · P    of a plain mean: sums are formed on the way
        ``"all_gather"``  (n−1) · P       (n−1) · P       of any kind: everybody gets all, and averages
        ``"server"``      P               D               of any kind: a server averages
        ================  ==============  ==============  =============================================

        n is the number of participants, P the payload and D the uncoded mean, in bytes. The ring is the all-reduce of
        Patarasuk and Yuan (2009, "Bandwidth optimal all-reduce algorithms"): n−1 steps of P/n to sum, n−1 to hand the
        sums round. A ring all-gather hands every payload on n−1 times, which is what this package does with coded
        payloads and with those of a robust mean. Buffers that are copied from one worker count as averaged ones.
        Headers and retries are not counted.

        Args:
            pattern: how messages travel.

        Returns:
            Bytes, rounded up per message.

        Raises:
            ValueError: an unknown pattern, or a ring for coded messages or robust means: neither are sums.
        """
        if pattern not in get_args(Pattern):
            raise ValueError(f"`pattern` (={pattern!r}) must be one of {', '.join(map(repr, get_args(Pattern)))}.")
        sent = received = 0
        for entry in self.entries:
            n, payload, dense = entry.participants, entry.payload_bytes, entry.dense_bytes
            if pattern == "server":
                sent, received = sent + math.ceil(payload * entry.part), received + math.ceil(dense * entry.part)
                continue
            if pattern == "all_gather":
                crossing = (n - 1) * payload
            elif entry.gathered or payload != dense:
                kind = "coded" if payload != dense else "coded or robustly averaged"
                raise ValueError(
                    f"`pattern` (='ring') sums what workers send on the way, which is impossible with the {kind}"
                    f" {entry.what!r} of local step {entry.local_step}. Use 'all_gather' or 'server'."
                )
            else:
                crossing = -(-2 * (n - 1) * payload // n)
            sent, received = sent + crossing, received + crossing
        return WireBytes(sent, received)

    def __repr__(self) -> str:
        if not self.entries:
            return "<Ledger: nothing was sent>"
        kinds: Counter[str] = Counter()
        for entry in self.entries:
            kinds[entry.what] += round(entry.payload_bytes * entry.part)
        each = ", ".join(f"{what} {sent:,}" for what, sent in kinds.items())
        count = f"{len(self.entries):,} {'entry' if len(self.entries) == 1 else 'entries'}"
        first, last = self.entries[0].local_step, self.entries[-1].local_step
        steps = f"local step {first:,}" if first == last else f"local steps {first:,} to {last:,}"
        return f"<Ledger: {count}, {self.total_bytes:,} bytes ({each}), {steps}>"
