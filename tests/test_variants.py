"""Do the further members of the family compute what their papers say, in several processes and after a resume, too?"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import twins
import yaml
from family import (
    INNER,
    INTERVAL,
    STEPS,
    TOLERANCE,
    WORKERS,
    Layers,
    Run,
    Save,
    assert_same_reports,
    assert_same_run,
    batches_of,
    difference,
    several,
    start,
    train,
)
from helpers import Net, assert_equal, copy_of, loader, regression_data, slow_but, trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from twins import Twin

from lightning_diloco import (
    FP4,
    GPA,
    Corrupt,
    DataParallel,
    Delayed,
    DeMo,
    DesLoc,
    Diloco,
    DilocoStrategy,
    DropOut,
    Eager,
    Edit,
    ErrorFeedback,
    FedAdagrad,
    FedAdam,
    FedYogi,
    Hierarchical,
    Krum,
    NoLoCo,
    PeriodicAveraging,
    Robust,
    SlowMo,
    Sparta,
    StreamingDiloco,
    SyncAlgorithm,
    Table,
    TrimmedMean,
)
from lightning_diloco.arguments import plain_value
from lightning_diloco.engine.engine import Engine

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
NESTEROV: Any = {}, partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
HALF: Any = {"outer_optimizer_kwargs": {"lr": 0.5}}, partial(SGD, lr=0.5)
OUTER_ADAM: Any = (
    {"outer_optimizer_cls": ADAM, "outer_optimizer_kwargs": {"lr": 0.1, "eps": 0.1}},
    partial(ADAM, lr=0.1, eps=0.1),
)


@dataclass
class Case:
    """A run: the arguments of the strategy, and the oracle for the same."""

    strategy: Callable[[], dict[str, Any]]
    twin: type[Twin]
    options: dict[str, Any] = field(default_factory=dict)
    inner: str = "sgd"
    num_workers: int = WORKERS
    steps: int = STEPS
    flush: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        made = {"make": partial(Layers, self.inner), "num_workers": self.num_workers, "steps": self.steps}
        return {**made, "final_sync": self.flush, **self.strategy()}

    def oracle(self) -> Twin:
        twin = self.twin(start(), self.num_workers, Layers.loss, INNER[self.inner], INTERVAL, **self.options)
        return twin.train(batches_of(self.num_workers, self.steps), self.flush)


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


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_every_algorithm_agrees_with_its_oracle(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert_agrees(train(tmp_path, **case.settings), case.oracle())


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_agree_with_the_oracle_and_with_one(tmp_path: Path) -> None:
    cases = [case for case in CASES.values() if case.num_workers > 1]
    two = several(tmp_path, 2, [case.settings for case in cases])
    for case, result in zip(cases, two, strict=True):
        assert_agrees(result, case.oracle())
        assert_same_run(result, train(tmp_path, **case.settings), measured=1e-9)


# a single worker reads the user's loader, which Lightning can't take up within an epoch
RESUMED = {name: case for name, case in CASES.items() if "," not in name and case.num_workers > 1}


@pytest.mark.parametrize("name", slow_but(QUICK, RESUMED))
def test_a_run_resumes_at_any_step(name: str, tmp_path: Path) -> None:
    """At the end of a round, and in the middle of one."""
    case = RESUMED[name]
    whole = train(tmp_path, **case.settings, callbacks=[Save([INTERVAL, INTERVAL + 3], tmp_path)])
    for step in (INTERVAL, INTERVAL + 3):
        resumed = train(tmp_path, **case.settings, resume=tmp_path / f"{step}.ckpt", seed=99)
        assert_equal(resumed.history, whole.history[step:], f"history from step {step}")
        for of_run in ("theta", "workers", "module", "bytes", "whats", "steps"):
            assert_equal(getattr(resumed, of_run), getattr(whole, of_run), f"{of_run}, resumed at {step}")
        assert_same_reports(resumed.reports, [r for r in whole.reports if r.step > step])


def given(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_diloco.{name}", "init_args": arguments}


IN_YAML: dict[str, tuple[dict[str, Any], SyncAlgorithm]] = {
    "Delayed": ({}, Delayed()),
    "Eager": ({}, Eager()),
    "Robust": (
        {
            "algorithm": given("Corrupt", algorithm=given("Diloco"), workers=[1], scale=-2.0),
            "aggregate": given("Krum", f=1, select=2),
        },
        Robust(Corrupt(Diloco(), [1], -2.0), Krum(1, 2)),
    ),
    "Edit": (
        {"algorithm": given("Diloco"), "warmup_rounds": 2, "max_norm": 10.0},
        Edit(Diloco(), 2, 10.0),
    ),
    "DeMo": ({"k": 8, "clip": 1.0}, DeMo(k=8, clip=1.0)),
    "SlowMo": ({"beta": 0.6}, SlowMo(0.6)),
    "Hierarchical": ({"every": 5}, Hierarchical(5)),
    "Hierarchical, lists": ({"every": 5, "groups": [[0, 2], [1, 3]]}, Hierarchical(5, [[0, 2], [1, 3]])),
    "GPA": ({"mu_y": 0.5}, GPA(mu_y=0.5)),
    "NoLoCo": ({"lr": 0.5, "group": 3}, NoLoCo(0.5, group=3)),
    "DesLoc": ({"exp_avg_interval": 20}, DesLoc(20)),
    "Sparta": ({}, Sparta()),
    "Sparta, beside": (
        {
            "p": 0.1,
            "every": 4,
            "beside": {"class_path": "lightning_diloco.StreamingDiloco", "init_args": {"fragments": 2}},
        },
        Sparta(0.1, 4, StreamingDiloco(2)),
    ),
}


@pytest.mark.parametrize("name", IN_YAML)
def test_yaml_gives_the_same_algorithm_as_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["python -m lightning_diloco"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own use of it
    arguments, expected = IN_YAML[name]
    algorithm = given(name.partition(",")[0], **arguments)
    strategy = given("DilocoStrategy", num_nodes=WORKERS, diloco_interval=INTERVAL, algorithm=algorithm)
    path = tmp_path / "given.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "accelerator": "cpu", "logger": False}}))
    cli = LightningCLI(BoringModel, args=[f"--config={path}"], run=False, seed_everything_default=False)
    made = cli.trainer.strategy._settings.algorithm
    assert type(made) is type(expected)
    assert plain_value(vars(made)) == plain_value(vars(expected))


# ------------------------------------------------------------------------------------------------- delayed and eager


def test_eager_with_one_worker_is_diloco_bit_for_bit(tmp_path: Path) -> None:
    for steps in (STEPS, 2 * INTERVAL):
        settings: dict[str, Any] = {"num_workers": 1, "steps": steps, "make": partial(Layers, "adamw")}
        ours, plain = train(tmp_path, algorithm=Eager(), **settings), train(tmp_path, **settings)
        assert_equal([w for _, w in ours.history], [w for _, w in plain.history])
        assert_equal(ours.workers, plain.workers)
        assert_equal(ours.module, plain.module)


def test_eager_workers_agree_in_the_end_under_sgd(tmp_path: Path) -> None:
    """Everybody has applied the sum of all mean Δ, in another order; nothing is lost on the way, dropped or not."""
    some = {"participation": Table({INTERVAL: [0, 2], 2 * INTERVAL: [1, 2, 3]})}
    for settings in ({}, some, {"partition": unequal, "weights": "samples"}):
        ours = train(tmp_path, algorithm=Eager(), **settings, **HALF[0])
        for w in range(1, WORKERS):
            assert difference(ours.history[-1][1][w], ours.history[-1][1][0]) > 1e-6
            assert difference(ours.workers[w], ours.workers[0]) <= TOLERANCE


def unequal(dataset: Any, num_workers: int) -> list[list[int]]:
    """6, 18, 30 and 42 of 96 samples."""
    indices = iter(range(len(dataset)))
    return [[next(indices) for _ in range(6 + 12 * w)] for w in range(num_workers)]


@pytest.mark.parametrize("make", [Delayed, Eager])
def test_overlapped_rounds_go_on_without_workers_that_are_left_out(make: Any, tmp_path: Path) -> None:
    """A worker that takes no part in step 6 goes on from where it is."""
    ours = train(tmp_path, algorithm=make(), participation=Table({INTERVAL: [0, 1, 3]}))
    alone = train(tmp_path, interval=1000, final_sync=False)
    at = INTERVAL - 1
    assert_equal(ours.history[at][1][2], alone.history[at][1][2])
    assert difference(ours.history[at][1][1], alone.history[at][1][1]) > 1e-6
    before, start_of = start().state_dict(), alone.history[at][1][0]
    if make is Eager:  # lr .7, momentum .9: 1.33 of a third of Δ_0
        for name, value in ours.history[at][1][0].items():
            moved = before[name] - 0.7 * 1.9 / 3 * (before[name] - start_of[name])
            torch.testing.assert_close(value, moved, rtol=0, atol=1e-12)
    lost = train(tmp_path, algorithm=make(), participation=Table({2 * INTERVAL: []}), steps=2 * INTERVAL + 1)
    after = lost.history[2 * INTERVAL - 1][1]
    assert difference(after[0], after[1]) > 1e-6  # nobody has taken θ
    nobody = train(tmp_path, algorithm=make(), participation=DropOut(1.0), steps=INTERVAL + 1, final_sync=False)
    assert_equal([w for _, w in nobody.history], [w for _, w in alone.history[: INTERVAL + 1]])
    assert nobody.reports == []


def test_overlapped_rounds_send_what_diloco_sends(tmp_path: Path) -> None:
    plain = train(tmp_path, algorithm=Diloco())
    for make in (Delayed, Eager):
        ours = train(tmp_path, algorithm=make())
        assert (ours.bytes, ours.whats, len(ours.reports)) == (plain.bytes, plain.whats, len(plain.reports))


def three(weights: list[float], algorithm: Any) -> Engine:
    """An engine with three workers at these weights, and θ = 0."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    optimizer = SGD(module.parameters(), lr=1.0)
    outer = partial(SGD, lr=1.0, momentum=0.5)
    engine = Engine(module, [optimizer], num_workers=3, interval=4, algorithm=algorithm, outer_factory=outer)
    for w, value in enumerate(weights):
        engine.context.replicas.tensors(w)["weight"].fill_(value)
        if algorithm.anchors == "own":
            engine.context.memory.anchors[w]["weight"].fill_(value)
    return engine


def test_own_outer_steps_leave_theta_alone() -> None:
    """Two optimizers over the same values: θ's moves θ, and the state of the other values is kept apart."""
    ctx = three([1.0, 2.0, 6.0], Eager()).context
    theta = ctx.outer.tensors["weight"]
    for _ in range(2):  # b = 1, then 1.5
        values = ctx.outer_step(1, ["weight"], {"weight": torch.ones_like(theta)})
        ctx.merge([1], ["weight"], values)
    assert (ctx.weights(1)["weight"].item(), theta.item()) == (2.0 - 1.0 - 1.5, 0.0)
    assert ctx.slot(1, "outer state/momentum_buffer", like={})["weight"].item() == 1.5
    assert not ctx.outer.optimizer.state
    ctx.outer.step(["weight"], {"weight": torch.ones_like(theta)})
    assert theta.item() == -1.0


# ------------------------------------------------------------------------------------------------------------ SPARTA


def test_sparta_of_everything_is_the_mean_and_of_nothing_is_nothing(tmp_path: Path) -> None:
    """p = 1, k = 1: averaging in every step; p = 0: independent training. Bit for bit."""
    ours = train(tmp_path, algorithm=Sparta(1.0))
    every = train(tmp_path, algorithm=PeriodicAveraging(), interval=1)
    assert_equal([w for _, w in ours.history], [w for _, w in every.history])
    assert ours.bytes == every.bytes
    nothing = train(tmp_path, algorithm=Sparta(0.0))
    alone = train(tmp_path, interval=1000, final_sync=False)
    assert_equal([w for _, w in nothing.history], [w for _, w in alone.history])
    assert (nothing.bytes, nothing.reports) == (0, [])
    beside = train(tmp_path, algorithm=Sparta(0.0, beside=Diloco()))
    assert_same_run(beside, train(tmp_path))


