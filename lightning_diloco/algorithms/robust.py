"""Robust means in any averaging algorithm, and workers that send nonsense to try them with.

Robust: the mean of Δ_i, weights or gradients is replaced by an :class:`~lightning_diloco.algorithms.Aggregate`, which
every worker computes from all messages. Corrupt: some workers send ``scale`` times what they should: the sign-flipping
attack of the literature for scale < 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from lightning_diloco.algorithms.aggregates import Aggregate
from lightning_diloco.algorithms.around import Around
from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.order import OF_WEIGHTS, Order

_KINDS = (*OF_WEIGHTS, "gradients")


class Robust(Around):
    """An algorithm whose means are robust: ``Robust(Diloco(), TrimmedMean(1))``.

    Codecs, participation and error feedback work as without: what is aggregated are decoded messages.

    Args:
        algorithm: what to do with the means; see :class:`~lightning_diloco.algorithms.Around`.
        aggregate: the rule: ``TrimmedMean``, ``GeometricMedian``, ``CentredClipping``, ``Krum``, or one of your own.

    Raises:
        ValueError: an argument is of the wrong kind, or the algorithm sends something else; when training starts: the
            rule needs more workers, or the strategy's ``weights`` are not "uniform"; when sending: too few take part.

    When: workers that fail silently, or that nobody vouches for.
    Cost: every worker needs all messages (an all-gather instead of a ring); n decoded models in memory while sending.
    Proof: ``test_robust.py``.
    """

    def __init__(self, algorithm: SyncAlgorithm, aggregate: Aggregate) -> None:
        super().__init__(algorithm)
        if not isinstance(aggregate, Aggregate):
            raise ValueError(
                f"Robust: `aggregate` (={aggregate!r}) must be a rule. Give an object, for example TrimmedMean(1)."
            )
        _check_kind(self)
        self.aggregate = aggregate

    @override
    def setup(self) -> None:
        super().setup()
        if self.ctx.num_workers < self.aggregate.least():
            raise ValueError(
                f"Robust: {self.aggregate!r} needs at least {self.aggregate.least()} workers, but `num_nodes` is"
                f" {self.ctx.num_workers}. Use more workers, or a rule for fewer attackers."
            )

    @override
    def revise(self, order: Order) -> Order:
        return replace(order, aggregate=self.aggregate, assigns=False) if order.what in _KINDS else order


class Corrupt(Around):
    """An algorithm some of whose workers send ``scale`` times what they should, to test others with.

    Inside other wrappers, as in ``Robust(Corrupt(Diloco(), [0]), Krum(1))``, it acts before them.

    Args:
        algorithm: what all workers believe to take part in; see :class:`~lightning_diloco.algorithms.Around`.
        workers: who does it.
        scale: factor of Δ_i and of gradients; of weights, the factor of their distance from θ.

    Raises:
        ValueError: an argument is of the wrong kind, or the algorithm sends nothing that could be scaled; when training
            starts: there is no such worker.

    When: in experiments on robustness.
    Cost: none.
    Proof: ``test_robust.py``.
    """

    def __init__(self, algorithm: SyncAlgorithm, workers: Sequence[int], scale: float = -10.0) -> None:
        super().__init__(algorithm)
        fine = isinstance(workers, Sequence) and not isinstance(workers, str)
        if not fine or not all(isinstance(w, int) and not isinstance(w, bool) and w >= 0 for w in workers):
            raise ValueError(f"Corrupt: `workers` (={workers!r}) must be a list of workers, from 0, like [0, 3].")
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise ValueError(f"Corrupt: `scale` (={scale!r}) must be a number, such as -10.0.")
        _check_kind(self)
        self.workers, self.scale = list(workers), float(scale)

    @override
    def setup(self) -> None:
        super().setup()
        if max(self.workers, default=0) >= self.ctx.num_workers:
            raise ValueError(
                f"Corrupt: `workers` (={self.workers}) has a worker that doesn't exist: `num_nodes` is"
                f" {self.ctx.num_workers}, ids start at 0."
            )

    @override
    def revise(self, order: Order) -> Order:
        if order.what not in _KINDS:
            return order
        theta = self.ctx.outer.tensors if order.what == "weights" else None

        def read(worker: int) -> Mapping[str, Tensor]:
            tensors = order.read(worker)
            return _Scaled(tensors, theta, self.scale) if worker in self.workers else tensors

        return replace(order, read=read, assigns=False)


def _check_kind(around: Around) -> None:
    if around.sends not in _KINDS:
        name, inside = type(around).__name__, type(around.algorithm).__name__
        raise ValueError(
            f"{name} acts on Δ, weights and gradients, but `algorithm` (={inside}) sends {around.sends}, which it would"
            f" leave as they are. Put it around one that sends these; Sparta can be beside it, as in"
            f" Sparta(beside={name}(Diloco(), …))."
        )


class _Scaled(Mapping[str, Tensor]):
    """Tensors times a number, or their distances from an origin, each computed when read."""

    def __init__(self, tensors: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None, scale: float) -> None:
        self._tensors, self._origin, self._scale = tensors, origin, scale

    def __getitem__(self, name: str) -> Tensor:
        if self._origin is None:
            return self._tensors[name] * self._scale
        return self._origin[name] + (self._tensors[name] - self._origin[name]) * self._scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
