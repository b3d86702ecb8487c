"""The local steps of all workers, and the synchronisations between rounds.

Owns the count of local steps, and the end of training. Imports nothing of Lightning.

The engine runs without a Trainer::

    sgd = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    engine = Engine(module, [optimizer], num_workers=4, interval=10, algorithm=Diloco(), outer_factory=sgd)
    for batches in data:                          # one batch per worker
        for w in engine.local_workers:
            with engine.turn(w):                  # worker w is active in the module and the optimizer
                loss(module, batches[w]).backward()
                optimizer.step()
        reports = engine.end_step()               # counts the step; synchronises when the round is over
    engine.flush()                                # a last outer step on a partial round
    engine.finish()                               # the module holds θ
    engine.close()                                # gives hooks and gradients back
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.algorithms.diloco import is_plain_run
from lightning_diloco.algorithms.machines import Machines
from lightning_diloco.algorithms.participation import Participation, Table
from lightning_diloco.algorithms.report import OuterStepReport
from lightning_diloco.algorithms.sending import Sender
from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.codecs import Codec
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.tensors import tensors_in
from lightning_diloco.comm.world import World
from lightning_diloco.engine import checkpoint
from lightning_diloco.engine.file_format import RunState
from lightning_diloco.engine.joining import Membership, check_availability
from lightning_diloco.engine.progress import BatchProgress
from lightning_diloco.engine.synchronisation import Synchronisation
from lightning_diloco.engine.telemetry import Seen
from lightning_diloco.engine.times import Stopwatch
from lightning_diloco.engine.turns import Turns
from lightning_diloco.engine.views import Views
from lightning_diloco.state.checks import (
    refuse_foreign_tensors,
    refuse_overlaps,
    refuse_unswappable,
    refuse_untrainable,
)
from lightning_diloco.state.live_module import LiveModule
from lightning_diloco.state.memory import Memory
from lightning_diloco.state.optimizers import InnerOptimizers
from lightning_diloco.state.outer import Outer, OuterFactory
from lightning_diloco.state.own_steps import OwnSteps
from lightning_diloco.state.policies import Policies, PolicyApplication
from lightning_diloco.state.randomness import RandomStream, derive_seed, process_state
from lightning_diloco.state.replicas import Layout, ModelState, Replicas
from lightning_diloco.state.worker import ScalerOwner


class Engine:
    """N workers inside one module.

    Args:
        module: the live module; its values are where θ and every worker start.
        optimizers: the inner optimizers over the module's parameters.
        num_workers: N ≥ 1.
        interval: H ≥ 1.
        algorithm: decides when workers communicate, what they send, and what each does with what arrives.
        outer_factory: builds the outer optimizer from θ's trainable parameters.
        policies: see :class:`Policies`.
        codec: packs what workers send; None: the algorithm's own.
        participation: who takes part in a transfer; None: everybody.
        cluster: the simulated machines; None: there are none.
        diagnostics: whether norms, cosines and drifts are measured.
        seed: where the workers' random streams start; used for N > 1.
        scaler_owner: the object whose ``scaler`` attribute is the gradient scaler in use, if any.
        schedulers: LR schedulers that are stepped inside the workers' turns; those stepped outside need no mention.
        initial: states that ``inner_state="reset"`` gives a worker's optimizers; default: the present states.
        world: the processes that share the workers; default: this one hosts all.
        ordered: see :class:`~lightning_diloco.comm.channel.Channel`.

    Raises:
        ValueError: the module has nothing to train, or parameters that can't be replicated.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Any],
        *,
        num_workers: int,
        interval: int,
        algorithm: SyncAlgorithm,
        outer_factory: OuterFactory,
        policies: Policies | None = None,
        codec: Codec | None = None,
        participation: Participation | None = None,
        cluster: Cluster | None = None,
        diagnostics: bool = True,
        seed: int = 0,
        scaler_owner: ScalerOwner | None = None,
        schedulers: Sequence[Any] = (),
        initial: Sequence[Any] | None = None,
        world: World | None = None,
        ordered: bool = True,
    ) -> None:
        self.world = world or World(num_workers)
        self.module = module
        self.policies = policies or Policies()
        self.algorithm = algorithm
        self.num_workers = num_workers
        self.local_workers = self.world.workers
        refuse_unswappable(module)
        layout = Layout(module, self.policies.share_frozen)
        self._seed = seed
        tensors = [*(layout.parameters[n] for n in layout.trainable), *module.parameters(), *module.buffers()]
        self._device = self.world.device = tensors[0].device if tensors else torch.device("cpu")
        self._replicas = Replicas(layout, self.local_workers)
        self._outer = Outer(layout, self._replicas.module_state, outer_factory)
        codec = codec or algorithm.codec
        availability = None if cluster is None else cluster.availability
        if availability is not None:
            check_availability(availability, type(algorithm).__name__, algorithm.looks_at_gradients)
        gradient_bytes = sum(self._outer.tensors[n].nbytes for n in self._outer.names)
        machines = Machines(cluster, num_workers, gradient_bytes)
        self._plain_settings = codec, participation, availability
        if not self._is_plain:
            refuse_untrainable(module)
        solo = num_workers == 1
        member = self.world.member
        streams = {w: RandomStream(derive_seed(seed, "worker", w, member), self._device) for w in self.local_workers}
        if not solo:
            refuse_foreign_tensors(module, optimizers)
            refuse_overlaps(layout)
        worker_streams = dict.fromkeys(streams) if solo else streams
        apart = availability is not None or algorithm.chooses_workers  # workers may not have stepped as often
        own_steps = OwnSteps(num_workers, restarts=availability is not None) if apart else None
        self._inner = InnerOptimizers(optimizers, scaler_owner, worker_streams, schedulers, initial, own_steps)
        if isinstance(participation, Table):
            participation.check(num_workers)
        memory = Memory(self._replicas, algorithm.anchors == "own")
        channel = Channel(self.world, lambda: self.context.step, ordered)
        self.context = SyncContext(
            replicas=self._replicas,
            outer=self._outer,
            channel=channel,
            inner=self._inner,
            memory=memory,
            sender=Sender(
                self._replicas,
                self._outer,
                memory,
                channel,
                self.policies,
                seed,
                codec,
                participation,
                diagnostics,
                machines,
            ),
            machines=machines,
            interval=interval,
            num_workers=num_workers,
        )
        self._live_module = LiveModule(self._replicas, self._outer, [memory, self.context])
        application = PolicyApplication(self.policies, self._replicas, self._outer, channel, self._inner)
        self._synchronisation = Synchronisation(self.context, algorithm, self._live_module, application)
        self.views = Views(
            self.context,
            self._live_module,
            application,
            algorithm.published,
            self.policies.eval_weights,
            seed,
            in_turn=lambda: self.current_worker is not None,
        )
        self.progress = BatchProgress()
        self.worker_steps = 0  # of all workers together, since this engine began
        self.stopwatch = Stopwatch(lambda: self.world.waiting.seconds)
        self.seen = Seen(self.local_workers)
        self._membership = Membership(self.context, algorithm)
        banks = not solo or algorithm.looks_at_gradients
        self.turns = Turns(self.context, self._live_module, self.progress, banks, self.stopwatch)
        self._hooks: list[Any] = []
        self._watch_groups()
        algorithm.ctx = self.context
        algorithm.setup()
        self._update_plain_run()

    # ---------------------------------------------------------------------------------------- turns and steps

    @property
    def current_worker(self) -> int | None:
        """Global id of the worker that is active, None between turns."""
        return self.turns.current_worker

    def turn(self, worker: int, keep_gradients: bool = False) -> AbstractContextManager[None]:
        """See :meth:`Turns.turn`."""
        return self.turns.turn(worker, keep_gradients)

    def row_of_turns(self) -> AbstractContextManager[None]:
        """See :meth:`Turns.row`."""
        return self.turns.row()

    def begin_step(self) -> None:
        """Workers leave and join before the coming local step.

        All processes call it together before the turns; once per local step something happens.
        """
        self._membership.enter(self.local_steps + 1)
        if self.algorithm.chooses_workers and not self.active_anywhere:
            raise RuntimeError(
                f"{type(self.algorithm).__name__}.active leaves nobody to take local step {self.local_steps + 1} of the"
                f" workers {self.context.workers}, which are there: the run would stand still. Return one of them."
            )

    @property
    def present(self) -> list[int]:
        """The workers of this process that are there; there may be none."""
        return self.context.local_workers

    @property
    def active(self) -> list[int]:
        """The workers of this process that take the coming local step."""
        chosen = self.active_anywhere
        return [w for w in self.context.local_workers if w in chosen]

    @property
    def active_anywhere(self) -> list[int]:
        """The workers that take the coming local step, also those of other processes."""
        chosen = set(self.algorithm.active(self.local_steps + 1))
        return [w for w in self.context.workers if w in chosen]

    def use_weights(self, weights: Mapping[int, float] | None) -> None:
        """From now on workers have these weights in every mean for which the algorithm names none; None: equal ones."""
        self.context.channel.weights = weights

    def before_inner_steps(self) -> None:
        """With ``algorithm.needs_gradients``: all backward passes are done, no worker has stepped yet."""
        with self.stopwatch.part("outer"):
            self._synchronisation.before_inner_steps()

    def end_step(self) -> Sequence[OuterStepReport]:
        """After the turns: counts the local step if an optimizer stepped, and lets the algorithm synchronise."""
        with self.stopwatch.part("outer"):
            return self._end_step()

    def _end_step(self) -> Sequence[OuterStepReport]:
        self.turns.end_batch()
        if not self._agreed_step():
            self.progress.forget()
            return []
        self.context.local_steps += 1
        counts = self._count_steps()
        self._live_module.note_steps()
        try:
            self.broadcast_buffers_in_team()
            if self.policies.inner_state != "keep" and (self.local_steps == 1 or self.context.due(self.local_steps)):
                self._inner.check_averageable(self.policies.inner_state)
            if self.is_plain_run:
                self._live_module.follow()
            self._inner.adopt_outside_changes()
            reports = self._synchronisation.after_inner_steps()
            self._after_synchronisation(reports)
        except BaseException:
            self.progress.in_outer_step = self.context.sender.writing  # else nothing was written yet
            self.context.local_steps -= 1
            self._take_back(counts)
            raise
        self.progress.moved_late = False
        self.progress.forget()
        return reports

    def _count_steps(self) -> tuple[int, list[int]]:
        """Counts the step for the workers that took it; returns the counts from before."""
        own, before = self._inner.own_steps, self.worker_steps
        if own is None:
            self.worker_steps += len(self.context.workers)
            return before, []
        self._inner.adopt_outside_changes()  # from before the step, where no turn has: all of the workers may be absent
        counts, active = list(own.counts), self.algorithm.active(self.local_steps)
        stepped = [w for w in self.context.workers if w in active]
        own.stepped(stepped)
        self.worker_steps += len(stepped)
        return before, counts

    def _take_back(self, counts: tuple[int, list[int]]) -> None:
        self.worker_steps, own_counts = counts
        if self._inner.own_steps is not None:
            self._inner.own_steps.take_back(own_counts)

    def _agreed_step(self) -> bool:
        """Whether an optimizer of any worker has stepped in this batch. A process may host no active worker."""
        stepped = self.progress.stepped
        if not self.differs_in_active_workers:
            return stepped
        return any(self.world.gather_all(f"the end of local step {self.local_steps + 1}", stepped))

    @property
    def differs_in_active_workers(self) -> bool:
        """Whether workers may be active on some processes and not on others."""
        some = self.algorithm.chooses_workers or self.context.machines.schedule is not None
        return self.world.size > 1 and some

    def _after_synchronisation(self, reports: Sequence[OuterStepReport]) -> None:
        if reports:
            self._inner.activate_first()
            self._update_plain_run()

    @property
    def _is_plain(self) -> bool:
        return is_plain_run(self.num_workers, self.algorithm, self._outer.optimizer, *self._plain_settings)

    def _update_plain_run(self) -> None:
        """The outer optimizer decides anew after each synchronisation: its learning rate may have a schedule."""
        self._live_module.set_plain_run(self._is_plain)

    def broadcast_buffers_in_team(self) -> None:
        """The buffers of a worker's first process become those of its whole team, as under DDP."""
        if self.world.team > 1:
            for w in self.local_workers:
                self.world.broadcast_in_team([b for _, b in self._replicas.states[w].named_buffers()])

    def end_epoch(self) -> None:
        """After an epoch's last batch."""
        self.turns.end_epoch()
        self._live_module.search()

    def adopt_outside_changes(self) -> None:
        """Adopts outside changes of the module, also where writing left no trace."""
        self._live_module.search()
        self._live_module.adopt_outside_changes()

    def expect_outside_changes(self) -> None:
        """The next comparison finds outside changes that left no trace, too."""
        self._live_module.search()

    # ---------------------------------------------------------------------------------------- the end

    def flush(self) -> Sequence[OuterStepReport]:
        """A last synchronisation on a partial round; nothing if no step, or no change, is pending.

        If the round is complete, buffers that changed since (in a pass that only measures BatchNorm statistics) are
        synchronised all the same.
        """
        with self.stopwatch.part("outer"):
            return self._flush()

    def _flush(self) -> Sequence[OuterStepReport]:
        self.adopt_outside_changes()
        self._inner.adopt_outside_changes()
        try:
            reports = self._synchronisation.flush(self.progress.moved_late)
            self._after_synchronisation(reports)
        except BaseException:
            self.progress.in_outer_step = self.context.sender.writing
            raise
        return reports

    def finish(self) -> None:
        """Training is over: from here on the module holds θ, and outside changes are not adopted."""
        was_plain, complete = self.is_plain_run, self.local_steps == self.context.round_start
        self._live_module.set_plain_run(False)
        if was_plain and complete:
            self.adopt_outside_changes()  # the only worker is θ, with what hooks wrote after the last round
        else:
            self._live_module.publish(self._synchronisation.published())
        self.views.closed = self.turns.finished = True

    def close(self) -> None:
        """However the fit ended: the module is left with its own tensors, the optimizers with worker 0's state."""
        self._live_module.set_plain_run(False)
        self._inner.adopt_outside_changes()
        self._inner.activate_first()
        self.views.closed = True
        self.stopwatch.stop()
        self.turns.close()
        for hook in self._hooks:
            hook.remove()
        for worker in self._inner.workers.values():
            worker.gradients = {}

    def to(self, device: torch.device) -> None:
        """Moves the states of the workers and θ, for after the fit."""
        if device != self._device:
            self._device = device
            self._replicas.to(device)
            self._outer.to(device)
            self.context.memory.to(device)
            for worker in self._inner.workers.values():
                worker.to(device)

    # ---------------------------------------------------------------------------------------- optimizers

    def restart_optimizers(self) -> None:
        """Every worker starts from the inner optimizers' present state; before the first step only."""
        self._inner.start_from_live()

    def use_optimizers(self, optimizers: Sequence[Any], schedulers: Sequence[Any] = ()) -> None:
        """Follows optimizers that were replaced between turns: every worker gets a copy of a new optimizer's state.

        Args:
            optimizers: the optimizers that the training loop steps from now on; workers keep their states of those that
                stay.
            schedulers: as in the constructor.

        Raises:
            RuntimeError: they were replaced inside a worker's turn.
        """
        if not self._inner.are_others(optimizers, schedulers):
            return
        if self.current_worker is not None and not self.is_plain_run:
            raise RuntimeError(
                f"The optimizers were replaced inside worker {self.current_worker}'s turn, where the other workers"
                " can't follow. Do it between steps, for all workers at once (for example in"
                " `Callback.on_train_batch_start`, or in the module's `on_train_epoch_start`)."
            )
        if self.num_workers > 1:
            refuse_foreign_tensors(self.module, optimizers)
        self._inner.replace(optimizers, schedulers)
        self.turns.optimizers_replaced()
        self._watch_groups()

    def _watch_groups(self) -> None:
        if self.policies.inner_state != "keep":
            self._hooks += self._inner.watch_groups()

    # ---------------------------------------------------------------------------------------- checkpoints

    def pack(self, seed: int) -> dict[str, Any]:
        """The state of the run, for a checkpoint; see :mod:`lightning_diloco.engine.checkpoint`.

        Raises:
            RuntimeError: inside a worker's turn, where the workers are not at the same step.
        """
        if self.current_worker is not None:
            raise RuntimeError(
                f"A checkpoint can't be saved inside worker {self.current_worker}'s turn, in which the workers are"
                " not at the same step. Save between steps: from a callback's hook, or a hook of the module for epochs."
            )
        if not self.views.open and not self.finished:
            self._inner.adopt_outside_changes()
        self.context.machines.settle(self.world.gather_all)
        random = self.views.outside_random or process_state()
        self.progress.in_outer_step = self.progress.in_outer_step or self.context.sender.writing
        changed = set() if self.views.open or self.finished else self._live_module.written().keys()
        state = checkpoint.pack(self.context, seed, random, self._with_pending, changed)
        state["buffers_at"] = self._synchronisation.buffers_at
        state["samples"] = self.seen.samples(self.world)
        state["torn"] = self.progress.state_dict(self.local_steps, self.local_workers)
        return state

    def _with_pending(self, state: ModelState) -> ModelState:
        """``state`` with the outside changes since the last turn."""
        return state if self.views.open or self.finished else self._live_module.pending(state)

    def resume(self, state: RunState) -> None:
        """Continues from a state that :meth:`pack` made; before the first step.

        Raises:
            ValueError: the state was saved in the middle of a step that can't be finished.
        """
        if state["torn"]["workers"] and self.algorithm.needs_gradients(state["local_steps"] + 1):
            raise ValueError(
                f"The checkpoint was saved when local step {state['local_steps'] + 1} had been interrupted, and"
                f" {type(self.algorithm).__name__} needs the gradients of all workers to finish that step. Resume from"
                " the last file before it."
            )
        if state["num_workers"] != self.num_workers and self.algorithm.needs_gradients(state["local_steps"] + 1):
            raise ValueError(
                f"`num_nodes` (={self.num_workers}) differs from the {state['num_workers']} workers of the checkpoint,"
                f" and {type(self.algorithm).__name__} needs workers whose optimizers are in the same state; new ones"
                " would start afresh. Resume with the same number."
            )
        if state["num_workers"] != self.num_workers and self.algorithm.chooses_workers:
            raise ValueError(
                f"`num_nodes` (={self.num_workers}) differs from the {state['num_workers']} workers of the checkpoint,"
                f" and under {type(self.algorithm).__name__} every worker has a place of its own in the data and its"
                " schedules. Resume with the same number."
            )
        self._live_module.set_plain_run(False)
        checkpoint.apply(state, self.context)
        self._membership.follow()
        self._synchronisation.buffers_at = state["buffers_at"]
        self.seen.resume(state["samples"])
        self.progress.load_state_dict(state["torn"])
        self._inner.activate_first()
        self._live_module.publish(self._synchronisation.published())
        self._update_plain_run()

    @contextmanager
    def first_workers_state(self) -> Iterator[None]:
        """Inside, the optimizers hold the first worker's state, also during a validation."""
        with self._inner.first_activated():
            yield

    # ---------------------------------------------------------------------------------------- what others may read

    @property
    def is_plain_run(self) -> bool:
        """N = 1 with a plain average as outer step: nothing is swapped."""
        return self._live_module.is_plain_run

    @property
    def finished(self) -> bool:
        """Whether training is over."""
        return self.views.closed

    @property
    def local_steps(self) -> int:
        return self.context.local_steps

    @property
    def outer_steps(self) -> int:
        return self.context.outer_steps

    @property
    def outer_optimizer(self) -> torch.optim.Optimizer:
        return self._outer.optimizer

    @property
    def outer_parameters(self) -> Mapping[str, nn.Parameter]:
        """Parameter name → the parameter of θ that the outer optimizer moves."""
        return self._outer.parameters

    def memory_report(self) -> dict[str, int]:
        """See :meth:`lightning_diloco.DilocoStrategy.memory_report`."""
        parameters, buffers = self._replicas.states[self.local_workers[0]].nbytes()
        inner, gradients = self._inner.first.nbytes()
        workers, outer_state = len(self.local_workers), self._outer.state_bytes()
        module = sum(self._replicas.module_state.nbytes())
        memory = self.context.memory.nbytes() + sum(t.nbytes for x in self.context.waiting for t in tensors_in(x.means))
        return {
            "workers": workers,
            "parameters_per_worker": parameters,
            "buffers_per_worker": buffers,
            "inner_state_per_worker": inner,
            "gradients_per_worker": gradients,
            "outer_model": parameters + buffers,
            "outer_state": outer_state,
            "algorithm_memory": memory,
            "module": module,
            "total": workers * (parameters + buffers + inner + gradients)
            + parameters
            + buffers
            + outer_state
            + memory
            + module,
        }