def test_spartas_masks_have_their_size_and_change(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(Sparta):
        def positions(self) -> dict[str, Tensor]:
            seen.append(super().positions())
            return seen[-1]

    ours = train(tmp_path, algorithm=Watched(0.3, 2))
    assert len(seen) == len(ours.reports) == STEPS // 2
    counts = [sum(len(i) for i in index.values()) for index in seen]
    size = sum(p.numel() for p in start().parameters())
    assert sum(counts) / len(counts) / size == pytest.approx(0.3, abs=0.06)
    assert len({tuple(torch.cat(list(index.values())).tolist()) for index in seen}) == len(seen)
    assert [r.payload_bytes for r in ours.reports] == [8 * count for count in counts]


@pytest.mark.processes
@pytest.mark.slow
def test_spartas_masks_are_the_same_in_two_processes(tmp_path: Path) -> None:
    settings = {"algorithm": Sparta(0.3, 2, Diloco()), "codec": FP4()}
    (two,) = several(tmp_path, 2, [settings])
    assert_same_run(two, train(tmp_path, **settings), measured=1e-9)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Sparta(1.5), r"^Sparta: `p` \(=1.5\) must be a number from 0"),
    (lambda: Sparta(True), r"^Sparta: `p` \(=True\)"),
    (lambda: Sparta(float("nan")), r"^Sparta: `p` \(=nan\)"),
    (lambda: Sparta(0.1, 0), r"^Sparta: `every` \(=0\) must be an integer ≥ 1"),
    (lambda: Sparta(0.1, beside=Eager()), r"^Sparta: `beside` \(=Eager\) must measure Δ_i from θ"),
    (lambda: Sparta(0.1, beside=Sparta()), r"^Sparta: `beside` \(=Sparta\)"),
    (lambda: Sparta(0.1, beside=DataParallel()), r"^Sparta: `beside` \(=DataParallel\)"),
    (lambda: NoLoCo(-0.1), r"^NoLoCo: `lr` \(=-0.1\) must be a number ≥ 0"),
    (lambda: NoLoCo(momentum=1), r"^NoLoCo: `momentum` \(=1\) must be a number from 0 to below 1"),
    (lambda: NoLoCo(gamma="0.1"), r"^NoLoCo: `gamma` \(='0.1'\) must be a number ≥ 0"),
    (lambda: NoLoCo(group=1), r"^NoLoCo: `group` \(=1\) must be an integer ≥ 2"),
    (lambda: SlowMo(1.0), r"^SlowMo: `beta` \(=1.0\) must be a number from 0 to below 1"),
    (lambda: SlowMo(0.5, 0), r"^SlowMo: `alpha` \(=0\) must be a number > 0"),
    (lambda: Hierarchical(0), r"^Hierarchical: `every` \(=0\) must be an integer ≥ 1"),
    (lambda: Hierarchical(2, 0), r"^Hierarchical: `groups` \(=0\) must be a number of groups ≥ 1"),
    (lambda: Hierarchical(2, [[0], []]), r"^Hierarchical: `groups` \(=\[\[0\], \[\]\]\) must be a number"),
    (lambda: GPA(1.0), r"^GPA: `mu_x` \(=1.0\) must be a number from 0 to below 1"),
    (lambda: GPA(0.9, -1), r"^GPA: `mu_y` \(=-1\) must be a number from 0 to 1"),
    (lambda: FedAdam([torch.nn.Parameter(torch.ones(1))], -1.0), r"^FedAdam: `lr` \(=-1.0\) must be ≥ 0"),
    (lambda: FedYogi([torch.nn.Parameter(torch.ones(1))], 0.1, (0.9, 1.0)), r"^FedYogi: `betas` \(=\(0.9, 1.0\)\)"),
    (lambda: FedAdagrad([torch.nn.Parameter(torch.ones(1))], 0.1, tau=0.0), r"^FedAdagrad: `tau` \(=0.0\) must be > 0"),
    (lambda: DeMo(clip=0), r"^DeMo: `clip` \(=0\) must be a number > 0"),
    (lambda: DeMo(k=0), r"^DCT: `k` \(=0\) must be an integer ≥ 1"),
    (lambda: DeMo(1.5), r"^ErrorFeedback: `decay` \(=1.5\) must be a number in \(0, 1\]"),
    (lambda: DesLoc(0), r"^DesLoc: `exp_avg_interval` \(=0\) must be an integer ≥ 1"),
    (lambda: DesLoc(None, 2.5), r"^DesLoc: `exp_avg_sq_interval` \(=2.5\) must be an integer ≥ 1"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_wrong_arguments_are_named(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


REFUSED_LATER: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"algorithm": Sparta(), "inner_state": "reset"}, r"^`inner_state` \(='reset'\) would touch"),
    (lambda: {"algorithm": Hierarchical(6)}, r"^Hierarchical: `every` \(=6\) must be less than `diloco_interval`"),
    (lambda: {"algorithm": Hierarchical(2, 5)}, r"^Hierarchical: `groups` \(=5\) must put each of the workers 0 to 3"),
    (lambda: {"algorithm": Hierarchical(2, [[0, 1], [1, 2, 3]])}, r"^Hierarchical: `groups` \(=.*\) must put each"),
    (lambda: {"algorithm": GPA(), "eval_weights": "outer"}, r"^GPA trains a single worker, but `num_nodes` is 4"),
    (lambda: {"algorithm": GPA(), "num_workers": 1}, r"^`eval_weights` \(='average'\) would show where"),
    (lambda: {"algorithm": NoLoCo(group=5)}, r"^NoLoCo: `group` \(=5\) must be at most `num_nodes` \(=4\)"),
    (lambda: {"algorithm": DesLoc(), "inner_state": "average"}, r"^`inner_state` \(='average'\) would undo"),
    (lambda: {"algorithm": Sparta(), "codec": ErrorFeedback(FP4())}, r"^`codec` \(=ErrorFeedback.*\) keeps an error"),
    (
        lambda: {"algorithm": Sparta(beside=StreamingDiloco(99))},
        r"^StreamingDiloco: `fragments` \(=99\) must be at most `diloco_interval`",
    ),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED_LATER, ids=[text for _, text in REFUSED_LATER])
