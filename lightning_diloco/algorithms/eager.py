"""Overlapped DiLoCo: delayed and eager updates (Kale et al., arXiv 2502.12996).

Communication takes a whole round, during which the workers train on: Δ^r, the mean of round r, arrives when round r + 1
ends. At the end of round r, every worker sends Δ_i^r, and then::

    delayed:    θ   ← OuterOpt(θ, Δ^{r−1});                                  θ_i ← θ
    eager:      Δ̃_i = Δ^{r−1} + (1/N)(Δ_i^r − Δ_i^{r−1})        own part fresh, the others' stale
                φ_i ← OuterOpt_i(φ_i, Δ̃_i);                                  θ_i ← φ_i

Under eager updates each worker has an outer value φ_i, from which Δ_i is measured, and a state of the outer optimizer.
What is missing counts as 0: Δ^0 = Δ_i^0 = 0. A flush sends the last, partial round and takes in all that is under way.

Owned here: ``slot(i, "rest")``, what has arrived less what the worker had taken from it before: Δ^{r−1} − Δ_i^{r−1}/N.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.transfer import Transfer


class _Overlapped(SyncAlgorithm):
    """Sends Δ_i at the end of a round, and takes in what was sent a round ago."""

    outer_defaults: ClassVar[Mapping[str, Any] | None] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if ctx.due(step):
            sent = ctx.send(ctx.names, ctx.delta, delay=ctx.interval)
            self._take_in(sent, ctx.arrived())
            ctx.renew(sent)

    @override
    def flush(self, step: int) -> None:
        """Sends what is left before anything lands, since workers take new weights when it does."""
        ctx = self.ctx
        if ctx.outstanding:
            ctx.end_rounds()
            sent = ctx.send(ctx.names, ctx.delta)
            ctx.land()
            self._take_in(sent, ctx.arrived())

    @abstractmethod
    def _take_in(self, sent: Transfer, arrived: Sequence[Transfer]) -> None:
        """``sent`` is new; at the end of training it is among the ``arrived``, if it was sent at all."""


class Delayed(_Overlapped):
    """DiLoCo whose outer step applies the mean Δ of the round before.

    All workers take θ when a round ends, also at the end of the first, when nothing has arrived yet. A worker that
    takes no part in a transfer keeps its θ_i and goes on. The flush applies the last two Δ one after the other.

    When: communication has to hide behind a whole round; as the baseline of :class:`Eager`, which loses less.
    Cost: DiLoCo's bytes; a transfer under way in memory.
    Proof: ``test_variants.py``, ``test_eager.py``.
    """

    @override
    def _take_in(self, sent: Transfer, arrived: Sequence[Transfer]) -> None:
        ctx = self.ctx
        for transfer in arrived:
            ctx.outer.step(transfer.names, transfer.mean)
        workers = sent.workers or sent.rolled_back or [w for transfer in arrived for w in transfer.workers]
        if sent.means or sent.rolled_back or self.ctx.flushing:
            ctx.merge(workers, ctx.names, ctx.outer.tensors)


class Eager(_Overlapped):
    """DiLoCo that applies a worker's own Δ_i at once, and those of the others a round later.

    Others see the mean of the workers. A worker that takes no part in a transfer keeps its θ_i and goes on; what
    arrives meanwhile it applies when it takes part again. A single worker trains exactly as under
    :class:`~lightning_diloco.Diloco`.

    When: communication has to hide behind a whole round.
    Cost: DiLoCo's bytes; per worker three more models with the default outer optimizer: φ_i, momentum, rest.
    Proof: ``test_variants.py``, ``test_eager.py``; N = 1 is Diloco; with outer SGD all workers agree after the flush.
    """

    published: ClassVar[Literal["outer", "average"]] = "average"
    anchors: ClassVar[Literal["shared", "own"]] = "own"

    @override
    def _take_in(self, sent: Transfer, arrived: Sequence[Transfer]) -> None:
        ctx = self.ctx
        complete = sent in arrived or not sent.means  # nothing of the workers' own is under way any more
        if ctx.flushing and not sent.means and ctx.num_workers == 1:
            return  # nobody else's Δ is missing
        takers = sent.workers if sent.means else ctx.workers if ctx.flushing else []
        for w in ctx.local_workers:
            rest, delta = ctx.slot(w, "rest"), ctx.delta(w)
            for transfer in arrived:
                for name in transfer.names:
                    rest[name].add_(transfer.mean[name])
            if w not in takers:
                continue
            share = 0.0 if complete else ctx.share(sent, w)
            update = {}
            for name in ctx.names:
                own = delta[name].mul_(share) if share else 0.0  # of a worker that isn't finite: nothing
                update[name] = rest[name] + own
                rest[name].zero_().sub_(own)
            ctx.merge([w], ctx.names, ctx.outer_step(w, ctx.names, update))
