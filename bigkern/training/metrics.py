"""Loss, accuracy, what guessing would reach, and speed.

Targets are class numbers, or numbers to come near to (floats; images as bytes). Of classes, accuracy is the share that
is met; of numbers, the share of their variance that is explained: 1 - mean squared error / variance. Targets of
``IGNORED`` do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigkern.training.data import IGNORED, Split


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all targets. logits (N, classes) with targets (N,), or (N, T, classes) with targets (N, T)."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def are_numbers(targets: Tensor) -> bool:
    """Whether targets are to be come near to, rather than class numbers (int64)."""
    return targets.dtype == torch.uint8 or targets.is_floating_point()


def counted(targets: Tensor) -> Tensor | int:
    """How many targets there are to meet."""
    return targets.numel() if are_numbers(targets) else (targets != IGNORED).sum()


def training_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error from numbers; cross entropy of logits with class numbers."""
    return functional.mse_loss(outputs, targets) if are_numbers(targets) else cross_entropy(outputs, targets)


def correct(outputs: Tensor, targets: Tensor, variance: float = 1.0) -> Tensor:
    """What ``outputs`` add to the accuracy, times the number of targets: a float64 scalar on their device.

    How many targets have the largest logit; of numbers with that ``variance``, the count less what is not explained.
    """
    if are_numbers(targets):
        return targets.numel() - (outputs - targets).double().square().sum() / variance
    return (outputs.argmax(-1) == targets).sum().double()


def variance(targets: Tensor, most: int = 4096) -> float:
    """Of numbers, over ``most`` samples spread evenly; 1 of class numbers, where it has no use."""
    if not are_numbers(targets):
        return 1.0
    return max(as_numbers(targets[:: -(-len(targets) // most)]).double().var(correction=0).item(), 1e-12)


def as_numbers(values: Tensor) -> Tensor:
    """Bytes as floats in [0, 1]; floats as they are."""
    return values.float() / 255 if values.dtype == torch.uint8 else values


@dataclass(frozen=True)
class Evaluation:
    """A model on a split. ``targets`` counts each step of a sequence; ``recall`` is by class (NaN: absent; numbers have
    no classes)."""

    loss: float
    accuracy: float
    targets: int
    recall: list[float]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode the model was in comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def outputs(
    model: nn.Module, split: Split, device: torch.device | str, batch_size: int = 256
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, targets) of each batch, in order. Wrap in ``evaluating``."""
    for start in range(0, len(split), batch_size):
        inputs, targets = split.batch(slice(start, start + batch_size), device)
        yield model(inputs), targets


def evaluate(model: nn.Module, split: Split, device: torch.device | str = "cpu", batch_size: int = 256) -> Evaluation:
    """Loss, accuracy and recall over the whole split."""
    if len(split) == 0:
        raise ValueError("split: empty, there is nothing to evaluate on")
    loss = torch.zeros((), dtype=torch.float64, device=device)
    if are_numbers(split.targets):
        count = 0
        with evaluating(model):
            for values, targets in outputs(model, split, device, batch_size):
                loss += (values - targets).double().square().sum()
                count += targets.numel()
        return Evaluation(loss.item() / count, 1 - loss.item() / count / variance(split.targets, len(split)), count, [])
    hits = present = None
    with evaluating(model):
        for logits, targets in outputs(model, split, device, batch_size):
            classes = logits.shape[-1]
            loss += cross_entropy(logits, targets).double() * counted(targets)
            right, all_of_them = targets[logits.argmax(-1) == targets], targets[targets != IGNORED]
            counts = torch.stack([part.bincount(minlength=classes) for part in (right, all_of_them)])
            hits, present = counts if hits is None else (hits + counts[0], present + counts[1])
    total = int(present.sum())
    return Evaluation(loss.item() / total, int(hits.sum()) / total, total, (hits / present).tolist())


def majority_accuracy(train: Tensor, held_out: Tensor) -> float:
    """Accuracy on ``held_out`` of always answering the most frequent target of ``train``; of numbers, their mean."""
    if are_numbers(train):
        error = (as_numbers(held_out).double() - as_numbers(train).double().mean()).square().mean()
        return 1 - error.item() / variance(held_out, len(held_out))
    most_frequent = train[train != IGNORED].mode().values
    return (held_out[held_out != IGNORED] == most_frequent).double().mean().item()


def exact_matches(model: nn.Module, split: Split, device: torch.device | str = "cpu", batch_size: int = 256) -> float:
    """The share of answers that a model with ``greedy`` writes right from the first token to the last."""
    right = 0
    for start in range(0, len(split), batch_size):
        inputs, targets = split.batch(slice(start, start + batch_size), device)
        written = model.greedy(inputs[:, 0], targets.shape[1])
        written = functional.pad(written, (0, targets.shape[1] - written.shape[1]))
        right += int(((written == targets) | (targets == IGNORED)).all(1).sum())
    return right / len(split)


def largest_difference(
    model: nn.Module, other: nn.Module, split: Split, device: torch.device | str = "cpu", batch_size: int = 256
) -> float:
    """The largest absolute difference of any output of the two models over the split."""
    differences = []
    with evaluating(model), evaluating(other):
        pairs = zip(outputs(model, split, device, batch_size), outputs(other, split, device, batch_size), strict=True)
        for (ours, _), (theirs, _) in pairs:
            differences.append((ours.double() - theirs.double()).abs().max())
    # torch's max, unlike Python's, keeps a NaN: the largest difference there is.
    return torch.stack(differences).max().item()


def interleaved_seconds(runs: list[Callable[[], None]], device: torch.device | str, repeats: int) -> list[float]:
    """Median seconds of each run, taken in turns so that a change of the machine's load meets them alike."""
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if repeat:  # the first round warms up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]
