"""Automatic optimization of a worker, inside Lightning's loop.

Owns what differs from Lightning's: a worker may leave out a step, and hooks that nobody hears are not announced
(``hooks.py``). Private because Lightning's loop that announces ``on_before_zero_grad`` has no public name.
"""

from collections import OrderedDict
from typing import Any

from lightning.pytorch.loops.optimization.automatic import ClosureResult, _AutomaticOptimization
from lightning.pytorch.trainer import call
from torch.optim import Optimizer
from typing_extensions import override

from lightning_diloco._lightning.hooks import does_something, is_profiled, reaches_nobody
from lightning_diloco._lightning.reclassed import Reclassed
from lightning_diloco._lightning.turns import fit_of


class DilocoAutomaticOptimization(Reclassed, _AutomaticOptimization):
    """Lightning's closure and step, for the worker that has its turn."""

    @override
    def _training_step(self, kwargs: OrderedDict[str, Any]) -> ClosureResult:
        # Lightning refuses a step without a loss in several processes, because under DDP they wait for each other in
        # every backward pass. That is true of the members of a team only.
        if fit_of(self.trainer).world.team > 1:
            return super()._training_step(kwargs)
        output = call._call_strategy_hook(self.trainer, "training_step", *kwargs.values())
        self.trainer.strategy.post_training_step()
        return self.output_result_cls.from_training_step_output(output, self.trainer.accumulate_grad_batches)

    @override
    def _on_before_zero_grad(self, optimizer: Optimizer) -> None:
        if not reaches_nobody(self.trainer, "on_before_zero_grad"):
            super()._on_before_zero_grad(optimizer)
            return
        progress = self.optim_progress.optimizer.zero_grad
        progress.increment_ready()
        progress.increment_started()

    @override
    def _optimizer_zero_grad(self, batch_idx: int, optimizer: Optimizer) -> None:
        if does_something(self.trainer.lightning_module, "optimizer_zero_grad") or is_profiled(self.trainer):
            super()._optimizer_zero_grad(batch_idx, optimizer)
            return
        optimizer.zero_grad()
        self.optim_progress.optimizer.zero_grad.increment_completed()
