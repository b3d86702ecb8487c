"""Workers of different speeds around a server, event by event from a queue: the oracle of asynchronous training.

Written from 2401.09135 alone, in plain PyTorch, for float64; it imports nothing from the package.

Every worker has a list of batches, which it reads from the beginning to the end, whatever the others do. A worker that
has taken its budget of steps pushes Δ = what it last pulled − what it has now; the server steps; the worker pulls. Of
what happens at the same time, all pushes come before all pulls.
"""

import copy
import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import torch
from oracles import states
from torch import Tensor, nn
from torch.optim import Optimizer


class EventServer:
    """Delayed Nesterov; ``history[t - 1]`` holds (θ, [θ_0, …]) after the t-th turn of the crowd.

    Args:
        model: where all start.
        loss: ``(model, batch) → loss``.
        inner: makes an inner optimizer.
        batches: of each worker.
        length: ``(worker, its step, from 1) → time``, a whole number.
        budgets: of each worker.
        turns: how many turns of the crowd: the longest times in which nobody completes two steps.
        lr: ε.
        momentum: β.
        size: n, of the buffer.
        activation: c.
        mangle: ``(worker, Δ by name) → Δ by name or None``: what reaches the server; None: lost on the way.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        inner: Callable[[Any], Optimizer],
        batches: Sequence[Sequence[Any]],
        length: Callable[[int, int], int],
        budgets: Sequence[int],
        turns: int,
        lr: float = 0.7,
        momentum: float = 0.9,
        size: int | None = None,
        activation: float = 0.0,
        mangle: Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None] = lambda w, delta: delta,
        end: bool = True,
    ) -> None:
        n = len(batches)
        self.theta = copy.deepcopy(model)
        self.workers = [copy.deepcopy(model) for _ in range(n)]
        self.pulled = [values(model) for _ in range(n)]
        self.inner = [inner(w.parameters()) for w in self.workers]
        self.lr, self.beta, self.size, self.c, self.mangle = lr, momentum, size or n, activation, mangle
        self.momentum = {name: torch.zeros_like(p) for name, p in values(model).items()}
        self.buffer = copy.deepcopy(self.momentum)
        self.arrivals = count()
        self.taken, self.since = [0] * n, [0] * n
        self.pushes: list[tuple[int, tuple[int, ...]]] = []  # (turn, workers)
        self.history: list[Any] = []
        queue = [(length(w, 1), w) for w in range(n)]
        heapq.heapify(queue)
        stepped: set[int] = set()
        while len(self.history) < turns:
            time = queue[0][0]
            now = []
            while queue[0][0] == time:
                w = heapq.heappop(queue)[1]
                now.append(w)
                heapq.heappush(queue, (time + length(w, self.taken[w] + 1 + 1), w))
            if stepped & set(now):
                self.history.append(states(self.theta, self.workers))
                stepped = set()
                if len(self.history) == turns:
                    break
            stepped |= set(now)
            for w in now:
                self.inner[w].zero_grad()
                loss(self.workers[w], batches[w][self.taken[w]]).backward()
                self.inner[w].step()
                self.taken[w] += 1
                self.since[w] += 1
            self.exchange([w for w in now if self.since[w] == budgets[w]], len(self.history) + 1)
        if end:
            self.exchange([w for w in range(n) if self.since[w]], turns)

    @torch.no_grad()
    def exchange(self, workers: list[int], turn: int) -> None:
        reached = []
        for w in workers:
            self.since[w] = 0
            delta = self.mangle(w, {name: self.pulled[w][name] - p for name, p in self.workers[w].named_parameters()})
            if delta is not None:
                reached.append(w)
                self.serve(delta)
        for w in reached:
            self.workers[w].load_state_dict(self.theta.state_dict())
            self.pulled[w] = values(self.theta)
        if reached:
            self.pushes.append((turn, tuple(reached)))

    def serve(self, delta: dict[str, Tensor]) -> None:
        t, n, c = next(self.arrivals), self.size, self.c
        for name, p in self.theta.named_parameters():
            self.buffer[name] += delta[name]
            if (t + 1) % n == 0:
                self.momentum[name] = self.beta * self.momentum[name] + self.buffer[name] / n
                p -= self.lr * ((1 - c * n + c) * self.beta * self.momentum[name] + delta[name] / n)
                self.buffer[name] = torch.zeros_like(p)
            else:
                p -= self.lr * (c * self.beta * self.momentum[name] + delta[name] / n)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
