"""One process or many: everything that Lightning wants to know about processes, and nothing about DiLoCo.

Owns ranks and devices, torch's process group, and what ``sync_dist`` and ``barrier`` do. Does not own who hosts which
worker (``world.py``), how processes begin and end (``launching.py``), nor the gradients of a worker that has several of
them (``team.py``).

The base is Lightning's strategy for a single device, with the surface of its parallel strategies added: Lightning
refuses ``torch.compile``d modules under other classes, refuses parallel strategies on any Mac with MPS, and counts
subclasses of its DDP strategy as distributed even in one process. It looks for these attributes by name, which is its
way of supporting foreign strategies.
"""

import atexit
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import get_spawning_popen
from typing import Any
from weakref import WeakSet

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _all_gather_ddp_if_available,
    _destroy_dist_connection,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_diloco._lightning.connectors import install_connectors, uninstall_connectors
from lightning_diloco._lightning.launching import CopyLauncher, ScriptLauncher, watch_parent
from lightning_diloco._lightning.trainers import SharedStrategy
from lightning_diloco.arguments import StartMethod
from lightning_diloco.comm.world import World, check_layout
from lightning_diloco.fit import Fit


class _Assignable:
    """A number that the processes give, unless somebody assigns one: Lightning's single-device strategy has attributes.

    What is assigned is what others read; the strategy itself goes by its processes.
    """

    def __init__(self, number: Callable[["ProcessStrategy"], int]) -> None:
        self._number = number

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = f"_assigned_{name}"

    def __get__(self, strategy: Any, owner: type | None = None) -> Any:
        if strategy is None:
            return self
        return vars(strategy)[self._key] if self._key in vars(strategy) else self._number(strategy)

    def __set__(self, strategy: Any, number: int) -> None:
        vars(strategy)[self._key] = number

    def __delete__(self, strategy: Any) -> None:
        del vars(strategy)[self._key]


