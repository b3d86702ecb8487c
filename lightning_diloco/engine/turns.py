"""The turns of the workers: what is swapped in before a worker's step, and what is looked at after it.

Owns the worker that is active, and the checks of what its step has done. Does not own what a turn swaps (``state/``),
nor the count of steps (``engine.py``). Imports nothing of Lightning.

Turns that follow each other with nothing of the project's in between are a row: what lies outside the turns is set up
once. A turn of worker i, in order; the steps marked with * are done once in a row, before its first turn or after its
last:

==============================================  ==================================================
outside changes of weights and optimizers *     ``state/live_module.py``, ``state/optimizers.py``
θ_i and the worker's buffers become active      ``state/replicas.py`` (``Layout.activate``)
what an error inside the turn sets back         ``engine/progress.py`` (``BatchProgress.turn``)
inner optimizer states, groups, scaler          ``state/worker.py`` (``Worker.activate``)
gradients that the worker has accumulated       ``state/worker.py`` (``Worker.turn``)
the worker's random stream                      ``state/randomness.py``
``training_step``, backward, optimizer step     Lightning, in the Trainer's loop
random stream, inner states, gradients kept     ``state/worker.py``
replaced ``.data`` copied into the replica      ``state/replicas.py`` (``Layout.collect``)
was the step done by a known optimizer?         ``state/guard.py``
the module's tensors become active again *      ``state/live_module.py`` (``deactivate``)
the optimizers hold the first worker's state *  ``state/optimizers.py`` (``activate_first``)
the process's random stream is back *           ``state/randomness.py``
==============================================  ==================================================
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.engine.progress import BatchProgress
from lightning_diloco.engine.times import Stopwatch
from lightning_diloco.state.guard import AttributeGuard, StepGuard
from lightning_diloco.state.live_module import LiveModule


class Turns:
    """The turns of the workers hosted here.

    Args:
        context: the workers, θ and the inner optimizers.
        live: the live module.
        progress: how far the workers are within a batch.
        banks_gradients: keep gradients with the workers between their turns; a single worker needs that for algorithms
            that look at gradients only.
        stopwatch: counts the time of turns.

    Attributes:
        current_worker: global id of the worker whose state is in the module; None between rows of turns.
        finished: training is over: optimizers may step as they like.
    """

    def __init__(
        self,
        context: SyncContext,
        live: LiveModule,
        progress: BatchProgress,
        banks_gradients: bool,
        stopwatch: Stopwatch,
    ) -> None:
        self._context, self._live, self._progress, self._stopwatch = context, live, progress, stopwatch
        self._banks_gradients = banks_gradients
        self.current_worker: int | None = None
        self.finished = False
        self._in_row = self._in_turn = False
        self._guard, self._attributes = StepGuard(), AttributeGuard()
        after_step = weakref.WeakMethod(self._after_optimizer_step)  # torch's registry must not keep the engine alive
        self._hook = register_optimizer_step_post_hook(partial(_call_if_alive, after_step))

    @contextmanager
    def row(self) -> Iterator[None]:
        """Inside, turns follow each other, and nothing in between reads or writes the module or the optimizers.

        Outside changes since the last row are adopted first, by every worker. A turn outside a row makes a row of its
        own.
        """
        if self._live.is_plain_run:
            yield
            return
        self._swap_begins()
        self._in_row = True
        try:
            with self._context.inner.random_state_kept():
                yield
        finally:
            self._in_row, self.current_worker = False, None
            self._swap_ends()
        self._live.follow()  # what the turns have frozen or unfrozen, before a synchronisation

    def _swap_begins(self) -> None:
        self._live.adopt_outside_changes()
        self._context.inner.adopt_outside_changes()

    def _swap_ends(self) -> None:
        self._live.deactivate()
        self._context.inner.activate_first()

    @contextmanager
    def turn(self, worker: int, keep_gradients: bool = False) -> Iterator[None]:
        """A worker's turn: its weights, buffers, optimizer states, gradients, scaler and random stream are active.

        Args:
            worker: global id, hosted here.
            keep_gradients: keep ``p.grad`` for the worker's next turn instead of dropping it (gradient accumulation).

        Raises:
            RuntimeError: parameters were added, removed, replaced or reshaped inside, or trained by an optimizer that
                is none of ``optimizers``.
        """
        if self._in_turn:
            raise RuntimeError(f"Worker {worker}'s turn can't begin inside worker {self.current_worker}'s.")
        self.current_worker, self._in_turn = worker, True
        before = self._stopwatch.inner
        try:
            with (
                self._stopwatch.part("inner"),
                nullcontext() if self._in_row or self._live.is_plain_run else self.row(),
                nullcontext() if self._live.is_plain_run else self._swapped_in(worker, keep_gradients),
            ):
                yield
        finally:
            self._in_turn = False
            if not self._in_row:
                self.current_worker = None
            self._context.machines.worked(worker, self._stopwatch.inner - before)

    @contextmanager
    def _swapped_in(self, worker: int, keep_gradients: bool) -> Iterator[None]:
        ctx, inner = self._context, self._context.inner
        layout, state, worker_state = ctx.replicas.layout, ctx.replicas.states[worker], inner.workers[worker]
        # every worker's steps change the same attributes, so that looking at the first worker's is enough
        here = ctx.local_workers
        looks = len(here) > 1 and worker == here[0]
        layout.activate(state)
        layout.begin_turn()
        self._guard.begin_turn(layout, state, ctx.outer.tensors)
        if looks:
            self._attributes.begin_turn(inner.live)
        try:
            with (
                self._progress.turn(worker, worker_state, state),
                worker_state.turn(layout.everything if self._banks_gradients else [], keep_gradients),
            ):
                yield
            if layout.replaced():
                raise RuntimeError(
                    f"Parameters were added, removed or replaced inside worker {worker}'s step, where the other workers"
                    " can't follow. Do it between steps, for all workers at once (for example in"
                    " `Callback.on_train_batch_start`)."
                )
            layout.collect(state)
            where = f"worker {worker}'s turn at local step {ctx.local_steps + 1}"
            self._guard.end_turn(layout, state, inner.live, where)
            if looks:
                self._attributes.end_turn(inner.live)
        finally:
            toggled = layout.end_turn()
        if toggled:  # a frozen parameter may have been one tensor of all workers until now
            self._swap_ends()
            self._swap_begins()

    def note_step(self, optimizer: Any) -> None:
        """Says that ``optimizer`` stepped (or would have, had its scaler let it): the batch is a local step.

        Raises:
            RuntimeError: between the turns of N > 1 workers.
        """
        if self.current_worker is None and self._context.num_workers > 1 and not self.finished:
            raise RuntimeError(
                f"{type(optimizer).__name__} stepped between the workers' turns, where the module holds θ: no worker"
                " would have taken the step. Step in `training_step`, or in a hook of the module around a batch"
                " (`on_train_batch_end`); hooks of callbacks, and hooks around epochs, run once for all workers."
            )
        self._guard.stepped(optimizer)
        self._progress.note_step()

    def _after_optimizer_step(self, optimizer: Any) -> None:
        """Any optimizer of this process has stepped."""
        if self._context.inner.knows(optimizer):
            self.note_step(optimizer)
        elif self.current_worker is not None and self._context.num_workers > 1:
            place = (self.current_worker, self._context.local_steps)
            self._guard.foreign_step(optimizer, self._context.replicas.layout, place)

    def end_batch(self) -> None:
        """After the turns of a batch: gradients that no optimizer has used point to a mistake."""
        waiting = {p for worker in self._context.inner.workers.values() for p in worker.gradients}
        self._guard.end_batch(self._context.replicas.layout, waiting)

    def end_epoch(self) -> None:
        """After an epoch's last batch."""
        self._guard.end_epoch(self._context.replicas.layout)

    def optimizers_replaced(self) -> None:
        """Other optimizers have become live."""
        self._guard.replaced()

    def close(self) -> None:
        """Gives hooks back."""
        self.finished = True
        self._guard.close()
        self._hook.remove()


def _call_if_alive(method: weakref.WeakMethod[Any], optimizer: Any, *_: Any) -> None:
    alive = method()
    if alive is not None:
        alive(optimizer)
