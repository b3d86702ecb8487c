"""Lightning's training loop, with every worker inside one of its steps.

Owns *when*: where in the loop the workers have their turns, where a round ends, what is live during validation. Holds
no state of its own, so that ``loop.state_dict()`` stays Lightning's. ``installation.py`` gives a Trainer these loops
for the time of a fit.

Private because no public hook sees every path: while accumulating gradients Lightning calls the closure without the
strategy, and between the loop and ``Strategy.optimizer_step`` stands the user's own ``optimizer_step``.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_diloco._lightning.connectors import DilocoSignalConnector
from lightning_diloco._lightning.data import is_sharded, set_epoch, show_first_workers, split_batch
from lightning_diloco._lightning.hooks import does_something, looks_at_gradients, rank_of
from lightning_diloco._lightning.reclassed import Reclassed
from lightning_diloco._lightning.results import WorkerResults, mean_type
from lightning_diloco._lightning.trainer_state import logging_step, overfits, uses_distributed_sampler
from lightning_diloco.fit import Fit

Outputs = dict[str, Any]

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class DilocoFitLoop(Reclassed, _FitLoop):
    """The loop over epochs, which tells the fit when training begins and ends."""

    @property
    def _fit(self) -> Fit:
        return fit_of(self.trainer)

    @override
    def setup_data(self) -> None:
        # `Strategy.process_dataloader` isn't told the stage, and `trainer.training` is True for validation loaders too
        before = None if self._combined_loader is None else self._combined_loader.flattened
        fit, trainer = self._fit, self.trainer
        with fit.sharding(uses_distributed_sampler(trainer), overfits(trainer)):
            super().setup_data()
        if self._combined_loader is not None and self._combined_loader.flattened is not before:
            show_first_workers(self._combined_loader)
        if isinstance(self._data_fetcher, _DataLoaderIterDataFetcher) and fit.shards_data:
            raise MisconfigurationException(
                "`training_step(self, dataloader_iter)` fetches batches by itself, so DilocoStrategy can't deal them"
                " to its workers. Use `training_step(self, batch, batch_idx)`."
            )

    @property
    def restarting(self) -> bool:
        """Whether an unfinished epoch goes on. With ``max_steps`` Lightning says so after a complete one, too: it then
        runs an empty epoch, and the next one reads the data of the one after it.
        """
        return bool(self._restarting)

    @restarting.setter
    def restarting(self, restarting: bool) -> None:
        current: Any = self.epoch_progress.current
        complete = current.ready == current.started == current.processed
        loop = _Loop if complete and self._fit.settings.num_workers > 1 else _FitLoop
        loop.restarting.fset(self, restarting and not complete)  # type: ignore[attr-defined]

    @property
    @override
    def skip(self) -> bool:
        """Resumed from a file of the last local step, the outer step on the partial round is still to come."""
        pending = self._fit.awaits_final_sync and self.trainer.limit_train_batches != 0
        return super().skip and not pending

    @override
    def on_run_start(self) -> None:
        self._fit.start_engine()
        self._fit.in_loop = True
        super().on_run_start()

    @override
    def on_advance_start(self) -> None:
        super().on_advance_start()
        progress: Any = self.epoch_progress
        begun = progress.current.ready > progress.current.completed
        if not begun and self._fit.settings.num_workers > 1:
            # Resumed from the last on_train_batch_end of an epoch, Lightning goes on with the next without saying so:
            # the epoch doesn't count as begun, a file saved in it can't be resumed, and the hooks are left out.
            progress.increment_ready()
            call._call_callback_hooks(self.trainer, "on_train_epoch_start")
            call._call_lightning_module_hook(self.trainer, "on_train_epoch_start")
            progress.increment_started()
        assert self._combined_loader is not None
        for loader in self._combined_loader.flattened:
            set_epoch(loader, progress.current.processed)
        self._fit.engine.expect_outside_changes()

    @override
    def on_advance_end(self) -> None:
        connector = self.trainer._logger_connector
        connector.epoch_end_reached()  # from here on the collections give epoch values
        values = _worker_values(self.epoch_loop._results, on_step=False)
        super().on_advance_end()
        if values:
            _log(self.trainer, values, self.epoch_loop._batches_that_stepped - 1)
        self._fit.engine.end_epoch()

    @override
    def on_run_end(self) -> None:
        fit = self._fit
        reports = fit.finish()  # before callbacks' on_train_end: EMA and SWA write their weights there
        fit.deliver(reports, logging_step(self.trainer, after_training=True))
        _obey_signals(self.trainer)
        fit.in_loop = False
        super().on_run_end()


class DilocoEpochLoop(Reclassed, _TrainingEpochLoop):
    """The loop over batches: one Lightning step is one local step of every worker."""

    @override
    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self._resumes_after_validation(data_fetcher):
            return
        trainer, fit = self.trainer, fit_of(self.trainer)
        engine, module, connector = fit.engine, trainer.lightning_module, trainer._logger_connector
        fit.keeps_gradients = fit.keeps_gradients or looks_at_gradients(trainer)
        engine.progress.manual = not module.automatic_optimization
        fit.follow_optimizers()
        # Lightning's own loop broadcasts here whether process 0 got a SIGTERM; that waits for the next synchronisation
        iterator = None  # of a `training_step(self, dataloader_iter)`, which only a single worker can have
        if isinstance(data_fetcher, _DataLoaderIterDataFetcher):
            iterator, batch_idx = next(data_fetcher), data_fetcher._batch_idx
            self.batch_progress.is_last_batch = data_fetcher.done
            batches = given = dict.fromkeys(engine.local_workers, data_fetcher._batch)
        else:
            fetched, _, _ = next(data_fetcher)
            batch_idx = self.batch_idx + 1
            self.batch_progress.is_last_batch = data_fetcher.done
            workers, combined = engine.local_workers, data_fetcher.combined_loader
            # what no loader was sharded for is handed through untouched
            batches = self._transfer(split_batch(fetched, workers) if is_sharded(combined) else {workers[0]: fetched})
            given = {w: batch for w, batch in batches.items() if batch is not None}
        batch = next(iter(given.values()), None)  # callbacks see the first worker's, as on rank 0 under DDP
        self.batch_progress.increment_ready()
        connector.on_batch_start(batch)

        outputs: dict[int, Outputs] = {}
        end_of_epoch = False
        end_hook_is_due, steps_before = True, engine.local_steps

        def end_hook() -> None:
            self._module_hook("on_train_batch_end", batches, lambda w: (outputs.get(w), batches[w], batch_idx))

        if len(given) < len(batches):
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        if given:
            call._call_callback_hooks(trainer, "on_train_batch_start", batch, batch_idx)
            left = {w: b for w, b in given.items() if w not in engine.progress.done}  # all, but in a torn step
            responses = self._module_hook("on_train_batch_start", left, lambda w: (left[w], batch_idx))
            call._call_strategy_hook(trainer, "on_train_batch_start", batch, batch_idx)
            end_of_epoch = -1 in responses
            if end_of_epoch:
                self.batch_progress.increment_by(0, is_last_batch=True)
            else:
                self.batch_progress.increment_started()
                with trainer.profiler.profile("run_training_batch"):
                    outputs = self._run_workers(left, batch_idx, iterator)
                if not module.automatic_optimization and engine.num_workers > 1:
                    end_hook()  # it may step, too: so it comes before the step is counted, not after the callbacks'
                    end_hook_is_due = False
                if self.automatic_optimization._skip_backward:
                    engine.progress.forget()  # SWA's pass for BatchNorm statistics trains nothing
                else:
                    self._end_step()
        counted = engine.local_steps > steps_before
        self.batch_progress.increment_processed()

        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if end_of_epoch:
            raise StopIteration

        if isinstance(data_fetcher, _DataLoaderIterDataFetcher):  # the step has fetched
            batch, batch_idx = data_fetcher._batch, data_fetcher._batch_idx
            batches = dict.fromkeys(batches, batch)
            self.batch_progress.is_last_batch = data_fetcher.done
        call._call_callback_hooks(trainer, "on_train_batch_end", _mean_loss(outputs), batch, batch_idx)
        if end_hook_is_due:
            engine.progress.counted = counted
            try:
                end_hook()
            finally:
                engine.progress.counted = False
            if engine.progress.stepped:
                self._end_step()
        _obey_signals(trainer)
        connector.on_batch_end()
        self.batch_progress.increment_completed()
        connector.update_train_step_metrics()
        accumulating = self._should_accumulate() and trainer.lightning_module.automatic_optimization
        if not accumulating and (connector.should_update_logs or trainer.fast_dev_run):
            _log(trainer, _worker_values(self._results, on_step=True), self._batches_that_stepped)

    def _end_step(self) -> None:
        """Counts the local step, if an optimizer stepped, and synchronises if it is due."""
        trainer, fit = self.trainer, fit_of(self.trainer)
        with trainer.profiler.profile(f"[Strategy]{type(trainer.strategy).__name__}.outer_step"):
            if not trainer.lightning_module.automatic_optimization:
                fit.engine.broadcast_buffers_in_team()  # as DDP does before every forward
            fit.deliver(fit.engine.end_step(), logging_step(trainer))

    @override
    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        should = super()._should_check_val_fx(data_fetcher)
        if self.trainer._val_check_time_interval is None:
            return should
        # every process has a clock of its own
        return bool(fit_of(self.trainer).world.decided_by_first(lambda: should))

    def _resumes_after_validation(self, data_fetcher: _DataFetcher) -> bool:
        """After loading a checkpoint saved around a validation: whether this call has no batch to train on."""
        if self.restarting and self._should_check_val_fx(data_fetcher):
            if self.val_loop.restarted_mid_evaluation:
                return True
            if self.restarted_on_last:
                self._skip_next_val = True
                return True
            several = fit_of(self.trainer).engine.num_workers > 1
            with isolate_rng() if several else nullcontext():  # it draws a seed for the loader, which is not read
                self.val_loop.increment_progress_to_evaluation_end()
        self.val_loop.restarting = False
        return False

    def _transfer(self, batches: dict[int, Any]) -> dict[int, Any]:
        """Moves each worker's batch to the device, in the worker's turn if the project takes part in that."""
        trainer = self.trainer
        module = trainer.lightning_module
        owners = [o for o in (module, trainer.datamodule) if o is not None]
        in_turn = any(does_something(o, hook) for hook in _TRANSFER_HOOKS for o in owners)

        def move(batch: Any) -> Any:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)

        if not in_turn:
            return {w: move(batch) for w, batch in batches.items()}
        moved = {}
        for w, batch in batches.items():
            with self._turn(w, batch):
                moved[w] = move(batch)
        self._results_fold()
        return moved

    def _run_workers(self, batches: Mapping[int, Any], batch_idx: int, iterator: Any) -> dict[int, Outputs]:
        """Forward, backward and inner step of every worker; Lightning's progress counters move once."""
        engine = fit_of(self.trainer).engine
        automatic = self.trainer.lightning_module.automatic_optimization
        active = engine.algorithm.active(engine.local_steps + 1)
        turns = {
            w: OrderedDict(any=iterator)
            if iterator is not None
            else self._build_kwargs(OrderedDict(), batch, batch_idx)
            for w, batch in batches.items()
            if w in active
        }
        stepping = not self._should_accumulate() and not self.automatic_optimization._skip_backward
        counters = _Counters(self.automatic_optimization, self.manual_optimization)
        with counters.kept(lambda: set(turns) <= engine.progress.done):
            if engine.algorithm.needs_gradients and automatic and stepping:
                outputs = self._run_after_all_backwards(turns, batch_idx, counters)
            else:
                outputs = {}
                for w in counters.each(turns):
                    with self._turn(w, batches[w]):
                        if automatic:
                            optimizer = self.trainer.optimizers[0]
                            outputs[w] = self.automatic_optimization.run(optimizer, batch_idx, turns[w])
                        else:
                            outputs[w] = self.manual_optimization.run(turns[w])
                    engine.progress.done.add(w)
        self._results_fold()
        return outputs

    def _run_after_all_backwards(
        self, turns: Mapping[int, Any], batch_idx: int, counters: "_Counters"
    ) -> dict[int, Outputs]:
        """For algorithms that change gradients: all forward and backward passes first, then all inner steps."""
        fit, loop = fit_of(self.trainer), self.automatic_optimization
        engine, parameters = fit.engine, self.trainer.lightning_module.parameters
        closures: dict[int, _Finished] = {}
        for w in counters.each(turns):
            with self._turn(w, turns[w].get("batch"), keep_gradients=True):
                closure = loop._make_closure(turns[w], self.trainer.optimizers[0], batch_idx)
                with fit.team.one_pass(parameters()):
                    closures[w] = _Finished(closure())
                closures[w].output = closure.consume_result().asdict()
        engine.before_inner_steps()
        for w in counters.each(turns):
            with self._turn(w, turns[w].get("batch")), fit.team.computed_before():
                loop._optimizer_step(batch_idx, closures[w])
            engine.progress.done.add(w)
        return {w: {} if c.loss is None else c.output for w, c in closures.items()}

    def _module_hook(
        self, name: str, batches: Mapping[int, Any], arguments: Callable[[int], tuple[Any, ...]]
    ) -> list[Any]:
        """A hook of the LightningModule, once per worker in its turn, as on every rank under DDP."""
        trainer = self.trainer
        if not does_something(trainer.lightning_module, name):
            return []
        responses = []
        for w, batch in batches.items():
            with self._turn(w, batch):
                responses.append(call._call_lightning_module_hook(trainer, name, *arguments(w)))
        self._results_fold()
        return responses

    @contextmanager
    def _turn(self, worker: int, batch: Any, keep_gradients: bool = False) -> Iterator[None]:
        fit = fit_of(self.trainer)
        connector, results = self.trainer._logger_connector, self._results
        assert isinstance(results, WorkerResults)
        first_iteration = connector._first_loop_iter
        if first_iteration and worker != fit.engine.local_workers[0]:
            connector._first_loop_iter = False  # else the first log() of a hook drops the values of the workers before
        keep = keep_gradients or self._should_accumulate() or fit.keeps_gradients
        try:
            with rank_of(worker), results.turn(worker, batch), fit.engine.turn(worker, keep_gradients=keep):
                yield
                fit.follow_optimizers()  # which is refused here
        finally:
            connector._first_loop_iter = first_iteration

    def _results_fold(self) -> None:
        assert isinstance(self._results, WorkerResults)
        self._results.fold()


