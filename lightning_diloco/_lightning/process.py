"""How a run of one or several processes begins and ends: launcher, torch's process group, the module on the device.

Elsewhere: the launchers (``launching.py``), the collectives in between (``collectives.py``), which process hosts which
worker (``comm/world.py``), the gradients of a worker that has several processes (``team.py``).
"""

import atexit
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import get_spawning_popen
from typing import Any
from weakref import WeakSet

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.distributed import (
    _destroy_dist_connection,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_diloco._lightning.connectors import install_connectors, uninstall_connectors
from lightning_diloco._lightning.launching import CopyLauncher, ScriptLauncher, store_of_attempt, watch_parent
from lightning_diloco._lightning.ranks import RankedStrategy
from lightning_diloco.arguments import StartMethod
from lightning_diloco.comm.world import World, check_layout
from lightning_diloco.fit import Fit, FitResults
from lightning_diloco.reporting import hints


class ProcessStrategy(RankedStrategy):
    """Runs a Trainer in W = devices · machines processes.

    Args:
        num_workers: N, which W must divide or be a multiple of.
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: as in Lightning's
            strategies.
        process_group_backend: torch.distributed's back end; None: by device (gloo for CPUs, nccl for CUDA).
        timeout: how long a process waits for others; None: torch's default.
        start_method: how further processes on this machine are started; None: "popen", in a notebook "fork".
    """

    def __init__(
        self,
        num_workers: int,
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        cluster_environment: ClusterEnvironment | None,
        checkpoint_io: CheckpointIO | None,
        precision_plugin: Precision | None,
        process_group_backend: str | None,
        timeout: timedelta | None,
        start_method: StartMethod | None,
    ) -> None:
        super().__init__(accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin)
        self._num_workers = num_workers
        self._backend, self._timeout, self._start_method = process_group_backend, timeout, start_method
        self._world = World(num_workers)
        self._fit: Fit | None = None  # the present or last fit
        self._machines_announced = False  # whether the environment tells of several machines
        self._returned: FitResults | None = None  # of the last fit, in the process that only started others
        self._group_is_ours = False  # whether this strategy has made torch's process group
        self._end_watch: Callable[[], None] = _nothing

    @property
    def _layer_sync(self) -> LayerSync | None:
        """Lightning puts its plugin for ``Trainer(sync_batchnorm=True)`` here."""
        return self._given.layer_sync

    @_layer_sync.setter
    def _layer_sync(self, layer_sync: LayerSync | None) -> None:
        if layer_sync is not None and self._num_workers > 1:
            self._withdraw()
            raise MisconfigurationException(
                "`Trainer(sync_batchnorm=True)` averages each batch's statistics over workers, and DiLoCo's workers"
                " communicate only every `diloco_interval` steps. Leave it out; `DilocoStrategy(buffers='average')`"
                " averages the running statistics at each synchronisation."
            )
        self._given.layer_sync = layer_sync

    @override
    def _make_launcher(self) -> None:
        self._launcher = None
        asked = f" (`Trainer(devices={self.num_processes}, num_nodes={self._given.machines})`)"
        check_layout(self._num_workers, self._processes, started_by=asked)
        if not self.is_distributed:
            return
        assert self.cluster_environment is not None
        # asked now: Lightning's launcher sets these variables itself
        self._machines_announced = bool({"NODE_RANK", "GROUP_RANK", "MASTER_ADDR"} & os.environ.keys())
        method = self._start_method or ("fork" if _IS_INTERACTIVE else "popen")
        if method == "popen":
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self._given.machines)
        else:
            self._launcher = CopyLauncher(self, start_method=method)  # type: ignore[arg-type]

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        if self._trainer_here is not None:  # else the Trainer's connectors are used without a run
            install_connectors(self._trainer_here)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._fit is not None:
            self._fit.in_loop = False
        size = self._processes
        if size == 1:
            self._world = World(self._num_workers)
            return
        self._end_watch()  # of an earlier run that an exception ended
        # processes that have agreed to stop save their files, and then end by themselves
        self._end_watch = watch_parent(self._launcher, self.cluster_environment, spare=lambda: self._world.stopping)
        if self._num_workers == 1:
            reset_seed()  # as DDP does; several workers have a random stream each
        self.set_world_ranks()
        assert self.cluster_environment is not None
        self._warn_of_missing_machines()
        device = self.root_device
        options: dict[str, Any] = {"device_id": device if device.type != "cpu" else None}
        if self._timeout is not None:
            options["timeout"] = self._timeout
        options |= store_of_attempt()
        backend = self._backend or _get_default_process_group_backend_for_device(device)
        self._group_is_ours = self._group_is_ours or not torch.distributed.is_initialized()
        _init_dist_connection(self.cluster_environment, backend, **options)
        if self._group_is_ours:
            atexit.unregister(_close_group)  # until this run has ended well: it would wait for a lost process
        if self._world.group is not torch.distributed.group.WORLD:  # the group is new after `destroy_process_group`
            self._world = World(self._num_workers, self._rank, size)
            self._world.connect(self._timeout, self._compared_settings)
        self._world.signals, self._world.known_signals = set(), set()

    def _warn_of_missing_machines(self) -> None:
        """Before the wait for other machines, if nothing says that there are any."""
        environment, machines = self.cluster_environment, self._given.machines
        if machines == 1 or self._machines_announced or type(environment) is not LightningEnvironment:
            return
        if self._fit is None or self._fit.gives_hints:
            hints.give(*hints.about_machines(machines, f"{environment.main_address}:{environment.main_port}"))

    @property
    def _compared_settings(self) -> dict[str, Any]:
        """Arguments that must be equal on all processes."""
        return {"num_nodes": self._num_workers}

    @override
    def setup(self, trainer: Trainer) -> None:
        if self._given.layer_sync is not None and self.is_distributed and trainer.state.fn == TrainerFn.FITTING:
            assert self.lightning_module is not None
            self.model = self._given.layer_sync.apply(self.lightning_module)
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        super().model_to_device()
        if self.is_distributed:  # all processes start from process 0's weights, as under DDP
            assert self.model is not None
            tensors = _sendable(self.model)
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            layout = {n: f"{tuple(t.shape)} {t.dtype}{' trained' * (n in trained)}" for n, t in tensors.items()}
            self._world.check_equal("the set-up of the module", layout)
            self._world.broadcast(tensors.values(), 0, "the first process's weights")

    @override
    def teardown(self) -> None:
        trainer = self._trainer_here
        if trainer is not None and not trainer.interrupted:
            self._leave_together()
        self._end_watch()
        if trainer is not None:
            uninstall_connectors(trainer)
            if self._given.layer_sync is not None and self.is_distributed:
                assert self.lightning_module is not None
                self._given.layer_sync.revert(self.lightning_module)
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()
        super().teardown()

    def _leave_together(self) -> None:
        """Waits for the other processes: their parent must not end before them, or they would end, too."""
        try:
            self._world.gather_all("the end of the run")
        except RuntimeError as error:  # the run of this process is complete all the same
            warnings.warn(str(error), stacklevel=2)
            return
        if self._group_is_ours:  # gloo's threads may abort a process that lets them run into the end of Python
            _open_worlds.add(self._world)
            atexit.register(_close_group)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if isinstance(self._launcher, ScriptLauncher) and not self._world.stopping:
            self._launcher.end()

    @property
    def _trainer_here(self) -> Trainer | None:
        """The Trainer that runs in this process; None in a process that only starts others ("spawn", "fork")."""
        module = self.lightning_module
        return None if module is None else module._trainer

    @property
    def _is_being_spawned(self) -> bool:
        """Whether a launcher pickles this strategy for the processes that it starts, which need its full state."""
        return self._only_starts_others and get_spawning_popen() is not None

    @property
    def _only_starts_others(self) -> bool:
        return isinstance(self._launcher, CopyLauncher) and self._world.size == 1


_open_worlds: WeakSet[World] = WeakSet()


def _close_group() -> None:
    """Destroys the process group; its threads end with the last reference to it."""
    for world in list(_open_worlds):
        world.disconnect()
    _destroy_dist_connection()


def _nothing() -> None:
    """A module's function, so that strategies can be pickled."""


def _sendable(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that have values; lazy parameters have none yet."""
    lazy = torch.nn.parameter.is_lazy
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: t.detach() for name, t in named if not lazy(t)}
