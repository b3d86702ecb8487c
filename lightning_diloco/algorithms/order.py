"""An order: what an algorithm wants to send. Makes no transfer of it (``sending.py``). Imports nothing of Lightning."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_diloco.algorithms.aggregates import Aggregate
from lightning_diloco.codecs import Codec
from lightning_diloco.comm.means import Differences

Read = Callable[[int], Mapping[str, Tensor]]  # worker → its tensors, by name

OF_WEIGHTS = ("delta", "weights")
"""Kinds of tensors that are, or become, pseudo-gradients."""


@dataclass(frozen=True)
class Order:
    """What an algorithm wants to send; see :meth:`~lightning_diloco.algorithms.context.SyncContext.send`.

    Attributes:
        assigns: the mean of the weights may be sent in place of the mean Δ, since θ will be assigned that mean.
        everybody: ``participation`` leaves nobody out.
        aggregate: takes the place of the mean; None: the mean.
        again: tells orders of the same stream and step apart, for random numbers; empty for the first.
        count: how many orders of the same stream there were before in this step.
    """

    names: list[str]
    read: Read
    groups: list[list[int]]
    weights: Mapping[int, float] | None
    step: int
    delay: int
    tag: str | None
    what: str
    codec: Codec | None
    assigns: bool
    everybody: bool = False
    aggregate: Aggregate | None = None
    again: str = ""
    count: int = 0

    @property
    def stream(self) -> str:
        """What successive transfers of the same things have in common."""
        return self.what if self.tag is None else f"{self.what}/{self.tag}"

    @property
    def key(self) -> tuple[str, int, int]:
        """Tells it from all other orders of the run."""
        return self.stream, self.step, self.count

    @property
    def where(self) -> str:
        """The place in the run, for messages."""
        what = "" if self.stream in OF_WEIGHTS else f" of {self.stream}"
        return f"the synchronisation{what} after {self.step} local steps"

    @property
    def of_weights(self) -> bool:
        """Whether pseudo-gradients are sent, or weights."""
        return self.what in OF_WEIGHTS

    def as_delta(self, theta: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What is looked at of a worker's ``tensors``, or of their mean: of weights, their distance from θ."""
        if self.what == "weights" and theta.keys() >= set(self.names):
            return Differences(self.names, theta, tensors)
        return tensors