class DilocoAutomaticOptimization(Reclassed, _AutomaticOptimization):
    """Automatic optimization, in which a worker may leave out a step wherever it is hosted."""

    @override
    def _training_step(self, kwargs: OrderedDict[str, Any]) -> ClosureResult:
        if (
            fit_of(self.trainer).world.team > 1
        ):  # whose members are data-parallel: Lightning refuses a step without a loss
            return super()._training_step(kwargs)
        # Lightning refuses it in several processes, too, which wait for each other in every backward pass under DDP
        output = call._call_strategy_hook(self.trainer, "training_step", *kwargs.values())
        self.trainer.strategy.post_training_step()
        return self.output_result_cls.from_training_step_output(output, self.trainer.accumulate_grad_batches)


class DilocoValidationLoop(Reclassed, _EvaluationLoop):
    """Validation during fit, which sees the weights that ``eval_weights`` names."""

    @override
    def run(self) -> list[Any]:
        with fit_of(self.trainer).evaluation():  # outside inference mode, so that the mean is an ordinary tensor
            outputs: list[Any] = super().run()
            return outputs

    @override
    def _evaluation_step(self, *args: Any, **kwargs: Any) -> None:
        super()._evaluation_step(*args, **kwargs)
        _obey_signals(self.trainer)


class _Counters:
    """Lightning's progress counters in one step, which move once although every worker steps.

    Args:
        automatic: the loop that counts under automatic optimization.
        manual: the one under manual optimization.
    """

    def __init__(self, automatic: _AutomaticOptimization, manual: _ManualOptimization) -> None:
        progress = automatic.optim_progress.optimizer
        pairs = (progress.step, progress.zero_grad, manual.optim_step_progress)
        self._trackers: list[Any] = [tracker for pair in pairs for tracker in (pair.total, pair.current)]
        self._before = self._read()
        self._after: list[dict[str, int]] | None = None

    def each(self, turns: Iterable[int]) -> Iterator[int]:
        """The workers in order, each of which finds the counters as the first one did."""
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

    def _read(self) -> list[dict[str, int]]:
        return [dict(vars(tracker)) for tracker in self._trackers]

    def _write(self, values: Sequence[Mapping[str, int]]) -> None:
        for tracker, saved in zip(self._trackers, values, strict=True):
            vars(tracker).update(saved)


