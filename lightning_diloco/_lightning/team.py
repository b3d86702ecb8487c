"""The strategy's hooks around a backward pass, where a worker has several processes (a team).

Owns *where* in Lightning gradients are averaged: at the end of the last backward pass before an inner step, before
``on_after_backward``, clipping and ``on_before_optimizer_step``, as under DDP. Elsewhere: when a pass is due
(``comm/team.py``), the mean (``comm/world.py``).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_diloco._lightning.shortcuts import ShortcutStrategy
from lightning_diloco._lightning.trainer_state import accumulating
from lightning_diloco.state.outer import needs_closure


class TeamStrategy(ShortcutStrategy):
    """Averages the gradients of a worker's processes."""

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        if self._fit is None or self._world.team == 1:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        module, team = self._fit.trainer.lightning_module, self._fit.team

        def averaged() -> Any:
            with team.one_pass(module.parameters()) if module.automatic_optimization else nullcontext():
                loss = closure()
            if isinstance(loss, Tensor) and needs_closure(optimizer):
                loss = self._world.team_mean(loss)  # line searches must decide alike on all members
            return loss

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning's backward pass; in a team with the mean before ``on_after_backward``, as under DDP."""
        if self._fit is None or self._world.team == 1:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module = self._fit.trainer.lightning_module
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        if not (module.automatic_optimization and accumulating(module.trainer)):
            self._fit.team.average(module.parameters())
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss
