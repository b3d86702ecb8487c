"""How further processes on this machine begin, and how all of them end.

Owns the launcher that starts this script again, the watch over a parent process, and what signals do. Does not own
what a process does in between. Private because Lightning's launchers and signal handlers have no public names.
"""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_diloco._lightning.reclassed import Reclassed

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


class DilocoSignalConnector(Reclassed, _SignalConnector):
    """What signals do where several workers train: they wait until all workers are at the same step.

    Lightning's handler of SIGTERM broadcasts in the middle of whatever the processes are doing, and its loop broadcasts
    before every batch to receive that; its handler of SLURM's requeue signal saves a file in the middle of a worker's
    turn. Here a process notes what it was told, and :meth:`obey` acts where a file can be saved: after a batch of
    training or validation, and after the last outer step. With several processes that is after the next
    synchronisation, where all have learnt of it; when training is over, it is too late for them.

    The handlers stay registered for a while after this class has been taken back, hence no ``super()``.
    """

    @override
    def _sigterm_notifier_fn(self, signum: Any, frame: Any) -> None:
        strategy: ProcessStrategy = self.trainer.strategy  # type: ignore[assignment]
        if strategy.world.size == 1:
            _SignalConnector._sigterm_notifier_fn(self, signum, frame)
            return
        if "stop" not in strategy.world.signals and strategy.launcher is not None:
            strategy.launcher.kill(signum)
        strategy.world.signals.add("stop")
        self.received_sigterm = self.received_sigterm or self.trainer.state.fn != TrainerFn.FITTING

    @override
    def _slurm_sigusr_handler_fn(self, signum: Any, frame: Any) -> None:
        strategy: ProcessStrategy = self.trainer.strategy  # type: ignore[assignment]
        if strategy.in_loop:
            strategy.world.signals.add("requeue")
        elif strategy.world.size == 1 or self.trainer.state.fn != TrainerFn.FITTING:
            _SignalConnector._slurm_sigusr_handler_fn(self, signum, frame)

    def obey(self) -> None:
        """Does, on all processes, what the signals ask for."""
        strategy: ProcessStrategy = self.trainer.strategy  # type: ignore[assignment]
        world = strategy.world
        known = world.signals if world.size == 1 else world.known_signals
        if "requeue" in known and not strategy.in_trial:
            known.discard("requeue")
            world.signals.discard("requeue")
            signum = getattr(strategy.cluster_environment, "requeue_signal", None) or signal.SIGUSR1
            _SignalConnector._slurm_sigusr_handler_fn(self, signum, None)  # type: ignore[arg-type]
        if world.stopping:
            self.received_sigterm = True
