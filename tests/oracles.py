"""Oracles: the algorithms of the family as nested loops in plain PyTorch, to be run in float64.

Written from the papers' equations (ALGORITHMS.md) alone: N modules made by ``copy.deepcopy``, each with an inner
optimizer of its own. Nothing is imported from the package, and nothing is shared with ``reference.py`` either, which
has a shorter plain DiLoCo that :class:`Oracle` is checked against (``test_oracles.py``).

Words: θ is the outer model, θ_i worker i's, Δ_i = θ − θ_i. A step t is one inner step of every worker, from 1.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[Any], Optimizer]
Compress = Callable[[Tensor], Tensor]
States = tuple[dict[str, Tensor], list[dict[str, Tensor]]]
"""θ and all θ_i."""


@dataclass
class Sent:
    """The mean of what the participants sent of a fragment, on its way until step ``due``."""

    step: int
    due: int
    kind: str  # "round" or "flush"
    fragment: int
    participants: list[int]
    mean: dict[str, Tensor]
    arrived: int | None = None


def everybody(step: int, fragment: int) -> Sequence[int] | None:
    return None


class Oracle:
    """DiLoCo (2311.08105) and Streaming DiLoCo (2501.18512), with codec, error feedback and lost transfers::

        each step t:
          every worker:                      an inner step
          every fragment p that is due:      a_i   = Δ_{i,p} + β·e_{i,p}     for every participant i
                                             sent  = C(a_i);  e_{i,p} ← a_i − C(a_i)
                                             Δ_p   = mean over the participants of C(a_i)
          every Δ_p sent τ steps ago:        θ_p   ← OuterOpt_p(θ_p, Δ_p)
                                             θ_{i,p} ← α·θ_{i,p} + (1−α)·θ_p     for its participants

    Every fragment has an outer optimizer of its own. Who doesn't take part keeps θ_i and e_i; its next Δ_i refers to
    the θ of that time. Without participants nothing is sent.

    Args:
        model: where θ and every worker start; not changed.
        num_workers: N.
        loss: ``(model, batch) → loss``.
        inner: makes an inner optimizer from parameters.
        outer: makes the outer optimizer of a fragment from its parameters.
        interval: H.
        fragments: parameter names, fragment by fragment; None: a single fragment of all, plain DiLoCo.
        delay: τ.
        alpha: α.
        first_sync: "paper": fragment p is first sent at step H + p·⌊H/P⌋; "staggered": at ⌊(p+1)·H/P⌋. Then every H.
        codec: C, a tensor to the tensor that the receiver sees; None: sent as it is.
        decay: β; None: no error feedback.
        participants: ``(step, fragment) → workers``; None as an answer: all.
        weights: of each worker in every mean, divided by the sum over those that take part; None: equal ones.

    Attributes:
        history: ``history[t - 1]`` is (θ, [θ_0, …]) as state dicts after step t, before a flush.
        sent: everything that was sent, in that order.
        arrived: the same, in the order of arrival.
        errors: ``errors[i][name]`` is e_i.
        dense: the sum of all Δ_i that were measured, per worker and name.
    """

    def __init__(
        self,
        model: nn.Module,
        num_workers: int,
        loss: Loss,
        inner: MakeOptimizer,
        outer: MakeOptimizer,
        interval: int,
        *,
        fragments: Sequence[Sequence[str]] | None = None,
        delay: int = 0,
        alpha: float = 0.0,
        first_sync: str = "paper",
        codec: Compress | None = None,
        decay: float | None = None,
        participants: Callable[[int, int], Sequence[int] | None] = everybody,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.share = weights or [1.0] * num_workers
        self.theta = copy.deepcopy(model)
        self.workers = [copy.deepcopy(model) for _ in range(num_workers)]
        self.inner = [inner(w.parameters()) for w in self.workers]
        self.theta_of = trainable(self.theta)
        self.worker_of = [trainable(w) for w in self.workers]
        self.fragments = [list(names) for names in fragments or [list(self.theta_of)]]
        self.outer = [outer([self.theta_of[n] for n in names]) for names in self.fragments]
        self.loss, self.interval, self.delay, self.alpha = loss, interval, delay, alpha
        self.first_sync, self.codec, self.decay, self.participants = first_sync, codec, decay, participants

        zeros = {n: torch.zeros_like(p) for n, p in self.theta_of.items()}
        self.errors = [copy.deepcopy(zeros) for _ in self.workers]
        self.dense = [copy.deepcopy(zeros) for _ in self.workers]
        self.step = self.origin = 0
        self.last_sent = [0 for _ in self.fragments]
        self.in_flight: list[Sent] = []
        self.sent: list[Sent] = []
        self.arrived: list[Sent] = []
        self.history: list[States] = []

    def train(self, batches: Sequence[Sequence[Any]]) -> "Oracle":
        """A step for every batch; ``batches[i]`` are worker i's."""
        for step_batches in zip(*batches, strict=True):
            for worker, optimizer, batch in zip(self.workers, self.inner, step_batches, strict=True):
                optimizer.zero_grad()
                self.loss(worker, batch).backward()
                optimizer.step()
            self.step += 1
            for p in range(len(self.fragments)):
                if self.is_due(p):
                    self.send(p, self.delay, "round")
            for transfer in [s for s in self.in_flight if s.due == self.step]:
                self.arrive(transfer)
            self.history.append(states(self.theta, self.workers))
        return self

    def is_due(self, p: int) -> bool:
        interval, count, t = self.interval, len(self.fragments), self.step - self.origin
        first = interval + p * (interval // count) if self.first_sync == "paper" else (p + 1) * interval // count
        return t >= first and (t - first) % interval == 0

    @torch.no_grad()
    def send(self, p: int, delay: int, kind: str) -> None:
        self.last_sent[p] = self.step
        who = self.participants(self.step, p)
        who = list(range(len(self.workers))) if who is None else list(who)
        if not who:
            return
        mean = {}
        for name in self.fragments[p]:
            received = []
            for i in who:
                delta = self.theta_of[name] - self.worker_of[i][name]
                self.dense[i][name] += delta
                a = delta if self.decay is None else delta + self.decay * self.errors[i][name]
                c = a if self.codec is None else self.codec(a)
                if self.decay is not None:
                    self.errors[i][name] = a - c
                received.append(self.share[i] * c)
            mean[name] = torch.stack(received).sum(0) / sum(self.share[i] for i in who)
        transfer = Sent(self.step, self.step + delay, kind, p, who, mean)
        self.sent.append(transfer)
        self.in_flight.append(transfer)

    @torch.no_grad()
    def arrive(self, transfer: Sent) -> None:
        self.in_flight.remove(transfer)
        for name, delta in transfer.mean.items():
            self.theta_of[name].grad = delta
        self.outer[transfer.fragment].step()
        for i in transfer.participants:
            for name in transfer.mean:
                worker, theta = self.worker_of[i][name], self.theta_of[name]
                worker.copy_(self.alpha * worker + (1 - self.alpha) * theta)
        transfer.arrived = self.step
        self.arrived.append(transfer)

    def flush(self) -> "Oracle":
        """The normal end of training: what is on its way arrives; what has trained since it was sent is sent."""
        for transfer in list(self.in_flight):
            self.arrive(transfer)
        for p in [p for p in range(len(self.fragments)) if self.last_sent[p] < self.step and self.is_apart(p)]:
            self.send(p, 0, "flush")
        for transfer in list(self.in_flight):
            self.arrive(transfer)
        self.origin = self.step
        return self

    def is_apart(self, p: int) -> bool:
        """Whether a worker differs from θ in this fragment."""
        return any(not torch.equal(w[n], self.theta_of[n]) for w in self.worker_of for n in self.fragments[p])


class DataParallel:
    """Every worker's gradient at the same weights, through the codec; their mean, clipped, steps a single model.

    Args:
        model: where it starts; not changed.
        batches: one list of batches per worker.
        loss: ``(model, batch) → loss``.
        inner: makes the optimizer from parameters.
        codec: C, applied to every worker's gradient; None: sent as it is.
        clip: the largest norm of the mean gradient, with torch's 1e-6 in the division; None: any.
        weights: of each worker's gradient; None: equal ones.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[Any]],
        loss: Loss,
        inner: MakeOptimizer,
        codec: Compress | None = None,
        clip: float | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.theta = copy.deepcopy(model)
        self.workers = [self.theta for _ in batches]
        self.inner = inner(self.theta.parameters())
        self.history: list[States] = []
        parameters = list(trainable(self.theta).values())
        for step_batches in zip(*batches, strict=True):
            rows = [torch.autograd.grad(loss(self.theta, batch), parameters) for batch in step_batches]
            for p, *gradients in zip(parameters, *rows, strict=True):
                share = weights or [1.0] * len(gradients)
                sent = [g if codec is None else codec(g) for g in gradients]
                p.grad = torch.stack([w * g for w, g in zip(share, sent, strict=True)]).sum(0) / sum(share)
            if clip is not None:
                norm = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()
                for p in parameters:
                    p.grad = p.grad * min(1.0, clip / (float(norm) + 1e-6)) if p.grad is not None else None
            self.inner.step()
            self.history.append(states(self.theta, self.workers))


def joined(batches: Sequence[Sequence[Sequence[Tensor]]]) -> list[list[Tensor]]:
    """The batches of a single worker that sees all samples: N·B in each step."""
    return [
        [torch.cat(tensors) for tensors in zip(*step_batches, strict=True)]
        for step_batches in zip(*batches, strict=True)
    ]


class PostLocalSGD:
    """Until step ``switch`` the mean gradient for all workers; then local steps, and their mean every H (1808.07217).

    Args:
        model: where all start; not changed.
        batches: one list of batches per worker.
        loss: ``(model, batch) → loss``.
        inner: makes an inner optimizer from parameters.
        switch: steps with mean gradients.
        interval: H, counted from ``switch``.
        final_sync: end with the mean.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[Any]],
        loss: Loss,
        inner: MakeOptimizer,
        switch: int,
        interval: int,
        final_sync: bool = True,
    ) -> None:
        self.theta = copy.deepcopy(model)
        self.workers = [copy.deepcopy(model) for _ in batches]
        self.inner = [inner(w.parameters()) for w in self.workers]
        self.history: list[States] = []
        for t, step_batches in enumerate(zip(*batches, strict=True), start=1):
            for worker, optimizer, batch in zip(self.workers, self.inner, step_batches, strict=True):
                optimizer.zero_grad()
                loss(worker, batch).backward()
            if t <= switch:
                for replicas in zip(*(trainable(w).values() for w in self.workers), strict=True):
                    mean = torch.stack([r.grad for r in replicas if r.grad is not None]).sum(0) / len(replicas)
                    for r in replicas:
                        r.grad = mean.clone()
            for optimizer in self.inner:
                optimizer.step()
            if t <= switch or (t - switch) % interval == 0:
                self.average()
            self.history.append(states(self.theta, self.workers))
        if final_sync:
            self.average()

    @torch.no_grad()
    def average(self) -> None:
        for p, *replicas in zip(self.theta.parameters(), *(w.parameters() for w in self.workers), strict=True):
            p.copy_(torch.stack([r.detach() for r in replicas]).sum(0) / len(replicas))
            for r in replicas:
                r.copy_(p)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def states(theta: nn.Module, workers: Iterable[nn.Module]) -> States:
    return copy.deepcopy((theta.state_dict(), [w.state_dict() for w in workers]))


def by_row(rows: Mapping[int, Sequence[int]]) -> Callable[[int, int], Sequence[int] | None]:
    """Participants by step; in steps without a row all take part."""
    return lambda step, fragment: rows.get(step)
