"""Algorithms written against the interface that the package offers."""

from collections.abc import Sequence

from lightning_diloco import OuterStepReport, SyncAlgorithm


class PeriodicAveraging(SyncAlgorithm):
    """Local SGD: every H steps all workers take the mean of their weights."""

    def after_inner_step(self, step: int) -> Sequence[OuterStepReport]:
        ctx = self.ctx
        if not ctx.due(step):
            return []
        workers = ctx.begin_round()
        ctx.outer.assign(ctx.channel.mean(ctx.names, ctx.replicas.tensors, workers, what="weights"))
        ctx.restart(workers, ctx.names, ctx.outer.tensors)
        return [ctx.end_round()]


class DataParallel(SyncAlgorithm):
    """Gradients are averaged before every step."""

    needs_gradients = True

    def before_inner_step(self, step: int) -> None:
        ctx = self.ctx
        gradients = {w: ctx.gradients(w) for w in ctx.local_workers}
        mean = ctx.channel.mean(ctx.names, gradients.__getitem__, what="gradients")
        for own in gradients.values():
            for name, gradient in own.items():
                gradient.copy_(mean[name])

    def after_inner_step(self, step: int) -> Sequence[OuterStepReport]:
        return []


class Gossip(SyncAlgorithm):
    """Workers 0 and 1 take the middle between them; uses exchange, slots, alpha, and counts in its own word."""

    def after_inner_step(self, step: int) -> Sequence[OuterStepReport]:
        ctx = self.ctx
        if not ctx.due(step):
            return []
        ctx.begin_round()
        received = ctx.channel.exchange([(0, 1)], ctx.names, ctx.replicas.tensors, what="gossip")
        for worker, values in received.items():
            for name, value in values.items():
                ctx.replicas.slot(worker, "partner")[name].copy_(value)
            ctx.restart([worker], ctx.names, values, alpha=0.5)
        return [ctx.end_round("gossip")]
