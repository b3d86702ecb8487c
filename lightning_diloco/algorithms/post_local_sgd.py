"""Post-local SGD: data parallelism first, local steps later (Lin et al., arXiv 1808.07217).

::

    t ≤ switch:   g = (1/N) Σ_i C(∇_i);  θ_i ← InnerOpt_i(θ_i, g);  θ ← θ_i             every local step
    t > switch:   θ ← (1/N) Σ_i θ_i;     θ_i ← θ                                        every H local steps
"""

from typing_extensions import override

from lightning_diloco.algorithms.data_parallel import average_gradients
from lightning_diloco.algorithms.periodic_averaging import PeriodicAveraging


class PostLocalSGD(PeriodicAveraging):
    """Data parallelism for ``switch`` local steps, periodic averaging from then on.

    Args:
        switch: local steps of data parallelism, ≥ 0; rounds of H local steps are counted from there. The paper switches
            when the learning rate first decays, half-way through training.

    Raises:
        ValueError: ``switch`` is no integer ≥ 0.

    When: local steps hurt most at the start, where workers part quickly.
    Cost: that of data parallelism, then of periodic averaging.
    Proof: ``test_family.py``.
    """

    def __init__(self, switch: int) -> None:
        if isinstance(switch, bool) or not isinstance(switch, int) or switch < 0:
            raise ValueError(f"PostLocalSGD: `switch` (={switch!r}) must be an integer ≥ 0: steps of data parallelism.")
        self.switch = switch

    @override
    def needs_gradients(self, step: int) -> bool:
        return step <= self.switch

    @override
    def before_inner_step(self, step: int) -> None:
        average_gradients(self)

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if step <= self.switch:
            ctx.outer.assign(ctx.common_weights())
            return
        if ctx.due(step, offset=max(0, self.switch - ctx.origin)):
            ctx.send(ctx.names, ctx.delta)
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)