class _Finished:
    """A closure whose forward and backward are done: calling it returns the loss."""

    def __init__(self, loss: torch.Tensor | None) -> None:
        self.loss = loss
        self.output: Outputs = {}

    def __call__(self, *_: Any, **__: Any) -> torch.Tensor | None:
        return self.loss


# -------------------------------------------------------------------------------------------- small trainer_state


def fit_of(trainer: Trainer) -> Fit:
    """The fit that ``trainer`` runs."""
    strategy: Any = trainer.strategy
    assert isinstance(strategy._fit, Fit)
    return strategy._fit


def _mean_loss(outputs: Mapping[int, Outputs]) -> Outputs | None:
    """What callbacks get: the first worker's outputs with the mean loss of all."""
    if len(outputs) < 2:
        return next(iter(outputs.values()), None)
    first = next(iter(outputs.values()))
    losses = [o["loss"] for o in outputs.values() if isinstance(o.get("loss"), torch.Tensor)]
    if not isinstance(first.get("loss"), torch.Tensor) or any(loss.numel() != 1 for loss in losses):
        return first  # manual optimization may call anything its loss
    return {**first, "loss": torch.stack([mean_type(loss).reshape(()) for loss in losses]).mean()}


def _worker_values(results: _ResultCollection, on_step: bool) -> Mapping[str, float]:
    assert isinstance(results, WorkerResults)
    return results.worker_values(on_step)


def _obey_signals(trainer: Trainer) -> None:
    connector = trainer._signal_connector
    assert isinstance(connector, DilocoSignalConnector)
    connector.obey()


def _log(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    if values:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)
