"""Algorithms written against the interface that the package offers."""

from collections.abc import Sequence

from lightning_diloco import SyncAlgorithm


class PeriodicAveraging(SyncAlgorithm):
    """Local SGD by hand: every H steps all workers take the mean of their weights."""

    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if ctx.due(step):
            ctx.send(ctx.names, ctx.weights, what="weights")
        for transfer in ctx.arrived():
            ctx.outer.assign(transfer.mean)
            ctx.merge(transfer.workers, transfer.names, transfer.mean)


class Gossip(SyncAlgorithm):
    """Workers 0 and 1 move towards the middle between them; nobody moves θ. Uses groups, slots, alpha, a tag."""

    published = "average"
    anchors = "own"

    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if ctx.due(step):
            ctx.send(ctx.names, ctx.weights, groups=[[0, 1]], what="weights", tag="gossip")
        for transfer in ctx.arrived("gossip"):
            for worker in [w for w in transfer.workers if w in ctx.local_workers]:
                for name, value in transfer.mean_of(worker).items():
                    ctx.slot(worker, "middle")[name].copy_(value)
                ctx.merge([worker], transfer.names, transfer.mean_of(worker), alpha=0.25)


class OneAtATime(SyncAlgorithm):
    """Only worker (step mod N) steps; all take the mean of their weights when a round ends."""

    def active(self, step: int) -> Sequence[int]:
        return [step % self.ctx.num_workers]

    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if ctx.due(step):
            ctx.send(ctx.names, ctx.weights, what="weights")
        for transfer in ctx.arrived():
            ctx.outer.assign(transfer.mean)
            ctx.merge(transfer.workers, transfer.names, transfer.mean)
