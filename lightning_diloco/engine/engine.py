"""The local steps of all workers, and the synchronisations between rounds.

Owns the turns of the workers, the count of local steps, and the end of training. Imports nothing of Lightning.

A turn of worker i, in order:

==============================================  ==================================================
outside changes of weights and optimizers       ``state/live_module.py``, ``state/optimizers.py``
θ_i and the worker's buffers become active      ``state/replicas.py`` (``Layout.activate``)
what an error inside the turn sets back         ``engine/progress.py`` (``BatchProgress.turn``)
inner optimizer states, groups, scaler          ``state/worker.py`` (``Worker.activate``)
gradients that the worker has accumulated       ``state/worker.py`` (``Worker.turn``)
the worker's random stream                      ``state/randomness.py``
``training_step``, backward, optimizer step     Lightning, in the Trainer's loop
random stream, inner states, gradients kept     ``state/worker.py``
replaced ``.data`` copied into the replica      ``state/replicas.py`` (``Layout.collect``)
was the step done by a known optimizer?         ``state/guard.py``
the module's tensors become active again        ``state/live_module.py`` (``deactivate``)
the optimizers hold the first worker's state    ``state/optimizers.py`` (``activate_first``)
==============================================  ==================================================

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

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_diloco.algorithms.base import SyncAlgorithm, is_plain_run
from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.algorithms.report import OuterStepReport
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.world import World
from lightning_diloco.engine import checkpoint
from lightning_diloco.engine.file_format import RunState
from lightning_diloco.engine.progress import BatchProgress
from lightning_diloco.engine.views import Views
from lightning_diloco.state.checks import (
    refuse_foreign_tensors,
    refuse_overlaps,
    refuse_unswappable,
    refuse_untrainable,
)
from lightning_diloco.state.guard import AttributeGuard, StepGuard
from lightning_diloco.state.live_module import LiveModule
from lightning_diloco.state.optimizers import InnerOptimizers
from lightning_diloco.state.outer import Outer, OuterFactory
from lightning_diloco.state.policies import Policies
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
        algorithm: decides when workers communicate, and which tensors they exchange.
        outer_factory: builds the outer optimizer from θ's trainable parameters.
        policies: see :class:`Policies`.
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
        self.current_worker: int | None = None
        refuse_unswappable(module)
        layout = Layout(module, self.policies.share_frozen)
        self._seed = seed
        tensors = [*(layout.parameters[n] for n in layout.trainable), *module.parameters(), *module.buffers()]
        self._device = self.world.device = tensors[0].device if tensors else torch.device("cpu")
        self._replicas = Replicas(layout, self.local_workers)
        self._outer = Outer(layout, self._replicas.module_state, outer_factory)
        if not is_plain_run(num_workers, algorithm, self._outer.optimizer):
            refuse_untrainable(module)
        self._live_module = LiveModule(self._replicas, self._outer)
        solo = num_workers == 1
        member = self.world.member
        streams = {w: RandomStream(derive_seed(seed, "worker", w, member), self._device) for w in self.local_workers}
        if not solo:
            refuse_foreign_tensors(module, optimizers)
            refuse_overlaps(layout)
        worker_streams = dict.fromkeys(streams) if solo else streams
        self._inner = InnerOptimizers(optimizers, scaler_owner, worker_streams, schedulers, initial)
        self.context = SyncContext(
            replicas=self._replicas,
            outer=self._outer,
            channel=Channel(self.world, lambda: self.local_steps, ordered),
            inner=self._inner,
            interval=interval,
            num_workers=num_workers,
            policies=self.policies,
        )
        self.views = Views(
            self.context,
            self._live_module,
            algorithm.publish,
            self.policies.eval_weights,
            seed,
            in_turn=lambda: self.current_worker is not None,
        )
        self.progress = BatchProgress()
        self._guard, self._attributes = StepGuard(), AttributeGuard()
        after_step = weakref.WeakMethod(self._after_optimizer_step)  # torch's registry must not keep the engine alive
        self._hooks = [register_optimizer_step_post_hook(partial(_call_if_alive, after_step))]
        self._watch_groups()
        algorithm.setup(self.context)
        self._update_plain_run()

    # ---------------------------------------------------------------------------------------- turns and steps

    @contextmanager
    def turn(self, worker: int, keep_gradients: bool = False) -> Iterator[None]:
        """A worker's turn: its weights, buffers, optimizer states, gradients, scaler and random stream are active.

        Outside changes of the module and the optimizers since the last turn are adopted first, by every worker.

        Args:
            worker: global id, hosted here.
            keep_gradients: keep ``p.grad`` for the worker's next turn instead of dropping it (gradient accumulation).

        Raises:
            RuntimeError: parameters were added, removed, replaced or reshaped inside, or trained by an optimizer that
                is none of ``optimizers``.
        """
        if self.current_worker is not None:
            raise RuntimeError(f"Worker {worker}'s turn can't begin inside worker {self.current_worker}'s.")
        self.current_worker = worker
        try:
            with nullcontext() if self.is_plain_run else self._swapped_in(worker, keep_gradients):
                yield
        finally:
            self.current_worker = None

    @contextmanager
    def _swapped_in(self, worker: int, keep_gradients: bool) -> Iterator[None]:
        self._live_module.adopt_outside_changes()
        self._inner.adopt_outside_changes()
        layout, state, worker_state = self._replicas.layout, self._replicas.states[worker], self._inner.workers[worker]
        # every worker's steps change the same attributes, so that looking at the first worker's is enough
        looks = len(self.local_workers) > 1 and worker == self.local_workers[0]
        layout.activate(state)
        layout.begin_turn()
        self._guard.begin_turn(layout, state, self._outer.tensors)
        if looks:
            self._attributes.begin_turn(self._inner.live)
        try:
            with (
                self.progress.turn(worker, worker_state, state),
                worker_state.turn(layout.everything if self.num_workers > 1 else [], keep_gradients),
            ):
                yield
            if layout.replaced():
                raise RuntimeError(
                    f"Parameters were added, removed or replaced inside worker {worker}'s step, where the other workers"
                    " can't follow. Do it between steps, for all workers at once (for example in"
                    " `Callback.on_train_batch_start`)."
                )
            with torch.no_grad():
                layout.collect(state)
            where = f"worker {worker}'s turn at local step {self.local_steps + 1}"
            self._guard.end_turn(layout, state, self._inner.live, where)
            if looks:
                self._attributes.end_turn(self._inner.live)
        finally:
            layout.end_turn()
            self._live_module.deactivate()
            self._inner.activate_first()

    def note_step(self, optimizer: Any) -> None:
        """Says that ``optimizer`` stepped (or would have, had its scaler let it): the batch is a local step.

        Raises:
            RuntimeError: between the turns of N > 1 workers.
        """
        if self.current_worker is None and self.num_workers > 1 and not self.finished:
            raise RuntimeError(
                f"{type(optimizer).__name__} stepped between the workers' turns, where the module holds θ: no worker"
                " would have taken the step. Step in `training_step`, or in a hook of the module around a batch"
                " (`on_train_batch_end`); hooks of callbacks, and hooks around epochs, run once for all workers."
            )
        self._guard.stepped(optimizer)
        self.progress.note_step()

    def _after_optimizer_step(self, optimizer: Any) -> None:
        """Any optimizer of this process has stepped."""
        if self._inner.knows(optimizer):
            self.note_step(optimizer)
        elif self.current_worker is not None and self.num_workers > 1:
            self._guard.foreign_step(optimizer, self._replicas.layout, (self.current_worker, self.local_steps))

    def before_inner_steps(self) -> None:
        """With ``algorithm.needs_gradients``: all backward passes are done, no worker has stepped yet."""
        with torch.no_grad():
            self.algorithm.before_inner_step(self.local_steps + 1)

    def end_step(self) -> Sequence[OuterStepReport]:
        """After the turns: counts the local step if an optimizer stepped, and lets the algorithm synchronise."""
        waiting = {p for worker in self._inner.workers.values() for p in worker.gradients}
        self._guard.end_batch(self._replicas.layout, waiting)
        if not self.progress.stepped:
            self.progress.forget()
            return []
        self.context.local_steps += 1
        self._live_module.note_steps()
        try:
            reports = self._publish_after(self._synchronise())
        except BaseException:
            self.progress.in_outer_step = self.context.in_round  # else nothing was written yet
            self.context.local_steps -= 1
            raise
        self.progress.moved_late = False
        self.progress.forget()
        return reports

    def _synchronise(self) -> Sequence[OuterStepReport]:
        self.broadcast_buffers_in_team()
        if self.policies.inner_state != "keep" and (self.local_steps == 1 or self.context.due(self.local_steps)):
            self._inner.check_averageable(self.policies.inner_state)
        if self.is_plain_run:
            self._live_module.follow()
        self._inner.adopt_outside_changes()
        reports = self.algorithm.after_inner_step(self.local_steps)
        if not reports and self.context.due(self.local_steps):  # the algorithm has not synchronised the processes
            self.world.gather_signals(f"the end of a round after {self.local_steps} local steps")
        return reports

    def _publish_after(self, reports: Sequence[OuterStepReport]) -> Sequence[OuterStepReport]:
        if reports:
            self._inner.activate_first()
            self._update_plain_run()
            self._live_module.publish(self.algorithm.publish())
        return reports

    def _update_plain_run(self) -> None:
        """The outer optimizer decides anew after each synchronisation: its learning rate may have a schedule."""
        plain = is_plain_run(self.num_workers, self.algorithm, self._outer.optimizer)
        self._live_module.set_plain_run(plain)

    def broadcast_buffers_in_team(self) -> None:
        """The buffers of a worker's first process become those of its whole team, as under DDP."""
        if self.world.team > 1:
            for w in self.local_workers:
                self.world.broadcast_in_team([b for _, b in self._replicas.states[w].named_buffers()])

    def end_epoch(self) -> None:
        """After an epoch's last batch."""
        self._guard.end_epoch(self._replicas.layout)
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
        self.adopt_outside_changes()
        complete = self.local_steps == self.context.round_start and not self.progress.moved_late
        if complete or self.context.workers_equal_outer_model():
            self.context.policy_application.synchronise_buffers()
            self._live_module.publish(self.algorithm.publish())
            return []
        self._inner.adopt_outside_changes()
        return self._publish_after(self.algorithm.flush(self.local_steps))

    def finish(self) -> None:
        """Training is over: from here on the module holds θ, and outside changes are not adopted."""
        was_plain, complete = self.is_plain_run, self.local_steps == self.context.round_start
        self._live_module.set_plain_run(False)
        if was_plain and complete:
            self.adopt_outside_changes()  # the only worker is θ, with what hooks wrote after the last round
        else:
            self._live_module.publish(self.algorithm.publish())
        self.views.closed = True

    def close(self) -> None:
        """However the fit ended: the module is left with its own tensors, the optimizers with worker 0's state."""
        self._live_module.set_plain_run(False)
        self._inner.adopt_outside_changes()
        self._inner.activate_first()
        self.views.closed = True
        self._guard.close()
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
        self._guard.replaced()
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
        random = self.views.outside_random or process_state()
        state = checkpoint.pack(self.context, self.algorithm, seed, random, self._with_pending)
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
        if state["torn"]["workers"] and self.algorithm.needs_gradients:
            raise ValueError(
                f"The checkpoint was saved when local step {state['local_steps'] + 1} had been interrupted, and"
                f" {type(self.algorithm).__name__} needs the gradients of all workers to finish that step. Resume from"
                " the last file before it."
            )
        self._live_module.set_plain_run(False)
        checkpoint.apply(state, self.context, self.algorithm)
        self.progress.load_state_dict(state["torn"])
        self._inner.activate_first()
        self._live_module.publish(self.algorithm.publish())
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
        return {
            "workers": workers,
            "parameters_per_worker": parameters,
            "buffers_per_worker": buffers,
            "inner_state_per_worker": inner,
            "gradients_per_worker": gradients,
            "outer_model": parameters + buffers,
            "outer_state": outer_state,
            "module": module,
            "total": workers * (parameters + buffers + inner + gradients) + parameters + buffers + outer_state + module,
        }


def _call_if_alive(method: weakref.WeakMethod[Any], optimizer: Any, *_: Any) -> None:
    alive = method()
    if alive is not None:
        alive(optimizer)
