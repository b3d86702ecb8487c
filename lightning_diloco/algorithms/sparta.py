"""SPARTA: sparse averaging of parameters (EXO Labs, "SPARTA: Distributed Training with Sparse Parameter Averaging").

Every k local steps, with a mask of every parameter that is the same for all workers and new each time::

    mask      each element with probability p, independently
    θ_i[mask] ← (1/N) Σ_i θ_i[mask]       the rest of θ_i stays; so does the mean of the replicas

Workers know the mask from the seed of the run; only the elements under it are sent. The published values: p = 0.005,
k = 1.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm


class Sparta(SyncAlgorithm):
    """Workers average a random fraction of their parameters, alone or beside another algorithm.

    Alone, others see the mean of the replicas. Beside an algorithm it exchanges first, in every step in which both do;
    Δ_i is still measured from θ, and the mean Δ stays what it was.

    Args:
        p: probability in [0, 1] with which an element is exchanged; 0: nothing is. Published: 0.005.
        every: k ≥ 1, local steps from one exchange to the next, counted from the start of training.
        beside: an algorithm that trains as it would alone, but for the exchanges; for example ``Diloco()``. It must
            measure Δ_i from θ, and leave gradients alone.

    Raises:
        ValueError: an argument is out of its range; when training starts: ``inner_state`` is not "keep", a codec keeps
            errors, which belong to positions that change from exchange to exchange, or ``nonfinite`` is "skip" without
            an algorithm whose θ could put all of a worker right.

    When: a link that is always there, and slow; beside DiLoCo it lets rounds be longer.
    Cost: p of the model's bytes per worker and direction every k steps; a random number per parameter.
    Proof: ``test_variants.py``, ``test_sparta.py``; p = 1 and k = 1 is the mean in every step, p = 0
    independent training.
    """

    def __init__(self, p: float = 0.005, every: int = 1, beside: SyncAlgorithm | None = None) -> None:
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
            raise ValueError(f"Sparta: `p` (={p!r}) must be a number from 0 (nothing is exchanged) to 1 (everything).")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Sparta: `every` (={every!r}) must be an integer ≥ 1: local steps between exchanges.")
        self.p, self.every, self.beside = float(p), every, beside
        if beside is None:
            vars(self).update(published="average", sends="elements")
            return
        alone = not beside.chooses_workers and not beside.looks_at_gradients
        if isinstance(beside, Sparta) or beside.anchors != "shared" or not alone:
            raise ValueError(
                f"Sparta: `beside` (={type(beside).__name__}) must measure Δ_i from θ, leave gradients alone, and let"
                " all workers take every step, as Diloco and StreamingDiloco do."
            )
        vars(self).update(
            outer_defaults=beside.outer_defaults, published=beside.published, codec=beside.codec, sends=beside.sends
        )

    @override
    def setup(self) -> None:
        sender = self.ctx.sender
        if sender.policies.inner_state != "keep":
            raise ValueError(
                f"`inner_state` (={sender.policies.inner_state!r}) would touch the inner state of whole parameters at"
                " each of Sparta's exchanges, which moves a fraction of them. Use `inner_state='keep'`."
            )
        if sender.codec is not None and sender.codec.remembers:
            raise ValueError(
                f"`codec` (={sender.codec!r}) keeps an error per position, but Sparta sends other positions each time."
                " Use a codec without error feedback."
            )
        if self.beside is None and sender.policies.nonfinite == "skip":
            raise ValueError(
                "`nonfinite` (='skip') can't put a worker right whose weights Sparta exchanges a fraction of: the rest"
                " would stay NaN or infinite. Use `nonfinite='raise'`, or Sparta beside an algorithm with whole rounds,"
                " as in Sparta(beside=Diloco())."
            )
        if self.beside is not None:
            self.beside.ctx = self.ctx
            self.beside.setup()

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if (step - ctx.origin) % self.every == 0:
            index = {n: i for n, i in self.positions().items() if len(i)}
            if index:
                ctx.send(list(index), partial(self._selected, index), tag="sparta", what="elements")
            for transfer in ctx.arrived("sparta"):
                ctx.merge(transfer.workers, transfer.names, transfer.mean, index=index)
        if self.beside is not None:
            self.beside.after_inner_step(step)

    @override
    def flush(self, step: int) -> None:
        """The mean of the replicas, which others see, doesn't depend on another exchange."""
        if self.beside is not None:
            self.beside.flush(step)

    def positions(self) -> dict[str, Tensor]:
        """Parameter name → positions in the flattened parameter that are exchanged in this step, int64, ascending."""
        generator, theta = self.ctx.random("sparta"), self.ctx.outer.tensors
        return {
            n: (torch.rand(theta[n].numel(), generator=generator) < self.p).nonzero().view(-1).to(theta[n].device)
            for n in self.ctx.names
        }

    def _selected(self, index: Mapping[str, Tensor], worker: int) -> dict[str, Tensor]:
        weights = self.ctx.weights(worker)
        return {n: weights[n].reshape(-1)[i] for n, i in index.items()}