def test_settings_that_an_algorithm_cannot_serve_are_named(
    settings: Callable[[], dict[str, Any]], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=text):
        train(tmp_path, steps=1, **settings())


# ------------------------------------------------------------------------------------------------------------ NoLoCo


def test_gossip_among_all_is_diloco_with_a_heavy_ball(tmp_path: Path) -> None:
    """As long as all φ are equal, which they then stay: the pull is 0."""
    ours = train(tmp_path, algorithm=NoLoCo(0.6, 0.8, 0.7, group=WORKERS))
    ball = train(tmp_path, outer_optimizer_kwargs={"lr": 0.6, "momentum": 0.8})
    for (_, mine), (_, theirs) in zip(ours.history, ball.history, strict=True):
        for w in range(WORKERS):
            assert difference(mine[w], theirs[w]) <= TOLERANCE
    assert difference(ours.module, ball.module) <= TOLERANCE


@pytest.mark.parametrize("num_workers", [4, 5])
def test_pairs_are_disjoint_and_change_and_an_odd_worker_waits(num_workers: int, tmp_path: Path) -> None:
    seen: list[list[list[int]]] = []

    class Watched(NoLoCo):
        def groups(self) -> list[list[int]]:
            seen.append(super().groups())
            return seen[-1]

    ours = train(tmp_path, num_workers, algorithm=Watched(), interval=1, steps=12, final_sync=False)
    assert len(seen) == 12
    for groups, (_, workers), before in zip(seen, ours.history, [None, *ours.history], strict=False):
        members = [w for group in groups for w in group]
        assert len(set(members)) == len(members) == num_workers // 2 * 2
        assert [len(group) for group in groups] == [2] * (num_workers // 2)
        assert before is None or len(workers) == num_workers
    partners = {tuple(sorted(group)) for groups in seen for group in groups}
    assert len(partners) > num_workers  # of six, or ten, possible pairs
    size = 8 * sum(p.numel() for p in start().parameters())
    assert ours.bytes == 12 * 2 * size  # φ and Δ
    if num_workers == 5:
        waiting = {w for groups in seen for w in range(5) if w not in [m for g in groups for m in g]}
        assert len(waiting) > 1
        alone = train(tmp_path, num_workers, interval=1000, steps=12, final_sync=False)
        first = next(w for w in range(5) if w not in [m for g in seen[0] for m in g])
        assert_equal(ours.history[0][1][first], alone.history[0][1][first])


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
def test_gossip_survives_a_worker_that_is_not_finite(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=Pairs(), make=Breaks, nonfinite="skip", participation=Table({12: [1, 2, 3]}))
    assert [r.participants for r in ours.reports[:4]] == [(0, 2, 3)] * 2 + [(2, 3)] * 2
    assert all(torch.isfinite(t).all() for t in ours.history[INTERVAL - 1][1][1].values())
    assert all(torch.isfinite(t).all() for t in ours.module.values())


def test_slow_weights_reach_whom_delta_has_reached_uncoded(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=NoLoCo(), participation=DropOut(0.4), codec=FP4(), interval=2)
    assert len(ours.reports) >= 12
    size = 8 * sum(p.numel() for p in start().parameters())
    for delta, slow in zip(ours.reports[::2], ours.reports[1::2], strict=True):
        assert (delta.step, delta.participants) == (slow.step, slow.participants)
        assert delta.payload_bytes < size / 8 < size == slow.payload_bytes
    assert len({len(r.participants) for r in ours.reports}) > 1


class Breaks(Layers):
    """Worker 1's loss is NaN in step 5."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy: Any = self.trainer.strategy
        broken = strategy.current_worker == 1 and strategy.local_steps == 4
        return super().training_step(batch, batch_idx) * (float("nan") if broken else 1.0)


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.parametrize("make", [Delayed, Eager, partial(Sparta, 0.3, 2, Diloco())])
def test_overlapped_rounds_survive_a_worker_that_is_not_finite(make: Any, tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=make(), make=Breaks, nonfinite="skip")
    assert all(torch.isfinite(t).all() for t in ours.module.values())
    assert all(torch.isfinite(t).all() for w in ours.workers.values() for t in w.values())


# ----------------------------------------------------------------------------------------------------------- DES-LOC


def test_des_loc_without_moments_is_periodic_averaging_bit_for_bit(tmp_path: Path) -> None:
    make = partial(Layers, "adamw")
    assert_same_run(
        train(tmp_path, algorithm=DesLoc(1000, 1000), make=make),
        train(tmp_path, algorithm=PeriodicAveraging(), make=make),
    )


def test_des_loc_leaves_counters_alone_and_wants_moments(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=DesLoc(6, 12), make=partial(Layers, "adamw"), steps=12)
    size = 8 * sum(p.numel() for p in start().parameters())
    assert ours.whats == ["exp_avg", "weights", "exp_avg", "exp_avg_sq", "weights"]
    assert ours.bytes == 5 * size
    default = train(tmp_path, algorithm=DesLoc(), make=partial(Layers, "adamw"), steps=12, interval=2)
    assert [(r.step, r.tag) for r in default.reports if r.tag] == [(6, "exp_avg"), (12, "exp_avg"), (12, "exp_avg_sq")]
    with pytest.raises(RuntimeError, match=r"^DesLoc averages the entry 'exp_avg' of the inner optimizer's state"):
        train(tmp_path, algorithm=DesLoc(2, 4), steps=2)


# ------------------------------------------------------------------------------------------------ SlowMo, groups, GPA


def test_slow_momentum_is_a_heavy_ball_at_a_constant_rate(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=SlowMo(0.6, 0.9))
    ball = train(tmp_path, outer_optimizer_kwargs={"lr": 0.9, "momentum": 0.6})
    for (theta, _), (expected, _) in zip(ours.history, ball.history, strict=True):
        assert difference(theta, expected) <= TOLERANCE
    mean, plain = train(tmp_path, algorithm=SlowMo(0.0)), train(tmp_path, algorithm=PeriodicAveraging())
    assert difference(mean.module, plain.module) <= TOLERANCE


def test_a_group_of_one_is_diloco_and_of_all_periodic_averaging(tmp_path: Path) -> None:
    alone = train(tmp_path, algorithm=Hierarchical(2, WORKERS))
    plain = train(tmp_path)
    assert_equal(alone.history, plain.history)
    together = train(tmp_path, algorithm=Hierarchical(2, 1), outer_optimizer_kwargs={"lr": 1.0})
    every = train(tmp_path, algorithm=PeriodicAveraging(), interval=2)
    for (_, mine), (_, theirs) in zip(together.history, every.history, strict=True):
        for w in range(WORKERS):
            assert difference(mine[w], theirs[w]) <= TOLERANCE
    size = 8 * sum(p.numel() for p in start().parameters())
    assert together.bytes == every.bytes == 10 * size


def test_averaging_as_fast_as_the_gradient_point_is_nesterov_every_step(tmp_path: Path) -> None:
    """μ_x = μ_y = μ: where gradients are taken moves as DiLoCo's single worker with H = 1, lr 1 − μ and momentum μ."""
    for inner in ("sgd", "adamw"):
        settings: dict[str, Any] = {"num_workers": 1, "make": partial(Layers, inner)}
        ours = train(tmp_path, algorithm=GPA(0.8, 0.8), eval_weights="outer", **settings)
        outer = {"lr": 1 - 0.8, "momentum": 0.8, "nesterov": True}
        snoo = train(tmp_path, interval=1, outer_optimizer_kwargs=outer, **settings)
        for (_, mine), (_, theirs) in zip(ours.history, snoo.history, strict=True):
            assert difference(mine[0], theirs[0]) <= TOLERANCE
        assert (ours.bytes, ours.reports) == (0, [])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_gpa_resumes(tmp_path: Path) -> None:
    """From the end of an epoch, which has four steps."""
    settings: dict[str, Any] = {
        **{"algorithm": GPA(0.9), "eval_weights": "outer", "num_workers": 1, "steps": 11},
        "data": regression_data(16, dtype=torch.float64),
    }
    whole = train(tmp_path, **settings, callbacks=[Save([4], tmp_path)])
    resumed = train(tmp_path, **settings, resume=tmp_path / "4.ckpt", seed=99)
    assert_equal(resumed.history, whole.history[4:])
    assert_equal(resumed.module, whole.module)


# ------------------------------------------------------------------------------------------------------------- FedOpt


def test_server_optimizers_by_hand() -> None:
    """τ = 1, g = 2 and then 1; η = 1; β₁ = 0, so that m = g. v starts at 1.

    Adagrad: v = 5, 6. Adam, β₂ = ½: v = ½ + 2 = 2.5, then 1.25 + ½ = 1.75.
    Yogi, β₂ = ½: v = 1 + ½·4 = 3, as 1 < 4; then 3 − ½·1 = 2.5, as 3 > 1.
    """
    expected = {FedAdagrad: (5.0, 6.0), FedAdam: (2.5, 1.75), FedYogi: (3.0, 2.5)}
    for cls, seconds in expected.items():
        p, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        made: Any = cls([p, other], 1.0, 0.0 if cls is FedAdagrad else (0.0, 0.5), 1.0)
        at = 0.0
        for gradient, v in zip((2.0, 1.0), seconds, strict=True):
            p.grad = torch.full((1,), gradient)
            assert made.step(lambda: 7.0) == 7.0
            at -= gradient / (v**0.5 + 1)
            assert made.state[p]["exp_avg_sq"].item() == pytest.approx(v)
            assert p.item() == pytest.approx(at)
        assert other.item() == 0.0
        assert other not in made.state


@pytest.mark.parametrize("cls", [FedAdam, FedYogi, FedAdagrad])
def test_server_optimizers_need_a_learning_rate(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"The outer optimizer can't be built: .*missing 1 required .* 'lr'"):
        DilocoStrategy(2, 2, outer_optimizer_cls=cls)


def test_server_optimizers_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["python -m lightning_diloco"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    path = tmp_path / "given.yaml"
    outer = {"outer_optimizer_cls": "lightning_diloco.FedYogi", "outer_optimizer_kwargs": {"lr": 0.25}}
    strategy = given("DilocoStrategy", num_nodes=2, **outer)
    path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "accelerator": "cpu", "logger": False}}))
    cli = LightningCLI(BoringModel, args=[f"--config={path}"], run=False, seed_everything_default=False)
    assert cli.trainer.strategy._settings.outer_factory([torch.nn.Parameter(torch.ones(1))]).defaults == {
        **{"lr": 0.25, "betas": (0.9, 0.99), "tau": 1e-3}
    }


