"""Launchers of further processes on this machine, and the watch over a process's parent.

Elsewhere: the run of a process (``process.py``), signals (``connectors.py``). Private because Lightning's launchers
have no public names.
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
        """Kills the processes that this process has started, which would wait for it until their timeout."""
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
    """Pickles as the import of a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.name,)


def watch_parent(launcher: Any, environment: Any, spare: Callable[[], bool]) -> Callable[[], None]:
    """Ends this process when its parent has exited: the next collective, which would fail, may be far away.

    Args:
        launcher: the launcher that started this process, if Lightning did.
        environment: the cluster environment.
        spare: whether this process is about to end by itself.

    Returns:
        A function that ends the watch: a process that waits for no other may outlive its parent.
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
