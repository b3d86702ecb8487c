"""Algorithms around others: they change what another algorithm sends, or what it makes of what arrives.

Owns the handing on of every call, and the way from an order to its change. Changes nothing itself. Imports nothing of
Lightning.
"""

from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.order import Order
from lightning_diloco.algorithms.transfer import Transfer


class Around(SyncAlgorithm):
    """Does as another algorithm does; a subclass changes its orders (:meth:`revise`) or transfers (:meth:`amend`).

    Args:
        algorithm: must measure Δ_i from θ, and let all workers take every step.

    Raises:
        ValueError: it doesn't.
    """

    def __init__(self, algorithm: SyncAlgorithm) -> None:
        name = type(self).__name__
        if not isinstance(algorithm, SyncAlgorithm):
            raise ValueError(f"{name}: `algorithm` (={algorithm!r}) must be an algorithm. Give an object: Diloco().")
        if algorithm.anchors != "shared" or algorithm.chooses_workers:
            raise ValueError(
                f"{name}: `algorithm` (={type(algorithm).__name__}) must measure Δ_i from θ, and let all workers take"
                " every step, as Diloco and StreamingDiloco do."
            )
        self.algorithm = algorithm
        vars(self).update(
            outer_defaults=algorithm.outer_defaults,
            published=algorithm.published,
            codec=algorithm.codec,
            sends=algorithm.sends,
            gradients_are_final=algorithm.gradients_are_final,
        )

    @property
    @override
    def looks_at_gradients(self) -> bool:
        return self.algorithm.looks_at_gradients

    @override
    def setup(self) -> None:
        self.algorithm.ctx = self.ctx
        self.algorithm.setup()
        self.ctx.changes.append((self.revise, self.amend))

    @override
    def needs_gradients(self, step: int) -> bool:
        return self.algorithm.needs_gradients(step)

    @override
    def before_inner_step(self, step: int) -> None:
        self.algorithm.before_inner_step(step)

    @override
    def after_inner_step(self, step: int) -> None:
        self.algorithm.after_inner_step(step)

    @override
    def flush(self, step: int) -> None:
        self.algorithm.flush(step)

    def revise(self, order: Order) -> Order:
        """What is sent instead. Called on all processes alike; default: the order itself."""
        return order

    def amend(self, order: Order, transfer: Transfer) -> None:
        """May write to the means of a transfer that has just been sent; default: doesn't."""
