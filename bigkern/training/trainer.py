"""One training loop for all models. It can stop after any step and go on, on a CPU bit for bit, as if it had not."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigkern import optim
from bigkern.training.data import Split
from bigkern.training.metrics import Evaluation, correct, counted, evaluate, training_loss, variance

OPTIMIZERS = ("adam", "sgd")
MOMENTUM = 0.9


class Epoch(NamedTuple):
    """What one epoch came to. ``seconds`` are those spent on training steps."""

    number: int
    loss: float
    accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    seconds: float
    samples: int


class Trainer:
    """Trains ``model`` on ``train`` and judges it by ``held_out`` after each epoch: by cross entropy and accuracy where
    the targets are class numbers, by mean squared error and explained variance where they are numbers (metrics.py).

    ``optimizer`` is "adam" or "sgd" (momentum 0.9). The order of the samples follows from ``seed`` and the number of
    the epoch alone; dropout draws from torch's generator, which the caller seeds and ``state_dict`` holds.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Split,
        held_out: Split,
        *,
        optimizer: str = "adam",
        lr: float = 1e-3,
        batch_size: int = 64,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.train = train
        self.held_out = held_out
        self.batch_size = batch_size
        self.seed = seed
        self.optimizer = make_optimizer(optimizer, self.model, lr)
        self._variance = variance(train.targets)
        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the epoch under way
        self.history: list[Epoch] = []
        self._start_epoch()

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.batch_size)

    @property
    def running(self) -> tuple[float, float]:
        """(mean loss, accuracy) of the epoch so far. On a GPU reading it waits for the GPU."""
        targets = max(self._targets.item(), 1)
        return self._loss.item() / targets, self._correct.item() / targets

    def fit(
        self,
        epochs: int,
        *,
        on_step: Callable[[Trainer], None] | None = None,
        on_epoch: Callable[[Epoch], None] | None = None,
        save: Callable[[dict[str, Any]], None] | None = None,
    ) -> bool:
        """Trains until ``epochs`` epochs are finished, counted from the very first. True when they are.

        ``save`` gets the state after each epoch. Ctrl-C or SIGTERM ends training after the step under way, saves and
        returns False; a second one is not waited for.
        """
        with _interruptible() as interrupted:
            while self.epoch < epochs:
                self._run_epoch(on_step, interrupted)
                if not interrupted.is_set():
                    self._finish_epoch(on_epoch)
                if save:
                    save(self.state_dict())
                if interrupted.is_set():
                    return self.epoch >= epochs
        return True

    def _run_epoch(self, on_step: Callable[[Trainer], None] | None, interrupted: threading.Event) -> None:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (self.epoch + 1))
        order = torch.randperm(len(self.train), generator=generator).split(self.batch_size)
        self.model.train()
        start = time.perf_counter()
        for indices in order[self.step :]:
            if interrupted.is_set():
                break
            inputs, targets = self.train.batch(indices, self.device)
            outputs, loss = training_step(self.model, self.optimizer, inputs, targets)
            count = counted(targets)
            self._loss += loss.detach().double() * count
            self._correct += correct(outputs.detach(), targets, self._variance)
            self._targets += count
            self._samples += len(indices)
            self.step += 1
            if on_step:
                on_step(self)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds += time.perf_counter() - start

    def _finish_epoch(self, on_epoch: Callable[[Epoch], None] | None) -> None:
        loss, accuracy = self.running
        judged: Evaluation = evaluate(self.model, self.held_out, self.device)
        self.epoch += 1
        record = Epoch(self.epoch, loss, accuracy, judged.loss, judged.accuracy, self._seconds, self._samples)
        self.history.append(record)
        self._start_epoch()
        if on_epoch:
            on_epoch(record)

    def _start_epoch(self) -> None:
        self.step = 0
        # Kept on the device, in float64: a step does not wait for the GPU, and the sums do not drift.
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._correct = torch.zeros((), dtype=torch.float64, device=self.device)
        self._targets = torch.zeros((), dtype=torch.int64, device=self.device)
        self._samples = 0
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, in tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "epoch": self.epoch,
            "step": self.step,
            "sums": [self._loss.item(), self._correct.item(), self._targets.item(), self._samples, self._seconds],
            "history": [tuple(record) for record in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [Epoch(*record) for record in state["history"]]
        self._start_epoch()
        self.epoch, self.step = state["epoch"], state["step"]
        loss, hits, targets, self._samples, self._seconds = state["sums"]
        self._loss.fill_(loss)
        self._correct.fill_(hits)
        self._targets.fill_(targets)
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.device)


def make_optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if name == "adam":
        return optim.Adam(model.parameters(), lr=lr)
    if name == "sgd":
        return optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
    raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}")


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Forward, backward, one step of the optimizer. Returns (outputs, loss)."""
    outputs = model(inputs)
    loss = training_loss(outputs, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return outputs, loss


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Within, the first SIGINT or SIGTERM sets the event, and the next ends the program as usual.

    An exception in the middle of a step would leave half of the parameters updated; hence a flag, asked between steps.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # only the main thread may set handlers; elsewhere signals are not ours
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Someone who had a signal ignored (nohup) wants it ignored; None is a handler that Python could not give back.
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        interrupted.set()
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield interrupted
    finally:
        restore()
