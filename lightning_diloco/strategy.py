"""DilocoStrategy: the line that turns a Lightning project into a DiLoCo experiment.

Owns the arguments, and the values that users read during a fit and after it. Lightning's own hooks stand in
``_lightning/fitting.py``, the life of a fit in ``fit.py``, the training loop in ``_lightning/loops.py``.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import Precision
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_diloco._lightning.fitting import FitStrategy
from lightning_diloco.algorithms import Diloco, OuterStepReport, Participation, SyncAlgorithm
from lightning_diloco.arguments import (
    Reduction,
    StartMethod,
    arguments_that_differ,
    as_integer,
    check_bool,
    check_choice,
    check_count,
    check_instance,
    check_processes,
    configured,
    outer_factory,
)
from lightning_diloco.cluster.clock import Clock
from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.cluster.tally import Tally
from lightning_diloco.codecs import Codec
from lightning_diloco.comm.ledger import Ledger
from lightning_diloco.engine.engine import Engine
from lightning_diloco.engine.joining import check_availability
from lightning_diloco.engine.times import Times
from lightning_diloco.fit import RunSettings, Weights
from lightning_diloco.state.policies import BufferPolicy, EvalWeights, InnerStatePolicy, NonfinitePolicy, Policies

T = TypeVar("T")


class DilocoStrategy(FitStrategy):
    """Trains N DiLoCo workers inside an ordinary ``Trainer.fit`` (arXiv 2311.08105).

    Think of DDP with ``world_size = num_nodes``, except that the workers synchronise every ``diloco_interval`` steps.
    Everything that counts steps counts the local steps of a worker; ``batch_size`` is per worker. A fit::

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
        outer_optimizer_cls: the outer optimizer: a torch optimizer class, or a callable that makes an optimizer.
            (On the command line a dotted name is a class; a short name, or ``class_path`` with ``init_args``, is a
            callable, with torch's defaults for arguments that aren't given: SGD alone has lr 0.001.)
        outer_optimizer_kwargs: arguments of the outer optimizer, replacing the defaults wholly. None: for exactly
            ``torch.optim.SGD`` the values of the algorithm's paper (DiLoCo: lr 0.7, momentum 0.9, nesterov), for other
            classes the defaults of the class. Must be None with a callable.
        algorithm: decides when workers communicate, what they send, and what each does with what arrives; None:
            ``Diloco()``.
        eval_weights: weights and buffers that validation during fit and a checkpoint's ``state_dict`` see: "average"
            (the mean of the replicas), "outer" (θ of the last synchronisation) or "worker" (worker 0's).
        buffers: floating buffers and frozen parameters at a synchronisation: "average" (mean to all), "first" (worker
            0's to all), "local" (each keeps its own; θ shows the mean). Integer buffers: worker 0's to all (local:
            kept).
        inner_state: inner optimizer state at a synchronisation: "keep", "reset" (a copy of the state right after
            ``configure_optimizers``) or "average" (floating tensors with more than one element; step counters and
            Python numbers stay as they are in each worker).
        final_sync: do a last outer step on a partial round when training ends normally.
        partition: ``(dataset, num_workers) → a list of indices per worker``: the samples of each worker's shard.
        nonfinite: a worker whose Δ_i is not finite at a synchronisation of N > 1 workers: "raise", "skip" (the mean is
            over the others; the worker restarts from θ with fresh inner state, whichever part of the model was sent) or
            "propagate".
        share_frozen: all workers use the same tensors for parameters without ``requires_grad``.
        codec: packs what workers send, tensor by tensor, before the mean, for example ``FP4()`` or
            ``ErrorFeedback(Statistical(2))`` of :mod:`lightning_diloco.codecs`; None: the algorithm's own, which is
            nothing for most. ``Identity()`` sends tensors as they are whatever the algorithm.
        participation: who takes part in a transfer, for example ``DropOut(0.3)``; None: everybody. Workers that are
            left out keep their weights and go on.
        diagnostics: measure norms, cosines and drifts of what is sent; without, reports lack them, and an outer step
            is somewhat faster.
        weights: of the workers in means: "uniform", or "samples" (by the number of samples in a worker's shard, which
            ``partition`` decides: the paper's rule for non-iid data; without ``partition`` shards are equal). They hold
            for every mean over workers that doesn't name weights of its own: of what is sent, of buffers and inner
            state, and for ``eval_weights="average"``; whoever is left out, the rest count in proportion.
        cluster: the simulated machines, a ``Cluster`` with speeds, links and availability. It tells how long the run
            would have taken (``strategy.clock``), and changes no number of it, unless it has an ``availability``. None:
            there is no clock.
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
        reduction: Reduction = "auto",
        codec: Codec | None = None,
        participation: Participation | None = None,
        diagnostics: bool = True,
        weights: Weights = "uniform",
        cluster: Cluster | None = None,
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
        set_by_subclass = set(vars(self))  # before it calls this constructor
        num_nodes = check_count("num_nodes", num_nodes, "simulated workers")
        diloco_interval = check_count("diloco_interval", diloco_interval, "local steps between outer steps")
        check_choice("eval_weights", eval_weights, EvalWeights)
        check_choice("buffers", buffers, BufferPolicy)
        check_choice("inner_state", inner_state, InnerStatePolicy)
        check_choice("nonfinite", nonfinite, NonfinitePolicy)
        check_choice("reduction", reduction, Reduction)
        check_choice("weights", weights, Weights)
        final_sync = check_bool("final_sync", final_sync)
        share_frozen = check_bool("share_frozen", share_frozen)
        if partition is not None and not callable(partition):
            raise ValueError(
                f"`partition` (={partition!r}) must be a callable `(dataset, num_workers) -> list of index lists`, or"
                " None."
            )
        check_instance("algorithm", algorithm, SyncAlgorithm, "Diloco()")
        check_instance("codec", codec, Codec, "FP4()")
        check_instance("participation", participation, Participation, "DropOut(0.3)")
        check_instance("cluster", cluster, Cluster, "Cluster.low(step_seconds=0.1)")
        if cluster is not None:
            cluster.check(num_nodes)
        diagnostics = check_bool("diagnostics", diagnostics)
        check_processes(process_group_backend, timeout, start_method)
        algorithm = algorithm or Diloco()
        if cluster is not None and cluster.availability is not None:
            check_availability(cluster.availability, type(algorithm).__name__, algorithm.looks_at_gradients)
        factory = outer_factory(outer_optimizer_cls, outer_optimizer_kwargs, algorithm)
        policies = Policies(eval_weights, buffers, inner_state, nonfinite, share_frozen)
        super().__init__(
            RunSettings(
                num_nodes,
                diloco_interval,
                algorithm,
                factory,
                policies,
                final_sync,
                partition,
                codec,
                participation,
                cluster,
                diagnostics,
                weights,
                configured(algorithm, factory, codec, participation, weights, cluster),
            ),
            reduction,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._arguments = arguments
        # copies are made by this constructor, and carry the remaining attributes: those of a subclass
        self._strategy_attributes = {*vars(self), "_strategy_attributes"} - set_by_subclass
        _warn_of_another_trainer()

    @property
    def num_workers(self) -> int:
        """N: simulated workers."""
        return self._settings.num_workers

    @property
    def local_workers(self) -> list[int]:
        """Global ids of the workers hosted by this process; known from ``setup`` on."""
        return list(self._world.workers)

    @property
    def current_worker(self) -> int | None:
        """Global id of the worker that is active, None between turns."""
        return self._current_worker

    @property
    def local_steps(self) -> int:
        """Completed local steps; 0 before a fit, kept after it."""
        return self._counted.local_steps

    @property
    def outer_steps(self) -> int:
        """Transfers that have arrived: of ``Diloco``, outer steps; 0 before a fit, kept after it."""
        return self._counted.outer_steps

    @property
    def reports(self) -> list[OuterStepReport]:
        """The reports of all arrivals in the present or last fit; none before a fit. A new list."""
        return list(self._counted.reports)

    @property
    def outer_optimizer(self) -> Optimizer:
        """The live outer optimizer, for example to put an LR schedule on it."""
        return self._engine.outer_optimizer

    @property
    def ledger(self) -> Ledger:
        """The bytes that the workers have sent."""
        ledger = self._counted.ledger
        return self._engine.context.ledger if ledger is None else ledger

    @property
    def times(self) -> Times:
        """Where the wall-clock time of this process went in the present or last fit; zeros before it.

        After a fit in processes that this one has started (spawn, fork): the times of process 0.
        """
        return self._counted.times

    @property
    def clock(self) -> Clock:
        """How long the present or last fit has taken on the ``cluster``, in simulated time.

        Raises:
            RuntimeError: without a cluster, and before the fit.
        """
        return self._of_cluster(self._counted.clock)

    @property
    def tally(self) -> Tally:
        """Who was there and took part, by the cluster's availability, and what was lost.

        Raises:
            RuntimeError: without a cluster, and before the fit.
        """
        return self._of_cluster(self._counted.tally)

    def _of_cluster(self, found: T | None) -> T:
        if found is not None:
            return found
        if self._settings.cluster is None:
            raise RuntimeError(
                "There is no simulated cluster. Say what its machines are like:"
                " `DilocoStrategy(cluster=Cluster(step_seconds=0.1, bandwidth_gbit_s=1, latency_ms=20))`."
            )
        raise RuntimeError("The simulated cluster has a clock from `on_train_start` on. Call `trainer.fit` first.")

    def worker_state_dict(self, worker: int) -> dict[str, Any]:
        """The keys of ``module.state_dict()`` with worker ``worker``'s values, detached copies; strict-loadable.

        Raises:
            RuntimeError: before ``on_train_start``.
            ValueError: there is no such worker, or another process hosts it.
        """
        return self._engine.views.state_dict(self._checked_worker(worker))

    def outer_state_dict(self) -> dict[str, Any]:
        """The keys of ``module.state_dict()`` with θ's values, detached copies."""
        return self._engine.views.state_dict("outer")

    @contextmanager
    def weights(self, which: int | Literal["average", "outer"]) -> Iterator[None]:
        """Puts a copy of worker ``which``, the "average" of the workers, or the "outer" model into the module for a
        while.

        Training is undisturbed: changes of the copy are dropped.
        """
        if isinstance(which, str):
            check_choice("which", which, Literal["average", "outer"])
        with self._engine.views.weights(which if isinstance(which, str) else self._checked_worker(which)):
            yield

    def memory_report(self) -> dict[str, int]:
        """Bytes that this process holds, by purpose; "workers" is the number of workers hosted here.

        "parameters_per_worker", "buffers_per_worker", "inner_state_per_worker" and "gradients_per_worker" (0 unless
        gradients are kept between a worker's turns); "outer_model" (θ and its buffers), "outer_state" (of the outer
        optimizer), "algorithm_memory" (anchors, slots, errors that codecs
        keep, transfers under way), "module" (the live module between turns), and "total".
        """
        return self._engine.memory_report()

    def _checked_worker(self, worker: int) -> int:
        found = as_integer(worker)
        if found is None or not 0 <= found < self._settings.num_workers:
            raise ValueError(
                f"Worker {worker!r} doesn't exist: `num_nodes` is {self._settings.num_workers}, ids start at 0."
            )
        worker = found
        if worker not in self._world.workers:
            raise ValueError(
                f"Worker {worker} is hosted by process {self._world.host(worker)}; this is process {self._world.rank},"
                f" which hosts {self.local_workers}. Ask there: `if {worker} in strategy.local_workers: ...`."
            )
        return worker

    @property
    def _engine(self) -> Engine:
        """The engine of the present or last fit."""
        if self._started is not None:
            return self._started
        if self._only_starts_others:
            raise RuntimeError(
                f"The workers live in the processes that this one started (`start_method` is {self._start_method!r};"
                " in notebooks that is 'fork'), and ended with them. Ask in a callback or hook of the fit. Here are"
                " `local_steps`, `outer_steps`, `reports` and `ledger`."
            )
        raise RuntimeError(
            "The workers exist from `on_train_start` on, until the next fit. Call `trainer.fit` first, or ask"
            " from a hook of the fit."
        )

    @override
    def __repr__(self) -> str:
        """The arguments that differ from their defaults, and how far the present or last fit has come."""
        given = arguments_that_differ(DilocoStrategy, self._arguments, always=("num_nodes", "diloco_interval"))
        if self._started is None:
            return f"<{type(self).__name__}({given}), before its first fit>"
        steps, outer = self.local_steps, self.outer_steps
        return f"<{type(self).__name__}({given}) after {steps:,} local steps, {outer:,} outer steps, {self.ledger!r}>"

    # ---------------------------------------------------------------------------------------- copies

    @override
    def __getstate__(self) -> dict[str, Any]:
        """The settings only: a copy is a fresh strategy, and can be made at any time."""
        if self._is_being_spawned:
            return dict(super().__getstate__())
        known = self._strategy_attributes
        subclass = {k: v for k, v in vars(self).items() if k not in known and not hasattr(DilocoStrategy, k)}
        return {"arguments": self._arguments, "subclass": subclass}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        if "arguments" not in state:
            super().__setstate__(state)
            return
        DilocoStrategy.__init__(self, **state["arguments"])
        vars(self).update(state["subclass"])


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
