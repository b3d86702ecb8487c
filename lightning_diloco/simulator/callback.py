"""The callback that DilocoSimulator attaches: it calls the user's hooks, evaluates θ and writes checkpoint files.

It also collects the history of the run, which comes back from processes that the run starts.

Does not own the loss on a batch (``module.py``) nor the metrics (``metrics.py``).
"""

import logging
import math
import multiprocessing
import os
from collections.abc import Callable
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_diloco.simulator.history import History
from lightning_diloco.simulator.metrics import EvalStats, Evaluation, TrainStats, mean_metric
from lightning_diloco.simulator.module import SimulatorModule, guarded
from lightning_diloco.strategy import DilocoStrategy


class SimulatorCallback(L.Callback):
    """Calls the hooks, evaluates θ and writes the files; the simulator attaches it after the user's callbacks.

    Args:
        train_hook: the simulator's ``train_loss_hook``.
        eval_hook: the simulator's ``eval_loss_hook``.
        batches: batches of an evaluation of θ, in this order; None: no evaluation.
        eval_iters: batches per evaluation, at most all.
        ckpt_interval: outer steps between files; None: only ``final.ckpt``.
        save_dir: folder of the files; None: no files.
        cosine_anneal: whether the run has a schedule; a file of a run without a schedule can't be resumed with a
            schedule, nor the other way round.
        quiet: no log lines of Lightning; in started processes this callback sees to it.

    Attributes:
        history: training and evaluations of the present or last fit; without outer steps.
    """

    def __init__(
        self,
        train_hook: Callable[[TrainStats], None] | None,
        eval_hook: Callable[[EvalStats], None] | None,
        batches: DataLoader[Any] | None,
        eval_iters: int,
        ckpt_interval: int | None,
        save_dir: str | None,
        cosine_anneal: bool,
        quiet: bool = False,
    ) -> None:
        self.history = History()
        self._quiet = quiet
        self._local_losses: list[tuple[torch.Tensor, tuple[int, int, int, int]]] = []  # (sum, count) of each step
        self._cosine_anneal = cosine_anneal
        self._train_hook, self._eval_hook = train_hook, eval_hook
        self._eval_batches, self._eval_iters = batches, eval_iters
        self._ckpt_interval, self._save_dir = ckpt_interval, save_dir
        self._strategy: DilocoStrategy | None = None  # strategy of the present fit
        self._outer_steps = 0  # as of the last batch
        self._outer_steps_before = 0  # outer steps before a resumption that the strategy doesn't count (plain run)
        self._local_steps = self._epoch = 0  # as of the last local step
        self._loss: MeanMetric | None = None  # mean loss since the last local step
        self._step_of_last_end: int | None = None  # where the last pass over the data ended

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a spawned process this comes before Lightning's first log line."""
        vars(self).update(state)
        if self._quiet and multiprocessing.current_process().name != "MainProcess":
            set_level(logging.ERROR)

    def fit_results(self) -> History:
        """What comes back from a started process; see ``_lightning/launching.py``."""
        return self.history

    def load_fit_results(self, data: History) -> None:
        self.history = data

    @override
    def state_dict(self) -> dict[str, Any]:
        strategy = self._strategy
        done = strategy.outer_steps + self._outer_steps_before if strategy else self._outer_steps
        return {"outer_steps": done, "cosine_anneal": self._cosine_anneal}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._outer_steps, saved = state_dict["outer_steps"], state_dict["cosine_anneal"]
        if saved != self._cosine_anneal:
            raise MisconfigurationException(
                f"The checkpoint was written by a run with `cosine_anneal` (={saved}) and can't be resumed with"
                f" `cosine_anneal` (={self._cosine_anneal}), since the learning rate in the file follows that setting."
                f" Resume with `cosine_anneal={saved}`."
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._strategy = _strategy_of(trainer)
        done = self._strategy.outer_steps  # 0 after a resumed plain run
        self._outer_steps_before = max(0, self._outer_steps - done)
        self._outer_steps = done + self._outer_steps_before
        self._local_steps = trainer.global_step
        self.history, self._local_losses = History(), []

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has divided the loss by accumulate_grad_batches. A process without a loss in this batch (its
        # workers pause) must update the metric all the same, since compute() is a collective over all processes.
        known = bool(outputs) and "loss" in outputs
        zero = torch.zeros((), device=_strategy_of(trainer).root_device)
        loss = outputs["loss"] * trainer.accumulate_grad_batches if known else zero
        self._loss = self._loss or mean_metric(loss)
        self._loss.update(loss, int(known))
        if trainer.global_step == self._local_steps:
            return  # gradients are accumulating: no local step yet
        self._local_steps, self._epoch = trainer.global_step, trainer.current_epoch
        metric, self._loss = self._loss, None
        if self._train_hook is None:
            self._local_losses.append((torch.stack((metric.mean_value, metric.weight)), self._where(trainer)))
        else:
            stats = TrainStats(float(metric.compute()), *self._where(trainer))  # over all processes
            self.history.train.append(stats)
            _call(trainer, "train_loss_hook", self._train_hook, stats)
        self._after_outer_step(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._step_of_last_end:
            raise RuntimeError(
                f"A pass over `train_dataset` ended without a local step (local steps: {trainer.global_step}), and so"
                " would the next pass. Look for a StopIteration that the dataset raises, or a hook of the module that"
                " skips batches by returning -1."
            )
        self._step_of_last_end = trainer.global_step

    def _average_losses(self, trainer: L.Trainer) -> None:
        """Over all processes, once: a collective in every step would make them wait for each other."""
        if self._local_losses:
            sums = torch.stack([of_step for of_step, _ in self._local_losses])
            totals = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            steps = zip(totals, self._local_losses, strict=True)
            self.history.train.extend(
                TrainStats(total / count if count else math.nan, *where) for (total, count), (_, where) in steps
            )
            self._local_losses = []

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._average_losses(trainer)
        self._after_outer_step(trainer, pl_module)  # of the last, partial round
        if self._save_dir is not None:
            trainer.save_checkpoint(os.path.join(self._save_dir, "final.ckpt"))

    def _where(self, trainer: L.Trainer) -> tuple[int, int, int, int]:
        strategy = _strategy_of(trainer)
        step, outer = self._local_steps, strategy.outer_steps + self._outer_steps_before
        return step, step * strategy.num_workers, self._epoch, outer

    def _after_outer_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        before, now = self._outer_steps, self._where(trainer)[-1]
        if now == before:
            return
        self._outer_steps = now
        if self._eval_batches is not None:
            loss, accuracy, perplexity = self._evaluate(trainer, module, self._eval_batches)
            named = {"eval_loss": loss, "eval_accuracy": accuracy, "eval_perplexity": perplexity}
            metrics = {key: value for key, value in named.items() if value is not None}
            trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=self._local_steps - 1)  # as Lightning numbers the step's own metrics
            stats = EvalStats(loss, *self._where(trainer), accuracy, perplexity)
            self.history.eval.append(stats)
            if self._eval_hook is not None:
                _call(trainer, "eval_loss_hook", self._eval_hook, stats)
        if self._ckpt_interval is not None and now // self._ckpt_interval > before // self._ckpt_interval:
            assert self._save_dir is not None
            trainer.save_checkpoint(os.path.join(self._save_dir, f"step={self._local_steps:06d}.ckpt"))

    def _evaluate(
        self, trainer: L.Trainer, module: L.LightningModule, batches: DataLoader[Any]
    ) -> tuple[float, float | None, float]:
        """Loss, accuracy and perplexity of θ; does not change weights, modes of submodules or random generators."""
        strategy, precision = _strategy_of(trainer), trainer.precision_plugin
        assert isinstance(module, SimulatorModule)
        assert batches.batch_size is not None
        evaluation = Evaluation()
        left = len(batches.dataset)  # type: ignore[arg-type]
        modes = {m: m.training for m in module.modules()}
        with isolate_rng(), strategy.weights("outer"), torch.no_grad(), precision.forward_context():
            try:
                module.eval()
                for batch in islice(batches, self._eval_iters):
                    batch = module.on_before_batch_transfer(precision.convert_input(batch), 0)
                    batch = strategy.batch_to_device(batch, dataloader_idx=0)
                    loss, output, target = guarded("The model or `loss_fn`", module.evaluate, batch)
                    evaluation.update(loss, output, target, samples=min(left, batches.batch_size))
                    left -= batches.batch_size
            finally:
                for m, training in modes.items():
                    m.training = training
        return evaluation.results()


def set_level(*levels: int) -> list[int]:
    """Sets the level of Lightning's loggers, or their levels; returns the former ones."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger, level in zip(loggers, levels * (len(loggers) // len(levels)), strict=True):
        logger.setLevel(level)
    return before


def _call(trainer: L.Trainer, name: str, hook: Callable[[Any], None], stats: TrainStats) -> None:
    """Calls a hook on process 0; all processes stop if the hook sets ``trainer.should_stop``."""
    if trainer.is_global_zero:
        guarded(f"`{name}`", hook, stats)
    trainer.should_stop = trainer.strategy.reduce_boolean_decision(trainer.should_stop, all=False)


def _strategy_of(trainer: L.Trainer) -> DilocoStrategy:
    assert isinstance(trainer.strategy, DilocoStrategy)
    return trainer.strategy
