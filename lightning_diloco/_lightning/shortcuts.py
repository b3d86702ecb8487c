"""The strategy's backward pass and step, without the announcement of hooks that nobody hears.

Owns what is called where Lightning would announce them; what a run computes stays the same. Elsewhere: which hooks are
heard (``hooks.py``), and those around ``zero_grad`` (``optimization.py``).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_diloco._lightning.collectives import CollectiveStrategy

_BACKWARD = frozenset({"on_before_backward", "on_after_backward"})
_STEP = frozenset({"on_before_optimizer_step", "configure_gradient_clipping"})


class ShortcutStrategy(CollectiveStrategy):
    """Lightning's backward pass and step of a worker."""

    @property
    def _unheard(self) -> frozenset[str]:
        return frozenset() if self._fit is None else self._fit.unheard

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        if self._unheard >= _STEP:
            return optimizer.step(closure=closure, **kwargs)
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        if self._fit is None or not self._unheard >= _BACKWARD:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        self.pre_backward(closure_loss)
        self.precision_plugin.backward(closure_loss, self._fit.trainer.lightning_module, optimizer, *args, **kwargs)
        closure_loss = closure_loss.detach()
        self.post_backward(closure_loss)
        return closure_loss
