"""Lightning's training loop, with a local step of every worker inside each of its steps.

Owns *when*: where in the loop the workers have their turns, where a round ends, which weights are live during
validation. Holds no state, so that ``loop.state_dict()`` stays Lightning's. Elsewhere: a turn (``turns.py``), and how a
Trainer gets these loops for the time of a fit (``installation.py``). Private because Lightning's loops have no hooks at
these places and no public names.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_diloco._lightning.connectors import DilocoSignalConnector
from lightning_diloco._lightning.data import (
    abandon,
    expose_first_worker,
    is_sharded,
    own_length,
    set_epoch,
    split_batch,
)
from lightning_diloco._lightning.evaluation import run_further_validations
from lightning_diloco._lightning.hooks import looks_at_gradients
from lightning_diloco._lightning.reclassed import Reclassed
from lightning_diloco._lightning.results import WorkerResults, mean_type
from lightning_diloco._lightning.trainer_state import logging_step, overfits, uses_distributed_sampler
from lightning_diloco._lightning.turns import Outputs, WorkerTurns, fit_of
from lightning_diloco.fit import Fit


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
            expose_first_worker(self._combined_loader)
        if isinstance(self._data_fetcher, _DataLoaderIterDataFetcher) and fit.shards_data:
            raise MisconfigurationException(
                "`training_step(self, dataloader_iter)` fetches batches by itself, so DilocoStrategy can't give them"
                " to its workers. Use `training_step(self, batch, batch_idx)`."
            )

    @property
    def restarting(self) -> bool:
        """Whether an unfinished epoch goes on.

        With ``max_steps`` Lightning says so after a complete epoch, too. It then runs an empty epoch, and the following
        epoch would read the wrong data.
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
        """Whether nothing is left to do. After the last local step a resumed run may still owe its last outer step."""
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
        if self._fit.places is not None:
            self._fit.places.begin(progress.current.processed, own_length(self.trainer, self._combined_loader))
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
        fit.conclude()
        if self._combined_loader is not None:
            abandon(self._combined_loader)
        _obey_signals(self.trainer)
        fit.in_loop = False
        super().on_run_end()


