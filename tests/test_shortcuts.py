"""Hooks around a worker's step are called where somebody hears them, and what they cost otherwise is left out."""

import functools
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, loader, trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

from lightning_diloco import DilocoStrategy
from lightning_diloco._lightning.results import WorkerMetric

WORKERS = 3
OF_CALLBACKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
OF_THE_MODULE = (*OF_CALLBACKS, "optimizer_zero_grad", "configure_gradient_clipping")


def fit(module: L.LightningModule, steps: int = 2, strategy: Any = None, **options: Any) -> L.Trainer:
    t = trainer(strategy or DilocoStrategy(num_nodes=WORKERS, diloco_interval=2), max_steps=steps, **options)
    t.fit(module, loader())
    return t


def hearing(hook: str, heard: list[int | None], base: type) -> Any:
    """The hook of ``base``, which also notes who is active."""
    original = getattr(base, hook)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = self.trainer if isinstance(self, L.LightningModule) else args[0]
        heard.append(trainer.strategy.current_worker)
        return original(self, *args, **kwargs)

    return called


@pytest.mark.parametrize("hook", OF_THE_MODULE)
@pytest.mark.parametrize("how", ["class", "instance", "base class"])
def test_the_module_hears_every_workers(hook: str, how: str, monkeypatch: Any) -> None:
    heard: list[int | None] = []

    class Hearing(Net):
        pass

    module = Hearing()
    called = hearing(hook, heard, L.LightningModule)
    if how == "instance":
        setattr(module, hook, called.__get__(module))
    else:
        monkeypatch.setattr(Hearing if how == "class" else L.LightningModule, hook, called, raising=False)
    fit(module)
    assert heard == [0, 1, 2] * 2


def test_hooks_that_appear_inside_a_step_are_heard_in_it() -> None:
    """From the second worker's turn of the first step on: it attaches both."""
    heard: list[int | None] = []
    ear = type(
        "Ear", (L.Callback,), {"on_before_optimizer_step": hearing("on_before_optimizer_step", heard, L.Callback)}
    )()

    class Attaching(Net):
        def training_step(self, *args: Any) -> Any:
            if (self.trainer.global_step, self.trainer.strategy.current_worker) == (0, 1):
                self.trainer.callbacks.append(ear)
                self.on_after_backward = hearing("on_after_backward", heard, L.LightningModule).__get__(self)
            return super().training_step(*args)

    fit(Attaching())
    assert heard == [1, 1, 2, 2, 0, 0, 1, 1, 2, 2]


def test_nothing_of_a_fit_is_remembered_for_another_module() -> None:
    heard: list[None] = []

    class Tested(Net):
        automatic_optimization = False

        def test_step(self, batch: Any, batch_idx: int) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                self.manual_backward(self.net[0].weight.clone().sum())

        def on_after_backward(self) -> None:
            heard.append(None)

    t = trainer(DilocoStrategy(num_nodes=WORKERS, diloco_interval=2), max_steps=2, inference_mode=False)
    t.fit(Net(), loader())
    t.test(Tested(), loader(shuffle=False), verbose=False)
    assert heard


