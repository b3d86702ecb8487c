"""Small facts that only Lightning's private attributes tell, and the place of the loaders in a checkpoint.

Private because no public name says them; each function has its reason. Changes nothing but the checkpoint it is given.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_diloco.engine.file_format import LoaderState


def logging_step(trainer: Trainer, after_training: bool = False) -> int:
    """The step at which Lightning logs the present batch (after training: the last batch); no public name says it."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped) - int(after_training)


def detach_loader_state(loops: dict[str, Any], cycles: bool) -> LoaderState:
    """Takes the sharded loaders' entry out of ``checkpoint["loops"]``, since no other strategy could resume with it.

    Returns:
        The position in the data: epoch, batches of it that each worker has trained on, number of loaders.
    """
    fit = loops["fit_loop"]
    states = fit["state_dict"].pop("combined_loader", [])
    epoch, batches = fit["epoch_progress"]["current"]["processed"], fit["epoch_loop.batch_progress"]
    consumed = batches["current"]["processed"]  # a batch that was interrupted is read again
    if batches["is_last_batch"] and batches["current"]["completed"] < batches["current"]["processed"]:
        epoch, consumed = epoch + 1, 0  # saved in the last on_train_batch_end: Lightning resumes with the next epoch
    return {
        "epoch": epoch,
        "consumed": consumed,
        "cycles": cycles,
        "loaders": len(states),
    }


def attach_loader_state(loops: dict[str, Any], state: LoaderState) -> None:
    """Gives ``checkpoint["loops"]`` an entry for each sharded loader, as Lightning expects it."""
    loops["fit_loop"]["state_dict"]["combined_loader"] = [state] * state["loaders"]


def cycles_loaders(trainer: Trainer) -> bool:
    """Whether shorter training loaders start again when they end."""
    combined = trainer.fit_loop._combined_loader
    return combined is not None and combined._mode == "max_size_cycle"


def accumulating(trainer: Trainer) -> bool:
    """Whether the present batch only adds to the gradients; no public name says it."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def uses_distributed_sampler(trainer: Trainer) -> bool:
    """The user's ``Trainer(use_distributed_sampler=)``; no public attribute keeps it."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def only_tunes(trainer: Trainer) -> bool:
    """Whether this fit is a ``Tuner``'s, and ends before training; the tuner marks its callback, and nothing else."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(c, (BatchSizeFinder, LearningRateFinder)) and c._early_exit for c in callbacks)


def overfits(trainer: Trainer) -> bool:
    """Whether ``Trainer(overfit_batches=)`` is in force; set on the Trainer without being declared."""
    return bool(trainer.overfit_batches)  # type: ignore[attr-defined]
