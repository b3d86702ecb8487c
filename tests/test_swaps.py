"""Callbacks that swap other weights into the module and later write back what they found there: training goes on as if
they had not been.
"""

import functools
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, differs, loader, regression_data, slow_but, trainer

from lightning_diloco import DilocoStrategy

HOOKS = {
    "on_validation_start": ["on_validation_end", "on_train_epoch_end", "on_train_epoch_start", "on_train_batch_start"],
    "on_validation_epoch_end": ["on_train_epoch_end", "on_train_epoch_start", "on_train_batch_start"],
    "on_train_epoch_end": ["on_train_epoch_start", "on_train_batch_start"],
}
PAIRS = [(swap, back) for swap, backs in HOOKS.items() for back in backs]


class Average(L.Callback):
    """Keeps a moving average; swaps it in at one hook, and what was there back at another."""

    def __init__(self, swap: str, back: str, by: str, saves: bool) -> None:
        self.average: Any = None
        self.stored: Any = None
        self.by, self.saves = by, saves
        setattr(self, swap, self.swap)
        setattr(self, back, self.restore)
        self.swaps = self.restores = 0

    def write(self, module: L.LightningModule, state: Any) -> None:
        if self.by == "load_state_dict":
            module.load_state_dict(state)
        else:
            for key, tensor in module.state_dict().items():
                tensor.data.copy_(state[key])

    def on_train_batch_end(self, trainer, pl_module, *_):
        now = copy_of(pl_module.state_dict())
        if self.average is None:
            self.average = now
        for key, tensor in self.average.items():
            if tensor.is_floating_point():
                tensor.lerp_(now[key], 0.5)

    def swap(self, trainer, pl_module, *_):
        if self.average is not None and self.stored is None:
            self.stored = copy_of(pl_module.state_dict())
            self.write(pl_module, self.average)
            self.swaps += 1

    def restore(self, trainer, pl_module, *_):
        if self.stored is not None:
            if self.saves:
                trainer.save_checkpoint("x.ckpt")
            self.write(pl_module, self.stored)
            self.stored = None
            self.restores += 1


class Watch(L.Callback):
    """Every worker's state, and θ, after the second batch of the third epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            strategy = trainer.strategy
            self.states = [*(strategy.worker_state_dict(w) for w in range(3)), strategy.outer_state_dict()]


def run(callback: L.Callback | None, **kwargs: Any) -> Any:
    L.seed_everything(1, verbose=False)
    watch = Watch()
    callbacks = [watch] if callback is None else [watch, callback]
    t = trainer(
        DilocoStrategy(num_nodes=3, diloco_interval=5, **kwargs),
        max_epochs=3,
        callbacks=callbacks,
        num_sanity_val_steps=0,
    )
    t.fit(Net(dropout=0.2), loader(), loader(regression_data(24, seed=8), shuffle=False))
    return watch.states


@functools.cache
def undisturbed(**kwargs: Any) -> Any:
    return run(None, **kwargs)


@pytest.mark.parametrize("saves", slow_but([True], [False, True]))
@pytest.mark.parametrize("by", slow_but(["data"], ["load_state_dict", "data"]))
@pytest.mark.parametrize(("swap", "back"), PAIRS)
def test_weights_swapped_in_and_out_leave_training_as_it_was(swap: str, back: str, by: str, saves: bool) -> None:
    callback = Average(swap, back, by, saves)
    expected, found = undisturbed(), run(callback)
    assert callback.restores >= 2
    assert differs(found[0], found[1])
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("eval_weights", ["outer", "worker"])
def test_so_it_is_whatever_weights_the_validation_saw(eval_weights: Any) -> None:
    callback = Average("on_validation_start", "on_train_epoch_start", "data", saves=False)
    for a, b in zip(undisturbed(eval_weights=eval_weights), run(callback, eval_weights=eval_weights), strict=True):
        assert_same(a, b)


def test_files_show_what_is_swapped_in_and_a_run_that_resumes_from_them_adopts_it() -> None:
    class Once(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 7:
                before = copy_of(pl_module.state_dict())
                with torch.no_grad():
                    pl_module.net[0].weight.fill_(0.25)
                trainer.save_checkpoint("x.ckpt")
                workers = [trainer.strategy.worker_state_dict(w) for w in range(3)]
                assert all((w["net.0.weight"] == 0.25).all() for w in workers)
                pl_module.load_state_dict(before)

    expected, found = undisturbed(), run(Once())
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)
    file = torch.load("x.ckpt", weights_only=True)
    assert (file["state_dict"]["net.0.weight"] == 0.25).all()
    assert all((w["parameters"]["net.0.weight"] == 0.25).all() for w in file["diloco"]["workers"].values())


class Writes(L.Callback):
    """Writes 7 into a weight, and a number into a buffer, at a step that is followed by a validation."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 4:
            with torch.no_grad():
                pl_module.net[0].weight.fill_(7.0)
                pl_module.net[1].running_mean.fill_(0.2)


def test_a_write_just_before_a_validation_reaches_every_worker() -> None:
    seen: list[Any] = []

    class Looks(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                seen.append((self.net[0].weight.unique().tolist(), self.net[1].running_mean.unique().tolist()))

    t = trainer(
        DilocoStrategy(num_nodes=3, diloco_interval=50), max_steps=6, val_check_interval=2, callbacks=[Writes()]
    )
    t.fit(Looks(), loader(), loader(shuffle=False))
    assert seen == [([7.0], [pytest.approx(0.2)])] * 3


@pytest.mark.slow
def test_an_average_swapped_in_before_a_validation_and_out_inside_it_leaves_training_as_it_was() -> None:
    class Swaps(Average):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module)
            if batch_idx == 7:
                self.swap(trainer, pl_module)

    callback = Swaps("never", "on_validation_end", "data", saves=False)
    expected, found = run(None), run(callback)
    assert callback.restores == 3
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


@pytest.mark.slow
def test_weights_of_the_last_validation_written_back_steps_later_change_nothing_and_that_is_said() -> None:
    class Reloads(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            self.best = copy_of(pl_module.state_dict())

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 10:
                pl_module.load_state_dict(self.best)

    expected = run(None)
    with pytest.warns(
        UserWarning, match="weights that the last validation saw were written into the module some steps"
    ):
        found = run(Reloads())
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)
