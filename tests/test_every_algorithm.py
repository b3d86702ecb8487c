"""Does every algorithm keep its meaning in a project's company?

``ALGORITHMS`` has all of them, and every test of this file runs over it: an algorithm that is not in the table, or that
lacks an entry for a condition, fails. Whether they compute what their papers say is in test_variants.py and
test_family.py.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import twins
import yaml
from cases import CASES, HALF, NESTEROV, PRESET, Case, assert_agrees, given
from family import (
    BATCH_SIZE,
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
    train,
)
from helpers import Net, assert_equal, copy_of, loader, regression_data, slow_but, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from oracles import joined
from torch import Tensor, nn
from twins import Driven

import lightning_diloco
from lightning_diloco import (
    GPA,
    Cluster,
    Corrupt,
    DataParallel,
    Delayed,
    DelayedNesterov,
    DeMo,
    DesLoc,
    Diloco,
    DilocoStrategy,
    Eager,
    Edit,
    FedAdagrad,
    FedAdam,
    FedYogi,
    GeometricMedian,
    Hierarchical,
    Krum,
    NoLoCo,
    PeriodicAveraging,
    PostLocalSGD,
    Robust,
    SlowMo,
    SparseLoCo,
    Sparta,
    StreamingDiloco,
    SyncAlgorithm,
    Table,
    TrimmedMean,
)
from lightning_diloco.arguments import plain_value

SGD = torch.optim.SGD
STRIDED = [["layers.0", "layers.2", "norm"], ["layers.1", "layers.3"]]  # what two fragments are


@dataclass
class Member:
    """An algorithm.

    Attributes:
        case: a run with N = 4 (or 1), H = 6 and 19 steps, so that the last round is partial; and its oracle.
        in_yaml: arguments of the strategy, as YAML has them, and as Python has them.
        refuses: condition → the first words of the error; others must be served.
    """

    case: Case
    in_yaml: list[tuple[dict[str, Any], dict[str, Any]]]
    refuses: dict[str, str] = field(default_factory=dict)


def algorithm(made: SyncAlgorithm, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """An algorithm with these arguments, in YAML and in Python."""
    return {"algorithm": given(type(made).__name__, **arguments)}, {"algorithm": made}


def server(cls: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """An outer optimizer, in YAML and in Python."""
    kwargs = {"outer_optimizer_kwargs": {"lr": 0.25, **kwargs}}
    name = f"lightning_diloco.{cls.__name__}"
    return {"outer_optimizer_cls": name, **kwargs}, {"outer_optimizer_cls": cls, **kwargs}


def averaging(
    make: Callable[[], SyncAlgorithm], outer: Any, inner: str, twin: Any = twins.Fragments, **form: Any
) -> Case:
    return Case(lambda: {"algorithm": make(), **outer[0]}, twin, {"outer": outer[1], **form}, inner)


def streaming(model: nn.Module, *args: Any, **form: Any) -> twins.Fragments:
    names = [n for n, _ in model.named_parameters()]
    fragments = [[n for n in names if n.rpartition(".")[0] in modules] for modules in STRIDED]
    return twins.Fragments(model, *args, fragments=fragments, **form)


EDIT: dict[str, Any] = {"max_norm": 0.1, "temperature": 0.1, "threshold": 1.2, "decay": 0.3, "filter_warmup": 2}
BESIDE = given("StreamingDiloco", fragments=2)
CORRUPT = given("Corrupt", algorithm=given("Diloco"), workers=[1], scale=-2.0)

ALGORITHMS: dict[str, Member] = {
    "Diloco": Member(averaging(Diloco, NESTEROV, "adamw"), [algorithm(Diloco())]),
    "StreamingDiloco": Member(
        averaging(partial(StreamingDiloco, 2, delay=2, alpha=0.5), HALF, "sgd", streaming, delay=2, alpha=0.5),
        [algorithm(StreamingDiloco(3, alpha=0.5, pattern="sequential"), fragments=3, alpha=0.5, pattern="sequential")],
    ),
    "SparseLoCo": Member(
        averaging(SparseLoCo, ({}, partial(SGD, lr=1.0)), "adamw", **PRESET), [algorithm(SparseLoCo())]
    ),
    "PeriodicAveraging": Member(
        averaging(PeriodicAveraging, ({}, partial(SGD, lr=1.0)), "adamw"), [algorithm(PeriodicAveraging())]
    ),
    "PostLocalSGD": Member(
        Case(lambda: {"algorithm": PostLocalSGD(8)}, twins.DataParallel, {"switch": 8}, "adamw"),
        [algorithm(PostLocalSGD(8), switch=8)],
    ),
    "DataParallel": Member(
        Case(lambda: {"algorithm": DataParallel()}, twins.DataParallel, {}, "adamw"), [algorithm(DataParallel())]
    ),
    "Delayed": Member(CASES["delayed"], [algorithm(Delayed())]),
    "Eager": Member(CASES["eager"], [algorithm(Eager())]),
    "Sparta": Member(
        CASES["SPARTA"], [algorithm(Sparta())], {"skip": r"^`nonfinite` \(='skip'\) can't put a worker right whose"}
    ),
    "Sparta beside Diloco": Member(
        CASES["SPARTA beside DiLoCo"], [algorithm(Sparta(0.1, 4, StreamingDiloco(2)), p=0.1, every=4, beside=BESIDE)]
    ),
    "NoLoCo": Member(CASES["NoLoCo"], [algorithm(NoLoCo(0.5, group=3), lr=0.5, group=3)]),
    "DesLoc": Member(CASES["DES-LOC"], [algorithm(DesLoc(20), exp_avg_interval=20)]),
    "SlowMo": Member(CASES["SlowMo"], [algorithm(SlowMo(0.6), beta=0.6)]),
    "Hierarchical": Member(
        CASES["hierarchical"],
        [
            algorithm(Hierarchical(5), every=5),
            algorithm(Hierarchical(5, [[0, 2], [1, 3]]), every=5, groups=[[0, 2], [1, 3]]),
        ],
    ),
    "GPA": Member(CASES["GPA"], [algorithm(GPA(mu_y=0.5), mu_y=0.5)]),
    "DeMo": Member(
        CASES["DeMo"],
        [algorithm(DeMo(k=8, clip=1.0), k=8, clip=1.0)],
        {"clipping": r"^`gradient_clip_val` \(=0.2\) of the Trainer would"},
    ),
    "DelayedNesterov": Member(  # at equal speeds it is Diloco; others are in test_asynchronous.py
        Case(
            lambda: {"algorithm": DelayedNesterov(), "cluster": Cluster(0.1, bandwidth_gbit_s=1.0, latency_ms=0.0)},
            *(twins.Fragments, {"outer": NESTEROV[1]}, "adamw"),
        ),
        [algorithm(DelayedNesterov(2, activation=0.25), buffer_size=2, activation=0.25)],
    ),
    "Edit": Member(
        averaging(
            partial(Edit, Diloco(), 1, restart_every=2, **EDIT),
            *(NESTEROV, "adamw", twins.Edit),
            **{"warmup": 1, "restart": 2, **EDIT},
        ),
        [algorithm(Edit(Diloco(), 2, 10.0), algorithm=given("Diloco"), warmup_rounds=2, max_norm=10.0)],
    ),
    "Robust": Member(
        averaging(
            lambda: Robust(Corrupt(Diloco(), [1], -2.0), TrimmedMean(1)),
            *(NESTEROV, "sgd", twins.Trimmed),
            **{"f": 1, "corrupt": {1: -2.0}},
        ),
        [
            algorithm(
                Robust(Corrupt(Diloco(), [1], -2.0), Krum(1, 2)),
                **{"algorithm": CORRUPT, "aggregate": given("Krum", f=1, select=2)},
            )
        ],
    ),
    "FedAdam": Member(CASES["FedAdam"], [server(FedAdam, betas=(0.8, 0.9))]),
    "FedYogi": Member(CASES["FedYogi"], [server(FedYogi, tau=0.01)]),
    "FedAdagrad": Member(CASES["FedAdagrad"], [server(FedAdagrad, beta=0.5)]),
}
QUICK = {"StreamingDiloco", "Eager", "FedYogi"}
ALL = slow_but(QUICK, ALGORITHMS)
TOGETHER = {name: member for name, member in ALGORITHMS.items() if member.case.num_workers > 1}


def parts_of(value: Any) -> list[Any]:
    """What stands in a member's settings: algorithms, those inside them, and the outer optimizer."""
    if isinstance(value, SyncAlgorithm):
        return [value, *(part for inner in vars(value).values() for part in parts_of(inner))]
    return [value]


