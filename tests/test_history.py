"""Does `simulator.train()` return what the run was like, quietly if asked, for any callable that makes a model?"""

import logging
import sys
from functools import partial
from typing import Any

import pytest
import torch
from helpers import assert_same, copy_of
from simulators import Classifier, Log, classes, simulator, weights
from torch import nn
from torch.nn import functional as F

from lightning_diloco import DilocoSimulator, EvalStats, OuterStepReport, StreamingDiloco, TrainStats
from lightning_diloco.simulator import History


def test_the_history_is_what_hooks_and_reports_say() -> None:
    log = Log()
    s = simulator(eval_dataset=classes(20), **log.hooks())
    history = s.train()
    assert history.train == log.train
    assert history.eval == log.eval
    assert history.outer == s.strategy.reports
    assert [t.local_step for t in history.train] == list(range(1, 11))
    assert [e.local_step for e in history.eval] == [r.step for r in history.outer] == [4, 8, 10]
    assert repr(history) == (
        "History(10 local steps, 3 outer steps, 3 evaluations; last losses:"
        f" train {history.train[-1].loss:.4g}, eval {history.eval[-1].loss:.4g})"
    )
    assert repr(History()) == "History(0 local steps, 0 outer steps, 0 evaluations)"
    again = s.train()
    assert again == history or repr(again) == repr(history)
    assert again.train is not history.train


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_and_the_history_disturb_nothing(accumulate: int) -> None:
    """Without a hook the losses are averaged at the end of the run."""
    more = {"trainer_kwargs": {"accumulate_grad_batches": accumulate}, "max_local_step": 5}
    with_hooks, without = simulator(**Log().hooks(), eval_dataset=classes(20), **more), simulator(**more)
    expected, found = with_hooks.train(), without.train()
    assert len(found.train) == 5
    assert found.train == expected.train
    assert_same(weights(with_hooks), weights(without))


LONG: dict[str, Any] = {"eval_dataset": classes(20), "num_nodes": 2, "num_epochs": 40, "diloco_interval": 100}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DilocoSimulator, History]:
    """600 steps, whose history is more than a pipe holds, in one process."""
    with pytest.MonkeyPatch.context() as here:
        here.chdir(tmp_path_factory.mktemp("long_run"))
        s = simulator(**LONG)
        return s, s.train()