# ------------------------------------------------------------------------------------------- in a project's company


ALL: dict[str, Callable[[], dict[str, Any]]] = {
    "Delayed": lambda: {"algorithm": Delayed()},
    "Eager": lambda: {"algorithm": Eager()},
    "Sparta": lambda: {"algorithm": Sparta(0.2, 2)},
    "Sparta beside": lambda: {"algorithm": Sparta(0.2, 2, Delayed())},
    "NoLoCo": lambda: {"algorithm": NoLoCo()},
    "DesLoc": lambda: {"algorithm": DesLoc(4, 8)},
    "SlowMo": lambda: {"algorithm": SlowMo(0.5)},
    "Hierarchical": lambda: {"algorithm": Hierarchical(2)},
    "GPA": lambda: {"algorithm": GPA(0.9), "num_nodes": 1, "eval_weights": "outer"},
    "DeMo": lambda: {"algorithm": DeMo(clip=0.5)},
    "Robust": lambda: {"algorithm": Robust(Diloco(), TrimmedMean(1))},
    "Edit": lambda: {"algorithm": Edit(Diloco(), 1, 0.1, 0.1, 3.0)},
    "FedYogi": lambda: {"outer_optimizer_cls": FedYogi, "outer_optimizer_kwargs": {"lr": 0.01}},
}


