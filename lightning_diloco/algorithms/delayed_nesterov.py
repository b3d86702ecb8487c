"""Asynchronous DiLoCo with Delayed Nesterov and DyLU (Liu et al., arXiv 2401.09135, Algorithms 3 and 4).

Workers have different speeds, and nobody waits: whoever has taken its steps sends Δ_i, measured from the θ that it last
took over, to the server, and goes on from the θ of that moment. The t-th arrival, t = 0, 1, …, with g = Δ_i::

    B ← B + g
    (t + 1) mod n = 0:   m ← β·m + B/n;   θ ← θ − η·[(1 − c·n + c)·β·m + g/n];   B ← 0
    else:                                 θ ← θ − η·[c·β·m + g/n]
    θ_i, anchor_i ← θ

so that momentum, which n stale Δ_i in a row would drive too far, is applied once every n arrivals, and in parts of c in
between. DyLU: worker i takes ⌊v_i/v_max · H⌋ steps of its own, so that all arrive at about the same time; v is its
speed. Of what happens at the same time, all Δ_i arrive before anybody takes θ over. The paper: c = 0, β = 0.9.

m is the ``momentum_buffer`` of the outer SGD. Owned here: ``memo("buffer")``, B; ``memo("counts")``: t, and per worker
the steps since it took θ over and whether it was there in the last step.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm


class DelayedNesterov(SyncAlgorithm):
    """Workers that don't wait for each other; Nesterov momentum once every ``buffer_size`` arrivals.

    The strategy's ``cluster`` says how fast the workers are: ``Cluster(step_seconds=[0.1, 0.1, 0.2, 0.4], …)``. A local
    step of the run, as ``max_steps`` counts it, is one of the fastest worker (with jitter: shorter than that, see
    :mod:`lightning_diloco.cluster.pace`); the others take fewer. Each worker reads its shard batch by batch, also from
    epoch to epoch, and follows learning-rate schedules on its own steps. Time on the links delays nobody's step; the
    clock counts it, for a server.

    η and β are those of the strategy's outer SGD. Weights of the strategy (``weights="samples"``) multiply g, so that
    they are 1 on average. A worker that joins starts from θ, with a full budget of steps.

    Args:
        buffer_size: n ≥ 1; None: N. With 1 every arrival is a Nesterov step: asynchronous Nesterov, for which η/N moves
            θ as far in a round as η does here.
        activation: c in [0, 1/n], the part of the momentum that every arrival applies.
        dylu: whether slower workers take fewer steps before they send; else all take H.

    Raises:
        ValueError: an argument is out of its range; when training starts: there is no cluster, or the outer optimizer
            isn't SGD, with Nesterov momentum or none.

    When: workers of different speeds, and rounds that shouldn't wait for the slowest.
    Cost: DiLoCo's bytes, up and down a server; a model per worker, its anchor, and two at the server.
    Proof: ``test_asynchronous.py``; at equal speeds, with n = N and c = 0, it is DiLoCo.
    """

    outer_defaults: ClassVar[Mapping[str, Any] | None] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
    anchors: ClassVar[Literal["shared", "own"]] = "own"

    def __init__(self, buffer_size: int | None = None, activation: float = 0.0, dylu: bool = True) -> None:
        whole = isinstance(buffer_size, int) and not isinstance(buffer_size, bool)
        if buffer_size is not None and not (whole and buffer_size >= 1):
            raise ValueError(
                f"DelayedNesterov: `buffer_size` (={buffer_size!r}) must be an integer ≥ 1, the arrivals between two"
                " steps of the momentum, or None: as many as there are workers."
            )
        number = isinstance(activation, int | float) and not isinstance(activation, bool)
        if not (number and 0 <= activation <= 1):
            raise ValueError(f"DelayedNesterov: `activation` (={activation!r}) must be a number from 0 to 1/n.")
        if not isinstance(dylu, bool):
            raise ValueError(f"DelayedNesterov: `dylu` (={dylu!r}) must be True or False.")
        self.buffer_size, self.activation, self.dylu = buffer_size, activation, dylu

    @override
    def setup(self) -> None:
        ctx = self.ctx
        self._pace = ctx.machines.keep_pace(type(self).__name__)
        ctx.unsent = lambda: any(self._since())
        n = self.buffer_size or ctx.num_workers
        if self.activation * n > 1:
            raise ValueError(
                f"DelayedNesterov: `activation` (={self.activation}) must be at most 1/n, where n (={n}) is"
                " `buffer_size`, or `num_nodes` if that is None."
            )
        optimizer = ctx.outer.optimizer
        plain = type(optimizer) is torch.optim.SGD and not any(
            g["weight_decay"] or g["dampening"] or g["maximize"] or bool(g["momentum"]) != bool(g["nesterov"])
            for g in optimizer.param_groups
        )
        if not plain:
            raise ValueError(
                f"DelayedNesterov takes η and β from the outer optimizer, which must be torch.optim.SGD with a learning"
                f" rate, Nesterov momentum (or none), and nothing else; it is {optimizer!r}. Use"
                ' `outer_optimizer_kwargs={"lr": 0.7, "momentum": 0.9, "nesterov": True}`.'
            )

    @override
    def active(self, step: int) -> Sequence[int]:
        return [event.worker for event in self._pace.at(step)]

    @override
    def after_inner_step(self, step: int) -> None:
        since = self._since()
        for _, simultaneous in groupby(self._pace.at(step), lambda event: event.ticks):
            workers = [event.worker for event in simultaneous]
            for w in workers:
                since[w] += 1
            self._exchange([w for w in workers if since[w] >= self._budget(w)], since)
        self._remember(since)

    @override
    def flush(self, step: int) -> None:
        """Everybody who has stepped since it took θ over sends, and takes θ."""
        since = self._since()
        self._exchange([w for w in self.ctx.workers if since[w]], since)
        self._remember(since)

    # ---------------------------------------------------------------------------------------- the server

    def _exchange(self, workers: Sequence[int], since: list[int]) -> None:
        ctx = self.ctx
        if not workers:
            return
        ctx.send(ctx.names, ctx.delta, groups=[[w] for w in workers], fresh=True)
        for w in workers:
            since[w] = 0  # who is left out goes on, and sends the longer way after another budget
        for transfer in ctx.arrived():
            for w in transfer.senders:
                self._serve(transfer.mean_of(w), transfer.names, w)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)

    def _serve(self, delta: Mapping[str, Tensor], names: Sequence[str], worker: int) -> None:
        ctx, c = self.ctx, self.activation
        n, arrivals = self.buffer_size or ctx.num_workers, self._counts("arrivals", 1)
        buffer, values = ctx.memo("buffer"), {}
        arrivals += 1
        applies = int(arrivals) % n == 0
        groups = {id(p): group for group in ctx.outer.optimizer.param_groups for p in group["params"]}
        for name in names:
            theta, parameter = ctx.outer.tensors[name], ctx.outer.parameters[name]
            group, state = groups[id(parameter)], ctx.outer.optimizer.state[parameter]
            g, beta = delta[name] * ctx.emphasis(worker), group["momentum"]
            m = state.setdefault("momentum_buffer", torch.zeros_like(theta))
            b = buffer.setdefault(name, torch.zeros_like(theta)).add_(g)
            if applies:
                m.mul_(beta).add_(b, alpha=1 / n)
                b.zero_()
            part = 1 - c * n + c if applies else c
            values[name] = theta - group["lr"] * (part * beta * m + g / n)
        ctx.outer.assign(values)

    # ---------------------------------------------------------------------------------------- who has stepped how often

    def _budget(self, worker: int) -> int:
        return self._pace.budget(worker, self.ctx.interval) if self.dylu else self.ctx.interval

    def _counts(self, name: str, size: int) -> Tensor:
        return self.ctx.memo("counts").setdefault(name, torch.zeros(size, dtype=torch.int64))

    def _since(self) -> list[int]:
        """Per worker, its steps since it took θ over; of one that has just joined: none."""
        since, there = (self._counts(name, self.ctx.num_workers).tolist() for name in ("since", "there"))
        return [steps if present else 0 for steps, present in zip(since, there, strict=True)]

    def _remember(self, since: Sequence[int]) -> None:
        """Written after all that may raise: a step that an error tears is taken again."""
        there = [w in self.ctx.workers for w in range(self.ctx.num_workers)]
        for name, values in (("since", since), ("there", there)):
            self._counts(name, len(values)).copy_(torch.tensor(values))