class DilocoEpochLoop(Reclassed, _TrainingEpochLoop):
    """The loop over batches: a Lightning step is a local step of every worker."""

    @override
    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self._resumes_after_validation(data_fetcher):
            return
        trainer, fit = self.trainer, fit_of(self.trainer)
        engine, module, connector = fit.engine, trainer.lightning_module, trainer._logger_connector
        turns = WorkerTurns(self)
        turns.results.uneven = engine.differs_in_active_workers
        fit.keeps_gradients = fit.keeps_gradients or looks_at_gradients(trainer)
        engine.progress.manual = not module.automatic_optimization
        fit.follow_optimizers()
        # Lightning's loop broadcasts here whether process 0 got a SIGTERM; that waits for the next synchronisation
        iterator = None  # of a `training_step(self, dataloader_iter)`, which only N = 1 permits
        if isinstance(data_fetcher, _DataLoaderIterDataFetcher):
            iterator, batch_idx = next(data_fetcher), data_fetcher._batch_idx
            self.batch_progress.is_last_batch = data_fetcher.done
            engine.begin_step()
            taking = turns.workers = engine.active
            read = batches = given = dict.fromkeys(taking, data_fetcher._batch)
        else:
            fetched, _, _ = next(data_fetcher)
            batch_idx = self.batch_idx + 1
            self.batch_progress.is_last_batch = data_fetcher.done
            engine.begin_step()
            taking = turns.workers = engine.active
            workers, combined = engine.local_workers, data_fetcher.combined_loader
            # a batch of the user's loader is handed through untouched
            read = split_batch(fetched, taking or workers[:1]) if is_sharded(combined) else {workers[0]: fetched}
            batches = turns.transfer({w: read[w] for w in taking})
            given = {w: batch for w, batch in batches.items() if batch is not None}
        # callbacks see the first worker's, as on rank 0 under DDP; also where none of this process's is there
        batch = next(iter(given.values()), None) if taking else read[engine.local_workers[0]]
        self.batch_progress.increment_ready()
        connector.on_batch_start(batch)

        outputs: dict[int, Outputs] = {}
        end_of_epoch, moving = False, engine.active_anywhere if fit.places is not None else []
        end_hook_is_due, steps_before = True, engine.local_steps

        def end_hook() -> None:
            turns.hook("on_train_batch_end", batches, lambda w: (outputs.get(w), batches[w], batch_idx))

        if len(given) < len(batches):
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        if given or not taking:  # the other processes' workers take the step
            call._call_callback_hooks(trainer, "on_train_batch_start", batch, batch_idx)
            left = {w: b for w, b in given.items() if w not in engine.progress.done}  # all, but in a torn step
            responses = turns.hook("on_train_batch_start", left, lambda w: (left[w], batch_idx))
            call._call_strategy_hook(trainer, "on_train_batch_start", batch, batch_idx)
            end_of_epoch = turns.agreed("on_train_batch_start", -1 in responses)
            if end_of_epoch:
                self.batch_progress.increment_by(0, is_last_batch=True)
            else:
                self.batch_progress.increment_started()
                with trainer.profiler.profile("run_training_batch"):
                    outputs = turns.run(left, batch_idx, iterator)
                if not module.automatic_optimization and engine.num_workers > 1:
                    end_hook()  # it may step, too: so it comes before the step is counted, not after the callbacks'
                    end_hook_is_due = False
                if self.automatic_optimization._skip_backward:
                    engine.progress.forget()  # SWA's pass for BatchNorm statistics trains nothing
                else:
                    self._end_step()
        counted = engine.local_steps > steps_before
        self.batch_progress.increment_processed()
        if fit.places is not None and end_of_epoch:
            fit.places.leave(moving)
        elif fit.places is not None:
            fit.places.advance(moving, own_length(trainer, data_fetcher.combined_loader))

        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if end_of_epoch:
            raise StopIteration

        if isinstance(data_fetcher, _DataLoaderIterDataFetcher):  # the step has fetched
            batch, batch_idx = data_fetcher._batch, data_fetcher._batch_idx
            batches = dict.fromkeys(batches, batch)
            self.batch_progress.is_last_batch = data_fetcher.done
        fit.show_progress()  # before the hook in which a progress bar reads the values, wherever it stands in the list
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
        # the processes' clocks differ
        return bool(fit_of(self.trainer).world.decided_by_first(lambda: should))

    def _resumes_after_validation(self, data_fetcher: _DataFetcher) -> bool:
        """Whether a run, resumed from a file saved around a validation, has no batch to train on in this call."""
        if self.restarting and self._should_check_val_fx(data_fetcher):
            if self.val_loop.restarted_mid_evaluation:
                return True
            if self.restarted_on_last:
                self._skip_next_val = True
                return True
            several = fit_of(self.trainer).engine.num_workers > 1
            with isolate_rng() if several else nullcontext():  # it draws a seed for a loader that is not read
                self.val_loop.increment_progress_to_evaluation_end()
        self.val_loop.restarting = False
        return False


class DilocoValidationLoop(Reclassed, _EvaluationLoop):
    """Validation during fit, with the weights of ``eval_weights`` in the live module."""

    @override
    def run(self) -> list[Any]:
        fit = fit_of(self.trainer)
        if fit.training:
            run_further_validations(self, fit)
        with fit.evaluation():  # outside inference mode, so that the mean is an ordinary tensor
            outputs: list[Any] = super().run()
        fit_of(self.trainer).deliver_validation(outputs)
        return outputs

    @override
    def _evaluation_step(self, *args: Any, **kwargs: Any) -> None:
        super()._evaluation_step(*args, **kwargs)
        _obey_signals(self.trainer)


def _mean_loss(outputs: Mapping[int, Outputs]) -> Outputs | None:
    """The outputs for callbacks: the first worker's, with the mean loss of all workers."""
    if len(outputs) < 2:
        return next(iter(outputs.values()), None)
    first = next(iter(outputs.values()))
    losses = [o["loss"] for o in outputs.values() if isinstance(o.get("loss"), torch.Tensor)]
    if not isinstance(first.get("loss"), torch.Tensor) or any(loss.numel() != 1 for loss in losses):
        return first  # under manual optimization "loss" may be any object
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