class Company(Net):
    """BatchNorm, a schedule, and what validation has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        self.seen.append(copy_of(self.state_dict()))


@pytest.mark.parametrize("name", ALL)
def test_batch_norm_schedules_accumulation_and_clipping(name: str) -> None:
    """Steps are optimizer steps, every worker sees the schedule, and the fit ends with the model that others see."""
    settings = {"num_nodes": 4, "diloco_interval": 4, **ALL[name]()}
    strategy, module = DilocoStrategy(**settings), Company()
    clip = {} if name == "DeMo" else {"gradient_clip_val": 0.5}
    L.seed_everything(2, verbose=False)
    data = regression_data(80 * settings["num_nodes"], dtype=torch.float64)
    t = trainer(strategy, max_epochs=1, accumulate_grad_batches=2, precision="64-true", **clip)
    t.fit(module, loader(data), loader(data, shuffle=False))
    assert (strategy.local_steps, t.global_step) == (10, 10)
    assert all(torch.isfinite(v).all() for v in module.state_dict().values() if v.is_floating_point())
    assert_equal(strategy.outer_state_dict(), copy_of(module.state_dict()))
    inner = strategy._engine.context.inner
    assert {g["lr"] for worker in inner.workers.values() for g in worker.control[0]} == {1e-2 * 0.5**3}
    assert module.net[1].num_batches_tracked.item() == 20
    assert len(module.seen) == 2  # a sanity check, and an epoch's end
    moved = {k: float((v - module.seen[0][k]).abs().max()) for k, v in module.state_dict().items()}
    assert all(distance > 0 for distance in moved.values()), moved


@pytest.mark.parametrize("make", [Eager, NoLoCo, partial(GPA, 0.9)], ids=["Eager", "NoLoCo", "GPA"])
def test_weights_written_from_outside_rebase_anchors_and_memory(make: Any, tmp_path: Path) -> None:
    """After step 9 a callback writes zeros into a layer: all workers have them, and its Δ are measured from there."""
    seen: list[Any] = []

    class Write(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                with torch.no_grad():
                    pl_module.layers[1].weight.zero_()

    class Ask(Layers):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            strategy: Any = self.trainer.strategy
            if strategy.local_steps == 9:
                ctx = strategy._engine.context
                of_slots = [s["layers.1.weight"] for s in ctx.memory.slots.values() if "layers.1.weight" in s]
                anchors = [ctx.anchor(w)["layers.1.weight"] for w in ctx.local_workers]
                seen.append([float(t.abs().sum()) for t in (*of_slots, *anchors, self.layers[1].weight.detach())])
            return super().training_step(batch, batch_idx)

    alone = {"num_workers": 1, "eval_weights": "outer"} if "GPA" in str(make) else {}
    train(tmp_path, algorithm=make(), make=Ask, callbacks=[Write()], steps=2 * INTERVAL, **alone)
    assert len(seen) == (1 if alone else WORKERS)
    assert seen[0] == [0.0] * len(seen[0])
    assert len(seen[0]) > 2
