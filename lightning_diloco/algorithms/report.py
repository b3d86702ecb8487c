"""The report of an arrival: what a callback and the loggers learn of an outer step. Imports nothing of Lightning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OuterStepReport:
    """A transfer that has arrived, in numbers.

    Attributes:
        step: local steps done when it arrived, from 1.
        outer_step: arrivals so far, from 1.
        kind: "round"; "flush" at the end of training.
        pseudo_gradient_norm: ‖Δ‖₂ of the mean that arrived, over the tensors that were sent (of several groups of
            workers: the mean of their norms); None without ``diagnostics``.
        drift: per worker ‖θ_i − θ‖₂ / ‖θ‖₂ over these tensors when it was sent, with θ as it was before the outer step
            (the bare distance where ‖θ‖ = 0; NaN for a worker whose values were not finite); empty for other kinds of
            tensors than weights and Δ, and without ``diagnostics``.
        cosine: mean over pairs of workers of the cosine between what they sent, as decoded by the receiver (zeros count
            as orthogonal to all); None with fewer than two participants, without ``diagnostics``, and with
            ``reduction="all_reduce"`` over several processes, where nobody sees what single workers send.
        payload_bytes: bytes that each worker sent, in one direction, off the packed payload: the transfer, and the
            buffers and inner states that were synchronised along with it.
        participants: global ids of the workers in the mean.
        seconds: wall-clock time of sending and taking in.
        sent_step: local steps done when it was sent; ``step`` unless the algorithm delays transfers.
        tag: the algorithm's word for the transfer ("fragment 0", …), or None.
        names: number of tensors that were sent.
    """

    step: int
    outer_step: int
    kind: str
    pseudo_gradient_norm: float | None
    drift: tuple[float, ...]
    cosine: float | None
    payload_bytes: int
    participants: tuple[int, ...]
    seconds: float
    sent_step: int = 0
    tag: str | None = None
    names: int = 0