@pytest.mark.processes
@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_history_comes_back_from_processes(method: str, long_run: Any) -> None:
    alone, expected = long_run
    s = simulator(**LONG, strategy_kwargs={"start_method": method}, trainer_kwargs={"devices": 2})
    found = s.train()
    assert len(found.train) == len(expected.train) == 600
    for one, other in zip([*found.train, *found.eval], [*expected.train, *expected.eval], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert (one.local_step, one.epoch, one.num_diloco_steps) == (
            other.local_step,
            other.epoch,
            other.num_diloco_steps,
        )
    assert [(r.step, r.payload_bytes) for r in found.outer] == [(r.step, r.payload_bytes) for r in expected.outer]
    assert (s.strategy.local_steps, s.strategy.outer_steps) == (600, 6)
    assert_same(weights(s), weights(alone))


# ---------------------------------------------------------------------------------------------- table and figure


def by_hand() -> History:
    def report(step: int, outer: int, norm: float, drift: tuple[float, ...], cosine: float | None, n: int) -> Any:
        return OuterStepReport(step, outer, "round", norm, drift, cosine, n, (0, 1), 0.1)

    return History(
        [TrainStats(2.0, 1, 2, 0, 0), TrainStats(1.0, 2, 4, 0, 2), TrainStats(0.5, 3, 6, 1, 2)],
        [EvalStats(1.5, 2, 4, 0, 2, 0.25, 4.5), EvalStats(0.75, 3, 6, 1, 3, None, 2.0)],
        [
            report(2, 1, 3.0, (0.1, 0.3), 0.5, 40),
            report(2, 2, 6.0, (), None, 60),
            report(3, 3, 1.0, (0.5, 0.7), 0.9, 40),
        ],
    )


def test_the_table_has_a_row_per_local_step() -> None:
    pytest.importorskip("pandas")
    frame = by_hand().to_pandas()
    nan = float("nan")
    expected = {
        "train_loss": [2.0, 1.0, 0.5],
        "epoch": [0.0, 0.0, 1.0],
        "eval_loss": [nan, 1.5, 0.75],
        "eval_accuracy": [nan, 0.25, nan],
        "eval_perplexity": [nan, 4.5, 2.0],
        "outer_step": [nan, 2.0, 3.0],
        "pseudo_gradient_norm": [nan, 6.0, 1.0],
        "drift": [nan, nan, 0.6],
        "cosine": [nan, nan, 0.9],
        "payload_bytes": [nan, 100.0, 40.0],
    }
    assert list(frame.columns) == list(expected)
    assert (frame.index.name, list(frame.index)) == ("local_step", [1, 2, 3])
    for name, values in expected.items():
        assert frame[name].tolist() == pytest.approx(values, nan_ok=True), name
    assert History().to_pandas().shape == (0, 10)


def test_the_figure_shows_the_losses_and_the_accuracy() -> None:
    pytest.importorskip("matplotlib")
    loss, accuracy = by_hand().plot().axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines["training, mean of workers"] == [[1, 2.0], [2, 1.0], [3, 0.5]]
    assert lines["evaluation of θ"] == [[2, 1.5], [3, 0.75]]
    assert accuracy.lines[-1].get_xydata().tolist() == [[2, 0.25]]
    assert sorted({x for line in accuracy.lines[:-1] for x in line.get_xdata()}) == [2, 3]  # the outer steps
    assert len(History(by_hand().train).plot().axes) == 1
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize(("method", "package"), [("to_pandas", "pandas"), ("plot", "matplotlib")])
def test_what_is_not_installed_is_named(method: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        getattr(by_hand(), method)()
    assert str(caught.value) == (
        f"`History.{method}` needs {package}. Install it: `pip install 'lightning-diloco[compare]'`."
    )


def test_several_arrivals_in_a_step_are_one_row() -> None:
    pytest.importorskip("pandas")
    s = simulator(strategy_kwargs={"algorithm": StreamingDiloco(2, delay=0, first_sync="staggered")})
    history = s.train()
    frame = history.to_pandas()
    assert len(frame) == 10
    assert frame["payload_bytes"].sum() == sum(r.payload_bytes for r in history.outer)


# ---------------------------------------------------------------------------------------------- model_cls


def make(width: int = 8) -> nn.Module:
    return Classifier(width)


class Factory:
    def __init__(self) -> None:
        self.made = 0

    def build(self, width: int = 8) -> nn.Module:
        self.made += 1
        return Classifier(width)


@pytest.mark.parametrize(
    "model_cls",
    [
        make,
        partial(Classifier, dropout=0.2),
        lambda width=8: Classifier(width),
        Factory().build,
        partial(make, width=8),
    ],
)
def test_any_callable_makes_the_model(model_cls: Any) -> None:
    by_class = simulator()
    by_class.train()
    s = simulator(model_cls=model_cls, model_kwargs={"width": 8})
    s.train()
    assert_same(weights(s), weights(by_class))


def test_a_callable_that_returns_the_same_model_gives_every_run_a_copy() -> None:
    torch.manual_seed(0)
    model = Classifier()
    before = copy_of(model.state_dict())
    s = simulator(model_cls=lambda: model)
    s.train()
    first = weights(s)
    s.train()
    assert_same(weights(s), first)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"model_cls": nn.Linear(4, 3)},
            "`model_cls` (=Linear(...)) is a model, and must be a callable that makes it. Pass its class, or `lambda:"
            " model`, of which every run trains a copy.",
        ),
        (
            {"model_cls": 3},
            "`model_cls` (=3) must be a class derived from torch.nn.Module, or a callable that makes a module.",
        ),
        (
            {"model_cls": dict},
            "`model_cls` (=<class 'dict'>) must be a class derived from torch.nn.Module, or a callable that makes a"
            " module.",
        ),
        (
            {"model_cls": make, "model_kwargs": {"depth": 3}},
            "`model_kwargs` (={'depth': 3}) doesn't fit make: got an unexpected keyword argument 'depth'.",
        ),
        (
            {"loss_fn": nn.CrossEntropyLoss},
            "`loss_fn` (=<class 'torch.nn.modules.loss.CrossEntropyLoss'>) is a class. Pass an instance:"
            " `CrossEntropyLoss()`.",
        ),
        ({"quiet": 1}, "`quiet` (=1) must be True or False."),
    ],
)
def test_bad_input_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        simulator(**arguments)
    assert str(caught.value) == message


def test_what_a_callable_makes_is_checked() -> None:
    def nothing() -> None: ...

    with pytest.raises(ValueError) as caught:
        simulator(model_cls=nothing).train()
    assert str(caught.value) == f"`model_cls` (={nothing!r}) returned a NoneType, but must make a torch.nn.Module."


# ---------------------------------------------------------------------------------------------- quiet


def run(**arguments: Any) -> DilocoSimulator:
    s = DilocoSimulator(
        Classifier,
        num_nodes=2,
        diloco_interval=4,
        batch_size=4,
        loss_fn=F.cross_entropy,
        train_dataset=classes(80),
        **arguments,
    )
    s.train()
    return s


@pytest.mark.filterwarnings("ignore:GPU available but not used")
@pytest.mark.parametrize(
    "devices",
    [
        1,
        pytest.param(("fork", 2), marks=pytest.mark.processes),
        pytest.param(("spawn", 2), marks=[pytest.mark.processes, pytest.mark.slow]),
    ],
)
def test_a_quiet_run_says_nothing(
    devices: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # of libraries, in spawned processes: warnings stay with `quiet`
    method, count = devices if isinstance(devices, tuple) else (None, 1)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    options = {"accelerator": "cpu", "devices": count}
    arguments = {"trainer_kwargs": options, "strategy_kwargs": {"start_method": method}, "seed": 1}
    quiet = run(quiet=True, **arguments)
    assert capfd.readouterr() == ("", "")
    assert [logger.level for logger in loggers] == before
    loud = run(**arguments)
    assert capfd.readouterr() != ("", "")
    assert_same(weights(quiet), weights(loud))


def test_levels_are_restored_after_an_error() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level

    def fail(stats: TrainStats) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        run(quiet=True, train_loss_hook=fail, trainer_kwargs={"accelerator": "cpu"})
    assert logger.level == before
