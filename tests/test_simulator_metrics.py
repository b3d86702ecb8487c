"""Are the simulator's loss, accuracy and perplexity right?"""

import math

import pytest
import torch

from lightning_diloco.simulator.metrics import Evaluation, is_class_index


def test_accuracy_is_defined_for_class_indices_only() -> None:
    logits = torch.tensor([[[0.0, 9.0], [1.0, 0.0]], [[5.0, 5.0], [6.0, 0.0]]])  # (batch 2, classes 2, length 2)
    target = torch.tensor([[1, 1], [1, -100]])  # argmax along dimension 1: [[1, 0], [1, 0]]; the last is ignored
    evaluation = Evaluation()
    evaluation.update(torch.tensor(1.0), logits, target, samples=2)
    assert evaluation.results() == (1.0, pytest.approx(2 / 3), math.e)
    assert is_class_index(logits, target)
    for dtype in (torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.int64):
        evaluation = Evaluation()
        evaluation.update(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 1]).to(dtype), samples=3)
        assert evaluation.results()[1] == pytest.approx(2 / 3)
    for output, other in (
        (logits, target.float()),
        (logits, target[:, :1]),
        (logits, target.bool()),
        (logits[0, 0], target[0]),
        (logits, logits),
        ({"logits": logits}, target),
    ):
        assert not is_class_index(output, other)
        evaluation = Evaluation()
        evaluation.update(torch.tensor(2.0), output, other, samples=1)
        assert evaluation.results() == (2.0, None, math.exp(2))


def test_one_batch_without_class_indices_or_none_at_all_gives_no_accuracy() -> None:
    evaluation = Evaluation()
    evaluation.update(torch.tensor(1.0), torch.zeros(2, 3), torch.zeros(2).long(), samples=2)
    evaluation.update(torch.tensor(4.0), torch.zeros(1, 3), torch.zeros(1), samples=1)
    assert evaluation.results()[:2] == (2.0, None)
    evaluation = Evaluation()
    evaluation.update(torch.tensor(1.0), torch.zeros(2, 3), torch.full((2,), -100), samples=2)
    assert evaluation.results()[1] is None


def test_losses_beyond_numbers_are_reported_as_they_are() -> None:
    for loss, perplexity in ((1e4, math.inf), (math.inf, math.inf), (-1e4, 0.0)):
        evaluation = Evaluation()
        evaluation.update(torch.tensor(loss), torch.zeros(1), None, samples=1)
        assert evaluation.results() == (loss, None, perplexity)
    evaluation = Evaluation()
    evaluation.update(torch.tensor(math.nan), torch.zeros(1), None, samples=1)
    evaluation.update(torch.tensor(1.0), torch.zeros(1), None, samples=1)
    loss, _, perplexity = evaluation.results()
    assert math.isnan(loss)
    assert math.isnan(perplexity)
