"""A transfer: something that workers have sent, on its way from sending to arrival.

Owns what is known of it: who takes part, the means, bytes, and what was measured. Sends nothing (``sending.py``).
Imports nothing of Lightning.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_diloco.comm.tensors import copied


@dataclass(eq=False)  # two transfers are never the same, and tensors have no truth value
class Transfer:
    """Tensors of some workers, averaged within each group of them.

    Attributes:
        names: names of the tensors.
        groups: the workers whose tensors were averaged with each other: usually a single group.
        rejected: workers that were left out because their values were not finite; they take what arrives in their
            group.
        renewed: whether they have started anew already, when it was sent: see :meth:`SyncContext.renew`.
        home: worker → position of its group.
        sent: local step in which it was sent.
        due: local step in which it arrives.
        tag: the algorithm's word for it, by which a part of an algorithm finds its own transfers; or None.
        what: kind of the tensors: "delta", "weights", "gradients", or another word of the algorithm's.
        nbytes: bytes that a worker sent, in one direction.
        means: per group, name → mean.
        norm: ‖mean‖₂ of the first group; None without diagnostics.
        cosine: mean pairwise cosine of what the workers of the first group sent, as in
            :class:`~lightning_diloco.OuterStepReport`.
        drift: per worker ‖θ_i − θ‖ / ‖θ‖ when it was sent; empty without diagnostics, and for other kinds than "delta"
            and "weights".
        likeness: numbers of the report, layer by layer (of all layers together under ""), as plain values for files;
            empty without diagnostics.
        seconds: wall-clock time of sending.
        key: tells it from all others of the run.
        rolled_back: workers that took part in vain: a part was lost, and all of them return to their anchors.
        attendance: how many workers were there, and how many took part.
        on_links: per group, the workers that sent: also those that were found to be not finite, and those of a
            transfer that was rolled back.
    """

    names: list[str]
    groups: list[list[int]]
    rejected: list[int] = field(default_factory=list)
    renewed: bool = False
    home: dict[int, int] = field(default_factory=dict)
    sent: int = 0
    due: int = 0
    tag: str | None = None
    what: str = "delta"
    nbytes: int = 0
    means: list[Mapping[str, Tensor]] = field(default_factory=list)
    norm: float | None = None
    cosine: float | None = None
    drift: tuple[float | None, ...] = ()
    likeness: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    key: tuple[str, int, int] = ("", 0, 0)
    on_links: list[list[int]] = field(default_factory=list)
    rolled_back: list[int] = field(default_factory=list)
    attendance: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def senders(self) -> list[int]:
        """The workers in the means, ascending."""
        return sorted(w for group in self.groups for w in group)

    @property
    def workers(self) -> list[int]:
        """The workers that take what arrives: the senders, and those that were left out as not finite."""
        return sorted([*self.senders, *self.rejected])

    @property
    def mean(self) -> Mapping[str, Tensor]:
        """Name → mean over all senders.

        Raises:
            ValueError: there are several groups, or nobody took part.
        """
        if len(self.means) != 1:
            raise ValueError(
                f"A transfer among {len(self.groups)} groups of workers has no common mean. Use `mean_of(worker)`"
                " for each of `workers`."
            )
        return self.means[0]

    def mean_of(self, worker: int) -> Mapping[str, Tensor]:
        """Name → mean over the group of ``worker``."""
        if worker not in self.workers:
            raise ValueError(f"Worker {worker} takes no part in this transfer; {self.workers} do.")
        return self.means[self.home.get(worker, 0)]

    # ---------------------------------------------------------------------------------------- while it waits

    def rebase(self, written: Mapping[str, Tensor]) -> None:
        """Parameters were written from outside: a Δ from before says nothing any more; weights become the new ones."""
        for mean in self.means:
            for name in written.keys() & set(self.names):
                if self.what == "weights":
                    mean[name].copy_(written[name])
                else:
                    mean[name].zero_()

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a file."""
        return {**vars(self), "means": [copied(dict(mean), plain=True) for mean in self.means]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], device: torch.device) -> "Transfer":
        """The reverse of :meth:`state_dict`."""
        means = [{n: t.to(device, copy=True) for n, t in mean.items()} for mean in state["means"]]
        return cls(**{**state, "means": means})