@pytest.mark.parametrize("hook", OF_CALLBACKS)
@pytest.mark.parametrize("attached", ["before the fit", "between two steps"])
def test_a_callback_hears_every_workers(hook: str, attached: str) -> None:
    heard: list[int | None] = []
    ear = type("Ear", (L.Callback,), {hook: hearing(hook, heard, L.Callback)})()

    class Attach(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                trainer.callbacks.append(ear)

    late = attached != "before the fit"
    fit(Net(), steps=3, callbacks=[Attach() if late else ear])
    assert heard == [0, 1, 2] * (2 if late else 3)


class Loud(Precision):
    """A precision plugin of the project's own."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pre_backward(self, *args: Any) -> Any:
        self.calls.append("backward")
        return super().pre_backward(*args)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("step")
        return super().optimizer_step(*args, **kwargs)


def test_a_precision_plugin_of_the_projects_own_has_its_methods_called() -> None:
    plugin = Loud()
    fit(Net(), steps=1, plugins=[plugin])
    assert plugin.calls == ["step", "backward"] * WORKERS


@pytest.mark.parametrize("method", ["pre_backward", "post_backward", "optimizer_step", "clip_gradients"])
def test_a_patched_precision_plugin_has_its_methods_called(method: str) -> None:
    called: list[None] = []
    plugin = Precision()
    original = getattr(plugin, method)
    setattr(plugin, method, lambda *args, **kwargs: called.append(None) or original(*args, **kwargs))
    fit(Net(), steps=1, plugins=[plugin])
    assert len(called) == WORKERS


def test_a_strategy_that_moves_batches_itself_does_so() -> None:
    moved: list[Any] = []

    class Moving(DilocoStrategy):
        def batch_to_device(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            moved.append(batch)
            return super().batch_to_device(batch, *args, **kwargs)

    fit(Net(), steps=2, strategy=Moving(num_nodes=WORKERS, diloco_interval=2))
    assert len(moved) == 2 * WORKERS


@pytest.mark.parametrize("method", ["start", "profile"])
def test_a_method_that_is_put_on_the_strategy_or_the_profiler_is_called(method: str) -> None:
    strategy, profiler = DilocoStrategy(num_nodes=WORKERS, diloco_interval=2), PassThroughProfiler()
    moved, started = [], []
    original = strategy.batch_to_device
    strategy.batch_to_device = lambda *args, **kwargs: moved.append(None) or original(*args, **kwargs)
    measured = getattr(profiler, method)
    setattr(profiler, method, lambda name: started.append(name) or measured(name))
    fit(Net(), steps=1, strategy=strategy, profiler=profiler)
    assert len(moved) == WORKERS
    assert started.count("[LightningModule]Net.on_after_backward") == WORKERS


def test_in_an_ordinary_fit_nothing_is_announced(monkeypatch: Any) -> None:
    """Of what the workers' passes and steps would announce; hooks around a batch are the loop's."""
    announced: list[str] = []
    for name in ("_call_callback_hooks", "_call_lightning_module_hook"):
        original = getattr(call, name)

        @functools.wraps(original)
        def called(trainer: L.Trainer, hook: str, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            if trainer.strategy.current_worker is not None:
                announced.append(hook)
            return original(trainer, hook, *args, **kwargs)

        monkeypatch.setattr(call, name, called)
    fit(Net(), steps=2)
    assert announced == ["optimizer_step"] * 2 * WORKERS


def test_a_profiler_measures_every_hook_and_changes_no_bit() -> None:
    profiler = SimpleProfiler()
    fit(quiet := Net())
    fit(profiled := Net(), profiler=profiler)
    measured = profiler.recorded_durations
    announced = [f"[LightningModule]Net.{hook}" for hook in OF_THE_MODULE]
    assert [len(measured[name]) for name in announced] == [2 * WORKERS] * len(announced)
    assert all(torch.equal(a, b) for a, b in zip(quiet.parameters(), profiled.parameters(), strict=True))


def test_gradients_are_clipped_although_nobody_hears_of_it() -> None:
    class Norms(Net):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            norms.append(float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in self.parameters()]))))

    norms: list[float] = []
    fit(Norms(), gradient_clip_val=1e-3)
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-3)
    assert len(norms) == 2 * WORKERS


def test_clipping_of_the_modules_own_is_asked_although_nothing_is_to_be_clipped() -> None:
    asked: list[Any] = []

    class Clipping(Net):
        def clip_gradients(self, optimizer: Any, gradient_clip_val: Any = None, **_: Any) -> None:
            asked.append(gradient_clip_val)

    fit(Clipping())
    assert asked == [None] * 2 * WORKERS


def test_a_clip_value_that_is_set_after_the_backward_pass_counts() -> None:
    """In the second step only."""
    norms: list[float] = []

    class Setting(Net):
        def on_after_backward(self) -> None:
            self.trainer.gradient_clip_val = 1e-3 if self.trainer.global_step == 1 else None

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            norms.append(float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in self.parameters()]))))

    fit(Setting())
    assert min(norms[:WORKERS]) > 2e-3
    assert norms[WORKERS:] == pytest.approx([1e-3] * WORKERS, rel=1e-3)


def test_a_logged_value_moves_with_all_it_has_and_only_then() -> None:
    def metric(kind: type[_ResultMetric]) -> _ResultMetric:
        made = kind(_Metadata("training_step", "loss", on_step=True, _sync=_Sync()), is_tensor=True)
        made.update(torch.tensor(2.0), batch_size=4)
        return made

    def devices(of: _ResultMetric) -> list[str]:
        tensors = [of.value, of.cumulated_batch_size, of._forward_cache, *of._defaults.values()]
        return [t.device.type for t in tensors]

    ours, lightnings = metric(WorkerMetric), metric(_ResultMetric)
    kept = ours.value
    assert ours.to(torch.device("cpu")).value is kept
    assert devices(ours.to(torch.device("meta"))) == devices(lightnings.to(torch.device("meta")))
    assert set(devices(ours)) == {"meta"}
    ours._forward_cache = torch.tensor(2.0)  # logged anew, on another device than it was accumulated
    assert set(devices(ours.to(torch.device("meta")))) == {"meta"}


def test_the_logged_values_are_lightnings_after_the_fit() -> None:
    t = fit(Net())
    results = t.fit_loop.epoch_loop._results
    assert results
    assert {type(metric) for metric in results.values()} == {_ResultMetric}
