"""Metrics of an evaluation: loss, accuracy, perplexity; and the statistics that the simulator's hooks receive.

Owns the metrics (torchmetrics) and their definitions. Does not decide when a model is evaluated nor on which weights
(``callback.py``). Imports nothing of Lightning.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric


@dataclass(frozen=True)
class TrainStats:
    """Statistics of a local step of all workers.

    Attributes:
        loss: mean over the workers of their batches' losses.
        local_step: local steps done by each worker, from 1 to ``simulator.total``.
        global_step: ``local_step`` times the number of workers.
        epoch: passes over the training data that were complete when the step began, from 0.
        num_diloco_steps: outer steps done, including an outer step at this local step.
    """

    loss: float
    local_step: int
    global_step: int
    epoch: int
    num_diloco_steps: int


@dataclass(frozen=True)
class EvalStats(TrainStats):
    """Statistics of an evaluation of the outer model θ; ``loss`` is the mean over the evaluated samples.

    Attributes:
        accuracy: fraction of targets that equal the argmax of the output over dimension 1, from 0 to 1; None where the
            targets are not class indices. See :class:`Evaluation`.
        perplexity: e to the power of ``loss``; ``inf`` where that overflows.
    """

    accuracy: float | None
    perplexity: float


def mean_metric(like: Tensor) -> MeanMetric:
    """A MeanMetric on the device of ``like``, in float64 (float32 on MPS), which is NaN if a value is NaN."""
    # torchmetrics' nan_strategy "disable" ignores weights; a number replaces NaN, and NaN is a number here
    metric = MeanMetric(nan_strategy=math.nan).to(like.device)
    metric.set_dtype(torch.float32 if like.device.type == "mps" else torch.float64)
    return metric


class Evaluation:
    """Means over the batches of an evaluation.

    The accuracy is defined where targets are integers of the output's shape without dimension 1: outputs ``(B, C)`` and
    targets ``(B,)``, or ``(B, C, T)`` and ``(B, T)``. Negative targets, like ``cross_entropy``'s ``ignore_index``, are
    no class indices and are left out.
    """

    def __init__(self) -> None:
        self._loss: MeanMetric | None = None
        self._hits: MeanMetric | None = None
        self._classifies = True

    def update(self, loss: Tensor, output: Any, target: Any, samples: int) -> None:
        """Adds a batch.

        Args:
            loss: mean loss of the batch, a single number.
            output: the model's output, ``(B, C, ...)`` for a classifier.
            target: ``(B, ...)`` for a classifier.
            samples: B, the weight of this loss in the mean.
        """
        self._loss = self._loss or mean_metric(loss)
        self._loss.update(loss.detach().reshape(()), samples)
        if not is_class_index(output, target):
            self._classifies = False
            return
        target = target.long()  # torch can't compare unsigned types of more than 8 bits
        known = target >= 0
        self._hits = self._hits or mean_metric(loss)
        self._hits.update((output.argmax(1) == target)[known].to(torch.float32))

    def results(self) -> tuple[float, float | None, float]:
        """Loss, accuracy and perplexity of the added batches, of which there must be some."""
        assert self._loss is not None, "results() before update()"
        loss = float(_local(self._loss))
        accuracy = None
        if self._classifies and self._hits is not None and self._hits.weight > 0:
            accuracy = float(_local(self._hits))
        try:
            perplexity = math.exp(loss)
        except OverflowError:
            perplexity = math.inf
        return loss, accuracy, perplexity


def is_class_index(output: Any, target: Any) -> bool:
    """Whether ``target`` holds integers in the shape of ``output`` without its dimension 1.

    >>> is_class_index(torch.zeros(8, 10), torch.zeros(8).long()), is_class_index(torch.zeros(8, 1), torch.zeros(8, 1))
    (True, False)
    """
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)) or output.ndim < 2:
        return False
    integers = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return integers and target.shape == output.shape[:1] + output.shape[2:]


def _local(metric: MeanMetric) -> Tensor:
    """The value of this process alone: every process evaluates the same model on the same batches."""
    metric.sync_on_compute = False
    value: Tensor = metric.compute()
    return value
