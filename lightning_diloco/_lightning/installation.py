"""Gives a Trainer the loops of ``loops.py`` for a fit, and restores Lightning's at its end.

Owns the re-classing of the live loop objects of a single Trainer; nothing global is patched. Elsewhere: the check of
the private names that the loops use (``surface.py``).
"""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

from lightning_diloco._lightning.data import original
from lightning_diloco._lightning.loops import (
    DilocoEpochLoop,
    DilocoFitLoop,
    DilocoValidationLoop,
)
from lightning_diloco._lightning.optimization import DilocoAutomaticOptimization
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


def install(trainer: Trainer) -> None:
    """Re-classes the loops of ``trainer`` for a fit."""
    for holder in _live_objects(trainer):
        cls = type(holder)
        if cls in _CLASSES.values():
            continue
        if cls not in _CLASSES:
            raise MisconfigurationException(
                f"The Trainer's loops were replaced: found {cls.__module__}.{cls.__name__} in place of"
                " Lightning's loop. DilocoStrategy runs its workers inside Lightning's loops; remove the replacement."
            )
        holder.__class__ = _CLASSES[cls]


def prepare(trainer: Trainer, world: World, per_worker: bool) -> None:
    """Tells the results the processes and workers; ``per_worker`` keeps the logged values of each worker, too."""
    results = trainer.fit_loop.epoch_loop._results
    assert isinstance(results, WorkerResults)
    results.prepare(world, per_worker, trainer._logger_connector)


def uninstall(trainer: Trainer) -> None:
    """Restores the loops' classes, and the user's loaders in the CombinedLoader in which they came."""
    fit_loop = trainer.fit_loop
    if fit_loop._combined_loader is not None:
        fit_loop._combined_loader.reset()  # ends the processes of the sharded loaders, which are about to be dropped
        fit_loop._data_fetcher = None  # its teardown would ask for the length of a loader that is gone
        fit_loop._combined_loader.flattened = [original(loader) for loader in fit_loop._combined_loader.flattened]
    for holder in _live_objects(trainer):
        if isinstance(holder, WorkerResults):
            holder.give_back_metrics()
        give_back(holder)


def _live_objects(trainer: Trainer) -> list[Any]:
    epoch_loop = trainer.fit_loop.epoch_loop
    return [trainer.fit_loop, epoch_loop, epoch_loop.automatic_optimization, epoch_loop.val_loop, epoch_loop._results]
