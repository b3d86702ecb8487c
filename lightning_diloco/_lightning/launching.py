"""How further processes on this machine begin, and how all of them end.

Owns the launchers and the watch over a parent process. Does not own what a process does in between, nor what signals
do (``connectors.py``). Private because Lightning's launchers have no public names.
"""

import importlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from typing_extensions import override

_PARENT = "LIGHTNING_DILOCO_PARENT"  # environment variable: who started this process


class ScriptLauncher(_SubprocessScriptLauncher):
    """Starts this script once more for each further device."""

    @override
    def _call_children_scripts(self) -> None:
        os.environ[_PARENT] = str(os.getpid())
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[_PARENT]

    def end(self) -> None:
        """The processes this one has started would wait for it in vain."""
        for process in self.procs:
            process.kill()
            process.wait()
        self.procs.clear()  # Lightning's observer of this list would kill this process, too


class CopyLauncher(_MultiProcessingLauncher):
    """Copies this process for each device ("spawn", "fork")."""

    def __getstate__(self) -> dict[str, Any]:
        """Spawned processes unpickle this before the project's modules, which may import ``pytorch_lightning``."""
        alias = "lightning_diloco.as_pytorch_lightning"
        return {"imported_first": _Import(alias) if alias in sys.modules else None, **self.__dict__}


class _Import:
    """Is pickled as the import of a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.name,)


def watch_parent(launcher: Any, environment: Any, spare: Callable[[], bool]) -> Callable[[], None]:
    """Ends this process when the one that started it is gone: the next exchange, which would fail, may be far away.

    Args:
        launcher: what started this process, if Lightning did.
        environment: the cluster environment.
        spare: whether this process is about to end by itself.

    Returns:
        What ends the watch: a process may outlive its parent when it waits for nobody.
    """
    over = threading.Event()
    started = os.environ.get(_PARENT) == str(os.getppid())  # else it is inherited from further up
    started = started or isinstance(launcher, _MultiProcessingLauncher)
    started = started or isinstance(environment, TorchElasticEnvironment)
    if started and os.name != "nt":  # which doesn't tell
        arguments = (os.getppid(), over, spare)
        threading.Thread(target=_watch, args=arguments, name="watch over parent", daemon=True).start()
    return over.set


def _watch(parent: int, over: threading.Event, spare: Callable[[], bool]) -> None:
    while not over.wait(0.5):
        if os.getppid() != parent and not spare():
            print(f"lightning_diloco: process {os.getpid()} ends because its parent {parent} is gone.", file=sys.stderr)
            os._exit(1)
