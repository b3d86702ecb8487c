"""Reports of outer steps, for people and loggers.

Owns reporting only; no training logic. :class:`~lightning_diloco.DilocoStrategy` attaches the callback automatically.
"""

from collections.abc import Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_diloco.algorithms import OuterStepReport

_KEYS = ("diloco/outer_step", "diloco/pseudo_gradient_norm", "diloco/drift", "diloco/cosine", "diloco/comm_bytes")


class DilocoCallback(Callback):
    """Writes every arrival to the Trainer's loggers; attached automatically unless the Trainer has a DilocoCallback.

    ===============================  ==================================================================
    ``diloco/outer_step``            arrivals so far, from 1 (of ``Diloco``: outer steps)
    ``diloco/pseudo_gradient_norm``  ‖Δ‖ of the mean pseudo-gradient
    ``diloco/drift``                 mean over workers of ‖θ_i − θ‖ / ‖θ‖
    ``diloco/cosine``                mean pairwise cosine of the Δ_i; absent with fewer than two workers
    ``diloco/comm_bytes``            bytes that a worker has sent so far, in a single direction: the ledger's total
    ===============================  ==================================================================

    The values go straight to ``trainer.loggers`` at the step of the batch that ended the round, whatever
    ``log_every_n_steps``.

    Args:
        per_worker: log every key that the module logs in training as ``key/worker_i`` too.
        callback_metrics: keys of the table that also appear in ``trainer.callback_metrics``, for ``monitor=`` of
            ModelCheckpoint or EarlyStopping; default none.

    Raises:
        ValueError: ``callback_metrics`` has an unknown key.
        MisconfigurationException: the Trainer's strategy is not a DilocoStrategy.

    Override :meth:`on_outer_step` to act on reports::

        class StopWhenApart(DilocoCallback):
            def on_outer_step(self, trainer, pl_module, report):
                if report.cosine is not None and report.cosine < 0:
                    trainer.should_stop = True
    """

    def __init__(self, per_worker: bool = False, callback_metrics: Sequence[str] = ()) -> None:
        unknown = [key for key in callback_metrics if key not in _KEYS]
        if unknown or isinstance(callback_metrics, str):
            raise ValueError(f"`callback_metrics` (={callback_metrics!r}) must be a sequence of names out of {_KEYS}.")
        self.per_worker = per_worker
        self.callback_metrics = tuple(callback_metrics)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(trainer.strategy, "strategy_name", None) != "diloco":  # by name: the strategy imports this module
            raise MisconfigurationException(
                f"DilocoCallback reports the outer steps of a DilocoStrategy, but the Trainer's strategy is"
                f" {type(trainer.strategy).__name__}. Pass `Trainer(strategy=DilocoStrategy(...))` or remove the"
                " callback."
            )

    def on_outer_step(self, trainer: Trainer, pl_module: LightningModule, report: OuterStepReport) -> None:
        """Called after every arrival, with the new θ in the live module. Override this method to act on reports."""

    def report(self, trainer: Trainer, pl_module: LightningModule, report: OuterStepReport, logging_step: int) -> None:
        """Logs ``report`` and calls :meth:`on_outer_step`; ``Fit.deliver`` calls this.

        Args:
            trainer: the Trainer that fits.
            pl_module: the live module, which holds the new θ.
            report: the outer step.
            logging_step: the step at which Lightning logs the batch that ended the round.
        """
        values: list[float | None] = [
            report.outer_step,
            report.pseudo_gradient_norm,
            sum(report.drift) / len(report.drift) if report.drift else None,
            report.cosine,
            trainer.strategy.ledger.total_bytes,  # type: ignore[attr-defined]
        ]
        metrics = {key: float(value) for key, value in zip(_KEYS, values, strict=True) if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=logging_step)
        trainer.callback_metrics.update({k: torch.tensor(metrics[k]) for k in self.callback_metrics if k in metrics})
        self.on_outer_step(trainer, pl_module, report)
