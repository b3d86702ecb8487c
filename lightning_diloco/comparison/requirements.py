"""Optional dependencies of comparisons: imported when they are needed, with an error that names the extra."""

import importlib
from typing import Any


def needed(module: str, purpose: str) -> Any:
    """The module, imported.

    Raises:
        ModuleNotFoundError: the extra ``compare`` is not installed; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{purpose} needs {module.split(".")[0]}. Install it with: pip install "lightning-diloco[compare]"'
        ) from error
