"""The interface of an algorithm, and the list of an outer step.

An algorithm decides when workers communicate, what they send, and what each does with what arrives, by means of a
:class:`~lightning_diloco.algorithms.context.SyncContext`. Owns no state and no arithmetic.

An outer step of :class:`~lightning_diloco.Diloco`, in order:

=============================================  ==========================================================
after local step t                             ``engine/synchronisation.py`` calls ``after_inner_step(t)``
is the round over?                             ``ctx.due``                       ``algorithms/context.py``
who takes part, is all finite                  ``ctx.send``                      ``algorithms/sending.py``
C(Δ_i), packed tensor by tensor                ``codec.encode``                  ``codecs/``
Δ = mean of the Δ_i, statistics on the way     ``channel.mean``                  ``comm/channel.py``
bytes into the ledger                          ``channel.record``                ``comm/ledger.py``
the transfer waits until it is due             ``ctx.arrived``                   ``algorithms/context.py``
θ ← OuterOpt(θ, Δ)                             ``ctx.outer.step``                ``state/outer.py``
θ_i ← θ for every worker of the transfer       ``ctx.merge``                     ``algorithms/context.py``
frozen parameters, buffers, inner state        after the algorithm               ``state/policies.py``
θ into the live module                         after the algorithm               ``state/live_module.py``
the report to callbacks and loggers            the fit                           ``callback.py``
=============================================  ==========================================================

Symbols, here and in every algorithm:

=========  =============================================================================
N          number of workers (``num_nodes``)
H          local steps per round (``diloco_interval``)
θ          outer model: the shared weights between rounds (``ctx.outer``)
θ_i        replica of worker i (``ctx.weights(i)``)
Δ_i        pseudo-gradient of worker i, anchor − θ_i: old minus new, so that minimisers descend
Δ          mean of the Δ_i (never their sum)
C          the codec: what arrives of a tensor that was sent
=========  =============================================================================
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.codecs import Codec


class SyncAlgorithm(ABC):
    """Decides when workers communicate, what they send, and what each does with what arrives.

    A subclass implements :meth:`after_inner_step`; :class:`~lightning_diloco.Diloco` shows the usual shape. An object
    serves a single fit at a time and starts afresh at each :meth:`setup`. It keeps its arguments under their names, and
    everything that changes in ``ctx.slot`` and ``ctx.memo``: then files contain it.
    """

    outer_defaults: ClassVar[Mapping[str, Any] | None] = None
    """Published arguments for ``torch.optim.SGD`` as outer optimizer.

    None: the algorithm has no outer optimizer, and ``ctx.outer.step`` assigns the mean.
    """

    codec: Codec | None = None
    """What crosses the wire in the paper; ``DilocoStrategy(codec=)`` replaces it. None: the tensors as they are."""

    published: ClassVar[Literal["outer", "average"]] = "outer"
    """The model that others see: θ, or the mean of the replicas, for algorithms that never move θ. The mean is computed
    when a round ends, for validations, files and at the end of training."""

    anchors: ClassVar[Literal["shared", "own"]] = "shared"
    """From where Δ_i is measured: all from θ, or each worker from the values that it last took over (N more models)."""

    sends: ClassVar[str] = "delta"
    """The kind of what it sends in the first place, by which algorithms around it know whether they change anything."""

    gradients_are_final: ClassVar[bool] = False
    """Whether ``before_inner_step`` makes something of gradients that the Trainer must not clip, like signs."""

    ctx: SyncContext

    def __getstate__(self) -> dict[str, Any]:
        """Copies are made without the run."""
        return {name: value for name, value in vars(self).items() if name != "ctx"}

    def __repr__(self) -> str:
        """The call that makes it, as far as the constructor keeps its arguments under their names."""
        names = [n for n in inspect.signature(type(self)).parameters if hasattr(self, n)]
        return f"{type(self).__name__}({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"

    def setup(self) -> None:  # noqa: B027 (most algorithms have nothing to prepare)
        """Called before the first step of a fit; ``self.ctx`` is there. A place for checks against the model."""

    def active(self, step: int) -> Sequence[int]:
        """The workers that take local step ``step`` (from 1): a pure function of the step. Default: all."""
        return self.ctx.workers

    def needs_gradients(self, step: int) -> bool:
        """Whether all backward passes come first, then :meth:`before_inner_step`, then all inner steps.

        A pure function of the step. Default: no.
        """
        return False

    @property
    def chooses_workers(self) -> bool:
        """Whether :meth:`active` may ever leave a worker out. Default: if a class has implemented it.

        Every worker then has a pace of its own: it reads its shard batch by batch, and follows learning-rate schedules
        on its own steps.
        """
        return type(self).active is not SyncAlgorithm.active

    @property
    def looks_at_gradients(self) -> bool:
        """Whether :meth:`needs_gradients` may ever say yes. Default: if a class has implemented it."""
        return type(self).needs_gradients is not SyncAlgorithm.needs_gradients

    def before_inner_step(self, step: int) -> None:  # noqa: B027 (most algorithms leave gradients alone)
        """With ``needs_gradients``: may change the workers' gradients (``ctx.gradients``) before any worker steps."""

    @abstractmethod
    def after_inner_step(self, step: int) -> None:
        """Called after every local step; ``step`` is the number of completed local steps, from 1."""

    def flush(self, step: int) -> None:
        """Called when training ends normally, unless ``final_sync`` is off.

        Default: takes in what is under way; then, if workers have stepped since they last sent, lets every round end
        and takes in what that sends. Each is a further call of :meth:`after_inner_step` with the last step. Nothing is
        sent twice: a transfer for which no worker has stepped since its like was sent is not made.
        """
        if self.ctx.waiting:
            self.ctx.land()
            self.after_inner_step(step)
        if self.ctx.outstanding:
            self.ctx.end_rounds()
            self.after_inner_step(step)
        if self.ctx.waiting:  # of an algorithm that asks for arrivals before it sends
            self.ctx.land()
            self.after_inner_step(step)
