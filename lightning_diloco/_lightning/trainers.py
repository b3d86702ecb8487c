"""A strategy object in several Trainers: every run has the settings of the Trainer that runs.

Owns the settings that a Trainer's constructor puts on its strategy: accelerator, precision, devices, machines, cluster
environment, CheckpointIO and synchronised BatchNorm. Elsewhere: their effect (``ranks.py``, ``process.py``).

Private because a constructor doesn't identify itself: Lightning's ``_AcceleratorConnector`` first reads the strategy's
settings (``_accelerator`` before all else), then sets those that are missing, ``accelerator`` first, and calls
``_configure_launcher`` last. It keeps all settings, so that :meth:`SharedStrategy.connect` can have them set once more.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import LayerSync, Precision, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from typing_extensions import override

from lightning_diloco._lightning.io import AtomicCheckpointIO
from lightning_diloco._lightning.surface import verify


@dataclass
class TrainerSettings:
    """The settings that a Trainer has put on the strategy."""

    accelerator: Accelerator | None = None
    precision: Precision | None = None
    devices: list[torch.device] = field(default_factory=list)
    environment: ClusterEnvironment | None = None
    machines: int = 1
    checkpoint_io: CheckpointIO | None = None
    layer_sync: LayerSync | None = None
    made_by: tuple[Any, ...] = ()  # the objects that the Trainer's connector keeps, too
    has_run: bool = False

    @property
    def processes(self) -> int:
        return max(1, len(self.devices)) * self.machines

    def __str__(self) -> str:
        """The Trainer's arguments."""
        name = "cpu" if self.accelerator is None else self.accelerator.name()
        precision = (self.precision or Precision()).precision
        arguments = [f"accelerator={name!r}", f"devices={[str(d) for d in self.devices]}", f"precision={precision!r}"]
        arguments += [f"num_nodes={self.machines}"] if self.machines > 1 else []
        arguments += ["sync_batchnorm=True"] if self.layer_sync is not None else []
        return f"Trainer({', '.join(arguments)})"


class SharedStrategy(SingleDeviceStrategy):
    """Keeps the settings of Trainers apart from the arguments of the strategy."""

    def __init__(
        self,
        accelerator: Accelerator | None,
        parallel_devices: list[torch.device] | None,
        cluster_environment: ClusterEnvironment | None,
        checkpoint_io: CheckpointIO | None,
        precision_plugin: Precision | None,
    ) -> None:
        self._devices = parallel_devices or []
        self._environment = cluster_environment
        self._asked = False  # whether a Trainer's constructor has asked, and not yet set anything
        self._being_set = False  # whether a Trainer's constructor is setting its settings
        self._given, self._given_before = self._new_settings(), self._new_settings()
        # not SingleDeviceStrategy's, which makes ranks plain attributes
        Strategy.__init__(self, accelerator=accelerator, checkpoint_io=checkpoint_io)
        self._precision_plugin = precision_plugin
        self._default_checkpoint_io = AtomicCheckpointIO()

    def _new_settings(self) -> TrainerSettings:
        return TrainerSettings(devices=self._devices, environment=self._environment)

    # ---------------------------------------------------------------------------------------- a constructor asks

    @property
    def _accelerator(self) -> Accelerator | None:
        """The strategy's argument; a Trainer's constructor begins by reading it."""
        self._asked = True
        return self._accelerator_argument

    @_accelerator.setter
    def _accelerator(self, accelerator: Accelerator | None) -> None:
        self._accelerator_argument = accelerator

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        return self._environment if self._asked else self._given.environment

    @cluster_environment.setter
    def cluster_environment(self, environment: ClusterEnvironment | None) -> None:
        self._given.environment = environment
        if not self._being_set:
            self._environment = environment

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The devices of this machine, one per process; Lightning sets them."""
        return self._devices if self._asked else self._given.devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        self._given.devices = devices
        if not self._being_set:
            self._devices = devices

    # ---------------------------------------------------------------------------------------- and sets

    @property
    @override
    def accelerator(self) -> Accelerator | None:
        return self._accelerator_argument or self._given.accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        if self._asked:
            self._asked, self._being_set = False, True
            self._given, self._given_before = self._new_settings(), self._given
        self._given.accelerator = accelerator

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin or self._given.precision or Precision()

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        self._given.precision = precision_plugin

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        io = self._checkpoint_io or self._given.checkpoint_io or self._default_checkpoint_io
        if isinstance(io, _WrappingCheckpointIO):
            io.checkpoint_io = TorchCheckpointIO()  # as Lightning does; ignored by a wrapper that has a CheckpointIO
        return io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        self._given.checkpoint_io = io

    @property
    def num_nodes(self) -> int:
        """Machines, as everywhere in Lightning, which sets this attribute; the workers are ``num_workers``."""
        return self._given.machines

    @num_nodes.setter
    def num_nodes(self, machines: int) -> None:
        self._given.machines = machines

    @override
    def _configure_launcher(self) -> None:
        """A Trainer's constructor calls this last: devices and machines are known."""
        before, given = self._given_before, self._given
        given.made_by = (
            self.accelerator,
            self.precision_plugin,
            given.environment,
            self._checkpoint_io or given.checkpoint_io,
            given.devices,
            given.machines,
        )
        if self._being_set and before.made_by and not before.has_run and str(before) != str(given):
            self._withdraw()
            raise ValueError(
                f"The strategy belongs to {before}, which hasn't run yet, so {given} can't have it, too. Make a"
                f" {type(self).__name__} for each Trainer, or the second Trainer when the first one has run."
            )
        try:
            self._make_launcher()
        except BaseException:
            self._withdraw()
            raise
        self._being_set = False

    def _make_launcher(self) -> None:
        """Decides how the processes of the present settings start."""

    def _withdraw(self) -> None:
        """A Trainer was refused: the previous Trainer keeps the strategy."""
        if self._being_set:
            self._given, self._being_set = self._given_before, False

    # ---------------------------------------------------------------------------------------- a Trainer runs

    @override
    def connect(self, model: LightningModule) -> None:
        verify(model)
        self._asked = False
        if model._trainer is not None:  # else the Trainer's connectors are used without a run
            self._take_settings_of(model._trainer)
            self._given.has_run = True
        super().connect(model)

    def _take_settings_of(self, trainer: Trainer) -> None:
        """Has the Trainer's settings set once more, where another Trainer was made with the strategy since."""
        connector = trainer._accelerator_connector
        devices, machines = connector._parallel_devices, connector._num_nodes_flag
        objects = (connector.accelerator, connector.precision_plugin, connector.cluster_environment)
        last = self._given
        if (*objects, connector.checkpoint_io, devices, machines) == last.made_by:
            return
        processes = max(1, len(devices)) * machines
        is_copy = not last.made_by  # no constructor has set anything
        if processes == last.processes > 1:
            return  # which have started with the other Trainer's settings: the same ones, else it would be refused
        if not is_copy and (processes > 1 or last.processes > 1):
            raise ValueError(
                f"This Trainer can't run: it has {processes} processes, and its strategy was given to {last} since it"
                f" was made. Make a {type(self).__name__} for each Trainer."
            )
        last.has_run, ran = True, last.has_run  # so that it isn't refused
        self._asked = True
        connector._lazy_init_strategy()
        last.has_run = ran
        if is_copy and processes > 1:
            raise MisconfigurationException(
                f"This Trainer is a copy (from `pickle` or `copy`) of one with {processes} processes, and copies don't"
                " start processes. Make a new Trainer with the same arguments."
            )
