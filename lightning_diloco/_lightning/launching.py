"""Launchers of further processes on this machine, and the watch over a process's parent.

Elsewhere: the run of a process (``process.py``), signals (``connectors.py``). Private because Lightning's launchers
have no public names.
"""

import importlib
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous
from typing_extensions import override

_RESULTS = "diloco_results"  # the entry of Lightning's extra results with the path of ours
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
    """Copies this process for each device ("spawn", "fork"), and gets back what process 0 has counted in a fit.

    So do callbacks with the methods ``fit_results() -> plain data``, called in process 0, and
    ``load_fit_results(data)``, called here.
    """

    @override
    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            trainer.strategy._returned = None
        return super().launch(function, *args, trainer=trainer, **kwargs)

    @override
    def get_extra_results(self, trainer: Any) -> dict[str, Any]:
        extra: dict[str, Any] = super().get_extra_results(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            results = trainer.strategy._counted, [c.fit_results() for c in _with_results(trainer)]
            # in a file: Lightning's pipe holds 64 KiB, and its reader first waits for this process to end
            handle, extra[_RESULTS] = tempfile.mkstemp(".diloco")
            with os.fdopen(handle, "wb") as file:
                pickle.dump(results, file)
        return extra

    @override
    def update_main_process_results(self, trainer: Any, extra: dict[str, Any]) -> None:
        super().update_main_process_results(trainer, extra)
        if _RESULTS in extra:
            with open(extra[_RESULTS], "rb") as file:
                trainer.strategy._returned, results = pickle.load(file)
            os.remove(extra[_RESULTS])
            for callback, data in zip(_with_results(trainer), results, strict=True):
                callback.load_fit_results(data)

    def __getstate__(self) -> dict[str, Any]:
        """Spawned processes unpickle this before the project's modules, which may import ``pytorch_lightning``."""
        alias = "lightning_diloco.as_pytorch_lightning"
        return {"imported_first": _Import(alias) if alias in sys.modules else None, **self.__dict__}


def _with_results(trainer: Any) -> list[Any]:
    return [c for c in trainer.callbacks if hasattr(c, "fit_results")]


class _Import:
    """Pickles as the import of a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (self.name,)


def store_of_attempt() -> dict[str, Any]:
    """Arguments of ``init_process_group`` for processes that torchrun has started again on a single machine.

    torchrun keeps its store when it restarts them, with the addresses of the processes that are gone, and a process may
    read such an address and wait for it in vain. So every attempt has a part of the store to itself. Over several
    machines the counts of attempts may differ; there ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` gives each a new store.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    size = os.environ.get("WORLD_SIZE")
    if attempt == "0" or size is None or os.environ.get("LOCAL_WORLD_SIZE") != size:
        return {}
    store, _, _ = next(rendezvous("env://"))
    return {"store": PrefixStore(f"attempt {attempt}", store)}


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
