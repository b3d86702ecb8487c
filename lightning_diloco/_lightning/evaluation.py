"""Validation on more than one set of weights: further runs of Lightning's loop, before the ordinary one.

Owns what a further run must leave as it found it: Lightning's loop, logged values and progress, the callbacks, random
numbers and the loaders' generators. Elsewhere: the weights (``engine/views.py``), the ordinary run (``loops.py``).

A further run comes before the ordinary one, so that callbacks which monitor its values (EarlyStopping, ModelCheckpoint)
find them in their only call, at the end of the ordinary run. Private because Lightning has no public loop that can run
inside another, and names the logged values in a private collection.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import _METRICS, _ResultCollection
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_diloco._lightning.trainer_state import logging_step
from lightning_diloco.callback import suffix_of
from lightning_diloco.fit import Fit


class SuffixedResults(_ResultCollection):
    """What a further run logs: every key has a suffix, and nothing appears in the progress bar.

    Args:
        suffix: with its slash, for example "/outer".
    """

    def __init__(self, suffix: str) -> None:
        super().__init__(training=False)
        self._suffix = suffix

    @override
    def metrics(self, on_step: bool) -> _METRICS:
        metrics = super().metrics(on_step)
        callback, log = ({k + self._suffix: v for k, v in metrics[kind].items()} for kind in ("callback", "log"))
        return _METRICS(callback=callback, log=log, pbar={})


def run_further_validations(loop: _EvaluationLoop, fit: Fit) -> None:
    """Runs the validation on every set of ``fit.validate_on``; the ordinary run follows."""
    for which in fit.validate_on:
        suffix = suffix_of(which)
        # the copies of weights are ordinary tensors, in which a module may write whatever it likes
        with isolate_rng(), fit.further_evaluation(which):
            loop.setup_data()  # does nothing when the ordinary run does it again
            if loop.skip:
                return
            assert loop._combined_loader is not None
            loaders = loop._combined_loader.flattened
            for loader in loaders:
                _refuse_read_once(loader)
            with _generators_kept(loaders), _in_place_of(loop, loop.trainer, suffix) as further:
                further.run()


@contextmanager
def _in_place_of(loop: _EvaluationLoop, trainer: Trainer, suffix: str) -> Iterator[_EvaluationLoop]:
    """Inside, the Trainer's validation loop is a fresh one over the data of ``loop``; of callbacks only bars remain."""
    further = _EvaluationLoop(
        trainer, TrainerFn.FITTING, RunningStage.VALIDATING, verbose=False, inference_mode=loop.inference_mode
    )
    further._combined_loader, further._max_batches = loop._combined_loader, loop._max_batches
    further._last_val_dl_reload_epoch = loop._last_val_dl_reload_epoch
    further._seen_batches_per_dataloader = defaultdict(int, loop._seen_batches_per_dataloader)
    further._results = SuffixedResults(suffix)
    connector, epoch_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # a connector of Lightning's puts it there
    before = connector._first_loop_iter, connector._current_fx
    step = logging_step(trainer)
    bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]  # Rich's thread asks for its bar
    epoch_loop.val_loop, trainer.callbacks = further, bars  # type: ignore[attr-defined]
    # with a step, Lightning doesn't log the epoch, which the ordinary run logs at the same step
    connector.log_eval_end_metrics = lambda metrics: connector.log_metrics(metrics, step)  # type: ignore[method-assign]
    try:
        yield further
    finally:
        del connector.log_eval_end_metrics
        epoch_loop.val_loop, trainer.callbacks = loop, callbacks  # type: ignore[attr-defined]
        connector._first_loop_iter, connector._current_fx = before


@contextmanager
def _generators_kept(loaders: list[Any]) -> Iterator[None]:
    """The block draws from the generators of loaders and samplers, and leaves them as they were."""
    holders = [holder for loader in loaders for holder in _parts(loader)]
    generators = [g for g in (getattr(holder, "generator", None) for holder in holders) if g is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _parts(loader: Any) -> list[Any]:
    batches = getattr(loader, "batch_sampler", None)
    return [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]


def _refuse_read_once(loader: Any) -> None:
    dataset = getattr(loader, "dataset", loader)
    for source in (loader, dataset):
        if isinstance(source, Iterator):
            raise MisconfigurationException(
                f"`DilocoCallback(validate_on=)` reads the validation data several times, but they come from a"
                f" {type(source).__name__}, which can be read only once. Return an object whose `__iter__` starts"
                " again, or leave `validate_on` out."
            )