def test_every_public_algorithm_is_in_the_table() -> None:
    public = [value for value in vars(lightning_diloco).values() if isinstance(value, type)]
    kinds = {c for c in public if issubclass(c, SyncAlgorithm | torch.optim.Optimizer) and c is not SyncAlgorithm}
    assert len(kinds) >= 20
    for condition, settings in {
        "the oracle's run": [m.case.strategy() for m in ALGORITHMS.values()],
        "in YAML": [python for m in ALGORITHMS.values() for _, python in m.in_yaml],
    }.items():
        parts = [part for of_run in settings for value in of_run.values() for part in parts_of(value)]
        missing = {c.__name__ for c in kinds if not any(isinstance(p, c) or p is c for p in parts)}
        assert not missing, f"ALGORITHMS lacks {missing}, or their entries for {condition}"


# ---------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("name", ALGORITHMS)
def test_yaml_gives_the_same_as_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["python -m lightning_diloco"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own use of it
    path = tmp_path / "given.yaml"
    for in_yaml, in_python in ALGORITHMS[name].in_yaml:
        strategy = given("DilocoStrategy", num_nodes=WORKERS, diloco_interval=INTERVAL, **in_yaml)
        path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "accelerator": "cpu", "logger": False}}))
        cli = LightningCLI(BoringModel, args=[f"--config={path}"], run=False, seed_everything_default=False)
        made, expected = (s._settings for s in (cli.trainer.strategy, DilocoStrategy(WORKERS, INTERVAL, **in_python)))
        assert type(made.algorithm) is type(expected.algorithm)
        assert plain_value(vars(made.algorithm)) == plain_value(vars(expected.algorithm))
        outer, wanted = (s.outer_factory([nn.Parameter(torch.ones(1))]) for s in (made, expected))
        assert (type(outer), plain_value(outer.defaults)) == (type(wanted), plain_value(wanted.defaults))


