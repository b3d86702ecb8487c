"""Lightning's Strategy hooks that serve a fit.

Owns the translation between Lightning's hooks and :class:`~lightning_diloco.fit.Fit`. Elsewhere: processes
(``process.py``), the arguments and the values that users read (``strategy.py``).
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.distributed_c10d import _get_default_store
from torch.optim import Optimizer
from typing_extensions import override

from lightning_diloco._lightning import installation, trainer_state
from lightning_diloco._lightning.data import shard, shard_sizes
from lightning_diloco._lightning.hyperparameters import flattened, of_module_and_data
from lightning_diloco._lightning.io import is_truncated
from lightning_diloco._lightning.planning import plan_of
from lightning_diloco._lightning.team import TeamStrategy
from lightning_diloco.algorithms.diloco import is_plain_run
from lightning_diloco.arguments import Reduction, logged_settings
from lightning_diloco.callback import DilocoCallback
from lightning_diloco.engine import file_format
from lightning_diloco.engine.engine import Engine
from lightning_diloco.fit import Fit, FitResults, RunSettings
from lightning_diloco.reporting.progress import announce
from lightning_diloco.state.outer import trial_optimizer


class FitStrategy(TeamStrategy):
    """The hooks of :class:`~lightning_diloco.DilocoStrategy`, in the order in which Lightning calls them.

    Args:
        settings: the arguments that shape a run.
        reduction: order of summation over several processes.
        **processes: as in :class:`~lightning_diloco._lightning.process.ProcessStrategy`.
    """

    def __init__(self, settings: RunSettings, reduction: Reduction, **processes: Any) -> None:
        super().__init__(settings.num_workers, **processes)
        self._settings = settings
        self._reduction = reduction
        trial = trial_optimizer(settings.outer_factory)
        self._is_plain_run = is_plain_run(
            settings.num_workers,
            settings.algorithm,
            trial,
            settings.codec or settings.algorithm.codec,
            settings.participation,
            None if settings.cluster is None else settings.cluster.availability,
        )
        self._callback = DilocoCallback()

    @property
    def _started(self) -> Engine | None:
        """The engine of the present or last fit, if its training loop has begun."""
        return None if self._fit is None else self._fit.started

    @property
    def _counted(self) -> FitResults:
        """What the present or last fit has counted, in this process or in those that it started."""
        if self._returned is not None:
            return self._returned
        return FitResults() if self._fit is None else self._fit.results

    @property
    def _current_worker(self) -> int | None:
        return None if self._started is None else self._started.current_worker

    @property
    @override
    def is_global_zero(self) -> bool:
        """Whether this is process 0, outside turns or in the turn of worker 0."""
        return super().is_global_zero and not self._current_worker

    @property
    def _compared_settings(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "num_nodes": settings.num_workers,
            "diloco_interval": settings.interval,
            **settings.configured,
            "final_sync": settings.final_sync,
            "reduction": self._reduction,
            "diagnostics": settings.diagnostics,
            **vars(settings.policies),
        }

    # ---------------------------------------------------------------------------------------- beginning

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        trainer = self._trainer_here
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._fit = Fit(self._settings, trainer)
        self._attach_callback(trainer.callbacks, self._fit)  # type: ignore[attr-defined]  # a connector of Lightning's puts it there
        installation.install(trainer)

    def _attach_callback(self, callbacks: list[Any], fit: Fit) -> None:
        """Adds the automatic callback, unless the user has added a DilocoCallback."""
        of_the_user = [c for c in fit.reporters if c is not self._callback]
        if self._callback in callbacks and of_the_user:
            callbacks.remove(self._callback)
        elif self._callback not in callbacks and not of_the_user and not self._is_plain_run:
            callbacks.insert(0, self._callback)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        trainer, fit = self._trainer_here, self._fit
        if trainer is not None and fit is not None and trainer.state.fn == TrainerFn.FITTING:
            one_machine = self.num_nodes == 1
            fit.begin(self._world, self._reduction == "ordered" or (self._reduction == "auto" and one_machine))
            self._announce_waits(trainer, fit)
            installation.prepare(trainer, self._world, per_worker=any(c.per_worker for c in fit.reporters))

    def _announce_waits(self, trainer: Trainer, fit: Fit) -> None:
        seconds = [c.announce_waiting for c in fit.reporters if c.announce_waiting is not None]
        if self._world.size > 1 and seconds:
            # a second store would need a port of its own; the group's has no public name
            self._world.watch(_get_default_store(), min(seconds), partial(announce, trainer))

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if self._fit is not None and trainer.state.fn == TrainerFn.FITTING:
            self._fit.set_up(self.optimizers)
            self._log_hyperparameters(trainer, self._fit)

    def _log_hyperparameters(self, trainer: Trainer, fit: Fit) -> None:
        """Before Lightning logs the module's, and not for a Trainer that only runs a tuner, nor for the plain run."""
        reporters = [c for c in fit.reporters if c.hyperparameters]
        wanted = trainer.enable_autolog_hparams and not self._is_plain_run and not trainer_state.only_tunes(trainer)
        if reporters and wanted:
            ours = logged_settings(self._compared_settings, self._settings.partition)
            flat = flattened({**of_module_and_data(trainer), **ours})
            reporters[0].report_hyperparameters(trainer, ours, flat)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        plan = None if self._fit is None else self._fit.next_plan()
        if self._fit is None or plan is None:
            return dataloader
        sharded = shard(dataloader, plan)
        self._fit.note_shards(shard_sizes(sharded), dataloader)
        return sharded

    @override
    def on_train_start(self) -> None:
        fit = self._fit
        assert fit is not None
        fit.train(lambda: plan_of(fit))

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._started is not None:
            self._started.turns.note_step(optimizer)
        return output

    # ---------------------------------------------------------------------------------------- checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        fit = self._fit
        if fit is None or not fit.training or self._alone:
            return super().lightning_module_state_dict()
        return fit.engine.views.state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the first worker's optimizer, which any strategy can resume; also during validation."""
        if self._fit is not None:
            self._fit.follow_optimizers()
        with nullcontext() if self._started is None else self._started.first_workers_state():
            return super().optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if self._alone:
            warnings.warn(
                f"The checkpoint {filepath} is not written: an exception has stopped process {self.global_rank}, and"
                " the state of the other processes' workers is out of reach. Resume from the last file before it.",
                stacklevel=2,
            )
            return
        fit, weights_only = self._fit, "optimizer_states" not in checkpoint
        if fit is not None and not weights_only and not self._is_plain_run:
            state = fit.pack(self.lightning_module)
            if state is not None and self.is_global_zero:
                cycles = self._trainer_here is not None and trainer_state.cycles_loaders(self._trainer_here)
                loops = checkpoint["loops"]
                loader = trainer_state.detach_loader_state(loops, cycles) if fit.shards_data else None
                checkpoint["diloco"] = fit.complete(state, loader, checkpoint["state_dict"])
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        except Exception as error:  # torch raises nearly anything on a damaged file
            if not is_truncated(self.checkpoint_io, checkpoint_path):
                raise
            raise ValueError(
                f"The checkpoint {checkpoint_path} can't be read: it is truncated, or no checkpoint ({error})."
                " Resume from another file."
            ) from error
        trainer, fit = self._trainer_here, self._fit
        if trainer is not None and fit is not None and trainer.state.fn == TrainerFn.FITTING and "diloco" in checkpoint:
            source, settings = f"The checkpoint {checkpoint_path}", self._settings
            file_format.check(checkpoint, settings.num_workers, settings.configured, source)
            state = checkpoint["diloco"]
            file_format.restore_repeated(state, checkpoint["state_dict"])
            if state["loader"] is not None:
                trainer_state.attach_loader_state(checkpoint["loops"], state["loader"])
            fit.use_seed(state["seed"])
        return checkpoint

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        if self._fit is not None:
            self._fit.resume(checkpoint.get("diloco"))

    # ---------------------------------------------------------------------------------------- ending

    @override
    def teardown(self) -> None:
        trainer = self._trainer_here
        super().teardown()
        self._world.rest()
        if self._fit is not None:
            self._fit.close()
        if trainer is not None:
            installation.uninstall(trainer)
