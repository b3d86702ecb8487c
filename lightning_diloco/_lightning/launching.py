"""How further processes on this machine begin, and how all of them end.

Owns the launcher that starts this script again, the watch over a parent process, and what SIGTERM does. Does not own
what a process does in between. Private because Lightning's launchers and signal handlers have no public names.
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

if TYPE_CHECKING:
    from lightning_diloco._lightning.process import ProcessStrategy

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


def watch_parent(launcher: Any, environment: Any) -> Callable[[], None]:
    """Ends this process when the one that started it is gone: the next exchange, which would fail, may be far away.

    Returns:
        What ends the watch: a process may outlive its parent when it waits for nobody.
    """
    over = threading.Event()
    started = os.environ.get(_PARENT) == str(os.getppid())  # else it is inherited from further up
    started = started or isinstance(launcher, _MultiProcessingLauncher)
    started = started or isinstance(environment, TorchElasticEnvironment)
    if started and os.name != "nt":  # which doesn't tell
        threading.Thread(target=_watch, args=(os.getppid(), over), name="watch over parent", daemon=True).start()
    return over.set


def _watch(parent: int, over: threading.Event) -> None:
    while not over.wait(0.5):
        if os.getppid() != parent:
            print(f"lightning_diloco: process {os.getpid()} ends because its parent {parent} is gone.", file=sys.stderr)
            os._exit(1)


class DilocoSignalConnector(_SignalConnector):
    """What SIGTERM does where several processes train.

    Lightning's handler broadcasts in the middle of whatever the processes are doing, and its loop broadcasts before
    every batch to receive that. Here the signal waits for the next synchronisation, where all learn of it and stop
    after the same step, so that a checkpoint can still be written.
    """

    @override
    def _sigterm_notifier_fn(self, signum: Any, frame: Any) -> None:
        strategy: ProcessStrategy = self.trainer.strategy  # type: ignore[assignment]
        if not strategy.world.stop_requested and strategy.launcher is not None:
            strategy.launcher.kill(signum)
        strategy.world.stop_requested = True
        self.received_sigterm = self.received_sigterm or self.trainer.state.fn != TrainerFn.FITTING
