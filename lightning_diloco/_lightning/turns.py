"""The workers' turns within a step of Lightning's training loop.

Owns which hooks and passes run in a worker's turn, and Lightning's objects that a turn must leave as it found them:
progress counters and the logger connector. Elsewhere: when in the loop turns come (``loops.py``), the swap of the
worker's state (``engine/engine.py``).

Private because no public hook sees every path: while accumulating gradients Lightning calls the closure without the
strategy, and between the loop and ``Strategy.optimizer_step`` stands the user's ``optimizer_step``.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from torch.utils._pytree import tree_leaves

from lightning_diloco._lightning.hooks import does_something, only_moves, rank_of, transfers_in_turn
from lightning_diloco._lightning.results import WorkerResults
from lightning_diloco.comm.world import World
from lightning_diloco.fit import Fit

Outputs = dict[str, Any]


def fit_of(trainer: Trainer) -> Fit:
    """The fit that ``trainer`` runs."""
    strategy: Any = trainer.strategy
    assert isinstance(strategy._fit, Fit)
    return strategy._fit


class WorkerTurns:
    """The turns of the workers hosted here, within a step.

    Args:
        loop: Lightning's loop over batches, with workers' results.

    Attributes:
        workers: those that have turns, in order.
    """

    def __init__(self, loop: _TrainingEpochLoop) -> None:
        assert isinstance(loop._results, WorkerResults)
        self._loop, self._trainer, self.results = loop, loop.trainer, loop._results
        self._fit = fit_of(loop.trainer)
        self.workers: Sequence[int] = []

    @contextmanager
    def turn(self, worker: int, batch: Any, keep_gradients: bool = False) -> Iterator[None]:
        """Inside, ``worker`` is active: module, optimizers, logged values and rank-zero functions are this worker's."""
        fit, results, connector = self._fit, self.results, self._trainer._logger_connector
        first_iteration = connector._first_loop_iter
        if first_iteration and worker != self.workers[0]:
            connector._first_loop_iter = False  # else the first log() of a hook drops the values of earlier workers
        keep = keep_gradients or self._loop._should_accumulate() or fit.keeps_gradients
        try:
            with rank_of(worker), results.turn(worker, batch), fit.engine.turn(worker, keep_gradients=keep):
                yield
                fit.follow_optimizers()  # raises if the worker's turn has replaced them
        finally:
            connector._first_loop_iter = first_iteration

    def transfer(self, batches: dict[int, Any]) -> dict[int, Any]:
        """Moves each worker's batch to the device, in the worker's turn if the project overrides a transfer hook."""
        trainer = self._trainer
        module = trainer.lightning_module
        # An overridden hook may augment at random or read the module, so it needs the worker's stream and weights.
        # Lightning's own transfer needs neither, and a turn that swaps every tensor would be wasted on it.
        in_turn, plainly = transfers_in_turn(trainer), only_moves(trainer)

        def move(batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(batch)
            if plainly:
                return move_data_to_device(batch, trainer.strategy.root_device)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)

        if not in_turn:
            return {w: move(batch) for w, batch in batches.items()}
        moved = {}
        with self._fit.engine.row_of_turns():
            for w, batch in batches.items():
                with self.turn(w, batch):
                    moved[w] = move(batch)
        self.results.fold()
        return moved

    def run(self, batches: Mapping[int, Any], batch_idx: int, iterator: Any) -> dict[int, Outputs]:
        """Forward, backward and inner step of every worker; Lightning's progress counters move once."""
        engine = self._fit.engine
        automatic = self._trainer.lightning_module.automatic_optimization
        if iterator is None:  # Lightning reads the signature of `training_step` to build them
            arguments = self._loop._build_kwargs(OrderedDict(), None, batch_idx)
            inputs = {w: OrderedDict(arguments, batch=batch) for w, batch in batches.items()}
        else:
            inputs = {w: OrderedDict(any=iterator) for w in batches}
        stepping = not self._loop._should_accumulate() and not self._loop.automatic_optimization._skip_backward
        counters = _Counters(self._loop.automatic_optimization, self._loop.manual_optimization)
        with counters.kept(lambda: set(inputs) <= engine.progress.done):
            if engine.algorithm.needs_gradients(engine.local_steps + 1) and automatic and stepping:
                outputs = self._run_after_all_backwards(inputs, batch_idx, counters)
            else:
                outputs = {}
                with engine.row_of_turns():
                    for w in counters.each(inputs):
                        with self.turn(w, batches[w]):
                            if automatic:  # Lightning allows a single optimizer then
                                optimizer = self._trainer.optimizers[0]
                                outputs[w] = self._loop.automatic_optimization.run(optimizer, batch_idx, inputs[w])
                            else:
                                outputs[w] = self._loop.manual_optimization.run(inputs[w])
                        engine.progress.done.add(w)
                        self._note(w, batches[w], outputs[w])
            if engine.differs_in_active_workers:
                counters.agree(engine.world, f"the turns of local step {engine.local_steps + 1}")
        self.results.fold()
        return outputs

    def _run_after_all_backwards(
        self, inputs: Mapping[int, Any], batch_idx: int, counters: "_Counters"
    ) -> dict[int, Outputs]:
        """For algorithms that change gradients: all forward and backward passes first, then all inner steps."""
        fit, loop = self._fit, self._loop.automatic_optimization
        engine, parameters = fit.engine, self._trainer.lightning_module.parameters
        closures: dict[int, _Finished] = {}
        with engine.row_of_turns():
            for w in counters.each(inputs):
                with self.turn(w, inputs[w].get("batch"), keep_gradients=True):  # for the worker's second turn below
                    closure = loop._make_closure(inputs[w], self._trainer.optimizers[0], batch_idx)
                    with fit.team.one_pass(parameters()):
                        closures[w] = _Finished(closure())
                    closures[w].output = closure.consume_result().asdict()
        engine.before_inner_steps()
        with engine.row_of_turns():
            for w in counters.each(inputs):
                with self.turn(w, inputs[w].get("batch")), fit.team.computed_before():
                    loop._optimizer_step(batch_idx, closures[w])  # with Lightning's hooks, clipping and precision
                engine.progress.done.add(w)
                self._note(w, inputs[w].get("batch"), closures[w].output)
        return {w: {} if c.loss is None else c.output for w, c in closures.items()}

    def _note(self, worker: int, batch: Any, output: Outputs) -> None:
        """Counts the samples and the loss of a worker's turn; a pass that trains nothing (SWA's) doesn't count."""
        loop = self._loop
        if loop.automatic_optimization._skip_backward:
            return
        loss = output.get("loss")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            loss = None  # under manual optimization "loss" may be any object
        elif loop.trainer.lightning_module.automatic_optimization and loop.trainer.accumulate_grad_batches > 1:
            loss = loss * loop.trainer.accumulate_grad_batches  # by which Lightning has divided
        self._fit.engine.seen.note(worker, samples_of(batch), loss)

    def agreed(self, name: str, here: bool) -> bool:
        """Whether a hook has said so in any worker's turn, where processes may have had no turn."""
        engine = self._fit.engine
        if not engine.differs_in_active_workers or not does_something(self._trainer.lightning_module, name):
            return here
        return any(engine.world.gather_all(f"{name} of local step {engine.local_steps + 1}", here))

    def hook(self, name: str, batches: Mapping[int, Any], arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """Calls a hook of the LightningModule in each worker's turn, as on every rank under DDP."""
        trainer = self._trainer
        if not does_something(trainer.lightning_module, name):
            return []
        responses = []
        with self._fit.engine.row_of_turns():
            for w, batch in batches.items():
                with self.turn(w, batch):
                    responses.append(call._call_lightning_module_hook(trainer, name, *arguments(w)))
        self.results.fold()
        return responses


def samples_of(batch: Any) -> int | None:
    """The size of the first tensor's first dimension in a batch, of a tuple of tensors or a dict, say; None: unknown.

    Lightning's own function warns of sizes that differ, and raises where it finds none.
    """
    tensor = next((t for t in tree_leaves(batch) if isinstance(t, torch.Tensor) and t.ndim), None)
    return None if tensor is None else tensor.shape[0]


class _Counters:
    """Lightning's progress counters in a step, which move once although every worker steps.

    Args:
        automatic: the loop that counts under automatic optimization.
        manual: the loop that counts under manual optimization.
    """

    def __init__(self, automatic: _AutomaticOptimization, manual: _ManualOptimization) -> None:
        progress = automatic.optim_progress.optimizer
        pairs = (progress.step, progress.zero_grad, manual.optim_step_progress)
        self._trackers: list[Any] = [tracker for pair in pairs for tracker in (pair.total, pair.current)]
        self._before = self._read()
        self._after: list[dict[str, int]] | None = None

    def each(self, turns: Iterable[int]) -> Iterator[int]:
        """The workers in order; the counters are reset before each, so that every worker sees the first worker's."""
        for i, w in enumerate(turns):
            if i:
                self._after = self._after or self._read()
                self._write(self._before)
            yield w

    @contextmanager
    def kept(self, all_stepped: Callable[[], bool]) -> Iterator[None]:
        """An error inside leaves the counters as before the step, or after it if all workers have stepped.

        A run that resumes from a file saved then finishes the step, and counts it once.
        """
        try:
            yield
        except BaseException:
            if not all_stepped():
                self._write(self._before)
            elif self._after is not None:
                self._write(self._after)
            raise

    def agree(self, world: World, where: str) -> None:
        """A process of which no worker was active counts as the others do, else the processes' clocks part."""
        now = self._read()
        moves = world.gather_all(where, None if now == self._before else _difference(now, self._before))
        move = next((m for m in moves if m is not None), None)
        if move is not None and now == self._before:
            self._write([{k: v + m[k] for k, v in at.items()} for at, m in zip(now, move, strict=True)])

    def _read(self) -> list[dict[str, int]]:
        return [dict(vars(tracker)) for tracker in self._trackers]

    def _write(self, values: Sequence[Mapping[str, int]]) -> None:
        for tracker, saved in zip(self._trackers, values, strict=True):
            vars(tracker).update(saved)


def _difference(now: Sequence[Mapping[str, int]], before: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    return [{k: v - b[k] for k, v in at.items()} for at, b in zip(now, before, strict=True)]


class _Finished:
    """A closure after its forward and backward passes: calling it returns the loss."""

    def __init__(self, loss: torch.Tensor | None) -> None:
        self.loss = loss
        self.output: Outputs = {}

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor | None:
        return self.loss
