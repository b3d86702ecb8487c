"""Oracles of further members of the family, in float64: nested loops in plain PyTorch, from the equations alone.

:class:`Twin` has what all have in common: N modules, each with an inner optimizer, that step on batches of their own. A
subclass has what happens between them. Nothing is imported from the package.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracles import Loss, MakeOptimizer, Oracle, States, states, trainable
from torch import Tensor, nn

Named = dict[str, Tensor]


@dataclass
class Arrival:
    """A mean of tensors that has arrived."""

    arrived: int
    step: int
    participants: Sequence[int]
    mean: Named | None
    names: int


class Twin:
    """N workers that step by themselves; ``exchange`` is called after each step, ``flush`` at the end of training.

    Attributes:
        theta: the model that others see.
        workers: the replicas.
        history: (θ, [θ_0, …]) after every step, before a flush.
        arrivals: what has arrived, in order.
    """

    def __init__(
        self, model: nn.Module, num_workers: int, loss: Loss, inner: MakeOptimizer, interval: int, **options: Any
    ) -> None:
        self.theta = copy.deepcopy(model)
        self.workers = [copy.deepcopy(model) for _ in range(num_workers)]
        self.theta_of, self.worker_of = trainable(self.theta), [trainable(w) for w in self.workers]
        self.inner = [inner(w.parameters()) for w in self.workers]
        self.names = list(self.theta_of)
        self.loss, self.interval, self.n, self.step = loss, interval, num_workers, 0
        self.history: list[States] = []
        self.arrivals: list[Arrival] = []
        with torch.no_grad():
            self.begin(**options)

    def train(self, batches: Sequence[Sequence[Any]], flush: bool = True) -> "Twin":
        for step_batches in zip(*batches, strict=True):
            self.step += 1
            for worker, optimizer, batch in zip(self.workers, self.inner, step_batches, strict=True):
                optimizer.zero_grad()
                self.loss(worker, batch).backward()
            self.before_inner_steps()
            for optimizer in self.inner:
                optimizer.step()
            with torch.no_grad():
                self.exchange()
            self.after_exchange()
            self.history.append(states(self.theta, self.workers))
        if flush:
            with torch.no_grad():
                self.flush()
        return self

    # ------------------------------------------------------------------------------------ a subclass says

    def begin(self) -> None: ...

    def before_inner_steps(self) -> None: ...

    def exchange(self) -> None: ...

    def after_exchange(self) -> None: ...

    def flush(self) -> None: ...

    # ------------------------------------------------------------------------------------ what most need

    @property
    def round_ends(self) -> bool:
        return self.step % self.interval == 0

    @property
    def partial(self) -> bool:
        """Whether the workers have stepped since the last round ended."""
        return self.step % self.interval != 0

    def weights(self, i: int) -> Named:
        return {n: self.worker_of[i][n].detach().clone() for n in self.names}

    def put(self, i: int, values: Named) -> None:
        for n, value in values.items():
            self.worker_of[i][n].data.copy_(value)

    def put_theta(self, values: Named) -> None:
        for n, value in values.items():
            self.theta_of[n].data.copy_(value)

    def show_mean(self) -> None:
        """Others see the mean of the replicas."""
        self.put_theta(mean_of([self.weights(i) for i in range(self.n)]))

    def average(self) -> None:
        """All take the mean of their weights."""
        mean = mean_of([self.weights(i) for i in range(self.n)])
        self.note(self.step, range(self.n), minus({n: p.detach() for n, p in self.theta_of.items()}, mean))
        self.put_theta(mean)
        for i in range(self.n):
            self.put(i, mean)

    def note(self, step: int, participants: Sequence[int], mean: Named | None, names: int | None = None) -> None:
        self.arrivals.append(Arrival(self.step, step, participants, mean, len(mean or {}) if names is None else names))


def mean_of(states: Sequence[Named], shares: Sequence[float] | None = None) -> Named:
    shares = shares or [1 / len(states)] * len(states)
    return {n: sum(s * state[n] for s, state in zip(shares, states, strict=True)) for n in states[0]}  # type: ignore[misc]


def minus(a: Named, b: Named) -> Named:
    return {n: a[n] - b[n] for n in a}


class Stepper:
    """Outer values with an outer optimizer of their own."""

    def __init__(self, values: Named, outer: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.values = {n: nn.Parameter(v.clone()) for n, v in values.items()}
        self.optimizer = outer(list(self.values.values()))

    def step(self, delta: Named) -> Named:
        for n, p in self.values.items():
            p.grad = delta[n].clone()
        self.optimizer.step()
        return {n: p.detach().clone() for n, p in self.values.items()}


class Delayed(Twin):
    """Delayed outer gradients (2502.12996): θ^r ← OuterOpt(θ^{r−1}, Δ^{r−1}); a worker starts every round from θ."""

    def begin(self, outer: Any) -> None:
        self.outer = Stepper(self.weights(0), outer)
        self.previous: tuple[int, Named] | None = None

    def exchange(self) -> None:
        if self.round_ends:
            theta = {n: p.detach().clone() for n, p in self.outer.values.items()}
            new = mean_of([minus(theta, self.weights(i)) for i in range(self.n)])
            self.apply_previous()
            self.previous = self.step, new

    def apply_previous(self) -> None:
        values = {n: p.detach().clone() for n, p in self.outer.values.items()}
        if self.previous is not None:
            sent, delta = self.previous
            values = self.outer.step(delta)
            self.note(sent, range(self.n), delta)
        self.previous = None
        self.put_theta(values)
        for i in range(self.n):
            self.put(i, values)

    def flush(self) -> None:
        last = None
        if self.partial:
            theta = {n: p.detach().clone() for n, p in self.outer.values.items()}
            last = self.step, mean_of([minus(theta, self.weights(i)) for i in range(self.n)])
        self.apply_previous()
        if last is not None:
            self.previous = last
            self.apply_previous()


class Eager(Twin):
    """Eager updates (2502.12996): Δ̃_i = Δ_prev + (1/N)(Δ_i − Δ_i,prev), from each worker's own φ_i and outer state.

    With data weights w_i, which sum to 1, w_i takes the place of 1/N. At the end of training the mean of the last,
    partial round is known at once: Δ̃_i = (Δ_prev − w_i Δ_i,prev) + Δ.
    """

    def begin(self, outer: Any, shares: Sequence[float] | None = None) -> None:
        self.outer = [Stepper(self.weights(i), outer) for i in range(self.n)]
        zero = {n: torch.zeros_like(t) for n, t in self.weights(0).items()}
        self.own_before, self.before, self.sent_at = [zero] * self.n, zero, 0
        self.shares = shares or [1 / self.n] * self.n

    def deltas(self) -> list[Named]:
        return [minus({n: p.data for n, p in self.outer[i].values.items()}, self.weights(i)) for i in range(self.n)]

    def apply(self, i: int, update: Named) -> None:
        self.put(i, self.outer[i].step(update))

    def exchange(self) -> None:
        if self.round_ends:
            own = self.deltas()
            if self.sent_at:
                self.note(self.sent_at, range(self.n), self.before)
            for i, share in enumerate(self.shares):
                was = self.own_before[i]
                self.apply(i, {n: self.before[n] + share * (own[i][n] - was[n]) for n in self.names})
            self.own_before, self.before, self.sent_at = own, mean_of(own, self.shares), self.step
        self.show_mean()

    def flush(self) -> None:
        own = self.deltas() if self.partial else None
        if self.sent_at:
            self.note(self.sent_at, range(self.n), self.before)
        if own is None and self.n == 1:
            return
        fresh = None if own is None else mean_of(own, self.shares)
        for i, share in enumerate(self.shares):
            update = {n: self.before[n] - share * self.own_before[i][n] for n in self.names}
            self.apply(i, update if fresh is None else {n: update[n] + fresh[n] for n in self.names})
        if fresh is not None:
            self.note(self.step, range(self.n), fresh)
        self.show_mean()


class WithTheta(Twin):
    """Twins with an outer optimizer that all workers share."""

    def begin(self, outer: Any) -> None:
        self.outer = Stepper(self.weights(0), outer)

    def shared(self) -> Named:
        return {n: p.detach().clone() for n, p in self.outer.values.items()}

    def synchronise(self, shares: Sequence[float] | None = None) -> None:
        """A round of DiLoCo ends."""
        delta = mean_of([minus(self.shared(), self.weights(i)) for i in range(self.n)], shares)
        values = self.outer.step(delta)
        self.put_theta(values)
        for i in range(self.n):
            self.put(i, values)
        self.note(self.step, range(self.n), delta)

    def exchange(self) -> None:
        if self.round_ends:
            self.synchronise()

    def flush(self) -> None:
        if self.partial:
            self.synchronise()


class Trimmed(WithTheta):
    """DiLoCo whose mean leaves out the f largest and smallest of each element (1803.01498); some send other Δ_i."""

    def begin(self, outer: Any, f: int, corrupt: dict[int, float]) -> None:
        super().begin(outer)
        self.f, self.corrupt = f, corrupt

    def synchronise(self, shares: Sequence[float] | None = None) -> None:
        sent = [minus(self.shared(), self.weights(i)) for i in range(self.n)]
        for i, factor in self.corrupt.items():
            sent[i] = {n: factor * t for n, t in sent[i].items()}
        kept = {n: torch.stack([s[n] for s in sent]).sort(0).values[self.f : self.n - self.f] for n in self.names}
        delta = {n: rows.mean(0) for n, rows in kept.items()}
        values = self.outer.step(delta)
        self.put_theta(values)
        for i in range(self.n):
            self.put(i, values)
        self.note(self.step, range(self.n), delta)


class DataParallel(Twin):
    """Until step ``switch`` the mean gradient for all; then their mean every H steps (post-local SGD, 1808.07217)."""

    def begin(self, switch: float = math.inf) -> None:
        self.switch = switch

    def before_inner_steps(self) -> None:
        if self.step <= self.switch:
            mean = mean_of([{n: p.grad.clone() for n, p in w.items() if p.grad is not None} for w in self.worker_of])
            for of_worker in self.worker_of:
                for n, p in of_worker.items():
                    p.grad = mean[n].clone()
            self.note(self.step, range(self.n), mean)

    def exchange(self) -> None:
        if self.step <= self.switch:
            self.put_theta(self.weights(0))
        elif (self.step - self.switch) % self.interval == 0:
            self.average()

    def flush(self) -> None:
        if self.step > self.switch and (self.step - self.switch) % self.interval:
            self.average()


class Fragments(Oracle):
    """``Oracle``, DiLoCo and Streaming DiLoCo, with the manners of a twin."""

    def __init__(
        self, model: nn.Module, num_workers: int, loss: Loss, inner: Any, interval: int, outer: Any, **form: Any
    ) -> None:
        super().__init__(model, num_workers, loss, inner, outer, interval, **form)

    def train(self, batches: Sequence[Sequence[Any]], flush: bool = True) -> "Fragments":  # type: ignore[override]
        super().train(batches)
        if flush:
            self.flush()
        return self


class Driven:
    """An inner optimizer as a Trainer drives it: gradients are clipped by norm, and its learning rate has a schedule.

    Args:
        params: the parameters.
        make: makes the optimizer.
        clip: the largest norm, with torch's 1e-6 in the division; None: any.
        schedule: steps that have been taken → factor of the learning rate.
    """

    def __init__(self, params: Any, make: MakeOptimizer, clip: float | None, schedule: Callable[[int], float]) -> None:
        self.params = list(params)
        self.optimizer = make(self.params)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self.clip, self.schedule, self.taken = clip, schedule, 0
        self.lrs = [group["lr"] for group in self.param_groups]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        for group, lr in zip(self.param_groups, self.lrs, strict=True):
            group["lr"] = lr * self.schedule(self.taken)
        if self.clip is not None:
            norm = float(torch.cat([p.grad.flatten() for p in self.params if p.grad is not None]).norm())
            for p in self.params:
                p.grad = None if p.grad is None else p.grad * min(1.0, self.clip / (norm + 1e-6))
        self.optimizer.step()
        self.taken += 1


class Sparta(WithTheta):
    """SPARTA: every k steps the elements at ``positions(step, name, count)`` take their mean; then DiLoCo, if asked."""

    def begin(self, positions: Any, every: int, outer: Any = None) -> None:
        self.positions, self.every, self.beside = positions, every, outer is not None
        if outer is not None:
            super().begin(outer)

    def exchange(self) -> None:
        if self.step % self.every == 0:
            means = {}
            for n in self.names:
                chosen = self.positions(self.step, n, self.worker_of[0][n].numel())
                flat = [w[n].data.view(-1) for w in self.worker_of]
                for k in chosen:
                    mean = sum(float(f[k]) for f in flat) / self.n
                    means.setdefault(n, []).append(mean)
                    for f in flat:
                        f[k] = mean
            sent = {n: torch.tensor(values, dtype=torch.float64) for n, values in means.items()}
            self.note(self.step, range(self.n), sent)
        if self.beside:
            super().exchange()
        else:
            self.show_mean()

    def flush(self) -> None:
        if self.beside:
            super().flush()


class NoLoCo(Twin):
    """NoLoCo (2506.10911), with the paper's signs: Δ_i = θ_i − φ_i, and it is added."""

    def begin(self, groups: Any, lr: float, momentum: float, gamma: float) -> None:
        self.groups, self.lr, self.momentum, self.gamma = groups, lr, momentum, gamma
        self.phi = [self.weights(i) for i in range(self.n)]
        self.delta = [{n: torch.zeros_like(t) for n, t in self.weights(0).items()} for _ in range(self.n)]

    def gossip(self) -> None:
        groups = self.groups(self.step)
        sent = [minus(self.weights(i), self.phi[i]) for i in range(self.n)]
        old = [dict(phi) for phi in self.phi]
        for group in groups:
            outer, middle = mean_of([sent[i] for i in group]), mean_of([old[i] for i in group])
            for i in group:
                for n in self.names:
                    pull = self.gamma * (middle[n] - old[i][n])
                    self.delta[i][n] = self.momentum * self.delta[i][n] + self.lr * outer[n] + pull
                    self.phi[i][n] = old[i][n] + self.delta[i][n]
                self.put(i, self.phi[i])
        who = sorted(i for group in groups for i in group)
        for _ in ("Δ", "φ"):
            self.note(self.step, who, None, len(self.names))

    def exchange(self) -> None:
        if self.round_ends:
            self.gossip()
        self.show_mean()

    def flush(self) -> None:
        if self.partial:
            self.gossip()
        self.show_mean()


