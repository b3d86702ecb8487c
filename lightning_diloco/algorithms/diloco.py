"""DiLoCo: distributed low-communication training (Douillard et al., arXiv 2311.08105, Algorithm 1).

Every H completed local steps::

    Δ_i = θ − θ_i             for every worker i
    Δ   = (1/N) Σ_i Δ_i       mean, never sum
    θ   ← OuterOpt(θ, Δ)      θ.grad = Δ, minimised; default Nesterov SGD: b ← μb + Δ;  θ ← θ − η(Δ + μb)
    θ_i ← θ                   inner optimizer states stay as they are

With a plain average as outer step (SGD, lr 1, no momentum) this is FedAvg / local SGD, and θ becomes the mean itself,
bit for bit. The paper's defaults: η = 0.7, μ = 0.9, H = 500, inner AdamW.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.report import OuterStepReport


class Diloco(SyncAlgorithm):
    """Synchronous DiLoCo with any outer optimizer.

    N, H and the outer optimizer belong to :class:`~lightning_diloco.DilocoStrategy`; the algorithm itself has no
    options.
    """

    outer_defaults: ClassVar[Mapping[str, Any] | None] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}

    @override
    def after_inner_step(self, step: int) -> Sequence[OuterStepReport]:
        return [self._synchronise("round")] if self.ctx.due(step) else []

    @override
    def flush(self, step: int) -> Sequence[OuterStepReport]:
        return [self._synchronise("flush")]

    def _synchronise(self, kind: str) -> OuterStepReport:
        ctx, outer, channel = self.ctx, self.ctx.outer, self.ctx.channel
        participants = ctx.begin_round()
        if outer.is_plain_average:
            outer.assign(channel.mean(outer.names, ctx.replicas.tensors, participants, what="weights"))
        else:
            outer.step(outer.names, channel.mean(outer.names, ctx.pseudo_gradient, participants))
        ctx.restart(ctx.workers, outer.names, outer.tensors)
        return ctx.end_round(kind)