# ------------------------------------------------------------------- BatchNorm, a schedule, clipping, a partial round

CLIP = 0.2


def factor(step: int) -> float:
    """A learning rate that falls to 0 within a round, stays there at its end, and comes back."""
    return {11: 0.0, 10: 0.0}.get(step, 1.0 - 0.04 * step)


class Scheduled(Layers):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Normed(Scheduled):
    """With BatchNorm. No biases: before BatchNorm, their gradients would be nothing but rounding."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer, bias=False)
        self.norm = nn.BatchNorm1d(6)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        x = self.norm(self.layers[0](x)).tanh()
        for layer in self.layers[1:-1]:
            x = layer(x).tanh()
        return nn.functional.mse_loss(self.layers[-1](x), y)


class Broken(Normed):
    """Worker 1's loss is NaN in steps 5 and 19, the last, after which all of it is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strategy: Any = self.trainer.strategy
        broken = strategy.current_worker == 1 and strategy.local_steps in (4, STEPS - 1)
        return super().training_step(batch, batch_idx) * (float("nan") if broken else 1.0)


def company(name: str) -> dict[str, Any]:
    """Settings of a run with BatchNorm, a schedule, and, unless it is refused, clipping."""
    member = ALGORITHMS[name]
    options = {} if "clipping" in member.refuses else {"options": {"gradient_clip_val": CLIP}}
    return {**member.case.settings, "make": partial(Normed, member.case.inner), **options}


