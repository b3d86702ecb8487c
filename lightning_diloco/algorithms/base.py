"""The interface of an algorithm, and the list of an outer step.

An algorithm decides when workers communicate, which tensors they exchange, and how each worker uses the result, by
means of a :class:`~lightning_diloco.algorithms.context.SyncContext`. Owns no state and no arithmetic.

An outer step of :class:`~lightning_diloco.Diloco`, in order:

=============================================  ==========================================================
after local step t, if the round is over       ``engine/engine.py`` calls ``algorithm.after_inner_step(t)``
measure every Δ_i, leave out non-finite ones   ``ctx.begin_round``               ``algorithms/context.py``
Δ = mean of the Δ_i                            ``ctx.channel.mean``              ``comm/channel.py``
bytes into the ledger, statistics              (on the way)                      ``algorithms/report.py``
θ ← OuterOpt(θ, Δ)                             ``ctx.outer.step``                ``state/outer.py``
θ_i ← θ for every worker                       ``ctx.restart``                   ``algorithms/context.py``
frozen parameters, buffers, inner state        ``ctx.end_round``                 ``state/policies.py``
θ into the live module                         the engine                        ``state/live_module.py``
the report to callbacks and loggers            the fit                           ``callback.py``
=============================================  ==========================================================

Symbols, here and in every algorithm:

=========  =============================================================================
N          number of workers (``num_nodes``)
H          local steps per round (``diloco_interval``)
θ          outer model: the shared weights between rounds (``ctx.outer``)
θ_i        replica of worker i (``ctx.replicas``)
Δ_i        pseudo-gradient of worker i, θ − θ_i: old minus new, so that minimisers descend
Δ          mean of the Δ_i (never their sum)
=========  =============================================================================
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.algorithms.report import OuterStepReport
from lightning_diloco.state.outer import is_plain_average


class SyncAlgorithm(ABC):
    """Decides when workers communicate, which tensors they exchange, and how each worker uses the result.

    A subclass implements :meth:`after_inner_step`; :class:`~lightning_diloco.Diloco` shows the usual shape. An object
    serves a single fit at a time and starts afresh at each :meth:`setup`.
    """

    needs_gradients: ClassVar[bool] = False
    """True: the backward passes of all workers come first, then :meth:`before_inner_step`, then all inner steps."""

    outer_defaults: ClassVar[Mapping[str, Any] | None] = None
    """Published arguments for ``torch.optim.SGD`` as outer optimizer; None: the algorithm has no outer optimizer."""

    ctx: SyncContext

    def __getstate__(self) -> dict[str, Any]:
        """Copies are made without the run."""
        return {name: value for name, value in vars(self).items() if name != "ctx"}

    def setup(self, ctx: SyncContext) -> None:
        """Called before the first step of a fit."""
        self.ctx = ctx

    def active(self, step: int) -> Collection[int]:
        """The workers that take a local step at ``step`` (from 1). Default: all."""
        return self.ctx.workers

    def before_inner_step(self, step: int) -> None:  # noqa: B027 (most algorithms leave gradients alone)
        """With ``needs_gradients``: may change the workers' gradients (``ctx.gradients``) before any worker steps."""

    @abstractmethod
    def after_inner_step(self, step: int) -> Sequence[OuterStepReport]:
        """Called after every local step; ``step`` is the number of completed local steps, from 1."""

    def flush(self, step: int) -> Sequence[OuterStepReport]:
        """A last synchronisation on a partial round, when training ends normally. Default: none."""
        return []

    def publish(self) -> Mapping[str, Tensor]:
        """Parameter name → tensor of the outer model that others see. Default: θ."""
        return self.ctx.outer.tensors

    def state_dict(self) -> dict[str, Any]:
        """State of the algorithm for checkpoints; per-worker tensors live in ``ctx.replicas.slot(i, name)``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps no state, but was given {sorted(state)}. Resume with the algorithm that"
                " wrote the checkpoint."
            )


def is_plain_run(num_workers: int, algorithm: SyncAlgorithm, outer_optimizer: Optimizer) -> bool:
    """Whether the run is the plain run: a single worker, whose replica the outer step assigns to θ.

    Nothing is attached, swapped, logged or added to checkpoints then.
    """
    return num_workers == 1 and algorithm.outer_defaults is not None and is_plain_average(outer_optimizer)
