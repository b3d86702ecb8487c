"""What a Trainer tells about a fit when its training begins.

Owns the questions to Lightning. Private because the loaders with the workers' shards have no public place. Elsewhere:
the values (``reporting/plan.py``).
"""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer

from lightning_diloco._lightning.data import repeated
from lightning_diloco.fit import Fit
from lightning_diloco.reporting.plan import Plan


def plan_of(fit: Fit) -> Plan:
    """The plan of a fit whose workers exist."""
    trainer, context = fit.trainer, fit.engine.context
    steps, unknown = _local_steps(trainer)
    combined = trainer.fit_loop._combined_loader
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    automatic = trainer.lightning_module.automatic_optimization
    return Plan(
        interval=context.interval,
        done=context.local_steps,
        origin=context.origin,
        steps=steps,
        unknown=unknown,
        # without automatic optimization Lightning counts the steps of every optimizer
        at_most=not automatic or any(isinstance(c, (Timer, EarlyStopping)) for c in callbacks),
        flushes=fit.settings.final_sync,
        repeated=None if combined is None else repeated(combined),
    )


def _local_steps(trainer: Trainer) -> tuple[int | None, str]:
    """Local steps of the run in all; else None, and why nobody knows."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(c, GradientAccumulationScheduler) for c in callbacks):
        return None, "a GradientAccumulationScheduler changes the batches per step"
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        return None, "`max_epochs` is -1"
    if steps < 0:
        return None, "the training data have no length"
    return int(steps), ""
