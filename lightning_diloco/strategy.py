"""DilocoStrategy: the one line that turns a Lightning project into a DiLoCo experiment.

Owns the constructor, Lightning's Strategy hooks, and the life of an :class:`~lightning_diloco.engine.Engine`: one per
fit. Does not own the training loop (``_lightning/loops.py``) nor a step (``engine.py``).
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_diloco import checkpoint as checkpoint_format
from lightning_diloco._lightning import installation, readings
from lightning_diloco._lightning.data import deal
from lightning_diloco._lightning.hooks import does_something
from lightning_diloco._lightning.io import is_truncated
from lightning_diloco._lightning.process import StartMethod
from lightning_diloco._lightning.samplers import Dealing
from lightning_diloco._lightning.team import TeamStrategy
from lightning_diloco.algorithms import Diloco, OuterStepReport, SyncAlgorithm
from lightning_diloco.arguments import (
    as_integer,
    check_bool,
    check_choice,
    check_count,
    check_processes,
    configured,
    configured_groups,
    outer_factory,
)
from lightning_diloco.callback import DilocoCallback
from lightning_diloco.comm import Ledger
from lightning_diloco.context import BufferPolicy, InnerStatePolicy, NonfinitePolicy
from lightning_diloco.engine import Engine, EvalWeights, Policies
from lightning_diloco.outer import is_plain_average, needs_closure, trial_optimizer
from lightning_diloco.randomness import run_seed, set_process_state
from lightning_diloco.worker import copy_state, flatten_optimizers


class DilocoStrategy(TeamStrategy):
    """Trains N DiLoCo workers inside an ordinary ``Trainer.fit`` (arXiv 2311.08105).

    Think of DDP with ``world_size = num_nodes``, except that the workers synchronise every ``diloco_interval`` steps.
    Everything that counts steps counts the local steps of one worker; ``batch_size`` is per worker. What a fit does::

        for batches in loader:                       # one batch per worker, each from the worker's own shard
            callbacks.on_train_batch_start           # once; the module holds θ
            for worker in workers:                   # module, optimizers and torch's generator are the worker's
                module.on_train_batch_start          # hooks of the LightningModule run as on every DDP rank
                module.training_step, backward, clipping, optimizer.step
            every diloco_interval local steps:       # the outer step
                Δ = mean over workers of (θ − θ_i)
                θ = outer_optimizer(θ, Δ)
                θ_i = θ
            lr schedulers                            # once: they count local steps
            callbacks.on_train_batch_end             # once; the module holds θ
            for worker in workers: module.on_train_batch_end
            validation                               # once, with eval_weights in the module

    Args:
        num_nodes: simulated workers N ≥ 1. (``Trainer(num_nodes=)`` stays the number of machines.)
        diloco_interval: local steps H ≥ 1 between outer steps. A local step is a batch in which an optimizer stepped.
        outer_optimizer_cls: the outer optimizer: a torch optimizer class, or a callable that makes one from parameters.
            (On the command line a dotted name is a class; a short name, or ``class_path`` with ``init_args``, is a
            callable, with torch's defaults for what isn't given: SGD alone has lr 0.001.)
        outer_optimizer_kwargs: its arguments, replacing the defaults wholly. None: for exactly ``torch.optim.SGD`` what
            the algorithm's paper uses (DiLoCo: lr 0.7, momentum 0.9, nesterov), for other classes their own defaults.
            Must be None with a callable.
        algorithm: when and what the workers exchange; None: ``Diloco()``.
        eval_weights: weights and buffers that validation during fit and a checkpoint's ``state_dict`` see: "average"
            (the mean of the replicas), "outer" (θ of the last synchronisation) or "worker" (worker 0's).
        buffers: floating buffers and frozen parameters at a synchronisation: "average" (mean to all), "first" (worker
            0's to all), "local" (each keeps its own; θ shows the mean). Integer buffers: worker 0's to all (local:
            kept).
        inner_state: inner optimizer state at a synchronisation: "keep", "reset" (a copy of the state right after
            ``configure_optimizers``) or "average" (floating tensors with more than one element; step counters and
            Python numbers stay each worker's own).
        final_sync: do one last outer step on a partial round when training ends normally.
        partition: ``(dataset, num_workers) → one list of indices per worker``: which samples each worker owns.
        nonfinite: a worker whose Δ_i is not finite at a synchronisation of N > 1 workers: "raise", "skip" (the mean is
            over the others; the worker restarts from θ with fresh inner state) or "propagate".
        share_frozen: all workers use one copy of the parameters without ``requires_grad``.
        reduction: order of summation over several processes: "ordered" (that of the workers: results are bit-identical
            for every layout of workers over processes), "all_reduce" (that of the back end, which may send less), or
            "auto" (ordered on one machine, all_reduce across machines).
        accelerator: as in Lightning's strategies.
        parallel_devices: as in Lightning's strategies.
        cluster_environment: as in Lightning's strategies.
        checkpoint_io: as in Lightning's strategies.
        precision_plugin: as in Lightning's strategies.
        process_group_backend: torch.distributed's back end; None: gloo on CPUs, nccl on CUDA.
        timeout: how long a process waits for another before it ends with an error; None: torch's default.
        start_method: how ``Trainer(devices=)`` starts further processes: "popen" (the script once more), "spawn" or
            "fork"; None: "popen", in a notebook "fork". Under ``torchrun`` and on SLURM processes are there already.

    Raises:
        ValueError: an argument is out of its range, or the outer optimizer can't be built from its arguments; from the
            Trainer: N workers and W processes where neither number is a multiple of the other.
    """

    strategy_name = "diloco"

    def __init__(
        self,
        num_nodes: int = 4,
        diloco_interval: int = 500,
        outer_optimizer_cls: type[Optimizer] | OptimizerCallable = torch.optim.SGD,
        outer_optimizer_kwargs: dict[str, Any] | None = None,
        algorithm: SyncAlgorithm | None = None,
        eval_weights: EvalWeights = "average",
        buffers: BufferPolicy = "average",
        inner_state: InnerStatePolicy = "keep",
        final_sync: bool = True,
        partition: Callable[[Any, int], Sequence[Sequence[int]]] | None = None,
        nonfinite: NonfinitePolicy = "raise",
        share_frozen: bool = False,
        reduction: Literal["auto", "ordered", "all_reduce"] = "auto",
        *,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: StartMethod | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        before = set(vars(self))  # a subclass may have begun
        num_nodes = check_count("num_nodes", num_nodes, "simulated workers")
        diloco_interval = check_count("diloco_interval", diloco_interval, "local steps between outer steps")
        check_choice("eval_weights", eval_weights, ("average", "outer", "worker"))
        check_choice("buffers", buffers, ("average", "first", "local"))
        check_choice("inner_state", inner_state, ("keep", "reset", "average"))
        check_choice("nonfinite", nonfinite, ("raise", "skip", "propagate"))
        check_choice("reduction", reduction, ("auto", "ordered", "all_reduce"))
        final_sync = check_bool("final_sync", final_sync)
        share_frozen = check_bool("share_frozen", share_frozen)
        if partition is not None and not callable(partition):
            raise ValueError(
                f"`partition` (={partition!r}) must be a callable `(dataset, num_workers) -> list of index lists`, or"
                " None."
            )
        if algorithm is not None and not isinstance(algorithm, SyncAlgorithm):
            raise ValueError(
                f"`algorithm` (={algorithm!r}) must be an instance of SyncAlgorithm, like Diloco(), or None."
            )
        check_processes(process_group_backend, timeout, start_method)
        super().__init__(
            num_nodes,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._algorithm = algorithm or Diloco()
        self._outer_factory = outer_factory(outer_optimizer_cls, outer_optimizer_kwargs, self._algorithm)
        self._configured = configured(self._algorithm, self._outer_factory)
        has_outer = self._algorithm.outer_defaults is not None
        self._is_plain_run = num_nodes == 1 and has_outer and is_plain_average(trial_optimizer(self._outer_factory))
        self._callback = DilocoCallback()
        self._reduction = reduction
        self._interval = diloco_interval
        self._policies = Policies(eval_weights, buffers, inner_state, nonfinite, share_frozen)
        self._final_sync = final_sync
        self._partition = partition
        self._settings_of_file: dict[str, Any] = {}
        self._engine: Engine | None = None
        self._trial = False  # LR finder and batch-size finder run the fit loop before the fit proper
        self._seed = 0
        self._resumed: dict[str, Any] | None = None  # a checkpoint's state, until the engine has taken it
        self._initial_state: Sequence[Any] | None = None
        self._dealing: Dealing | None = None
        self.project_keeps_gradients = False
        self._arguments = arguments
        self._names = set(vars(self)) - before
        _warn_of_another_trainer()

    # ---------------------------------------------------------------------------------------- what users read

    @property
    def num_workers(self) -> int:
        """N: simulated workers."""
        return self._num_workers

    @property
    def local_workers(self) -> list[int]:
        """Global ids of the workers hosted by this process; known from ``setup`` on."""
        return list(self.world.workers)

    @property
    def current_worker(self) -> int | None:
        """Global id of the worker whose turn it is, None between turns."""
        return None if self._engine is None else self._engine.current_worker

    @property
    @override
    def is_global_zero(self) -> bool:
        """Whether this is process 0, and the turn of worker 0 or nobody's."""
        return super().is_global_zero and not self.current_worker

    @property
    def local_steps(self) -> int:
        """Completed local steps; 0 before a fit, kept after it."""
        return 0 if self._engine is None else self._engine.local_steps

    @property
    def outer_steps(self) -> int:
        """Completed synchronisations; 0 before a fit, kept after it."""
        return 0 if self._engine is None else self._engine.outer_steps

    @property
    def outer_optimizer(self) -> Optimizer:
        """The live outer optimizer, for example to put an LR schedule on it."""
        return self.engine.outer_optimizer

    @property
    def ledger(self) -> Ledger:
        """What the workers have sent."""
        return self.engine.context.ledger

    @property
    def engine(self) -> Engine:
        """The engine of the present or last fit."""
        if self._engine is None and self._only_starts_others:
            raise RuntimeError(
                f"The workers live in the processes that this one started (`start_method` is {self._start_method!r};"
                " in notebooks that is 'fork'), and ended with them. Ask in a callback or hook of the fit."
            )
        if self._engine is None:
            raise RuntimeError(
                "The workers exist from `on_train_start` on, until the next fit. Call `trainer.fit` first, or ask"
                " from a hook of the fit."
            )
        return self._engine

    def worker_state_dict(self, worker: int) -> dict[str, Any]:
        """The keys of ``module.state_dict()`` with worker ``worker``'s values, detached copies; strict-loadable.

        Raises:
            RuntimeError: before ``on_train_start``.
            ValueError: there is no such worker, or another process hosts it.
        """
        return self.engine.state_dict(self._checked_worker(worker))

    def outer_state_dict(self) -> dict[str, Any]:
        """The keys of ``module.state_dict()`` with θ's values, detached copies."""
        return self.engine.state_dict("outer")

    @contextmanager
    def weights(self, which: int | Literal["average", "outer"]) -> Iterator[None]:
        """Puts a copy of worker ``which``, the "average" of the workers, or the "outer" model into the module for a
        while.

        Training is undisturbed: what is written to the copy is dropped.
        """
        if isinstance(which, str):
            check_choice("which", which, ("average", "outer"))
        with self.engine.weights(which if isinstance(which, str) else self._checked_worker(which)):
            yield

    def memory_report(self) -> dict[str, int]:
        """Bytes held, by purpose; see :meth:`Engine.memory_report`."""
        return self.engine.memory_report()

    def _checked_worker(self, worker: int) -> int:
        found = as_integer(worker)
        if found is None or not 0 <= found < self._num_workers:
            raise ValueError(f"Worker {worker!r} doesn't exist: `num_nodes` is {self._num_workers}, ids start at 0.")
        worker = found
        if worker not in self.world.workers:
            raise ValueError(
                f"Worker {worker} is hosted by process {self.world.host(worker)}; this is process {self.world.rank},"
                f" which hosts {self.local_workers}. Ask there: `if {worker} in strategy.local_workers: ...`."
            )
        return worker

    # ---------------------------------------------------------------------------------------- copies

    @override
    def __getstate__(self) -> dict[str, Any]:
        """The settings only: a copy is a fresh strategy, and can be made at any time."""
        if self._is_being_spawned:
            return dict(super().__getstate__())
        further = {k: v for k, v in vars(self).items() if k not in self._names and k != "_names"}
        subclass = {k: v for k, v in further.items() if not hasattr(DilocoStrategy, k)}
        return {"arguments": self._arguments, "subclass": subclass}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        if "arguments" not in state:
            super().__setstate__(state)
            return
        DilocoStrategy.__init__(self, **state["arguments"])
        vars(self).update(state["subclass"])

    # ---------------------------------------------------------------------------------------- life of a fit

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        trainer = self._trainer_here
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._engine = None
        self._trial = True
        self._resumed = None
        self._attach_callback()
        installation.install(trainer)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        trainer = self._trainer_here
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._seed = self.world.first_decides(run_seed)
            installation.prepare(trainer, self.world, per_worker=any(c.per_worker for c in self._reporters))

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {
            "num_nodes": self._num_workers,
            "diloco_interval": self._interval,
            **self._configured,
            "final_sync": self._final_sync,
            "reduction": self._reduction,
            **vars(self._policies),
        }

    @property
    @override
    def in_trial(self) -> bool:
        return self._trial

    @property
    def _ordered(self) -> bool:
        return self._reduction == "ordered" or (self._reduction == "auto" and self.num_nodes == 1)

    @property
    def _callbacks(self) -> list[Any]:
        assert self.lightning_module is not None
        callbacks: list[Any] = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
        return callbacks  # the Trainer's own list, which a connector of Lightning's puts there

    @property
    def _reporters(self) -> list[DilocoCallback]:
        return [c for c in self._callbacks if isinstance(c, DilocoCallback)]

    def _attach_callback(self) -> None:
        """The automatic callback joins once; a DilocoCallback of the user's takes its place."""
        own = [c for c in self._reporters if c is not self._callback]
        if self._callback in self._callbacks and own:
            self._callbacks.remove(self._callback)
        elif self._callback not in self._callbacks and not own and not self._is_plain_run:
            self._callbacks.insert(0, self._callback)

    @override
    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            if self._algorithm.needs_gradients:
                self._check_needs_gradients(trainer.lightning_module)
            self._initial_state = [copy_state(o.state) for o in flatten_optimizers(self.optimizers)]

    def look_at_hooks(self) -> None:
        """A step begins: hooks may be put on the module, and callbacks attached, at any time."""
        module = self.lightning_module
        looking = ("on_before_zero_grad", "optimizer_zero_grad", "on_train_batch_start", "on_train_batch_end")
        self.project_keeps_gradients = (
            module is None
            or not module.automatic_optimization
            or any(does_something(module, hook) for hook in looking)
            or any(does_something(callback, "on_before_zero_grad") for callback in self._callbacks)
        )

    def _check_needs_gradients(self, module: LightningModule) -> None:
        name = type(self._algorithm).__name__
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"{name} changes gradients before the inner step, which needs automatic optimization;"
                f" {type(module).__name__} sets `automatic_optimization = False`."
            )
        for optimizer in self.optimizers:
            if needs_closure(optimizer):
                raise MisconfigurationException(
                    f"{name} needs one backward pass per step, but {type(optimizer).__name__} runs as many as it"
                    " likes. Use another inner optimizer."
                )
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"{name} exchanges gradients, which a gradient scaler scales differently on each worker. Use"
                " `precision='bf16-mixed'` or '32-true'."
            )

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        super().barrier(*args, **kwargs)
        if args == ("run-stage",) and self._trial:  # the Trainer's word for: all is set up, the fit proper begins
            self._trial = False
            self._drop_engine()

    def _drop_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def start_engine(self) -> None:
        """The fit loop is about to start: every worker starts from what is in the module."""
        self._drop_engine()  # of an earlier trial
        module = self.lightning_module
        assert module is not None
        scaler = getattr(self.precision_plugin, "scaler", None)
        self._engine = Engine(
            module,
            self.optimizers,
            num_workers=self._num_workers,
            interval=self._interval,
            algorithm=self._algorithm,
            outer_factory=self._outer_factory,
            policies=self._policies,
            seed=self._seed,
            scaler_owner=None if scaler is None else self.precision_plugin,  # type: ignore[arg-type]
            schedulers=self._stepped_schedulers,
            initial=self._initial_state,
            world=self.world,
            ordered=self._ordered,
        )
        groups = configured_groups(self._engine.outer_optimizer)
        if self._resumed is not None:
            checkpoint_format.check_settings(self._resumed["settings"], groups, "The checkpoint")
            self._engine.resume(self._resumed)
        self._settings_of_file = {**self._configured, **groups}

    @property
    def awaits_final_sync(self) -> bool:
        """Whether the file that this fit resumes from was saved in the middle of a round."""
        state = self._resumed
        return self._final_sync and state is not None and state["local_steps"] > state["round_start"]

    @override
    def on_train_start(self) -> None:
        self.engine.take_over()
        if self._resumed is None:
            self.engine.restart_optimizers()  # callbacks' on_train_start may have changed them
        elif self._num_workers > 1:
            set_process_state(self._resumed["random"])
        self._resumed = None

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._engine is not None:
            self._engine.note_step(optimizer)
        return output

    def follow_optimizers(self) -> None:
        """Tells the engine where ``setup_optimizers`` or ``trainer.optimizers = …`` has replaced the optimizers."""
        if self._engine is not None and not self._engine.finished:
            self._engine.use_optimizers(self.optimizers, self._stepped_schedulers)

    @property
    def _stepped_schedulers(self) -> Sequence[Any]:
        """Those that workers step themselves, under manual optimization."""
        assert self.lightning_module is not None
        automatic = self.lightning_module.automatic_optimization
        return () if automatic else [c.scheduler for c in self.lr_scheduler_configs]

    def deliver(self, reports: Sequence[OuterStepReport], after_training: bool = False) -> None:
        """Hands reports to the callbacks."""
        module = self.lightning_module
        assert module is not None
        if self._trial:
            return
        step = readings.logging_step(module.trainer, after_training)
        for report in reports:
            for callback in self._reporters:
                callback.report(module.trainer, module, report, step)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The window of a validation run; before training has started (the sanity check) nothing is to be swapped."""
        training = self._engine is not None and not self._engine.finished  # a finished one is a trial's
        self.follow_optimizers()
        with self.engine.evaluation() if training else nullcontext():
            yield

    def finish_training(self) -> None:
        """Training ended normally: the last outer step, and θ in the module."""
        reports = self.engine.flush() if self._final_sync else []
        self.engine.finish()
        self.deliver(reports, after_training=True)

    # ---------------------------------------------------------------------------------------- checkpoints

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        complete = "optimizer_states" in checkpoint  # else a weights-only file
        if self._alone:
            warnings.warn(
                f"The checkpoint {filepath} is not written: an exception has stopped process {self.global_rank}, and"
                " the state of the other processes' workers is out of reach. Resume from the last file before it.",
                stacklevel=2,
            )
            return
        self.follow_optimizers()
        engine = self._engine
        if engine is not None and engine.module is not self.lightning_module:
            engine = None  # of a fit of another module
        state = engine.pack(self._seed) if complete and engine and not self._is_plain_run else None
        if state is not None and self.is_global_zero:
            dealt = self._num_workers > 1 or self._partition is not None
            trainer = self._trainer_here
            cycles = trainer is not None and readings.cycles_loaders(trainer)
            loader = readings.detach_loader_state(checkpoint["loops"], cycles) if dealt else None
            checkpoint["diloco"] = checkpoint_format.complete(
                state, self._settings_of_file, loader, checkpoint["state_dict"]
            )
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The first worker's, an ordinary state that resumes anywhere; also during validation."""
        self.follow_optimizers()
        with nullcontext() if self._engine is None else self._engine.first_workers_state():
            return super().optimizer_state(optimizer)

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
        trainer = self._trainer_here
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and "diloco" in checkpoint:
            source = f"The checkpoint {checkpoint_path}"
            checkpoint_format.check(checkpoint, self._num_workers, self._configured, source)
            state = checkpoint["diloco"]
            checkpoint_format.restore_repeated(state, checkpoint["state_dict"])
            if state["loader"] is not None:
                readings.attach_loader_state(checkpoint["loops"], state["loader"])
            self._seed = state["seed"]
        return checkpoint

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        self._resumed = checkpoint.get("diloco")

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        training = self._engine is not None and not self._engine.finished and not self._alone
        return self.engine.state_dict() if training else super().lightning_module_state_dict()

    @override
    def teardown(self) -> None:
        trainer = self._trainer_here
        super().teardown()
        if self._engine is not None:
            self._engine.close()
        if trainer is not None:
            installation.uninstall(trainer)
        if self._trial:
            self._engine = None
        elif self._engine is not None:
            self._engine.to(torch.device("cpu"))

    # ---------------------------------------------------------------------------------------- data

    @contextmanager
    def dealing_training_data(self) -> Iterator[None]:
        """Loaders processed inside are dealt to the workers."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        self._dealing = Dealing(
            world=self.world,
            seed=self._seed,
            partition=self._partition,
            use_distributed_sampler=readings.uses_distributed_sampler(trainer),
            overfit=readings.overfits(trainer),
        )
        try:
            yield
        finally:
            self._dealing = None

    @property
    @override
    def deals_training_data(self) -> bool:
        return self._dealing is not None and (self._num_workers > 1 or self._partition is not None)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        if not self.deals_training_data:
            return dataloader
        assert self._dealing is not None
        dealt = deal(dataloader, self._dealing)
        self._dealing = replace(self._dealing, loader=self._dealing.loader + 1)
        return dealt


_warned_of_another_trainer = False  # once per process is enough for those who use `lightning` all along


def _warn_of_another_trainer() -> None:
    """A Trainer of ``pytorch_lightning`` would answer that this is an invalid strategy name."""
    global _warned_of_another_trainer
    other = sys.modules.get("pytorch_lightning")
    if _warned_of_another_trainer or other is None or getattr(other, "Trainer", None) is Trainer:
        return
    _warned_of_another_trainer = True
    rank_zero_warn(
        "`pytorch_lightning` is imported in this process. Its Trainer takes no DilocoStrategy ('You selected an invalid"
        " strategy name'), and the Trainer of `lightning.pytorch` takes none of its modules. If your code or a package"
        " that builds the Trainer for you uses `pytorch_lightning`, put `import lightning_diloco.as_pytorch_lightning`"
        " above its first import. If only a dependency has imported it, ignore this warning, which comes once.",
        stacklevel=6,  # the line that makes the strategy
    )
