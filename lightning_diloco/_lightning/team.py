"""A worker that is a team of several processes: every process's gradients are means over its worker's team.

Owns *when* gradients are averaged: at the end of the last backward pass before an inner step, before
``on_after_backward``, clipping and ``on_before_optimizer_step``, as under DDP. Does not own the mean (``world.py``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_diloco._lightning.process import ProcessStrategy
from lightning_diloco._lightning.readings import accumulating
from lightning_diloco.outer import needs_closure


class TeamStrategy(ProcessStrategy):
    """Averages gradients where there are more processes than workers; see :class:`ProcessStrategy`."""

    _averaged = False  # whether the present backward pass has ended in a mean over the worker's team
    _only_returns = False

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert module is not None

        def averaged() -> Any:
            with self.gradients_in_team() if module.automatic_optimization else nullcontext():
                loss = closure()
            if isinstance(loss, Tensor) and needs_closure(optimizer):
                loss = self.world.team_mean(loss)  # line searches must take the same decisions on all members
            return loss

        return super().optimizer_step(optimizer, averaged if self.world.team > 1 else closure, model, **kwargs)

    @contextmanager
    def gradients_in_team(self) -> Iterator[None]:
        """Inside is one forward and backward pass, at whose end the gradients are means over the worker's team."""
        self._averaged = False
        yield
        if not (self._averaged or self._only_returns):
            self._average_gradients()  # no backward pass here (the loss was None), but perhaps on another member

    @contextmanager
    def gradients_are_means(self) -> Iterator[None]:
        """Inside, closures only return what was computed before: there is nothing to average."""
        self._only_returns = True
        try:
            yield
        finally:
            self._only_returns = False

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """The base class's; in a team with the mean before ``on_after_backward``, as under DDP."""
        if self.world.team == 1:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module = self.lightning_module
        assert module is not None
        self.pre_backward(closure_loss)
        closure_loss = self.precision_plugin.pre_backward(closure_loss, module)
        self.precision_plugin.backward(closure_loss, module, optimizer, *args, **kwargs)
        if not (module.automatic_optimization and accumulating(module.trainer)):
            self._average_gradients()
        closure_loss = self.precision_plugin.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss

    def _average_gradients(self) -> None:
        if self.world.team > 1:
            assert self.lightning_module is not None
            self.world.average_gradients(self.lightning_module.parameters())
        self._averaged = True