class DesLoc(Twin):
    """DES-LOC (2505.22549): the means of weights, first and second moments, each at its own period."""

    def begin(self, first: int, second: int) -> None:
        self.periods = {"exp_avg": first, "exp_avg_sq": second}

    def exchange(self) -> None:
        for key, period in self.periods.items():
            if self.step % period == 0:
                moments = [
                    {n: self.inner[i].state[p][key] for n, p in self.worker_of[i].items()} for i in range(self.n)
                ]
                mean = mean_of([{n: t.clone() for n, t in m.items()} for m in moments])
                for of_worker in moments:
                    for n, t in of_worker.items():
                        t.copy_(mean[n])
                self.note(self.step, range(self.n), mean)
        if self.round_ends:
            self.average()

    def flush(self) -> None:
        if self.partial:
            self.average()


class SlowMo(Twin):
    """SlowMo (1910.00643); ``schedule(t)`` is the factor of the inner learning rate after t steps."""

    def begin(self, beta: float, alpha: float, schedule: Any) -> None:
        self.beta, self.alpha, self.schedule = beta, alpha, schedule
        self.u = {n: torch.zeros_like(t) for n, t in self.weights(0).items()}
        self.base = [[g["lr"] for g in o.param_groups] for o in self.inner]
        self.after_exchange()

    def synchronise(self) -> None:
        gamma = self.inner[0].param_groups[0]["lr"]
        theta = {n: p.detach().clone() for n, p in self.theta_of.items()}
        mean = mean_of([self.weights(i) for i in range(self.n)])
        for n in self.names:
            if gamma == 0:
                self.u[n] = self.beta * self.u[n]
                continue
            self.u[n] = self.beta * self.u[n] + (theta[n] - mean[n]) / gamma
        step = minus(theta, mean) if gamma == 0 else {n: gamma * u for n, u in self.u.items()}
        self.put_theta({n: theta[n] - self.alpha * step[n] for n in self.names})
        for i in range(self.n):
            self.put(i, {n: p.detach() for n, p in self.theta_of.items()})
        self.note(self.step, range(self.n), minus(theta, mean))

    def exchange(self) -> None:
        if self.round_ends:
            self.synchronise()

    def after_exchange(self) -> None:
        for optimizer, base in zip(self.inner, self.base, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * self.schedule(self.step)

    def flush(self) -> None:
        if self.partial:  # with the rate of the step that has been taken
            for optimizer, base in zip(self.inner, self.base, strict=True):
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * self.schedule(self.step - 1)
            self.synchronise()


class Hierarchical(WithTheta):
    """Groups take their mean every ``every`` steps, all an outer step every H."""

    def begin(self, every: int, groups: Sequence[Sequence[int]], outer: Any) -> None:
        super().begin(outer)
        self.every, self.groups = every, groups

    def exchange(self) -> None:
        if self.round_ends:
            self.synchronise()
        elif self.step % self.every == 0:
            for group in self.groups:
                mean = mean_of([self.weights(i) for i in group])
                for i in group:
                    self.put(i, mean)
            self.note(self.step, range(self.n), None, len(self.names))


class GPA(Twin):
    """Generalised primal averaging (2512.17131), with z, x and y as they are in the paper."""

    def begin(self, mu_x: float, mu_y: float) -> None:
        self.mu_x, self.mu_y = mu_x, mu_y
        self.x, self.y, self.z = self.weights(0), self.weights(0), self.weights(0)

    def exchange(self) -> None:
        step = minus(self.weights(0), self.y)
        for n in self.names:
            self.z[n] = self.z[n] + step[n]
            self.x[n] = self.mu_x * self.x[n] + (1 - self.mu_x) * self.z[n]
            self.y[n] = self.mu_y * self.x[n] + (1 - self.mu_y) * self.z[n]
        self.put(0, self.y)
        self.put_theta(self.x)


class FedOpt:
    """FedOpt's server step (2003.00295, Algorithm 2) in the paper's signs: Δ is new minus old, and is added.

    Args:
        params: what moves; ``grad`` is old minus new.
        rule: (v, Δ²) → v, number by number.
        lr: η.
        beta: β₁.
        tau: τ; v starts at τ².
    """

    def __init__(self, params: Sequence[nn.Parameter], rule: Any, lr: float, beta: float, tau: float) -> None:
        self.params, self.rule, self.lr, self.beta, self.tau = list(params), rule, lr, beta, tau
        self.m = [[0.0] * p.numel() for p in self.params]
        self.v = [[tau**2] * p.numel() for p in self.params]

    def step(self) -> None:
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            assert p.grad is not None
            flat = p.data.view(-1)
            for k, gradient in enumerate(p.grad.view(-1).tolist()):
                delta = -gradient
                m[k] = self.beta * m[k] + (1 - self.beta) * delta
                v[k] = self.rule(v[k], delta**2)
                flat[k] += self.lr * m[k] / (v[k] ** 0.5 + self.tau)


def cosines(x: Tensor, chunk: int, k: int) -> Tensor:
    """DeMo's compression (2411.19870), number by number: blocks, cosine sums, the k largest, and the sums back."""

    def side(length: int) -> int:
        return max(d for d in range(1, chunk + 1) if length % d == 0)

    def wave(n: int, f: int, at: int) -> float:
        return math.sqrt((1 if f == 0 else 2) / n) * math.cos(math.pi * (2 * at + 1) * f / (2 * n))

    matrix = x.reshape(x.shape[0] if x.dim() > 1 else 1, -1)
    result = torch.zeros_like(matrix)
    h, w = side(matrix.shape[0]), side(matrix.shape[1])
    for top in range(0, matrix.shape[0], h):
        for left in range(0, matrix.shape[1], w):
            block = matrix[top : top + h, left : left + w].tolist()
            found = {
                (f, g): sum(wave(h, f, i) * wave(w, g, j) * block[i][j] for i in range(h) for j in range(w))
                for f in range(h)
                for g in range(w)
            }
            kept = sorted(found, key=lambda at: -abs(found[at]))[:k]
            for i in range(h):
                for j in range(w):
                    result[top + i, left + j] = sum(found[f, g] * wave(h, f, i) * wave(w, g, j) for f, g in kept)
    return result.view(x.shape)


class DeMo(Twin):
    """DeMo: decoupled momenta, the mean of what is extracted of them, its sign for a gradient."""

    def begin(self, decay: float, chunk: int, k: int, clip: float | None) -> None:
        self.decay, self.chunk, self.k, self.clip = decay, chunk, k, clip
        self.momenta = [{n: torch.zeros_like(t) for n, t in self.weights(0).items()} for _ in range(self.n)]

    def before_inner_steps(self) -> None:
        sent: list[Named] = []
        for i in range(self.n):
            gradients = {n: p.grad.clone() for n, p in self.worker_of[i].items() if p.grad is not None}
            norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
            scale = 1.0 if self.clip is None else min(1.0, self.clip / (norm + 1e-6))
            sent.append({})
            for n, g in gradients.items():
                m = self.decay * self.momenta[i][n] + scale * g
                sent[i][n] = cosines(m, self.chunk, self.k)
                self.momenta[i][n] = m - sent[i][n]
        mean = mean_of(sent)
        for of_worker in self.worker_of:
            for n, p in of_worker.items():
                p.grad = mean[n].sign()
        self.note(self.step, range(self.n), mean)

    def exchange(self) -> None:
        self.put_theta(self.weights(0))


class Edit(WithTheta):
    """DiLoCo with EDiT's protections (2412.07210) and restarts of a heavy-ball or Nesterov momentum (2605.28585)."""

    def begin(
        self,
        outer: Any,
        warmup: int = 0,
        max_norm: float | None = None,
        temperature: float | None = None,
        threshold: float | None = None,
        decay: float = 0.02,
        filter_warmup: int = 120,
        restart: int | None = None,
    ) -> None:
        super().begin(outer)
        self.warmup, self.max_norm, self.temperature = warmup, max_norm, temperature
        self.threshold, self.decay, self.filter_warmup, self.restart = threshold, decay, filter_warmup, restart
        self.seen: dict[tuple[int, str], list[float]] = {}  # norms that were no outliers
        self.outliers: list[tuple[int, int, str]] = []

    def before_inner_steps(self) -> None:
        if self.step <= self.warmup * self.interval:
            gradients = [{n: p.grad.clone() for n, p in w.items() if p.grad is not None} for w in self.worker_of]
            mean = mean_of(gradients)
            for of_worker in self.worker_of:
                for n, p in of_worker.items():
                    p.grad = mean[n].clone()
            self.note(self.step, range(self.n), mean)

    def is_outlier(self, i: int, n: str, norm: float) -> bool:
        seen = self.seen.setdefault((i, n), [])
        if self.threshold is not None and len(seen) >= self.filter_warmup:
            mean, variance = seen[0], 0.0
            for x in seen[1:]:
                gap = x - mean
                mean = (1 - self.decay) * mean + self.decay * x
                variance = (1 - self.decay) * (variance + self.decay * gap**2)
            if variance > 0 and (norm - mean) / math.sqrt(variance) > self.threshold:
                self.outliers.append((self.step, i, n))
                return True
        seen.append(norm)
        return False

    def synchronise(self, shares: Sequence[float] | None = None) -> None:
        deltas = [minus(self.shared(), self.weights(i)) for i in range(self.n)]
        for i, delta in enumerate(deltas):
            for n, t in delta.items():
                if self.is_outlier(i, n, float(t.norm())):
                    delta[n] = torch.zeros_like(t)
        norms = [float(torch.cat([t.flatten() for t in d.values()]).norm()) for d in deltas]
        if self.temperature is not None:
            exps = [math.exp(-norm / self.temperature) for norm in norms]
            shares = [e / sum(exps) for e in exps]
        mean = mean_of(deltas, shares)
        self.note(self.step, range(self.n), mean)
        norm = float(torch.cat([t.flatten() for t in mean.values()]).norm())
        if self.max_norm is not None and norm > self.max_norm:
            mean = {n: t / norm * self.max_norm for n, t in mean.items()}
        values = self.outer.step(mean)
        self.put_theta(values)
        for i in range(self.n):
            self.put(i, values)

    def exchange(self) -> None:
        if self.step <= self.warmup * self.interval:
            values = self.weights(0)
            self.put_theta(values)
            for n, value in values.items():
                self.outer.values[n].data.copy_(value)
            return
        super().exchange()
        if self.restart is not None and self.round_ends and self.step // self.interval % self.restart == 0:
            for state in self.outer.optimizer.state.values():
                state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])

    def flush(self) -> None:
        if self.step > self.warmup * self.interval:
            super().flush()
