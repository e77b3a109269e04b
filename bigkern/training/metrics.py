"""Loss, accuracy, what guessing would reach, and speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bigkern.training.data import Split


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all targets. logits (N, classes) with targets (N,), or (N, T, classes) with targets (N, T)."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def correct(logits: Tensor, targets: Tensor) -> Tensor:
    """How many of the targets have the largest logit: a scalar on the logits' device."""
    return (logits.argmax(-1) == targets).sum()


@dataclass(frozen=True)
class Evaluation:
    """A model on a split. ``targets`` counts each step of a sequence; ``recall`` is by class (NaN: absent)."""

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
    hits = present = None
    with evaluating(model):
        for logits, targets in outputs(model, split, device, batch_size):
            classes = logits.shape[-1]
            loss += cross_entropy(logits, targets).double() * targets.numel()
            right = targets[logits.argmax(-1) == targets]
            counted = torch.stack([right.bincount(minlength=classes), targets.flatten().bincount(minlength=classes)])
            hits, present = counted if hits is None else (hits + counted[0], present + counted[1])
    total = int(present.sum())
    return Evaluation(loss.item() / total, int(hits.sum()) / total, total, (hits / present).tolist())


def majority_accuracy(train: Tensor, held_out: Tensor) -> float:
    """Accuracy on ``held_out`` of always answering the most frequent target of ``train``."""
    return (held_out == train.flatten().mode().values).double().mean().item()


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
