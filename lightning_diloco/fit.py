"""The life of a fit: its engine, the checkpoint that it resumes, its shards of the data, its reports.

Owns everything that begins with ``Trainer.fit`` and ends with it. Our loops (``_lightning/loops.py``) call this object,
and the strategy only through Lightning's hooks. Does not own a step (``engine/engine.py``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_diloco.algorithms import OuterStepReport, Participation, SyncAlgorithm
from lightning_diloco.algorithms.deltas import PseudoGradients
from lightning_diloco.arguments import configured_groups
from lightning_diloco.callback import DilocoCallback
from lightning_diloco.cluster.clock import Clock
from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.cluster.tally import Tally
from lightning_diloco.codecs import Codec
from lightning_diloco.comm.ledger import Ledger
from lightning_diloco.comm.team import TeamGradients
from lightning_diloco.comm.world import World
from lightning_diloco.engine import file_format
from lightning_diloco.engine.engine import Engine
from lightning_diloco.engine.file_format import LoaderState, RunState
from lightning_diloco.engine.places import Places
from lightning_diloco.engine.times import Times
from lightning_diloco.reporting import hints
from lightning_diloco.reporting.plan import Plan
from lightning_diloco.reporting.progress import RoundProgress
from lightning_diloco.reporting.summary import Summary
from lightning_diloco.state.outer import OuterFactory, needs_closure
from lightning_diloco.state.policies import EvalWeights, Policies
from lightning_diloco.state.randomness import run_seed, set_process_state
from lightning_diloco.state.worker import OptimizerState, copy_state, flatten_optimizers

Weights = Literal["uniform", "samples"]
Partition = Callable[[Any, int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class RunSettings:
    """The arguments of a :class:`~lightning_diloco.DilocoStrategy` that shape a run.

    Attributes:
        codec: None: the algorithm's own.
        weights: of the workers in means.
        configured: algorithm, outer optimizer, codec, participation, weights and availability as plain values, which a
            resumed run must share with its file.
    """

    num_workers: int
    interval: int
    algorithm: SyncAlgorithm
    outer_factory: OuterFactory
    policies: Policies
    final_sync: bool
    partition: Partition | None
    codec: Codec | None
    participation: Participation | None
    cluster: Cluster | None
    diagnostics: bool
    weights: Weights
    configured: dict[str, Any]


@dataclass(frozen=True)
class ShardPlan:
    """How a training loader is divided: among which workers, with which seed, and by which wishes of the user."""

    world: World
    seed: int
    partition: Partition | None
    use_distributed_sampler: bool
    overfit: bool
    loader: int = 0  # number of the training loader: the samplers of several loaders draw independently
    places: Places | None = None  # of workers that don't step together, each of which reads at its own pace

    @property
    def workers(self) -> Sequence[int]:
        """The workers hosted here."""
        return self.world.workers

    @property
    def shards(self) -> int:
        """Number of shards: N, or the number of processes where a worker has several."""
        return self.world.shards

    @property
    def shards_here(self) -> Sequence[int]:
        """The shards of the workers hosted here."""
        return [self.world.shard(w) for w in self.workers]


@dataclass(frozen=True)
class FitResults:
    """What a fit has counted: process 0 hands it to the process that has started it.

    Attributes:
        ledger: None: the training loop has not begun.
        clock: of the simulated cluster; None: there is none, or the training loop has not begun.
        tally: who took part; None as ``clock``.
    """

    local_steps: int = 0
    outer_steps: int = 0
    reports: list[OuterStepReport] = field(default_factory=list)
    ledger: Ledger | None = None
    times: Times = field(default_factory=Times)
    clock: Clock | None = None
    tally: Tally | None = None


@dataclass
class Fit:
    """A fit of a Trainer.

    Args:
        settings: the strategy's.
        trainer: the Trainer that fits.

    Attributes:
        world: the processes; known from :meth:`begin` on.
        team: averages gradients where a worker has several processes.
        in_trial: whether the fit loop runs for a tuner (LR finder, batch-size finder), before the fit proper.
        in_loop: whether the training loop has begun and not ended.
        keeps_gradients: whether the project looks at gradients between a worker's turns.
        plan: how the training loader that is being set up is divided; None outside ``setup_data``.
        places: how far every worker is in the data; None: all step together.
        reports: of all outer steps so far.
    """

    settings: RunSettings
    trainer: Trainer
    world: World = field(default_factory=lambda: World(1))
    in_trial: bool = True
    in_loop: bool = False
    keeps_gradients: bool = False
    plan: ShardPlan | None = None
    started: Engine | None = None
    _progress: RoundProgress | None = None
    reports: list[OuterStepReport] = field(default_factory=list)
    _seed: int = 0
    _ordered: bool = True
    _resumed: RunState | None = None  # a checkpoint's state, until the engine has applied it
    _initial_state: Sequence[OptimizerState] | None = None
    _configured: dict[str, Any] = field(default_factory=dict)
    _summary: Summary | None = None
    _shards: list[Sequence[int]] = field(default_factory=list)  # per training loader: the sizes of the workers' shards
    _judged: Plan | None = None  # of the run, if hints about its outer momentum are wanted
    _cosines: list[float] = field(default_factory=list)  # of Δ with the outer momentum, of the rounds so far
    _times: Times = field(default_factory=Times)  # when reports were last delivered

    def __post_init__(self) -> None:
        self.team = TeamGradients(self.world)
        own = self.settings.algorithm.chooses_workers and self.shards_data
        self.places = Places(self.settings.num_workers) if own else None

    @property
    def engine(self) -> Engine:
        """The engine; from :meth:`start_engine` on."""
        assert self.started is not None, "the training loop has not begun"
        return self.started

    @property
    def training(self) -> bool:
        """Whether the workers have begun and not finished; the engine of a tuner's trial has finished."""
        return self.started is not None and not self.started.finished

    @property
    def results(self) -> FitResults:
        """What has been counted so far."""
        if self.started is None:
            return FitResults()
        engine = self.started
        context, times = engine.context, engine.stopwatch.times
        machines = context.machines
        tally = None if machines.clock is None else machines.tally
        counts = engine.local_steps, engine.outer_steps
        return FitResults(*counts, self.reports, context.ledger, times, machines.clock, tally)

    @property
    def reporters(self) -> list[DilocoCallback]:
        """The Trainer's callbacks that report outer steps."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in callbacks if isinstance(c, DilocoCallback)]

    # ---------------------------------------------------------------------------------------- beginning

    def begin(self, world: World, ordered: bool) -> None:
        """The processes are known.

        Args:
            world: the processes and the workers that each hosts.
            ordered: whether means are summed in the workers' order.
        """
        self.world, self._ordered = world, ordered
        self.team = TeamGradients(world)
        self._seed = world.decided_by_first(run_seed)

    def set_up(self, optimizers: Sequence[Any]) -> None:
        """``configure_optimizers`` has been called: ``inner_state="reset"`` goes back to the present state."""
        if self.settings.algorithm.looks_at_gradients:
            _check_needs_gradients(self.settings.algorithm, self.trainer)
        self._initial_state = [copy_state(o.state) for o in flatten_optimizers(optimizers)]

    def resume(self, state: RunState | None) -> None:
        """The fit continues from ``checkpoint["diloco"]``, if there is one."""
        self._resumed = state

    def use_seed(self, seed: int) -> None:
        """The seed of the run that is resumed replaces that of this process."""
        self._seed = seed

    @property
    def awaits_final_sync(self) -> bool:
        """Whether the file that this fit resumes from leaves something to do for a last outer step."""
        state = self._resumed
        return self.settings.final_sync and state is not None and state["outstanding"]

    def end_trial(self) -> None:
        """Tuners are done, and the fit proper begins; ``barrier`` in ``_lightning/collectives.py`` calls this."""
        self.in_trial = False
        self._drop_engine()

    def _drop_engine(self) -> None:
        if self.started is not None:
            self.started.close()
            self.started = None

    def start_engine(self) -> None:
        """The training loop is about to begin: every worker starts from the module's values."""
        self._drop_engine()  # of an earlier trial
        if self.places is not None:
            self.places.restart()
        self._times = Times()
        strategy, settings = self.trainer.strategy, self.settings
        scaler = getattr(strategy.precision_plugin, "scaler", None)
        self.started = Engine(
            self.trainer.lightning_module,
            strategy.optimizers,
            num_workers=settings.num_workers,
            interval=settings.interval,
            algorithm=settings.algorithm,
            outer_factory=settings.outer_factory,
            policies=settings.policies,
            codec=settings.codec,
            participation=settings.participation,
            cluster=settings.cluster,
            diagnostics=settings.diagnostics,
            seed=self._seed,
            scaler_owner=None if scaler is None else strategy.precision_plugin,  # type: ignore[arg-type]
            schedulers=self._schedulers_in_turns,
            initial=self._initial_state,
            world=self.world,
            ordered=self._ordered,
        )
        looking = any(c.looks_before_outer_steps for c in self.reporters)
        self.started.context.sender.before_sending = self._before_outer_step if looking and not self.in_trial else None
        self.started.use_weights(self._worker_weights)
        groups = configured_groups(self.started.outer_optimizer, self.started.outer_parameters)
        if self._resumed is not None:
            file_format.check_settings(self._resumed["settings"], groups, "The checkpoint")
            self.started.resume(self._resumed)
            loader = self._resumed["loader"]
            if self.places is not None and loader is not None:
                self.places.load_state(loader["places"])
        self._configured = {**settings.configured, **groups}
        shown = any(callback.progress_bar for callback in self.reporters)
        self._progress = RoundProgress(self.trainer, self.started) if shown else None

    def train(self, plan: Callable[[], Plan]) -> None:
        """Callbacks' ``on_train_start`` have run, and may have changed weights and optimizers: the first step comes.

        Args:
            plan: tells what is known about the fit; asked if anything is said about it.
        """
        self.engine.adopt_outside_changes()
        if self._resumed is None:
            self.engine.restart_optimizers()
        elif self.settings.num_workers > 1:
            set_process_state(self._resumed["random"])
        self._resumed = None
        if not self.in_trial and not self.engine.is_plain_run and self.reporters:
            self._announce(plan())

    def _announce(self, plan: Plan) -> None:
        """Hints about the run, and the first lines of its summary."""
        algorithm = self.settings.algorithm
        fast: bool = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.gives_hints and self.settings.num_workers > 1 and not fast:
            has_rounds = not algorithm.looks_at_gradients
            for name, text in hints.about_run(plan, has_rounds):
                hints.give(name, text)
            self._judged = plan if algorithm.outer_defaults is not None else None
        if any(reporter.summary for reporter in self.reporters):
            self._summary = Summary(self.engine, plan, self.settings.outer_factory, rank_zero_info)

    def _judge(self, report: OuterStepReport) -> None:
        """A hint about the outer momentum, once the reports show that it overshoots."""
        cosine, momentum = report.momentum_cosine, hints.momentum_of(self.engine.outer_optimizer)
        plan = self._judged
        if plan is None or plan.rounds is None or plan.rounds > hints.MOST:
            return
        if momentum and cosine is not None:
            self._cosines.append(cosine)
            if hints.overshoots(self._cosines, plan.progress(report.step)):
                hints.give(*hints.about_momentum(momentum, report.step, self._cosines))

    @property
    def gives_hints(self) -> bool:
        """Whether no reporter has switched hints off."""
        return all(reporter.hints for reporter in self.reporters)

    # ---------------------------------------------------------------------------------------- training

    @property
    def _schedulers_in_turns(self) -> Sequence[Any]:
        """LR schedulers that workers step in their turns, under manual optimization."""
        automatic = self.trainer.lightning_module.automatic_optimization
        return () if automatic else [c.scheduler for c in self.trainer.strategy.lr_scheduler_configs]

    def follow_optimizers(self) -> None:
        """Hands the engine the optimizers that ``setup_optimizers`` or ``trainer.optimizers = …`` has put in place."""
        if self.training:
            self.engine.use_optimizers(self.trainer.strategy.optimizers, self._schedulers_in_turns)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The window of a validation run; before training (in the sanity check) the module is left as it is."""
        self.follow_optimizers()
        if not self.training:
            yield
            return
        with self.engine.stopwatch.part("evaluation"), self.engine.views.evaluation():
            yield

    @property
    def validate_on(self) -> list[int | EvalWeights]:
        """The sets of weights on which the validation data are run, too."""
        return list(dict.fromkeys(which for callback in self.reporters for which in callback.validate_on))

    @contextmanager
    def further_evaluation(self, which: int | EvalWeights) -> Iterator[None]:
        """The window of a validation run on another set of weights."""
        self.follow_optimizers()
        with self.engine.stopwatch.part("evaluation"), self.engine.views.further_evaluation(which):
            yield

    def deliver(self, reports: Sequence[OuterStepReport], logging_step: int) -> None:
        """Hands reports to the callbacks.

        Args:
            reports: of the outer steps since the last call.
            logging_step: the step at which Lightning logs the present batch.
        """
        if reports and not self.in_trial:
            self._deliver(reports, logging_step)
        if self._summary is not None:
            self._summary.after_step()

    def _deliver(self, reports: Sequence[OuterStepReport], logging_step: int) -> None:
        times, before = self.engine.stopwatch.times, self._times
        self._times = times
        inner, waiting = times.inner - before.inner, times.waiting - before.waiting
        reports = [replace(report, inner_seconds=inner, waiting_seconds=waiting) for report in reports]
        if self.settings.diagnostics:
            samples, losses = self.engine.seen.take(self.world)
            reports = [replace(report, samples=samples, train_losses=losses) for report in reports]
        for report in reports:
            self.reports.append(report)
            for callback in self.reporters:
                callback.report(self.trainer, self.trainer.lightning_module, report, logging_step)
        for report in reports:
            self._judge(report)

    def show_progress(self) -> None:
        """A batch is over: progress bars show the round."""
        if self._progress is not None:
            self._progress.show()

    def deliver_validation(self, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Hands the metrics of a validation during training to the callbacks.

        Args:
            outputs: per loader, what was logged.
        """
        callbacks = [c for c in self.reporters if c.axes]
        if not callbacks or not self.training or self.in_trial or not self.settings.diagnostics:
            return
        metrics = {key: float(value) for of_loader in outputs for key, value in of_loader.items()}
        samples = self.engine.seen.samples(self.world)
        for callback in callbacks:
            callback.report_validation(self.trainer, metrics, samples)

    def _before_outer_step(self, deltas: PseudoGradients) -> None:
        for callback in self.reporters:
            callback.on_before_outer_step(self.trainer, self.trainer.lightning_module, deltas)

    def finish(self) -> Sequence[OuterStepReport]:
        """Training ended normally: the last outer step, and θ in the module."""
        reports = self.engine.flush() if self.settings.final_sync else []
        self.engine.finish()
        return reports

    def conclude(self) -> None:
        """The reports of the last outer step are delivered."""
        if self._summary is not None:
            self._summary.end()

    def close(self) -> None:
        """However the fit ended: the module has its tensors back; the engine of a tuner's trial is dropped."""
        if self.started is not None:
            self.started.close()
        if self.in_trial:
            self.started = None
        elif self.started is not None:
            self.started.to(torch.device("cpu"))

    # ---------------------------------------------------------------------------------------- checkpoints

    def pack(self, module: LightningModule | None) -> dict[str, Any] | None:
        """The state of the run for a checkpoint of ``module``; None where there is none. All processes call it."""
        self.follow_optimizers()
        if self.started is None or self.started.module is not module:
            return None
        return self.started.pack(self._seed)

    def complete(
        self, state: dict[str, Any], loader: LoaderState | None, state_dict: Mapping[str, Any]
    ) -> dict[str, Any]:
        """``state`` as it stands in a file; see :func:`lightning_diloco.engine.file_format.complete`."""
        if loader is not None and self.places is not None:
            loader["places"] = self.places.state()
        return file_format.complete(state, self._configured, loader, state_dict)

    # ---------------------------------------------------------------------------------------- data

    @contextmanager
    def sharding(self, use_distributed_sampler: bool, overfit: bool) -> Iterator[None]:
        """Inside, the loaders that Lightning sets up are training loaders.

        Args:
            use_distributed_sampler: the Trainer's argument.
            overfit: whether the Trainer's ``overfit_batches`` is in force.
        """
        partition = self.settings.partition
        self.plan = ShardPlan(self.world, self._seed, partition, use_distributed_sampler, overfit, places=self.places)
        before, self._shards = self._shards, []
        try:
            yield
        finally:
            self.plan = None
            self._shards = self._shards or before  # Lightning sets loaders up again for some epochs only
        if self.training:
            self.engine.use_weights(self._worker_weights)

    def note_shards(self, sizes: Sequence[int] | None, loader: object) -> None:
        """A training loader has been sharded.

        Args:
            sizes: number of samples in each worker's shard, up to a common factor; None: unknown.
            loader: the user's.

        Raises:
            ValueError: ``weights`` is "samples", and sizes are unknown.
        """
        if self.settings.weights == "uniform":
            return
        if sizes is None:
            raise ValueError(
                f"`weights` (='samples') needs the number of samples in each worker's shard, but the training loader (a"
                f" {type(loader).__name__}) is read batch by batch: it is a stream, has a batch sampler of its own, or"
                " the Trainer has `use_distributed_sampler=False`. Pass a DataLoader with a `batch_size` over a dataset"
                " with `__len__` and `__getitem__`, with `DilocoStrategy(partition=...)` for shards of your choice; or"
                " use `weights='uniform'`."
            )
        self._shards.append(sizes)

    @property
    def _worker_weights(self) -> dict[int, float] | None:
        """Samples of each worker in all training loaders; None if they are equal: a plain mean is summed otherwise."""
        samples = [float(sum(sizes)) for sizes in zip(*self._shards, strict=True)]
        return dict(enumerate(samples)) if len(set(samples)) > 1 else None

    @property
    def shards_data(self) -> bool:
        """Whether training loaders are divided among workers; a single worker reads the user's loaders."""
        return self.settings.num_workers > 1 or self.settings.partition is not None

    def next_plan(self) -> ShardPlan | None:
        """How the loader that is being set up is divided; None if it isn't."""
        plan = self.plan
        if plan is None or not self.shards_data:
            return None
        if self.places is not None and plan.loader:
            raise MisconfigurationException(
                f"{type(self.settings.algorithm).__name__} lets every worker read its shard at its own pace, which"
                " takes a single training loader. The module has several."
            )
        self.plan = replace(plan, loader=plan.loader + 1)
        return plan


def _check_needs_gradients(algorithm: SyncAlgorithm, trainer: Trainer) -> None:
    name, module = type(algorithm).__name__, trainer.lightning_module
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} changes gradients before the inner step, which needs automatic optimization;"
            f" {type(module).__name__} sets `automatic_optimization = False`. Use automatic optimization, or another"
            " algorithm."
        )
    clip = trainer.gradient_clip_val
    if algorithm.gradients_are_final and clip:
        raise MisconfigurationException(
            f"`gradient_clip_val` (={clip!r}) of the Trainer would clip what {name} makes of the gradients. Leave it"
            f" out, and let the algorithm clip before: `{name}(clip={clip!r})`."
        )
    for optimizer in trainer.strategy.optimizers:
        if needs_closure(optimizer):
            raise MisconfigurationException(
                f"{name} needs one backward pass per step, but {type(optimizer).__name__} evaluates its closure"
                " several times per step. Use another inner optimizer."
            )
    if getattr(trainer.strategy.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f"{name} averages gradients, which a gradient scaler scales differently on each worker. Use"
            " `precision='bf16-mixed'` or '32-true'."
        )
