"""The LightningModule that DilocoSimulator builds around the user's model.

Owns the loss on a batch and the inner optimizer. Does not own the arguments (``facade.py``), the metrics
(``metrics.py``), the calls of hooks (``callback.py``) nor anything about workers.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override


class SimulatorModule(L.LightningModule):
    """The LightningModule that the simulator trains: ``loss_fn(model(x), y)`` on batches ``(x, y)``.

    For other batches, override :meth:`split` (and :meth:`forward` if the model takes several arguments), and name your
    class in the simulator::

        class Captions(SimulatorModule):
            def split(self, batch):
                return batch["image"], batch["caption"]

        class CaptionSimulator(DilocoSimulator):
            module_cls = Captions

    A file of the simulator loads with ``SimulatorModule.load_from_checkpoint(path, model=..., loss_fn=...).model``.

    Args:
        model: any module.
        loss_fn: ``(output, y) →`` a tensor with a single number.
        optimizer_cls: a torch optimizer class.
        optimizer_kwargs: arguments for ``optimizer_cls``; default none.
        cosine_steps: local steps over which a cosine takes the learning rate to 0; None: a constant learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer_cls: type[Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        cosine_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self._optimizer_cls, self._optimizer_kwargs = optimizer_cls, dict(optimizer_kwargs or {})
        self._cosine_steps = cosine_steps

    @override
    def forward(self, x: Any) -> Any:
        return self.model(x)

    def split(self, batch: Any) -> tuple[Any, Any]:
        """``batch`` as ``(x, y)``.

        Raises:
            MisconfigurationException: ``batch`` isn't a pair.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            size = f" of {len(batch)} items" if isinstance(batch, (tuple, list, dict)) else ""
            raise MisconfigurationException(
                f"The dataset's batches are a {type(batch).__name__}{size}, but must be pairs `(x, y)`. For other"
                " batches, override `split(self, batch)` in a subclass of lightning_diloco.simulator.SimulatorModule so"
                " that it returns `(x, y)`, and set `module_cls` to that subclass in a subclass of DilocoSimulator."
            )
        return batch[0], batch[1]

    def evaluate(self, batch: Any) -> tuple[Tensor, Any, Any]:
        """Loss (a single number), output and target of a batch.

        Raises:
            MisconfigurationException: ``loss_fn`` doesn't return a single number.
        """
        x, y = self.split(batch)
        output = self(x)
        loss = self.loss_fn(output, y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise MisconfigurationException(
                f"`loss_fn` returned {found}, but must return a tensor with a single number: the mean over the batch."
            )
        return loss, output, y

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = guarded("The model or `loss_fn`", self.evaluate, batch)[0]
        self.log("train_loss", loss, prog_bar=True, logger=bool(self.trainer.loggers), batch_size=1)
        return loss

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer_cls(self.parameters(), **self._optimizer_kwargs)
        total = self._cosine_steps
        if total is None:
            return optimizer
        # in closed form: CosineAnnealingLR's recursion would not reach 0 in a run resumed with another `total`
        schedule = LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def guarded(source: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """``function(argument)``; a StopIteration, for Lightning's loop the end of the data, becomes an error."""
    try:
        return function(argument)
    except StopIteration as error:
        raise RuntimeError(
            f"{source} raised StopIteration, which Lightning would take for the end of the data. Look for `next(...)`"
            " on an iterator that is exhausted."
        ) from error
