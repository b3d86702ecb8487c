"""DiLoCo: distributed low-communication training (Douillard et al., arXiv 2311.08105, Algorithm 1).

Every H completed local steps::

    Δ_i = θ − θ_i             for every worker i
    Δ   = (1/N) Σ_i C(Δ_i)    mean, never sum
    θ   ← OuterOpt(θ, Δ)      θ.grad = Δ, minimised; default Nesterov SGD: b ← μb + Δ;  θ ← θ − η(Δ + μb)
    θ_i ← θ                   inner optimizer states stay as they are

With a plain average as outer step (SGD, lr 1, no momentum) this is FedAvg / local SGD, and θ becomes the mean itself,
bit for bit. The paper's defaults: η = 0.7, μ = 0.9, H = 500, inner AdamW, no codec.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch.optim import Optimizer
from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.participation import Participation
from lightning_diloco.cluster.availability import Availability
from lightning_diloco.codecs import Codec
from lightning_diloco.state.outer import is_plain_average


class Diloco(SyncAlgorithm):
    """Synchronous DiLoCo with any outer optimizer, any codec, and any participation.

    N, H and the outer optimizer belong to :class:`~lightning_diloco.DilocoStrategy`; the algorithm itself has no
    options. A worker that takes no part in a round keeps its θ_i and goes on; its next Δ_i is measured from the θ of
    that time.

    When: a fixed link, workers of equal speed.
    Cost: the model's bytes per worker and direction every H steps; θ and the outer state in memory, once.
    Proof: ``test_reference.py``, ``test_family.py``, ``test_whole_numbers.py``.
    """

    outer_defaults: ClassVar[Mapping[str, Any] | None] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if ctx.due(step):
            ctx.send(ctx.names, ctx.delta)
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)


def is_plain_run(
    num_workers: int,
    algorithm: SyncAlgorithm,
    outer_optimizer: Optimizer,
    codec: Codec | None,
    participation: Participation | None,
    availability: Availability | None = None,
) -> bool:
    """Whether the run is the plain run: a single worker, whose replica the outer step assigns to θ.

    Nothing is attached, swapped, logged or added to checkpoints then.
    """
    plain = type(algorithm) is Diloco and is_plain_average(outer_optimizer)
    return num_workers == 1 and plain and codec is None and participation is None and availability is None
