"""The round and the speed in Lightning's progress bar, and messages beside a live bar.

Does not own the bars, which are Lightning's or the user's, nor the watch over long waits (``comm/watcher.py``).
"""

import logging
import math
import sys
from time import perf_counter
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.engine.engine import Engine

_ROUND, _SPEED = "round", "steps/s"
_STRETCH = 5.0  # seconds: the speed is that of the last 5 to 10

_log = logging.getLogger("lightning.pytorch.diloco")  # a child of Lightning's logger: its level and handlers hold


class RoundProgress:
    """Writes the round and the speed into ``trainer.progress_bar_metrics``, which Lightning's progress bars show.

    Args:
        trainer: the Trainer that fits.
        engine: the fit's.
    """

    def __init__(self, trainer: Trainer, engine: Engine) -> None:
        self._trainer, self._engine = trainer, engine
        self._epoch, self._rounds = -1, "?"
        self._latest = self._before = self._mark()

    def show(self) -> None:
        """After a batch."""
        trainer = self._trainer
        if trainer.progress_bar_callback is None or not trainer.is_global_zero or self._engine.is_plain_run:
            return
        shown: dict[str, Any] = trainer.progress_bar_metrics
        if type(self._engine.algorithm).needs_gradients is SyncAlgorithm.needs_gradients:
            if self._epoch != trainer.current_epoch:  # the loader may have been replaced
                self._epoch, self._rounds = trainer.current_epoch, self._all_rounds()
            shown[_ROUND] = f"{self._round(self._engine.local_steps)}/{self._rounds}"
            if next(iter(shown)) != _ROUND:  # a terminal of 80 columns has room for it and one metric
                others = {key: value for key, value in shown.items() if key != _ROUND}
                for key in others:
                    del shown[key]
                shown.update(others)
        speed = self._speed()
        if speed is not None:
            shown.pop(_SPEED, None)  # the last one is the first to be cut off
            shown[_SPEED] = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"

    def _round(self, steps: int) -> int:
        """The round to which local step ``steps`` belongs, from 1. A last, partial round counts."""
        context = self._engine.context
        return math.ceil(context.origin / context.interval) + math.ceil((steps - context.origin) / context.interval)

    def _all_rounds(self) -> str:
        """The number of rounds; "?" where the length of the run is unknown.

        Under manual optimization ``max_steps`` counts the steps of all optimizers together, of which a local step may
        have several. A GradientAccumulationScheduler changes the batches per step, and Lightning's estimate with them.
        """
        trainer, module = self._trainer, self._trainer.lightning_module
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
            return "?"
        if not module.automatic_optimization and trainer.max_steps != -1:
            return "?"
        steps = trainer.estimated_stepping_batches
        return str(self._round(int(steps))) if 0 < steps < math.inf else "?"

    def _mark(self) -> tuple[float, int]:
        """The time, without validations, and the local steps."""
        return perf_counter() - self._engine.stopwatch.times.evaluation, self._engine.local_steps

    def _speed(self) -> float | None:
        """Local steps of all workers per second."""
        (began, before), (now, steps) = self._before, self._mark()
        if now - self._latest[0] >= _STRETCH:
            self._before, self._latest = self._latest, (now, steps)
        return self._engine.num_workers * (steps - before) / (now - began) if now > began else None


def announce(trainer: Trainer, message: str) -> None:
    """Shows ``message`` above a live progress bar, or logs it. May be called in another thread."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        Tqdm.write(message, file=sys.stdout)  # `bar.print` says nothing while no bar is open
    elif bar is not None and getattr(bar, "is_enabled", False):
        bar.print(message)  # Rich's live display catches what is printed
    else:
        beside_a_bar = bar is not None and sys.stderr.isatty()  # process 0's bar, whose line is open
        _log.warning("\n" * beside_a_bar + message)
