from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from bigkern.training.data import Split
from bigkern.training.metrics import (
    are_numbers,
    correct,
    cross_entropy,
    evaluate,
    interleaved_seconds,
    largest_difference,
    majority_accuracy,
    training_loss,
    variance,
)


class Table(nn.Module):
    """Gives the logits that its inputs are."""

    def forward(self, inputs):
        return inputs


def test_evaluate_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    targets = torch.tensor([0, 1, 0])
    result = evaluate(Table(), Split(logits, targets), batch_size=2)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.targets == 3
    assert result.recall[:2] == [0.5, 1.0] and math.isnan(result.recall[2])
    by_hand = sum(math.log(sum(map(math.exp, row))) - row[t] for row, t in zip(logits.tolist(), [0, 1, 0], strict=True))
    assert result.loss == pytest.approx(by_hand / 3)


def test_sequences_count_each_step():
    logits, targets = torch.randn(4, 5, 3), torch.randint(0, 3, (4, 5))
    result = evaluate(Table(), Split(logits, targets), batch_size=3)
    assert result.targets == 20
    assert result.loss == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-6)
    assert result.accuracy == pytest.approx((logits.argmax(-1) == targets).float().mean().item())


def test_nothing_to_evaluate_on_is_refused():
    with pytest.raises(ValueError, match="empty"):
        evaluate(Table(), Split(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)))


def test_numbers_by_hand():
    """Explained variance: 1 - mean squared error / variance of the targets, here 1 and 5."""
    outputs, targets = torch.tensor([[1.0], [2.0], [3.0], [8.0]]), torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    result = evaluate(Table(), Split(outputs, targets), batch_size=3)
    assert (result.loss, result.targets, result.recall) == (1.5, 4, [])
    assert result.accuracy == pytest.approx(1 - 1.5 / 5)
    assert correct(outputs, targets, variance(targets)).item() / 4 == pytest.approx(result.accuracy)
    assert training_loss(outputs, targets).item() == 1.5
    assert majority_accuracy(targets, targets) == pytest.approx(0)
    assert majority_accuracy(targets + 10, targets) == pytest.approx(1 - (5 + 100) / 5)


def test_bytes_count_as_fractions():
    images = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8)
    assert are_numbers(images) and variance(images) == pytest.approx(0.25)
    assert evaluate(Table(), Split(images, images)).accuracy == 1
    assert majority_accuracy(images, images) == pytest.approx(0)


def test_class_numbers_are_not_numbers():
    assert not are_numbers(torch.tensor([1, 2])) and variance(torch.tensor([1, 2])) == 1.0


def test_majority_is_the_training_splits():
    assert majority_accuracy(torch.tensor([1, 1, 2]), torch.tensor([2, 2, 1, 0])) == 0.25
    assert majority_accuracy(torch.tensor([[1, 1], [2, 0]]), torch.tensor([[1, 0]])) == 0.5


def test_largest_difference_sees_every_batch_and_a_nan():
    inputs = torch.zeros(10, 2)
    split = Split(inputs, torch.zeros(10, dtype=torch.int64))

    class Off(nn.Module):
        def __init__(self, value, rows):
            super().__init__()
            self.value, self.rows, self.seen = value, rows, 0

        def forward(self, inputs):
            result = inputs.clone()
            for row in range(len(inputs)):
                if self.seen + row == self.rows:
                    result[row, 1] = self.value
            self.seen += len(inputs)
            return result

    assert largest_difference(Table(), Table(), split, batch_size=4) == 0
    assert largest_difference(Table(), Off(-0.5, 9), split, batch_size=4) == 0.5
    assert math.isnan(largest_difference(Table(), Off(math.nan, 0), split, batch_size=4))


def test_interleaved_seconds_are_medians_in_turns():
    order = []
    fast, slow = interleaved_seconds(
        [lambda: order.append("a"), lambda: (order.append("b"), time.sleep(0.02))], "cpu", repeats=3
    )
    assert order == ["a", "b"] * 4
    assert slow >= 0.02 > fast
