"""Curves of a run: the callback and the logger that record them.

Owns the rows of a run. A row is a validation: of those during the fit, with the weights that the strategy shows to
validations (``eval_weights``), and of the last one, after the fit, with the outer model θ.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import extract_batch_size
from typing_extensions import override

from lightning_diloco.callback import DilocoCallback, suffix_of
from lightning_diloco.strategy import DilocoStrategy

Row = dict[str, Any]
SIMULATED = "simulated_seconds"
COLUMNS = (
    *("run", "seed", "num_nodes", "diloco_interval", "step", "samples", "bytes", "seconds", SIMULATED, "final"),
    "train_loss",
)
"""Columns of every comparison; the validation's metrics follow."""


class Recorder(L.Callback):
    """Records a row per validation.

    Args:
        progress: called now and then with the completed part of the run, 0 to 1.

    Attributes:
        rows: the validations so far, as dicts with the keys ``step`` (local steps), ``samples`` (that all workers have
            trained on; NaN if a batch has no tensor that tells), ``bytes`` (that a worker has sent, in one direction:
            the ledger's total), ``seconds`` (of training, without validations), ``simulated_seconds`` (of the
            strategy's clock; NaN without one), ``final``, ``train_loss`` (mean over workers and over the batches since
            the row before) and the validation's metrics.
        logger: passes on what Lightning logs in validations; belongs among the Trainer's loggers.
    """

    def __init__(self, progress: Callable[[float], None]) -> None:
        self.rows: list[Row] = []
        self.logger = _Metrics()
        self._progress = progress
        self._step = self._global_step = 0
        self._samples: float = 0
        self._losses: list[torch.Tensor] = []
        self._seconds, self._since, self._shown = 0.0, 0.0, 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:  # Lightning has divided it by the number of batches
            self._losses.append(loss.detach().reshape(()) * trainer.accumulate_grad_batches)
        strategy = trainer.strategy
        if isinstance(strategy, DilocoStrategy):  # workers may be absent, or slower than others
            seen = strategy._engine.seen.samples(strategy._engine.world)
            self._samples = float("nan") if seen is None else seen
        else:
            self._samples += _samples_in(batch)
        if trainer.global_step == self._global_step:
            return  # gradients are accumulating: no local step yet
        self._global_step = trainer.global_step  # with several optimizers it counts all of their steps
        self._step += 1
        now = time.monotonic()
        if now - self._shown > 0.2:
            self._shown = now
            self._progress(_done(trainer, self._step))

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(trainer)
        further = _suffixes(trainer) if trainer.state.fn == TrainerFn.FITTING else ()  # these have just been run
        self.logger.values = {k: v for k, v in self.logger.values.items() if further and k.endswith(further)}

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = {name: value for name, value in self.logger.values.items() if name != "epoch"}
        taken = [name for name in metrics if name in COLUMNS]
        if taken:
            raise ValueError(f"The validation logs {taken[0]!r}, which is a column of comparisons. Log it as another.")
        final = trainer.state.fn != TrainerFn.FITTING
        self.rows.append(
            {
                "step": self._step,
                "samples": self._samples,
                "bytes": trainer.strategy.ledger.total_bytes if isinstance(trainer.strategy, DilocoStrategy) else 0,
                "seconds": self._seconds,
                SIMULATED: self._simulated_seconds(trainer.strategy),
                "final": final,
                "train_loss": self._mean_loss(),
                **metrics,
            }
        )
        self._since = time.perf_counter()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pause(trainer)

    def _pause(self, trainer: L.Trainer) -> None:
        """Adds the time since training was last taken up."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            now = time.perf_counter()
            self._seconds, self._since = self._seconds + now - self._since, now

    def _simulated_seconds(self, strategy: Any) -> float:
        if not isinstance(strategy, DilocoStrategy) or strategy._settings.cluster is None:
            return float("nan")
        return strategy.clock.seconds

    def _mean_loss(self) -> float:
        """Of the batches since the last row; of the last row's again, if there is none."""
        if self._losses:
            mean = float(torch.stack([loss.double().cpu() for loss in self._losses]).mean())
            self._losses.clear()
            return mean
        return float(self.rows[-1]["train_loss"]) if self.rows else float("nan")


class _Metrics(Logger):
    """Keeps the last values of a validation, under the keys that all loggers get."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    @property
    @override
    def name(self) -> None:
        return None

    @property
    @override
    def version(self) -> None:
        return None

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.values.update(metrics)

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def _suffixes(trainer: L.Trainer) -> tuple[str, ...]:
    """Ends of the keys of validations on further sets of weights."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return tuple(suffix_of(which) for c in callbacks if isinstance(c, DilocoCallback) for which in c.validate_on)


def _samples_in(batch: Any) -> float:
    try:
        return extract_batch_size(batch)
    except (MisconfigurationException, RecursionError):
        return float("nan")


def _done(trainer: L.Trainer, step: int) -> float:
    """The completed part of a fit, as far as the Trainer knows how long it is."""
    if trainer.max_steps > 0:
        return min(1.0, step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.num_training_batches
        within = (trainer.fit_loop.batch_idx + 1) / batches if 0 < batches < float("inf") else 0.0
        return min(1.0, (trainer.current_epoch + within) / trainer.max_epochs)
    return 0.0