class ProcessStrategy(SharedStrategy):
    """Runs a Trainer in one process, or in W = devices · machines of them.

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
        self._fit: Fit | None = None  # the present or last one
        self._group_is_ours = False  # whether it was not there before
        self._end_watch: Callable[[], None] = _nothing

    # ---------------------------------------------------------------------------------------- who and where

    @property
    def num_processes(self) -> int:
        """Processes on this machine."""
        return max(1, len(self._given.devices))

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self._processes > 1

    @property
    @override
    def root_device(self) -> torch.device:
        return self._given.devices[self._rank_here] if self._given.devices else torch.device("cpu")

    world_size: int = _Assignable(lambda strategy: strategy._processes)  # type: ignore[assignment]
    global_rank: int = _Assignable(lambda strategy: strategy._rank)  # type: ignore[assignment]
    local_rank: int = _Assignable(lambda strategy: strategy._rank_here)  # type: ignore[assignment]

    @property
    def _processes(self) -> int:
        return self._given.processes

    @property
    def _rank(self) -> int:
        return self.cluster_environment.global_rank() if self.is_distributed and self.cluster_environment else 0

    @property
    def _rank_here(self) -> int:
        return self.cluster_environment.local_rank() if self.is_distributed and self.cluster_environment else 0

    @property
    def node_rank(self) -> int:
        return self.cluster_environment.node_rank() if self.is_distributed and self.cluster_environment else 0

    @property
    @override
    def is_global_zero(self) -> bool:
        return self._rank == 0

    def set_world_ranks(self) -> None:
        """Tells the cluster environment and Lightning's rank-zero decorators who this process is."""
        if self.is_distributed and self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self._rank_here)
            self.cluster_environment.set_world_size(self._processes)
            rank_zero_only.rank = self._rank  # type: ignore[attr-defined]

    @property
    @override
    def _layer_sync(self) -> LayerSync | None:
        return self._given.layer_sync

    @_layer_sync.setter
    def _layer_sync(self, layer_sync: LayerSync | None) -> None:
        if layer_sync is not None and self._num_workers > 1:
            self._withdraw()
            raise MisconfigurationException(
                "`Trainer(sync_batchnorm=True)` makes workers share each batch's statistics, and DiLoCo's workers meet"
                " only every `diloco_interval` steps. Leave it out; `DilocoStrategy(buffers='average')` averages the"
                " running statistics at each synchronisation."
            )
        self._given.layer_sync = layer_sync

    # ---------------------------------------------------------------------------------------- starting and ending

    @override
    def _make_launcher(self) -> None:
        self._launcher = None
        asked = f" (`Trainer(devices={self.num_processes}, num_nodes={self._given.machines})`)"
        check_layout(self._num_workers, self._processes, started_by=asked)
        if not self.is_distributed:
            return
        assert self.cluster_environment is not None
        method = self._start_method or ("fork" if _IS_INTERACTIVE else "popen")
        if method == "popen":
            self._launcher = ScriptLauncher(self.cluster_environment, self.num_processes, self._given.machines)
        else:
            self._launcher = CopyLauncher(self, start_method=method)  # type: ignore[arg-type]

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        trainer = self._trainer_here
        if trainer is None:  # the Trainer's connectors are used without a run
            return
        install_connectors(trainer)

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
        # processes that have agreed to stop end by themselves, when they have saved what they can
        self._end_watch = watch_parent(self._launcher, self.cluster_environment, spare=lambda: self._world.stopping)
        if self._num_workers == 1:
            reset_seed()  # as DDP does; several workers have random streams of their own
        self.set_world_ranks()
        assert self.cluster_environment is not None
        device = self.root_device
        options: dict[str, Any] = {"device_id": device if device.type != "cpu" else None}
        if self._timeout is not None:
            options["timeout"] = self._timeout
        backend = self._backend or _get_default_process_group_backend_for_device(device)
        self._group_is_ours = self._group_is_ours or not torch.distributed.is_initialized()
        _init_dist_connection(self.cluster_environment, backend, **options)
        if self._group_is_ours:
            atexit.unregister(_close_group)  # until this run has ended well: it would wait for a lost peer
        if self._world.group is not torch.distributed.group.WORLD:  # another one after `destroy_process_group`
            self._world = World(self._num_workers, self._rank, size)
            self._world.connect(self._timeout, self._compared_settings)
        self._world.signals, self._world.known_signals = set(), set()

    @property
    def _compared_settings(self) -> dict[str, Any]:
        """What must be the same on all processes."""
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
        if self.is_distributed:  # gathered starts from process 0's weights, as under DDP
            assert self.model is not None
            tensors = _shareable(self.model)
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            kinds = {n: f"{tuple(t.shape)} {t.dtype}{' trained' * (n in trained)}" for n, t in tensors.items()}
            self._world.check_equal("the set-up of the module", kinds)
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
        """A process that has started others and is done before them must not look like one that died."""
        try:
            self._world.gather_all("the end of the run")
        except RuntimeError as error:  # this one's work is done all the same
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

    # ---------------------------------------------------------------------------------------- what users may call

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._alone:
            self._world.gather_all("a barrier", detail=" ".join(map(repr, args)))  # whose names may differ
        if args == ("run-stage",) and self._fit is not None and self._fit.in_trial:
            self._fit.end_trial()  # the Trainer's word for: all is set up, the fit proper begins

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._world.size == 1 or self._alone:
            return obj
        objects = [obj]
        self._world.gather_all("a broadcast")
        torch.distributed.broadcast_object_list(objects, src)
        return objects[0]

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean", what: str = "", **_: Any) -> Any:
        if self._world.size == 1 or self._alone or not isinstance(tensor, Tensor):
            return tensor
        self._world.gather_all(f"a reduction {what or '(sync_dist=True does one)'}")
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._world.size == 1 or self._alone:
            return decision
        votes = self.reduce(torch.tensor(int(decision), device=self.root_device), reduce_op="sum")
        return bool(votes == self._world.size) if all else bool(votes)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        if self._world.size == 1 or self._alone:
            return tensor
        self._world.gather_all("all_gather")
        return _all_gather_ddp_if_available(tensor, group, sync_grads)

    @property
    def _alone(self) -> bool:
        """Whether an exception ends this process while the others may be anywhere."""
        interrupted = self._trainer_here is not None and self._trainer_here.interrupted
        return interrupted and self._world.size > 1 and not self._world.stopping

    @property
    def _trainer_here(self) -> Trainer | None:
        """The Trainer that runs in this process: none in one that only starts others ("spawn", "fork")."""
        module = self.lightning_module
        return None if module is None else module._trainer

    @property
    def _is_being_spawned(self) -> bool:
        """Whether a launcher pickles this strategy for the processes that it starts, which need all of it."""
        return self._only_starts_others and get_spawning_popen() is not None

    @property
    def _only_starts_others(self) -> bool:
        return isinstance(self._launcher, CopyLauncher) and self._world.size == 1


_open_worlds: WeakSet[World] = WeakSet()


def _close_group() -> None:
    """Gives the process group back, whose threads end with the last reference to it."""
    for world in list(_open_worlds):
        world.disconnect()
    _destroy_dist_connection()


def _nothing() -> None:
    """A module's function, so that strategies can be pickled."""


def _shareable(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that can be sent; lazy ones have no values yet."""
    lazy = torch.nn.parameter.is_lazy
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: t.detach() for name, t in named if not lazy(t)}