def with_nan(name: str) -> dict[str, Any]:
    """The same with a worker that isn't finite and is left out, unless that is refused."""
    member = ALGORITHMS[name]
    broken = {"make": partial(Broken, member.case.inner), "nonfinite": "skip"}
    return {**company(name), **({} if "skip" in member.refuses else broken)}


@cache
def run_with_nan(name: str) -> Run:
    """In one process: the first test that asks trains it."""
    return train(Path(), **with_nan(name))


def of_parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if not n.startswith("norm.running") and t.is_floating_point()}


def running(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the workers' running statistics."""
    keys = ("norm.running_mean", "norm.running_var")
    return {n: torch.stack([state[n] for state in states]).mean(0) for n in keys}


@pytest.mark.parametrize("name", ALL)
def test_batch_norm_a_schedule_clipping_and_a_partial_round_agree_with_the_oracle(name: str, tmp_path: Path) -> None:
    """At every step and after the flush.

    An average of running statistics leaves their mean as it is, and they move linearly: their mean is that of workers
    that never average them.
    """
    case, settings = ALGORITHMS[name].case, company(name)
    assert case.steps % INTERVAL
    assert case.flush
    ours = train(tmp_path, **settings)
    clip = CLIP if "options" in settings else None
    twin = case.oracle(Normed().double(), partial(Driven, make=INNER[case.inner], clip=clip, schedule=factor))
    for t, ((theta, workers), (expected, others)) in enumerate(zip(ours.history, twin.history, strict=True), start=1):
        for w, other in enumerate(others):
            assert difference(of_parameters(workers[w]), of_parameters(other)) <= TOLERANCE, f"worker {w}, step {t}"
            assert workers[w]["norm.num_batches_tracked"] == t
        assert difference(of_parameters(theta), of_parameters(expected)) <= TOLERANCE, f"θ, step {t}"
        assert difference(running(list(workers.values())), running(others)) <= TOLERANCE, f"statistics, step {t}"
    expected = {**of_parameters(twin.theta.state_dict()), **running([w.state_dict() for w in twin.workers])}
    for state in (ours.theta, ours.module):
        assert difference({n: state[n] for n in expected}, expected) <= TOLERANCE
    for w, worker in enumerate(twin.workers):
        wanted = {**of_parameters(worker.state_dict()), **{n: t for n, t in expected.items() if "running" in n}}
        assert difference({n: ours.workers[w][n] for n in wanted}, wanted) <= TOLERANCE
    assert ours.steps == (case.steps, len(ours.reports))


@pytest.mark.parametrize("name", [name for name, member in ALGORITHMS.items() if "clipping" in member.refuses])
def test_clipping_that_cannot_be_served_is_refused(name: str, tmp_path: Path) -> None:
    member = ALGORITHMS[name]
    with pytest.raises(MisconfigurationException, match=member.refuses["clipping"]):
        train(tmp_path, **{**member.case.settings, "options": {"gradient_clip_val": CLIP}, "steps": 1})


# -------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_two_half_batches_are_a_whole_one(name: str, tmp_path: Path) -> None:
    case = ALGORITHMS[name].case
    options = {"accumulate_grad_batches": 2}
    ours, twin = train(tmp_path, **case.settings, batch_size=2, options=options), case.oracle()
    assert len(ours.history) == 2 * len(twin.history)
    for t, ((theta, workers), (expected, others)) in enumerate(zip(ours.history[1::2], twin.history, strict=True), 1):
        assert max(difference(workers[w], other) for w, other in enumerate(others)) <= TOLERANCE, f"step {t}"
        assert difference(theta, expected) <= TOLERANCE, f"θ, step {t}"
    assert difference(ours.module, twin.theta.state_dict()) <= TOLERANCE
    assert ours.steps[0] == case.steps


# ------------------------------------------------------------------------------------------------------ a NaN worker


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.parametrize("name", ALL)
def test_without_a_worker_that_is_not_finite_the_others_go_on(name: str, tmp_path: Path) -> None:
    """As if it had taken no part: bit for bit, until it takes part again. Then, and in the end, all are finite."""
    member, settings = ALGORITHMS[name], with_nan(name)
    if "skip" in member.refuses:
        with pytest.raises(ValueError, match=member.refuses["skip"]):
            train(tmp_path, **settings, nonfinite="skip")
        return
    ours = run_with_nan(name)
    if member.case.num_workers == 1:  # nobody else has a mean
        assert_same_run(ours, train(tmp_path, **{**settings, "nonfinite": "propagate"}))
        return
    without = [r for r in ours.reports if 1 not in r.participants]
    assert without
    assert min(r.sent_step for r in without) in (5, 6)
    assert all(r.participants in ((0, 2, 3), (2, 3)) for r in without)
    table = {r.sent_step: [w for w in range(WORKERS) if w != 1] for r in without}
    alone = train(tmp_path, **company(name), participation=Table(table))
    published = settings.get("algorithm", Diloco()).published
    step, again = min((r.sent_step, r.step) for r in ours.reports if 1 in r.participants and r.sent_step >= 5)
    waits = {2 * INTERVAL} if name == "NoLoCo" else set()  # without a group
    assert table.keys() - waits == {min(table), STEPS}  # once, and again as the fit ends
    for (theta, workers), (expected, others) in zip(ours.history[: again - 1], alone.history[: again - 1], strict=True):
        for w in (0, 2, 3):  # but for buffers, of which a worker gets new ones whose gradients are not finite
            assert_equal(of_parameters(workers[w]), of_parameters(others[w]))
        if published == "outer":  # the mean of the replicas has worker 1's
            assert_equal(of_parameters(theta), of_parameters(expected))
    norms, expected_norms = (
        [r.pseudo_gradient_norm for r in run.reports if r.step < again and 1 not in r.participants]
        for run in (ours, alone)
    )
    assert norms == expected_norms
    for state in (ours.theta, ours.module, *ours.workers.values(), ours.history[step - 1][1][1]):
        assert all(t.isfinite().all() for t in state.values())


# -------------------------------------------------------------------------------------------- resume, several processes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("name", ALL)
def test_a_run_resumes_with_what_is_under_way(name: str, tmp_path: Path) -> None:
    """At the end of a round, and in the middle of one; a single worker, whose loader is the user's, between epochs."""
    settings = company(name)
    alone = settings["num_workers"] == 1
    if alone:
        settings["data"] = regression_data(6 * 4, dtype=torch.float64)
    at = (INTERVAL, 2 * INTERVAL if alone else INTERVAL + 3)
    whole = train(tmp_path, **settings, callbacks=[Save(at, tmp_path)])
    for step in at:
        resumed = train(tmp_path, **settings, resume=tmp_path / f"{step}.ckpt", seed=99)
        assert_equal(resumed.history, whole.history[step:], f"history from step {step}")
        for of_run in ("theta", "workers", "module", "bytes", "whats", "steps"):
            assert_equal(getattr(resumed, of_run), getattr(whole, of_run), f"{of_run}, resumed at {step}")
        assert_same_reports(resumed.reports, [r for r in whole.reports if r.step > step])


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    runs = [with_nan(name) for name in TOGETHER]
    for name, result in zip(TOGETHER, several(tmp_path, 2, runs), strict=True):
        assert_same_run(result, run_with_nan(name), measured=1e-9)


PAIRED: dict[str, Callable[[], dict[str, Any]]] = {
    "Eager": lambda: {"algorithm": Eager()},
    "Sparta beside Diloco": lambda: {"algorithm": Sparta(0.3, 2, Diloco())},
    "NoLoCo": lambda: {"algorithm": NoLoCo()},
    "DesLoc": lambda: {"algorithm": DesLoc(4, 9)},
    "SlowMo": lambda: {"algorithm": SlowMo(0.6)},
    "Hierarchical": lambda: {"algorithm": Hierarchical(2, 1)},
    "DeMo": lambda: {"algorithm": DeMo(0.9, 4, 2)},
    "DelayedNesterov": lambda: {
        "algorithm": DelayedNesterov(),
        "cluster": Cluster([0.1, 0.2], bandwidth_gbit_s=1.0, latency_ms=0.0),
    },
    "Edit": lambda: {"algorithm": Edit(Diloco(), 1, restart_every=2, **EDIT)},
    "Robust": lambda: {"algorithm": Robust(Corrupt(Diloco(), [1], -0.5), GeometricMedian())},
    "FedYogi": lambda: {"outer_optimizer_cls": FedYogi, "outer_optimizer_kwargs": {"lr": 0.05, "tau": 0.01}},
}


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.processes
@pytest.mark.slow
def test_four_processes_give_the_same_bits(tmp_path: Path) -> None:
    names = [name for name in TOGETHER if name in PAIRED]
    pairs = {"algorithm": NoLoCo(), "interval": 2, "steps": 8}  # that it draws itself
    *results, paired = several(tmp_path, 4, [*map(with_nan, names), pairs])
    for name, result in zip(names, results, strict=True):
        assert_same_run(result, run_with_nan(name), measured=1e-9)
    assert_same_run(paired, train(tmp_path, **pairs), measured=1e-9)


@pytest.mark.processes
@pytest.mark.slow
def test_two_workers_on_four_processes_have_twice_the_batch(tmp_path: Path) -> None:
    """And one worker four times, which Lightning shuffles."""
    teams = {}
    for name, make in PAIRED.items():
        options = {} if "clipping" in ALGORITHMS[name].refuses else {"options": {"gradient_clip_val": CLIP}}
        module = partial(Scheduled, "adamw" if name == "DesLoc" else "sgd")
        teams[name] = {"num_workers": 2, "make": module, **options, **make()}
    *results, gpa = several(tmp_path, 4, [*teams.values(), CASES["GPA"].settings])
    for (name, settings), result in zip(teams.items(), results, strict=True):
        one = train(tmp_path, **settings, batch_size=2 * BATCH_SIZE)
        for t, ((theta, workers), (expected, others)) in enumerate(zip(result.history, one.history, strict=True), 1):
            assert workers.keys() == others.keys()
            assert max(difference(workers[w], others[w]) for w in workers) <= TOLERANCE, f"{name}, step {t}"
            assert difference(theta, expected) <= TOLERANCE, f"{name}, θ, step {t}"
        assert difference(result.module, one.module) <= TOLERANCE
        assert (result.bytes, result.whats, result.steps) == (one.bytes, one.whats, one.steps)
    assert_agrees(gpa, CASES["GPA"].oracle(batches=[joined(batches_of(4))]))


# ------------------------------------------------------------------------------- what validation and files see, and lr


IN_COMPANY: dict[str, Callable[[], dict[str, Any]]] = {
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


@pytest.mark.parametrize("name", slow_but(["Eager", "GPA", "FedYogi"], IN_COMPANY))
def test_batch_norm_schedules_accumulation_and_clipping(name: str) -> None:
    """Steps are optimizer steps, every worker sees the schedule, and the fit ends with the model that others see."""
    settings = {"num_nodes": 4, "diloco_interval": 4, **IN_COMPANY[name]()}
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
