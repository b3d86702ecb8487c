"""Views of the weights: a copy of a replica, of the mean, or of θ in the live module, for evaluation and for files.

Owns the windows in which the live module holds such a copy, and the fate of changes made inside. Does not own the
module between turns (``state/live_module.py``). Imports nothing of Lightning.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch

from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.comm.tensors import copied
from lightning_diloco.state.live_module import LiveModule
from lightning_diloco.state.policies import EvalWeights, PolicyApplication
from lightning_diloco.state.randomness import RandomStream, derive_seed, process_state
from lightning_diloco.state.replicas import ModelState, copy_buffers, is_floating, put_buffer


class Views:
    """Windows in which the live module holds other weights.

    Args:
        context: the workers, θ and the channel.
        live: the live module.
        policies: the common values of buffers.
        published: the model that the algorithm publishes: θ, or the mean of the replicas.
        which: the weights that validation and checkpoints see.
        seed: the run's seed; for N > 1 a validation has a random stream of its own.
        in_turn: whether a worker's turn is under way.

    Attributes:
        open: number of windows that are open.
        closed: training is over: the module holds θ, and outside changes stay in it.
        outside_random: states of the process's generators, while a validation has a random stream.
    """

    def __init__(
        self,
        context: SyncContext,
        live: LiveModule,
        policies: PolicyApplication,
        published: Literal["outer", "average"],
        which: EvalWeights,
        seed: int,
        in_turn: Callable[[], bool],
    ) -> None:
        self._context, self._live, self._policies, self._published = context, live, policies, published
        self._which, self._seed, self._in_turn = which, seed, in_turn
        self.open = 0
        self.closed = False
        self.outside_random: dict[str, Any] | None = None

    @contextmanager
    def weights(self, which: int | EvalWeights, everywhere: bool = False) -> Iterator[None]:
        """Inside, a copy of the chosen weights and buffers is in the module; changes of the copy are dropped.

        Args:
            which: a worker's id, "average" (the mean of the replicas), "outer" (θ), or "worker" (worker 0).
            everywhere: all processes call this together, and a worker may be hosted by any of them.
        """
        with torch.no_grad():
            scratch = self._broadcast_of(which) if everywhere and isinstance(which, int) else self._copy_of(which)
            if not self._in_turn() and not self.open and not self.closed:
                pending = self._live.pending(scratch)
                scratch.copy_from(pending.tensors, pending.buffers)
        gradients = [(p, p.grad) for p in self._context.replicas.layout.everything]
        self.open += 1
        try:
            with self._context.replicas.layout.activated(scratch):
                yield
        finally:
            self.open -= 1
            for p, gradient in gradients:
                p.grad = gradient

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The window of a validation run: ``eval_weights`` in the module, parameters and inner state a sandbox.

        Buffers that change inside are adopted by value. With N > 1 the window has a separate random stream, so that
        training draws the same numbers however often it is validated. Optimizers with ``train()`` and ``eval()`` see
        the mean of the workers' inner states: schedule-free's evaluation weights are linear in it.
        """
        if self._shows_eval_weights:
            yield
            return
        world = self._context.channel.world
        stream = RandomStream(derive_seed(self._seed, "evaluation", self._context.local_steps), world.device)
        self.outside_random = process_state()
        self._live.search()  # a callback may have swapped weights in, and may put the old ones back inside
        try:
            with stream.active() if self._context.num_workers > 1 else nullcontext(), self.weights(self._which):
                state = self._context.replicas.layout.read()
                self._live.begin_evaluation(state)
                before = copy_buffers(state.buffers)
                with self._context.inner.sandbox(self._context.channel):
                    yield
                state = self._context.replicas.layout.read()  # a hook may have pointed parameters elsewhere
                after = ModelState(state.tensors, [dict(buffers) for buffers in state.buffers])
        finally:
            self.outside_random = None
        self._live.end_evaluation(after, before)

    @contextmanager
    def further_evaluation(self, which: int | EvalWeights) -> Iterator[None]:
        """Another set of weights in the module, for a validation run beside that of :meth:`evaluation`.

        All processes call it together, since all of them evaluate the worker, whoever hosts it. Nothing that is changed
        inside stays, and torch draws the same random numbers as in :meth:`evaluation`.

        Args:
            which: as in :meth:`weights`.

        Raises:
            RuntimeError: an inner optimizer has weights of its own for evaluation.
        """
        world, optimizer = self._context.channel.world, self._context.inner.with_modes()
        if optimizer is not None:
            raise RuntimeError(
                f"`validate_on` (={which!r}) evaluates weights as they are, but {type(optimizer).__name__} computes its"
                " evaluation weights in `eval()` from the optimizer's state, of which a validation has the mean over"
                " the workers. Leave `validate_on` out; `eval_weights` decides about the weights of the validation."
            )
        stream = RandomStream(derive_seed(self._seed, "evaluation", self._context.local_steps), world.device)
        self._live.search()
        inner = self._context.inner
        with (
            stream.active() if self._context.num_workers > 1 else nullcontext(),
            self.weights(which, everywhere=True),
            nullcontext() if self._live.is_plain_run else inner.sandbox(self._context.channel),
        ):
            yield

    def state_dict(self, which: int | EvalWeights | None = None) -> dict[str, Any]:
        """The keys of ``module.state_dict()`` with detached copies of the chosen weights.

        Args:
            which: as in :meth:`weights`; None: the weights of a checkpoint, that is ``eval_weights``, or the live
                weights during validation and after the end of training.
        """
        live = which is None and (self.open or self.closed or self._shows_eval_weights)
        with nullcontext() if live else self.weights(self._which if which is None else which):
            state = self._context.replicas.layout.module.state_dict()
            return {k: copied(v) for k, v in state.items()}

    @property
    def _shows_eval_weights(self) -> bool:
        return self._live.is_plain_run and self._which != "outer"

    def _broadcast_of(self, worker: int) -> ModelState:
        """A copy of ``worker``'s replica, on every process."""
        replicas, world = self._context.replicas, self._context.channel.world
        here = world.workers  # also those that are absent: they are shown as they left
        scratch = replicas.layout.copy_of(replicas.states[worker if worker in here else here[0]])
        if world.size == 1:
            return scratch
        where = f"an evaluation of worker {worker} after {self._context.local_steps} local steps"
        buffers = dict(scratch.named_buffers())
        kinds = world.gather_all(where, [(key, tuple(b.shape), b.dtype) for key, b in buffers.items()])
        if any(kind != kinds[0] for kind in kinds):
            raise RuntimeError(
                f"The workers have different buffers at {where}, so that one process can't evaluate another's worker."
                " Give buffers the same names, shapes and dtypes in all workers, or leave `validate_on` out."
            )
        world.broadcast([*scratch.tensors.values(), *buffers.values()], world.host(worker), where)
        return scratch

    def _copy_of(self, which: int | EvalWeights) -> ModelState:
        replicas, layout = self._context.replicas, self._context.replicas.layout
        if which == "outer" and self._published == "average":
            which = "average"
        if which == "outer":
            return layout.copy_of(self._context.outer.state)
        if isinstance(which, int):
            return layout.copy_of(replicas.states[which])
        channel = self._context.channel
        first = channel.workers[0]  # worker 0, unless it has left
        scratch = layout.copy_of(replicas.states[(channel.here or channel.world.workers)[0]])
        if which == "worker" and self._context.channel.world.size == 1:
            return scratch
        application = self._policies
        survey = application.survey(f"an evaluation after {self._context.local_steps} local steps")
        if which == "worker":
            values = channel.copies_of(first, layout.names, replicas.tensors, scratch.tensors)
        else:
            differing = [n for n in layout.names if n not in layout.frozen or not application.same(survey, n)]
            floating = [n for n in differing if is_floating(scratch.tensors[n])]
            values = channel.mean(floating, replicas.tensors)
            others = [n for n in differing if n not in values]
            values |= channel.copies_of(first, others, replicas.tensors, scratch.tensors)
            equal = [n for n in layout.names if n not in values]
            values |= {} if channel.on_all_processes else channel.common(equal, replicas.tensors, scratch.tensors)
        for name, value in values.items():
            scratch.tensors[name].copy_(value)
        common = application.common_buffers(self._context.workers, survey, first=which == "worker")
        for (position, name), value in common.items():
            put_buffer(scratch.buffers[position], name, value)
        if not channel.on_all_processes:  # a process may host absent workers only, whose buffers are their own
            for (position, name), value in application.equal_buffers(first, survey, common).items():
                put_buffer(scratch.buffers[position], name, value)
        return scratch
