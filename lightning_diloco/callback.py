"""Reports of outer steps, for people and loggers.

Owns what is reported, and when; the names and values stand in ``reporting/``. No training logic.
:class:`~lightning_diloco.DilocoStrategy` attaches the callback automatically.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from lightning_diloco.algorithms import OuterStepReport
from lightning_diloco.algorithms.deltas import PseudoGradients
from lightning_diloco.arguments import as_integer, check_bool
from lightning_diloco.reporting import metrics, tensorboard


class DilocoCallback(Callback):
    """Writes every arrival to the Trainer's loggers; attached automatically unless the Trainer has a DilocoCallback.

    =========================================  ========================================================================
    ``diloco/pseudo_gradient_norm``            ‖Δ‖ of the mean pseudo-gradient
    ``diloco/update_norm``                     ‖θ_new − θ_old‖ of the outer step
    ``diloco/outer_norm``                      ‖θ‖ after the step
    ``diloco/drift``                           mean over workers of ‖θ_i − θ‖ / ‖θ‖
    ``diloco/cosine``                          mean pairwise cosine of the Δ_i; absent with fewer than two workers
    ``diloco/norm_ratio``                      mean of the ‖Δ_i‖ over ‖Δ‖: 1 if all workers moved the same way
    ``diloco/momentum_cosine``                 cosine of Δ with the outer optimizer's momentum before the step
    ``diloco/train_loss``                      mean over workers of their mean training losses since the last arrival
    ``diloco/outer_lr``                        learning rate of the outer optimizer
    ``diloco/inner_seconds``                   wall-clock seconds of the workers' turns since the last arrival
    ``diloco/outer_seconds``                   wall-clock seconds of the outer step
    ``diloco/waiting_seconds``                 seconds in which this process waited for others since the last arrival
    ``diloco/outer_step``                      arrivals so far, from 1 (of ``Diloco``: outer steps); not in TensorBoard
    ``diloco/samples``                         samples that all workers have trained on so far; not in TensorBoard
    ``diloco/comm_bytes``                      payload bytes that a worker has sent so far, in one direction: the
                                               ledger's total; not in TensorBoard
    ``diloco/simulated_seconds``               with a ``cluster``: seconds that the run has taken on it so far; not in
                                               TensorBoard
    ``diloco/compute_utilisation``             with a ``cluster``: the fraction of them that its workers have computed
    ``diloco/alive``                           with a ``cluster``: workers that were there when the transfer was sent
    ``diloco/participating``                   with a ``cluster``: of them those that took part in it
    ``diloco/committed``                       with a ``cluster``: of them those whose part is in the mean
    ``diloco/lost_steps``                      with a ``cluster``: local steps so far that never reached the others
    ``diloco/join_bytes``                      with a ``cluster``: bytes that joining workers have received so far
    ``diloco_workers/drift/worker_0``          of every worker: ‖θ_i − θ‖ / ‖θ‖
    ``diloco_workers/norm/worker_0``           of every participant: ‖Δ_i‖
    ``diloco_workers/cosine_with_mean/…``      of every participant: cosine of Δ_i with Δ
    ``diloco_workers/train_loss/worker_0``     of every worker: its mean training loss since the last arrival
    ``diloco_layers/<quantity>/<layer>``       of every layer: pseudo_gradient_norm, update_norm, outer_norm, drift,
                                               cosine, cosine_with_mean, norm_ratio, momentum_cosine
    ``diloco_by_samples/train_loss``           TensorBoard only: the training loss, and what validations log, over the
                                               samples that all workers have trained on instead of over steps
    ``diloco_by_bytes/train_loss``             TensorBoard only: the same over the payload bytes that a worker has sent
    ``diloco/cosine_matrix``                   TensorBoard only: pairwise cosines of the Δ_i as an image, from −1 (blue)
                                               over 0 (white) to 1 (red)
    =========================================  ========================================================================

    The values go straight to ``trainer.loggers`` at the step of the batch that ended the round, whatever
    ``log_every_n_steps``. See :class:`~lightning_diloco.OuterStepReport` for what each one is exactly, and when one is
    absent; ``DilocoStrategy(diagnostics=False)`` leaves only counters and seconds.

    Args:
        per_worker: log every key that the module logs in training as ``key/worker_i`` too.
        callback_metrics: keys of the table (``diloco/…``) that also appear in ``trainer.callback_metrics``, for
            ``monitor=`` of ModelCheckpoint or EarlyStopping; default none.
        validate_on: weights on which every validation of a fit is run, too: "outer" (θ of the last synchronisation),
            "average" (the mean of the replicas), or a worker's id. Every key that the module logs in validation also
            appears as ``key/outer``, ``key/average`` or ``key/worker_0``, in loggers and in ``callback_metrics``, so
            that ``monitor="val_loss/outer"`` works. These runs come before the ordinary validation, whose weights stay
            ``eval_weights``, and which is as without them: callbacks see that one only (but for progress bars; inside
            these runs ``trainer.callbacks`` has no others), while the module's validation hooks run each time. What a
            module writes to a logger without ``self.log`` is written each time, too. Not in the sanity check.
        progress_bar: show the round ("3/20"; "3/?" where the length of the run is unknown) and the local steps of all
            workers per second in the Trainer's progress bar. Algorithms that average gradients show no round.
        announce_waiting: say for which processes this process waits, and at which place in the run, when that takes
            longer than this many seconds; None: never. The lowest process that waits says so, once per wait, above the
            progress bar or in Lightning's log.
        workers: log ``diloco_workers/…``.
        layers: log ``diloco_layers/…``.
        images: log ``diloco/cosine_matrix``.
        layout: give TensorBoard's page Custom Scalars a chart per quantity, with the curves of all workers, or layers.
            TensorBoard reads one layout per run: turn ours off if you write your own.
        hyperparameters: log the strategy's arguments as hyperparameters, ``diloco/num_nodes`` and so on. With
            TensorBoard the run becomes a row of the page HParams, with the module's hyperparameters.
        axes: log ``diloco_by_samples/…`` and ``diloco_by_bytes/…``.
        summary: say at the start and at the end of a fit, in a few lines of Lightning's log, what it does and what it
            has done.
        hints: warn (:class:`~lightning_diloco.DilocoHint`) of what a run will probably regret, once per process.

    Raises:
        ValueError: ``callback_metrics`` has an unknown key.
        MisconfigurationException: the Trainer's strategy is not a DilocoStrategy.

    Override :meth:`on_outer_step` to act on reports, or :meth:`on_before_outer_step` to look at single workers::

        class StopWhenApart(DilocoCallback):
            def on_outer_step(self, trainer, pl_module, report):
                if report.cosine is not None and report.cosine < 0:
                    trainer.should_stop = True
    """

    def __init__(
        self,
        per_worker: bool = False,
        callback_metrics: Sequence[str] = (),
        *,
        validate_on: Sequence[int | Literal["outer", "average"]] = (),
        progress_bar: bool = True,
        announce_waiting: float | None = 5.0,
        workers: bool = True,
        layers: bool = True,
        images: bool = True,
        layout: bool = True,
        hyperparameters: bool = True,
        axes: bool = True,
        summary: bool = True,
        hints: bool = True,
    ) -> None:
        names = (*metrics.SCALARS, *metrics.OF_CLUSTER)
        unknown = [key for key in callback_metrics if key not in names]
        if unknown or isinstance(callback_metrics, str):
            raise ValueError(f"`callback_metrics` (={callback_metrics!r}) must be a sequence of names out of {names}.")
        self.per_worker = check_bool("per_worker", per_worker)
        self.callback_metrics = tuple(callback_metrics)
        self.validate_on = _checked_sets(validate_on)
        self.progress_bar = check_bool("progress_bar", progress_bar)
        if announce_waiting is not None and not 0 < announce_waiting < math.inf:
            raise ValueError(
                f"`announce_waiting` (={announce_waiting!r}) must be a number of seconds > 0, or None: never."
            )
        self.announce_waiting = announce_waiting
        self.workers, self.layers = check_bool("workers", workers), check_bool("layers", layers)
        self.images, self.layout = check_bool("images", images), check_bool("layout", layout)
        self.hyperparameters, self.axes = check_bool("hyperparameters", hyperparameters), check_bool("axes", axes)
        self._has_layout: set[int] = set()  # ids of the loggers that have got one in this fit
        self.summary, self.hints = check_bool("summary", summary), check_bool("hints", hints)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(trainer.strategy, "strategy_name", None) != "diloco":  # by name: the strategy imports this module
            raise MisconfigurationException(
                f"DilocoCallback reports the outer steps of a DilocoStrategy, but the Trainer's strategy is"
                f" {type(trainer.strategy).__name__}. Pass `Trainer(strategy=DilocoStrategy(...))` or remove the"
                " callback."
            )
        num_workers = trainer.strategy.num_workers  # type: ignore[attr-defined]
        unknown = [which for which in self.validate_on if isinstance(which, int) and which >= num_workers]
        if unknown:
            raise MisconfigurationException(
                f"`DilocoCallback(validate_on=)` names worker {unknown[0]}, but `num_nodes` is {num_workers}: ids go"
                f" from 0 to {num_workers - 1}."
            )
        self._has_layout.clear()

    def on_before_outer_step(self, trainer: Trainer, pl_module: LightningModule, deltas: PseudoGradients) -> None:
        """Called when workers are about to send Δ_i or weights, before they are averaged and anything is applied.

        Called on every process, once per transfer; not for gradients, and not if nobody takes part. The module holds θ.
        Δ_i is computed tensor by tensor when it is read, so that a look at one layer costs one layer::

            def on_before_outer_step(self, trainer, pl_module, deltas):
                for worker in deltas.local_workers:
                    print(worker, deltas.delta(worker)["net.0.weight"].norm())

        Args:
            trainer: the Trainer that fits.
            pl_module: the live module, which holds θ as it is before the step.
            deltas: step, tag, names, workers, and ``deltas.delta(worker)``: name → Δ_i. Readable in this hook only.
        """

    def on_outer_step(self, trainer: Trainer, pl_module: LightningModule, report: OuterStepReport) -> None:
        """Called after every arrival, with the new θ in the live module. Override this method to act on reports."""

    @property
    def looks_before_outer_steps(self) -> bool:
        """Whether the class overrides :meth:`on_before_outer_step`."""
        return type(self).on_before_outer_step is not DilocoCallback.on_before_outer_step

    def report(self, trainer: Trainer, pl_module: LightningModule, report: OuterStepReport, logging_step: int) -> None:
        """Logs ``report`` and calls :meth:`on_outer_step`; ``Fit.deliver`` calls this.

        Args:
            trainer: the Trainer that fits.
            pl_module: the live module, which holds the new θ.
            report: the outer step.
            logging_step: the step at which Lightning logs the batch that ended the round.
        """
        total_bytes = _total_bytes(trainer)
        scalars = metrics.scalars(report, total_bytes)
        logged = dict(scalars)
        if self.workers:
            logged |= metrics.of_workers(report)
        if self.layers:
            logged |= metrics.of_layers(report)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._log_to_tensorboard(logger, report, logged, logging_step, total_bytes)
            else:
                logger.log_metrics(logged, step=logging_step)
        trainer.callback_metrics.update({k: torch.tensor(scalars[k]) for k in self.callback_metrics if k in scalars})
        self.on_outer_step(trainer, pl_module, report)

    def _log_to_tensorboard(
        self,
        logger: TensorBoardLogger,
        report: OuterStepReport,
        logged: Mapping[str, float],
        step: int,
        total_bytes: int,
    ) -> None:
        if self.layout and id(logger) not in self._has_layout:
            self._has_layout.add(id(logger))
            tensorboard.log_layout(logger, self.workers, self.layers)
        tensorboard.log_scalars(logger, logged, step)
        loss = metrics.train_loss(report)
        if self.axes and loss is not None:
            tensorboard.log_by_axes(logger, {"train_loss": loss}, report.samples, total_bytes)
        if self.images and report.cosine_matrix is not None and len(report.cosine_matrix) > 1:
            tensorboard.log_matrix(logger, report.cosine_matrix, step)

    def report_validation(self, trainer: Trainer, values: Mapping[str, float], samples: int | None) -> None:
        """Logs what a validation during training has logged, over samples and bytes; ``Fit`` calls this.

        Args:
            trainer: the Trainer that fits.
            values: name → value.
            samples: that all workers have trained on; None: unknown.
        """
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                tensorboard.log_by_axes(logger, values, samples, _total_bytes(trainer))

    def report_hyperparameters(self, trainer: Trainer, ours: dict[str, Any], flat: dict[str, Any]) -> None:
        """Logs the strategy's arguments, before Lightning logs the module's hyperparameters; the strategy calls this.

        Args:
            trainer: the Trainer that is about to fit.
            ours: the strategy's arguments, as flat plain values.
            flat: the same with those of module and datamodule.
        """
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(ours)
            elif trainer.is_global_zero:
                tensorboard.log_hyperparameters(logger, ours, flat)


def _total_bytes(trainer: Trainer) -> int:
    total: int = trainer.strategy.ledger.total_bytes  # type: ignore[attr-defined]
    return total


def suffix_of(which: int | str) -> str:
    """The end of the keys of validations on a further set of weights; see ``validate_on``."""
    return f"/{which}" if isinstance(which, str) else f"/worker_{which}"


def _checked_sets(validate_on: Any) -> tuple[int | Literal["outer", "average"], ...]:
    sets = [] if isinstance(validate_on, str) or not isinstance(validate_on, Sequence) else list(validate_on)
    sets = [which if isinstance(which, str) else as_integer(which) for which in sets]
    known = all(which in ("outer", "average") if isinstance(which, str) else (which or 0) >= 0 for which in sets)
    repeated = len(set(sets)) < len(sets)
    if isinstance(validate_on, str) or not isinstance(validate_on, Sequence) or None in sets or not known or repeated:
        raise ValueError(
            f"`validate_on` (={validate_on!r}) must be a sequence of different sets of weights: 'outer', 'average' or"
            " ids of workers, for example ('outer', 0)."
        )
    return tuple(sets)
