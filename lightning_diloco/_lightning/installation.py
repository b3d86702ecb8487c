"""Gives a Trainer the loops of ``loops.py`` for a fit, and takes them back at its end.

Owns the re-classing of the live loop objects of one Trainer; nothing global is patched. Before anything is touched
:func:`verify` checks that the private methods used in this folder are those of the installed Lightning; they are the
same from 2.1 to 2.6.6.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from lightning import __version__ as lightning_version
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from lightning_diloco._lightning.data import original
from lightning_diloco._lightning.loops import (
    DilocoAutomaticOptimization,
    DilocoEpochLoop,
    DilocoFitLoop,
    DilocoValidationLoop,
)
from lightning_diloco._lightning.reclassed import give_back
from lightning_diloco._lightning.results import WorkerResults
from lightning_diloco.comm.world import World

_CLASSES: dict[type, type] = {
    _FitLoop: DilocoFitLoop,
    _TrainingEpochLoop: DilocoEpochLoop,
    _AutomaticOptimization: DilocoAutomaticOptimization,
    _EvaluationLoop: DilocoValidationLoop,
    _ResultCollection: WorkerResults,
}

_SIGNATURES: dict[tuple[type, str], Sequence[str]] = {
    (_FitLoop, "setup_data"): ("self",),
    (_FitLoop, "on_run_start"): ("self",),
    (_FitLoop, "on_advance_start"): ("self",),
    (_FitLoop, "on_advance_end"): ("self",),
    (_FitLoop, "on_run_end"): ("self",),
    (_TrainingEpochLoop, "advance"): ("self", "data_fetcher"),
    (_TrainingEpochLoop, "update_lr_schedulers"): ("self", "interval", "update_plateau_schedulers"),
    (_TrainingEpochLoop, "_build_kwargs"): ("self", "kwargs", "batch", "batch_idx"),
    (_TrainingEpochLoop, "_should_accumulate"): ("self",),
    (_TrainingEpochLoop, "_num_ready_batches_reached"): ("self",),
    (_TrainingEpochLoop, "_should_check_val_fx"): ("self", "data_fetcher"),
    (_EvaluationLoop, "run"): ("self", "args", "kwargs"),  # as its decorator shows them
    (_EvaluationLoop, "_evaluation_step"): ("self", "batch", "batch_idx", "dataloader_idx", "dataloader_iter"),
    (_EvaluationLoop, "increment_progress_to_evaluation_end"): ("self",),
    (_AutomaticOptimization, "run"): ("self", "optimizer", "batch_idx", "kwargs"),
    (_AutomaticOptimization, "_make_closure"): ("self", "kwargs", "optimizer", "batch_idx"),
    (_AutomaticOptimization, "_optimizer_step"): ("self", "batch_idx", "train_step_and_backward_closure"),
    (_AutomaticOptimization, "_training_step"): ("self", "kwargs"),
    (_ManualOptimization, "run"): ("self", "kwargs"),
    (_LoggerConnector, "on_batch_start"): ("self", "batch", "dataloader_idx"),
    (_LoggerConnector, "on_batch_end"): ("self",),
    (_LoggerConnector, "epoch_end_reached"): ("self",),
    (_LoggerConnector, "update_train_step_metrics"): ("self",),
    (_ResultCollection, "update_metrics"): ("self", "key", "value", "batch_size"),
    (_ResultCollection, "metrics"): ("self", "on_step"),
    (_ResultCollection, "valid_items"): ("self",),
    (_ResultCollection, "reset"): ("self", "metrics", "fx"),
    (_DataConnector, "_requires_distributed_sampler"): ("self", "dataloader"),
    (_DataConnector, "_resolve_sampler"): ("self", "dataloader", "shuffle", "mode"),
    (_SignalConnector, "_sigterm_notifier_fn"): ("self", "signum", "_"),
    (_SignalConnector, "_slurm_sigusr_handler_fn"): ("self", "signum", "_"),
    (_SubprocessScriptLauncher, "_call_children_scripts"): ("self",),
}


def verify() -> None:
    """Raises if the installed Lightning's private surface is not the one this package was written for."""
    for (owner, method), expected in _SIGNATURES.items():
        function = getattr(owner, method, None)
        found = None if function is None else tuple(inspect.signature(inspect.unwrap(function)).parameters)
        if found != tuple(expected):
            raise RuntimeError(
                f"lightning {lightning_version} has changed `{owner.__name__}.{method}`: expected the parameters"
                f" {tuple(expected)}, found {found}. lightning_diloco works inside Lightning's loops and needs"
                " lightning>=2.6,<2.7; install that, or a lightning_diloco made for yours."
            )


def install(trainer: Trainer) -> None:
    """Re-classes the loops of ``trainer`` for a fit."""
    verify()
    for holder in _live_objects(trainer):
        cls = type(holder)
        if cls in _CLASSES.values():
            continue
        if cls not in _CLASSES:
            raise MisconfigurationException(
                f"The Trainer's loops were replaced: found a {cls.__module__}.{cls.__name__} where Lightning has one"
                " of its own. DilocoStrategy runs its workers inside Lightning's loops; remove the replacement."
            )
        holder.__class__ = _CLASSES[cls]


def prepare(trainer: Trainer, world: World, per_worker: bool) -> None:
    """Processes and workers are known; ``per_worker`` keeps logged values of each worker, too."""
    results = trainer.fit_loop.epoch_loop._results
    assert isinstance(results, WorkerResults)
    results.prepare(world, per_worker, trainer._logger_connector)


def uninstall(trainer: Trainer) -> None:
    """Gives the loops their classes back, and the user's loaders to the loader collection they came in."""
    fit_loop = trainer.fit_loop
    if fit_loop._combined_loader is not None:
        fit_loop._combined_loader.reset()  # ends the processes of the sharded loaders, which are about to be let go
        fit_loop._data_fetcher = None  # its own teardown would now ask the loader for a length that it no longer knows
        fit_loop._combined_loader.flattened = [original(loader) for loader in fit_loop._combined_loader.flattened]
    for holder in _live_objects(trainer):
        give_back(holder)


def _live_objects(trainer: Trainer) -> list[Any]:
    epoch_loop = trainer.fit_loop.epoch_loop
    return [trainer.fit_loop, epoch_loop, epoch_loop.automatic_optimization, epoch_loop.val_loop, epoch_loop._results]
