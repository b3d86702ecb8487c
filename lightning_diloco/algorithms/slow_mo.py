"""SlowMo: slow momentum over local steps (Wang et al., arXiv 1910.00643, Algorithm 1).

Every H completed local steps, with the inner learning rate γ of the step that ends the round::

    Δ   = (1/N) Σ_i (θ − θ_i)
    u   ← β·u + Δ/γ
    θ   ← θ − α·γ·u
    θ_i ← θ

Momentum is in units of gradients, so that a schedule of γ rescales what is remembered: that is the difference to DiLoCo
with a heavy ball, which it is at a constant γ. The paper: α = 1, β from 0.4 to 0.8. Where γ = 0, Δ/γ has no value: then
θ ← θ − α·Δ and u ← β·u, the limit of the step for γ → 0.

Owned here: ``memo("slow momentum")``, u; ``slot(i, "inner lr")``, γ of the worker's latest step.
"""

from statistics import mean

import torch
from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm


class SlowMo(SyncAlgorithm):
    """Periodic averaging with a momentum that follows the inner learning rate.

    γ is the mean over the workers of the learning rate of their first inner optimizer's first group. What the paper
    does with the inner optimizer's buffers is the strategy's ``inner_state`` ("reset", "keep" or "average").

    Args:
        beta: β in [0, 1), the slow momentum.
        alpha: α > 0, the slow learning rate.

    Raises:
        ValueError: an argument is out of its range.

    When: the inner learning rate has a schedule with large changes.
    Cost: the model's bytes per worker and direction every H steps; u in memory, once.
    Proof: ``test_variants.py``, ``test_slow_mo.py``; at a constant γ it is DiLoCo with outer SGD(lr=α, momentum=β).
    """

    def __init__(self, beta: float, alpha: float = 1.0) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < 1:
            raise ValueError(f"SlowMo: `beta` (={beta!r}) must be a number from 0 to below 1. The paper: 0.4 to 0.8.")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
            raise ValueError(f"SlowMo: `alpha` (={alpha!r}) must be a number > 0. The paper: 1.")
        self.beta, self.alpha = beta, alpha

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        rate = {w: ctx.slot(w, "inner lr", like={}) for w in ctx.local_workers}
        if not ctx.flushing:  # when training ends, schedules have moved on
            for w, slot in rate.items():
                slot["lr"] = torch.tensor(ctx.inner_lr(w), dtype=torch.float64)
        if ctx.due(step):
            ctx.send(ctx.names, ctx.delta)
        for transfer in ctx.arrived():
            rates = ctx.numbers("the learning rates", {w: slot["lr"].item() for w, slot in rate.items()})
            gamma, momentum, values = mean(rates.values()), ctx.memo("slow momentum"), {}
            for n in transfer.names:
                theta, delta = ctx.outer.tensors[n], transfer.mean[n]
                u = momentum.setdefault(n, torch.zeros_like(theta)).mul_(self.beta)
                if gamma:
                    u.add_(delta, alpha=1 / gamma)
                values[n] = theta - self.alpha * (gamma * u if gamma else delta)
            ctx.outer.assign(values)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)
