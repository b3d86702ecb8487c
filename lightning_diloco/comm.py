"""What crosses between workers, and the ledger that counts it.

Owns the arithmetic of an exchange (order of summation, accumulation dtype) and its byte count. Does not own what is
exchanged or when (``algorithms/``). Imports nothing of Lightning.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Read = Callable[[int], Mapping[str, Tensor]]  # worker → named tensors


@dataclass(frozen=True)
class Exchange:
    """One entry of the ledger.

    Attributes:
        local_step: local steps done when it happened.
        what: what was sent: "delta", "weights", "buffers", "inner_state", or an algorithm's own word.
        payload_bytes: bytes that each participant sends, in one direction; factors of a ring (2(N−1)/N) or of a
            parameter server (up and down) are not in it.
    """

    local_step: int
    what: str
    payload_bytes: int


@dataclass
class Ledger:
    """Every exchange of a fit, in order. Evaluation means are not communication and don't appear."""

    entries: list[Exchange] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Bytes that one worker has sent so far, one direction."""
        return sum(entry.payload_bytes for entry in self.entries)


class Comm:
    """Mean and exchange over the workers of one process.

    Args:
        workers: global ids of all workers.
        clock: gives the number of completed local steps, for the ledger.
    """

    def __init__(self, workers: Sequence[int], clock: Callable[[], int]) -> None:
        self.workers = list(workers)
        self.ledger = Ledger()
        self.clock = clock

    def mean(
        self,
        names: Iterable[str],
        read: Read,
        workers: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        what: str | None = "delta",
    ) -> dict[str, Tensor]:
        """The mean over workers, tensor by tensor; see :func:`mean_of`.

        Args:
            names: which tensors.
            read: gives worker i's tensors; all workers' have the same shapes and dtypes.
            workers: who takes part; default all.
            weights: one weight ≥ 0 per participant, normalised to sum 1 here; default 1/N each.
            what: what the ledger calls it; None for means that no real cluster would send.

        Returns:
            New tensors of the inputs' shapes; half types come back as float32, in which they are accumulated.
        """
        workers = self.workers if workers is None else list(workers)
        if weights is not None and (len(weights) != len(workers) or min(weights) < 0 or not sum(weights)):
            raise ValueError(
                f"`weights` (={list(weights)}) must hold one number ≥ 0 for each of the {len(workers)} participants"
                " and not only zeros."
            )
        values = [read(w) for w in workers]
        result, sent = {}, 0
        for name in names:
            held = [tensors[name] for tensors in values]
            result[name] = mean_of(held, weights)
            sent += held[0].nbytes
        if what is not None:
            self.record(what, sent)
        return result

    def exchange(
        self, pairs: Iterable[tuple[int, int]], names: Iterable[str], read: Read, what: str = "weights"
    ) -> dict[int, dict[str, Tensor]]:
        """Each pair of workers swaps its tensors (gossip): worker → a copy of its partner's tensors.

        Args:
            pairs: disjoint pairs of different workers.
            names: which tensors.
            read: gives worker i's tensors.
            what: what the ledger calls it.
        """
        pairs, names = list(pairs), list(names)
        flat = [w for pair in pairs for w in pair]
        if len(set(flat)) != len(flat) or not set(flat) <= set(self.workers):
            raise ValueError(f"`pairs` (={pairs}) must be disjoint pairs of different workers out of {self.workers}.")
        received: dict[int, dict[str, Tensor]] = {}
        for a, b in pairs:
            received[a] = {n: read(b)[n].clone() for n in names}
            received[b] = {n: read(a)[n].clone() for n in names}
        if pairs:
            self.record(what, sum(t.nbytes for t in received[pairs[0][0]].values()))
        return received

    def record(self, what: str, payload_bytes: int) -> None:
        """Enters an exchange in the ledger; algorithms that move tensors themselves call it."""
        if payload_bytes:
            self.ledger.entries.append(Exchange(self.clock(), what, payload_bytes))


def mean_of(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """``x_0 + (Σ_{i>0} (x_i − x_0)) / N``, summed in order; with weights ``x_0 + Σ_{i>0} w_i (x_i − x_0) / Σ_i w_i``.

    Where all tensors are equal (infinite, too), so is their mean, exactly; ``Σ x_i / N`` misses it for N = 3, 5, 6, 7.

    Args:
        tensors: at least one; same shape and dtype.
        weights: one number per tensor, not all zero.

    Returns:
        A new tensor; half types are accumulated, and returned, in float32.
    """
    dtype = tensors[0].dtype
    first = tensors[0].to(torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype, copy=True)
    if len(tensors) == 1:
        return first
    shift = torch.zeros_like(first)
    for i, tensor in enumerate(tensors[1:], start=1):
        tensor = tensor.to(first.dtype)
        difference = (tensor - first).masked_fill_(tensor == first, 0)  # ∞ − ∞ would be NaN
        shift += difference if weights is None else difference * weights[i]
    mean = shift.div_(len(tensors) if weights is None else sum(weights)).add_(first)
    return torch.where(mean == first, first, mean)  # keeps the sign of −0.0
