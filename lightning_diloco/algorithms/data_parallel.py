"""Data parallelism: the baseline that every step communicates.

Every local step::

    g   = (1/N) Σ_i C(∇_i)    before the inner step, so that clipping sees the mean, as under DDP
    θ_i ← InnerOpt_i(θ_i, g)  the same on all workers
    θ   ← θ_i
"""

from typing import ClassVar

from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm


class DataParallel(SyncAlgorithm):
    """Workers average their gradients before every step: same shards, same ledger, same reports as DiLoCo.

    N workers with batches of B samples take the steps of a single worker on the N·B samples together (up to what a
    model computes across a batch, like BatchNorm). A parameter that got no gradient on some workers counts as zero
    there; one that got none on any stays without. A worker that ``participation`` leaves out of a step adds nothing to
    the mean, and takes it as the others do; gradients are zero if all are left out. ``diloco_interval`` sets only how
    often buffers are synchronised. It needs automatic optimization, and no gradient scaler.

    When: as the baseline with the most communication.
    Cost: the model's bytes per worker and direction at every step; a worker's gradients stay in memory until all have
    theirs.
    Proof: ``test_family.py`` (joined batches, clipping).
    """

    sends: ClassVar[str] = "gradients"

    @override
    def setup(self) -> None:
        if self.ctx.sender.policies.inner_state != "keep":
            raise ValueError(
                f"`inner_state` (={self.ctx.sender.policies.inner_state!r}) has no effect with DataParallel, whose"
                " workers never take weights over. Use `inner_state='keep'`."
            )

    @override
    def needs_gradients(self, step: int) -> bool:
        return True

    @override
    def before_inner_step(self, step: int) -> None:
        average_gradients(self)

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        ctx.outer.assign(ctx.common_weights())


def average_gradients(algorithm: SyncAlgorithm) -> None:
    """Every worker is about to step with the mean of the gradients of those that take part."""
    ctx = algorithm.ctx
    names = ctx.names_with_gradients()
    sent = ctx.send(names, ctx.gradients, what="gradients", tag="gradients")
    for worker in ctx.local_workers:
        for name, gradient in ctx.gradients(worker).items():
            if sent.means:
                gradient.copy_(sent.mean[name])
            else:
                gradient.zero_()
    ctx.arrived("gradients")
