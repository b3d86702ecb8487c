"""Lightning's connectors for signals and for data, as several workers need them, for the time of a run.

Owns the effect of a signal while workers train, and the sampler of a loader that is not sharded among workers. Private
because a Trainer's connectors have no public names.
"""

import signal
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector, _get_distributed_sampler
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_diloco._lightning.reclassed import Reclassed, give_back
from lightning_diloco.comm.world import World
from lightning_diloco.fit import Fit


class _Host(Protocol):
    """The part of the strategy that connectors need."""

    _world: World
    _fit: Fit | None
    launcher: Any
    cluster_environment: Any


def _host(trainer: Trainer) -> _Host:
    strategy: Any = trainer.strategy
    host: _Host = strategy
    return host


class DilocoSignalConnector(Reclassed, _SignalConnector):
    """Signals take effect when all workers are at the same step.

    Lightning's handler of SIGTERM broadcasts in the middle of other collectives, and its loop broadcasts before every
    batch to receive that; its handler of SLURM's requeue signal saves a file in the middle of a worker's turn. Here the
    handler notes the signal, and :meth:`obey` acts where a file can be saved: after a batch of training or validation,
    and after the last outer step. With several processes that is after the next synchronisation, which tells all
    processes of the signal; a signal after the last synchronisation has no effect on them.

    The handlers stay registered for a while after this class has been removed, hence no ``super()``.
    """

    @override
    def _sigterm_notifier_fn(self, signum: Any, frame: Any) -> None:
        strategy = _host(self.trainer)
        if strategy._world.size == 1:
            _SignalConnector._sigterm_notifier_fn(self, signum, frame)
            return
        if "stop" not in strategy._world.signals and strategy.launcher is not None:
            strategy.launcher.kill(signum)
        strategy._world.signals.add("stop")
        self.received_sigterm = self.received_sigterm or self.trainer.state.fn != TrainerFn.FITTING

    @override
    def _slurm_sigusr_handler_fn(self, signum: Any, frame: Any) -> None:
        strategy = _host(self.trainer)
        if strategy._fit is not None and strategy._fit.in_loop:
            strategy._world.signals.add("requeue")
        elif strategy._world.size == 1 or self.trainer.state.fn != TrainerFn.FITTING:
            _SignalConnector._slurm_sigusr_handler_fn(self, signum, frame)

    def obey(self) -> None:
        """Requeues or stops, on all processes, if a signal has asked for it."""
        strategy = _host(self.trainer)
        world, in_trial = strategy._world, strategy._fit is not None and strategy._fit.in_trial
        known = world.signals if world.size == 1 else world.known_signals
        if "requeue" in known and not in_trial:
            known.discard("requeue")
            world.signals.discard("requeue")
            signum = getattr(strategy.cluster_environment, "requeue_signal", None) or signal.SIGUSR1
            _SignalConnector._slurm_sigusr_handler_fn(self, signum, None)  # type: ignore[arg-type]
        if world.stopping:
            self.received_sigterm = True


class DilocoDataConnector(Reclassed, _DataConnector):
    """Gives each process its shard of loaders that workers don't share; Lightning asks parallel strategies only."""

    @override
    def _requires_distributed_sampler(self, dataloader: DataLoader[Any]) -> bool:
        fit = _host(self.trainer)._fit
        shards = fit is not None and fit.plan is not None and fit.shards_data
        return not shards and super()._requires_distributed_sampler(dataloader)

    @override
    def _resolve_sampler(self, dataloader: DataLoader[Any], shuffle: bool, mode: Any = None) -> Any:
        if not self._requires_distributed_sampler(dataloader):
            return dataloader.sampler
        return _get_distributed_sampler(
            dataloader,
            shuffle,
            mode=mode,
            overfit_batches=self.trainer.overfit_batches,  # type: ignore[attr-defined]
            num_replicas=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )


_CLASSES: dict[str, type] = {  # attribute of the Trainer → its class during a run
    "_signal_connector": DilocoSignalConnector,
    "_data_connector": DilocoDataConnector,
}


def install_connectors(trainer: Trainer) -> None:
    """Re-classes the connectors of ``trainer`` for a run."""
    for name, cls in _CLASSES.items():
        getattr(trainer, name).__class__ = cls


def uninstall_connectors(trainer: Trainer) -> None:
    """Gives the connectors their classes back."""
    for name in _CLASSES:
        give_back(getattr(trainer, name))
