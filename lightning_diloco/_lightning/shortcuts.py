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
from lightning_diloco._lightning.hooks import clips_nothing, does_something, is_plain, reaches_nobody

_STEP = ("optimizer_step", "_wrap_closure", "_after_closure", "clip_gradients")


class ShortcutStrategy(CollectiveStrategy):
    """Lightning's backward pass and step of a worker."""

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        trainer, patched = self._trainer_here, does_something(super(), "optimizer_step")
        if trainer is None or self._fit is None or patched or not is_plain(trainer, *_STEP):
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        module, precision = trainer.lightning_module, trainer.precision_plugin

        def announced() -> Any:
            loss = closure()  # may change what is asked next
            if not (reaches_nobody(trainer, "on_before_optimizer_step") and clips_nothing(trainer)):
                precision._after_closure(module, optimizer)
            return loss

        return optimizer.step(closure=announced, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        trainer, patched = self._trainer_here, does_something(super(), "backward")
        if trainer is None or self._fit is None or patched or not is_plain(trainer, "pre_backward", "post_backward"):
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        module, precision = trainer.lightning_module, trainer.precision_plugin
        self.pre_backward(closure_loss)
        if not reaches_nobody(trainer, "on_before_backward"):
            closure_loss = precision.pre_backward(closure_loss, module)
        precision.backward(closure_loss, module, optimizer, *args, **kwargs)
        silent = reaches_nobody(trainer, "on_after_backward")
        closure_loss = closure_loss.detach() if silent else precision.post_backward(closure_loss, module)
        self.post_backward(closure_loss)
        return closure_loss
