"""Runs of the further members of the family, and their oracles: the table that several tests read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import codec_reference as slow
import pytest
import torch
import twins
from family import (
    INNER,
    INTERVAL,
    STEPS,
    TOLERANCE,
    WORKERS,
    Layers,
    Run,
    batches_of,
    difference,
    largest,
    start,
)
from torch import Tensor
from twins import Twin

from lightning_diloco import (
    GPA,
    Delayed,
    DeMo,
    DesLoc,
    Diloco,
    Eager,
    FedAdagrad,
    FedAdam,
    FedYogi,
    Hierarchical,
    NoLoCo,
    SlowMo,
    Sparta,
)

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
NESTEROV: Any = {}, partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
PRESET: Any = {"codec": largest((64, 64), 64, lambda x: slow.statistical(x, 2)), "decay": 0.95}
HALF: Any = {"outer_optimizer_kwargs": {"lr": 0.5}}, partial(SGD, lr=0.5)
OUTER_ADAM: Any = (
    {"outer_optimizer_cls": ADAM, "outer_optimizer_kwargs": {"lr": 0.1, "eps": 0.1}},
    partial(ADAM, lr=0.1, eps=0.1),
)


@dataclass
class Case:
    """A run: the arguments of the strategy, and the oracle for the same."""

    strategy: Callable[[], dict[str, Any]]
    twin: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    inner: str = "sgd"
    num_workers: int = WORKERS
    steps: int = STEPS
    flush: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        made = {"make": partial(Layers, self.inner), "num_workers": self.num_workers, "steps": self.steps}
        return {**made, "final_sync": self.flush, **self.strategy()}

    def oracle(self, model: Any = None, inner: Any = None, batches: Any = None) -> Any:
        """The twin of a run on ``model``, with an inner optimizer that ``inner`` makes of parameters."""
        model, inner = model or start(), inner or INNER[self.inner]
        twin = self.twin(model, self.num_workers, type(model).loss, inner, INTERVAL, **self.options)
        return twin.train(batches or batches_of(self.num_workers, self.steps), self.flush)


def overlapped(algorithm: Any, outer: Any, inner: str = "adamw", **more: Any) -> Case:
    twin = {Delayed: twins.Delayed, Eager: twins.Eager}[algorithm]
    arguments, make_outer = outer
    return Case(lambda: {"algorithm": algorithm(), **arguments}, twin, {"outer": make_outer}, inner, **more)


def written(step: int, name: str, count: int) -> list[int]:
    """Positions of a mask that changes from step to step; none of some parameters."""
    return [k for k in range(count) if (7 * k + 3 * step + len(name)) % 5 == 0]


class Written(Sparta):
    """With masks that are known."""

    def positions(self) -> dict[str, Tensor]:
        counts = {n: self.ctx.outer.tensors[n].numel() for n in self.ctx.names}
        return {n: torch.tensor(written(self.ctx.step, n, count)) for n, count in counts.items()}


def sparta(every: int, beside: bool, **more: Any) -> Case:
    options: dict[str, Any] = {"positions": written, "every": every}
    if beside:
        options["outer"] = NESTEROV[1]
    return Case(lambda: {"algorithm": Written(0.2, every, Diloco() if beside else None)}, twins.Sparta, options, **more)


GROUPS = {6: [[2, 0], [1, 3]], 12: [[3, 2]], 18: [[0, 1], [2, 3]], 19: [[1, 2], [0, 3]]}


class Pairs(NoLoCo):
    """With pairs that are known."""

    def groups(self) -> list[list[int]]:
        return GROUPS[self.ctx.step]


def no_loco(make: Any, groups: Any, lr: float, momentum: float, gamma: float, **more: Any) -> Case:
    options = {"groups": groups, "lr": lr, "momentum": momentum, "gamma": gamma}
    return Case(lambda: {"algorithm": make(lr, momentum, gamma)}, twins.NoLoCo, options, **more)


def des_loc(first: int | None, second: int | None, **more: Any) -> Case:
    options = {"first": first or 3 * INTERVAL, "second": second or 6 * INTERVAL}
    return Case(lambda: {"algorithm": DesLoc(first, second)}, twins.DesLoc, options, "adamw", **more)


def factor(step: int) -> float:
    """A learning rate that falls to 0 within a round, stays there at its end, and comes back."""
    return {11: 0.0, 10: 0.0}.get(step, 1.0 - 0.04 * step)


class Scheduled(Layers):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def slow_mo(beta: float, alpha: float, inner: str = "sgd", **more: Any) -> Case:
    options = {"beta": beta, "alpha": alpha, "schedule": factor}
    settings = {"algorithm": SlowMo(beta, alpha), "make": partial(Scheduled, inner)}
    return Case(lambda: settings, twins.SlowMo, options, inner, **more)


def hierarchical(every: int, groups: Any, expected: Any, outer: Any, inner: str = "sgd", **more: Any) -> Case:
    arguments, make_outer = outer
    options = {"every": every, "groups": expected, "outer": make_outer}
    settings = {"algorithm": Hierarchical(every, groups), **arguments}
    return Case(lambda: settings, twins.Hierarchical, options, inner, **more)


def gpa(mu_x: float, mu_y: float, inner: str, **more: Any) -> Case:
    settings = {"algorithm": GPA(mu_x, mu_y), "eval_weights": "outer"}
    return Case(lambda: settings, twins.GPA, {"mu_x": mu_x, "mu_y": mu_y}, inner, num_workers=1, **more)


RULES: dict[str, Callable[[float, float], float]] = {
    "FedAdam": lambda v, square: 0.99 * v + (1 - 0.99) * square,
    "FedYogi": lambda v, square: v - (1 - 0.99) * square * (1 if v > square else -1 if v < square else 0),
    "FedAdagrad": lambda v, square: v + square,
}


def fed_opt(cls: Any, lr: float, beta: float, tau: float, inner: str = "sgd", **strategy: Any) -> Case:
    momentum = {"beta": beta} if cls is FedAdagrad else {"betas": (beta, 0.99)}
    arguments = {"outer_optimizer_cls": cls, "outer_optimizer_kwargs": {"lr": lr, "tau": tau, **momentum}}
    make = partial(twins.FedOpt, rule=RULES[cls.__name__], lr=lr, beta=beta, tau=tau)
    if strategy:
        return Case(lambda: {**arguments, **strategy}, twins.Eager, {"outer": make}, inner)
    return Case(lambda: arguments, twins.WithTheta, {"outer": make}, inner)


def demo(decay: float, chunk: int, k: int, clip: float | None, **more: Any) -> Case:
    options = {"decay": decay, "chunk": chunk, "k": k, "clip": clip}
    return Case(lambda: {"algorithm": DeMo(**options)}, twins.DeMo, options, **more)


CASES: dict[str, Case] = {
    "delayed": overlapped(Delayed, NESTEROV),
    "delayed, Adam": overlapped(Delayed, OUTER_ADAM, "sgd"),
    "delayed, whole rounds": overlapped(Delayed, HALF, steps=2 * INTERVAL),
    "delayed, no final sync": overlapped(Delayed, NESTEROV, "sgd", flush=False),
    "eager": overlapped(Eager, NESTEROV),
    "eager, Adam": overlapped(Eager, OUTER_ADAM, "sgd"),
    "eager, whole rounds": overlapped(Eager, NESTEROV, steps=3 * INTERVAL),
    "eager, no final sync": overlapped(Eager, HALF, "sgd", flush=False),
    "eager, one worker": overlapped(Eager, NESTEROV, num_workers=1),
    "eager, one round": overlapped(Eager, NESTEROV, steps=INTERVAL - 1),
    "SPARTA": sparta(1, False),
    "SPARTA, every third step": sparta(3, False, inner="adamw"),
    "SPARTA beside DiLoCo": sparta(2, True, inner="adamw"),
    "SPARTA beside DiLoCo, a partial round": sparta(1, True, steps=INTERVAL - 1),
    "NoLoCo": no_loco(Pairs, GROUPS.get, 0.7, 0.5, 0.7, inner="adamw"),
    "NoLoCo, groups of all": no_loco(partial(NoLoCo, group=4), lambda _: [[0, 1, 2, 3]], 0.5, 0.9, 0.3),
    "NoLoCo, whole rounds": no_loco(Pairs, GROUPS.get, 0.4, 0.0, 1.0, steps=2 * INTERVAL),
    "DES-LOC": des_loc(4, 9),
    "DES-LOC, the paper's periods": des_loc(None, None),
    "SlowMo": slow_mo(0.6, 1.0),
    "SlowMo, whole rounds": slow_mo(0.8, 0.5, "adamw", steps=2 * INTERVAL),
    "SlowMo, no final sync": slow_mo(0.4, 1.2, flush=False),
    "hierarchical": hierarchical(2, [[0, 3], [1, 2]], [[0, 3], [1, 2]], NESTEROV, "adamw"),
    "hierarchical, three groups": hierarchical(4, 3, [[0], [1], [2, 3]], OUTER_ADAM),
    "hierarchical, two groups": hierarchical(5, 2, [[0, 1], [2, 3]], HALF, steps=2 * INTERVAL),
    "GPA": gpa(0.9, 0.7, "adamw"),
    "GPA, gradients at the average": gpa(0.8, 1.0, "sgd"),
    "FedAdam": fed_opt(FedAdam, 0.05, 0.9, 0.01),
    "FedYogi": fed_opt(FedYogi, 0.05, 0.9, 0.01),
    "FedAdagrad": fed_opt(FedAdagrad, 0.1, 0.5, 0.001, "adamw"),
    "eager, FedYogi": fed_opt(FedYogi, 0.05, 0.5, 0.1, algorithm=Eager()),
    "DeMo": demo(0.9, 4, 2, None),
    "DeMo, clipped": demo(0.999, 3, 3, 0.3),
    "DES-LOC, in step": des_loc(INTERVAL, 2 * INTERVAL, flush=False),
}
QUICK = {
    "delayed",
    "eager",
    "SPARTA",
    "SPARTA beside DiLoCo",
    "NoLoCo",
    "DES-LOC",
    "SlowMo",
    "hierarchical",
    "GPA",
    "FedYogi",
}


def assert_agrees(ours: Run, twin: Twin) -> None:
    """At every step and at the end, to 1e-12; and the same arrivals."""
    assert len(ours.history) == len(twin.history) == ours.steps[0]
    for t, ((theta, workers), (twin_theta, twin_workers)) in enumerate(
        zip(ours.history, twin.history, strict=True), start=1
    ):
        assert sorted(workers) == list(range(len(twin_workers)))
        for w, expected in enumerate(twin_workers):
            assert difference(workers[w], expected) <= TOLERANCE, f"worker {w} after step {t}"
        assert difference(theta, twin_theta) <= TOLERANCE, f"θ after step {t}"
    for w, worker in enumerate(twin.workers):
        assert difference(ours.workers[w], worker.state_dict()) <= TOLERANCE, f"worker {w} at the end"
    assert difference(ours.theta, twin.theta.state_dict()) <= TOLERANCE
    assert difference(ours.module, twin.theta.state_dict()) <= TOLERANCE
    assert [(r.step, r.sent_step, r.participants, r.names) for r in ours.reports] == [
        (a.arrived, a.step, tuple(a.participants), a.names) for a in twin.arrivals
    ]
    for report, arrival in zip(ours.reports, twin.arrivals, strict=True):
        if arrival.mean is not None:
            norm = torch.cat([t.flatten() for t in arrival.mean.values()]).norm().item()
            assert report.pseudo_gradient_norm == pytest.approx(norm, rel=1e-9, abs=1e-12)


def given(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_diloco.{name}", "init_args": arguments}
