"""The hyperparameters of module and datamodule that Lightning logs at the start of a fit.

Private because no public name says whether the module's hyperparameters are meant for loggers, nor how Lightning makes
flat names and plain values of them.
"""

from typing import Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict, _sanitize_params
from lightning.pytorch import Trainer


def of_module_and_data(trainer: Trainer) -> dict[str, Any]:
    """What Lightning is about to log, as it is."""
    found: dict[str, Any] = {}
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # a connector of Lightning's puts it there
    for owner in (trainer.lightning_module, datamodule):
        if owner is not None and owner._log_hyperparams:
            found |= {k: v for k, v in owner.hparams_initial.items() if k != "_class_path"}  # LightningCLI's mark
    return found


def flattened(parameters: dict[str, Any]) -> dict[str, Any]:
    """Nested hyperparameters as Lightning's TensorBoardLogger writes them: flat names, and numbers, strings, bools."""
    return dict(_sanitize_params(_flatten_dict(_convert_params(parameters))))
