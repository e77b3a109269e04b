"""``bigkern demo``: trains the documents' models on real data and sets each beside its twin made of torch.nn alone."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bigkern
from bigkern.models import TORCH, layer_runs
from bigkern.training import corpus, pairs
from bigkern.training import data as sources
from bigkern.training.data import Dataset, PairEncoder, Split
from bigkern.training.display import console, epoch_line, measure_of, served_by, table, training_progress
from bigkern.training.metrics import (
    Evaluation,
    evaluate,
    evaluating,
    exact_matches,
    interleaved_seconds,
    largest_difference,
    majority_accuracy,
)
from bigkern.training.tagging import library_tags, most_frequent_tags
from bigkern.training.tasks import build_model, choose_device, device_name, model_arguments
from bigkern.training.trainer import Epoch, Trainer, make_optimizer, training_step

_INTERRUPTED = 130


@dataclass(frozen=True)
class Baseline:
    """What a model without memory reaches on the held-out data: a perplexity or an accuracy, and whose."""

    figure: str
    rival: str
    reach: Callable[[Dataset], float]

    def beside(self, judged: Evaluation, reached: float) -> str:
        if self.figure == "perplexity":
            return f"Held-out perplexity {math.exp(judged.loss):.2f}; {self.rival}: {reached:.2f}."
        return f"Held-out accuracy {judged.accuracy:.1%}; {self.rival}: {reached:.1%}."


@dataclass(frozen=True)
class Show:
    """One model of the demonstration. Epochs are sized for about 20 seconds on two CPU cores."""

    title: str
    task: str
    data: Callable[[], Dataset]
    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "adam"
    sizes: dict[str, int] = field(default_factory=dict)  # where the model's own would take too long
    baseline: Baseline | None = None


def _perplexity_of_pairs(dataset: Dataset) -> float:
    text = sources.language_reference(64, every_step=True)  # without the windows' overlap
    return 2 ** corpus.ngram_bits(text.train.inputs, text.held_out.inputs, len(dataset.classes), 2)


_PAIRS = Baseline("perplexity", "counting which character follows which", _perplexity_of_pairs)
_TRIPLES = Baseline(
    "perplexity",
    "counting which character follows which two",
    lambda dataset: 2 ** corpus.baseline_bits(dataset, 3),
)
_SINGLE = Baseline(
    "accuracy",
    "each character's most frequent tag",
    lambda dataset: most_frequent_tags(dataset.train, dataset.held_out),
)

SHOWS = {
    "cnn": Show(
        "CNN, convolutions 32-64-128, dense 512",
        "which digit an 8x8 scan shows; convolutions padded by 1, since unpadded they need 18x18",
        lambda: sources.digits(8),
        epochs=15,
        batch_size=64,
        lr=1e-3,
    ),
    "cnn-small": Show(
        "CNN, convolutions 32-64, dense 128",
        "which digit a scan enlarged to 28x28 shows",
        lambda: sources.digits(28),
        epochs=12,
        batch_size=32,
        lr=1e-3,
    ),
    "cnn-log-softmax": Show(
        "CNN, convolutions 32-64 pooled once, log-softmax",
        "which digit an 8x8 scan shows; by SGD with momentum",
        lambda: sources.digits(8),
        epochs=10,
        batch_size=32,
        lr=1e-2,
        optimizer="sgd",
    ),
    "gru": Show(
        "GRU 128, an answer at each step",
        "the next character of English text, at each of 64 steps",
        lambda: sources.language_reference(64, every_step=True),
        epochs=3,
        batch_size=64,
        lr=4e-3,
        baseline=_PAIRS,
    ),
    "gru-tagger": Show(
        "GRU 128, a tag at each step",
        "what each character of Python source is part of: name, keyword, number, string, comment, operator",
        lambda: library_tags(64),
        epochs=2,
        batch_size=32,
        lr=4e-3,
        baseline=_SINGLE,
    ),
    "rnn": Show(
        "Plain RNN 128, rows of an image",
        "which digit an 8x8 scan shows, read row by row; by SGD with momentum",
        lambda: sources.digits(8),
        epochs=20,
        batch_size=32,
        lr=2e-2,
        optimizer="sgd",
    ),
    "lstm": Show(
        "Stacked LSTM 128-128",
        "the character after 16 characters of English text",
        lambda: sources.language_reference(16, every_step=False, stride=10),
        epochs=1,
        batch_size=64,
        lr=4e-3,
        baseline=_PAIRS,
    ),
    "transformer": Show(
        "Transformer, 8 heads, feed-forward 512",
        "which of 8 Python packages a passage of 64 words of code is from",
        sources.package_sources,
        epochs=3,
        batch_size=32,
        lr=1e-3,
    ),
    "attention-classifier": Show(
        "Attention classifier as printed: Conv1d 64, global max pool",
        "which of 8 Python packages a passage of 64 words of code is from",
        sources.package_sources,
        epochs=3,
        batch_size=32,
        lr=1e-3,
    ),
    "self-attention-classifier": Show(
        "Attention classifier with self-attention before the pool",
        "which of 8 Python packages a passage of 64 words of code is from",
        sources.package_sources,
        epochs=2,
        batch_size=32,
        lr=1e-3,
    ),
    "autoencoder": Show(
        "Autoencoder, dense 128-16-128",
        "drawing an 8x8 scan again from 16 numbers",
        lambda: sources.to_itself(sources.digits(8)),
        epochs=20,
        batch_size=32,
        lr=2e-3,
    ),
    "autoencoder-conv": Show(
        "Autoencoder, convolutional",
        "drawing an 8x8 scan again from 16 numbers",
        lambda: sources.to_itself(sources.digits(8)),
        epochs=15,
        batch_size=32,
        lr=2e-3,
    ),
    "seq2seq": Show(
        "Encoder-decoder Transformer, 2 + 2 layers",
        "English names of numbers below 1,000,000 in digits",
        lambda: pairs.numbers_in_words(12_000),
        epochs=2,
        batch_size=32,
        lr=2e-3,
    ),
    "gpt": Show(
        "GPT, pre-norm decoder of 2 layers, 64 wide",
        "the next character of the standard library's sources, at each of 64 steps",
        lambda: corpus.library_windows(64, 400_000),
        epochs=2,
        batch_size=16,
        lr=3e-3,
        sizes={"dim": 64, "heads": 2, "blocks": 2},
        baseline=_TRIPLES,
    ),
    "mlp": Show(
        "MLP Net, dense 10-5-1",
        "how far diabetes went on in a year, from ten measurements",
        sources.diabetes,
        epochs=100,
        batch_size=16,
        lr=1e-3,
    ),
}


@dataclass(frozen=True)
class Result:
    """What the table shows of one model. Speeds are samples a second, of training steps and of inference."""

    model: str
    title: str
    task: str
    parameters: int
    layers: list[str]
    epochs: int
    training_seconds: float
    held_out_samples: int
    accuracy: float
    accuracy_torch: float
    majority_accuracy: float
    loss: float
    baseline: float | None
    largest_difference: float
    training_speed: float
    training_speed_torch: float
    inference_speed: float
    inference_speed_torch: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=tuple(SHOWS), help="this model alone (repeatable)")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of each: shows that all runs, not what it learns"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is a GPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def main(args: argparse.Namespace) -> int:
    to = console()
    device = choose_device(args.device)
    names = [name for name in SHOWS if args.only is None or name in args.only]
    if args.json:
        args.json.open("a").close()  # an unwritable file is refused now, not after the training
    effort = "a few steps each" if args.quick else "about 20 seconds each on two CPU cores"
    to.print(f"Training {len(names)} models on {device_name(device)}, {effort}: {', '.join(names)}. Ctrl-C stops.")
    start = time.monotonic()
    results = []
    for name in names:
        result = _show(name, SHOWS[name], args, device, to)
        if result is None:
            break
        results.append(result)
    to.print(_table(results, device))
    to.print(
        "Accuracy is on held-out data; majority is what always giving the most frequent answer would reach. Of the "
        "autoencoders and of MLP Net it is the share of the variance that is explained, and of always giving the mean. "
        "Speeds are samples a second, of training steps and of inference. Each model stands beside its twin, built of "
        "torch.nn alone with the same weights; difference is the largest between any of their outputs on the held-out "
        "data.\n"
        f"{time.monotonic() - start:.0f} s in all."
    )
    if args.json:
        args.json.write_text(json.dumps(_report(results, args, device), indent=2) + "\n")
    return 0 if len(results) == len(names) else _INTERRUPTED


def _show(name: str, show: Show, args: argparse.Namespace, device: torch.device, to) -> Result | None:
    """Trains and measures one model; None when interrupted."""
    dataset = show.data()
    train, held_out, epochs = dataset.train, dataset.held_out, show.epochs
    if args.quick:
        train, held_out, epochs = _sample(train, 2 * show.batch_size), _sample(held_out, 32), 1
    torch.manual_seed(args.seed)
    arguments = {**model_arguments(name, dataset), **show.sizes}
    model = build_model(name, arguments)
    trainer = Trainer(
        model,
        train,
        held_out,
        optimizer=show.optimizer,
        lr=show.lr,
        batch_size=show.batch_size,
        seed=args.seed,
        device=device,
    )
    to.print(f"\n[bold]{show.title}[/]: {show.task}")
    to.print(f"{len(train):,} samples to train on, {len(held_out):,} held out; {dataset.description}", markup=False)

    def on_epoch(record: Epoch) -> None:
        if epochs < 50 or record.number % 10 == 0:
            to.print(epoch_line(record, epochs, measure_of(train.targets)))

    with training_progress(to, trainer, epochs) as on_step:
        if not trainer.fit(epochs, on_step=on_step, on_epoch=on_epoch):
            return None

    twin = build_model(name, arguments, TORCH).to(device)
    twin.load_state_dict(model.state_dict())
    judged = evaluate(model, held_out, device)
    if isinstance(dataset.encoder, PairEncoder):
        to.print(f"whole answers right, written step by step: {exact_matches(model, held_out, device):.1%}")
    baseline = show.baseline.reach(dataset) if show.baseline else None
    if show.baseline:
        to.print(show.baseline.beside(judged, baseline))
    training, inference = _speeds([model, twin], train, held_out, show, device, repeats=1 if args.quick else 9)
    sample, _ = held_out.batch(slice(0, 8), device)
    with evaluating(model):
        runs = layer_runs(model, sample)
    return Result(
        model=name,
        title=show.title,
        task=show.task,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=served_by(runs),
        epochs=epochs,
        training_seconds=sum(record.seconds for record in trainer.history),
        held_out_samples=len(held_out),
        accuracy=judged.accuracy,
        accuracy_torch=evaluate(twin, held_out, device).accuracy,
        majority_accuracy=majority_accuracy(train.targets, held_out.targets),
        loss=judged.loss,
        baseline=baseline,
        largest_difference=largest_difference(model, twin, held_out, device),
        training_speed=training[0],
        training_speed_torch=training[1],
        inference_speed=inference[0],
        inference_speed_torch=inference[1],
    )


def _sample(split: Split, count: int) -> Split:
    """``count`` samples spread over the split, which may be sorted by class."""
    kept = torch.linspace(0, len(split) - 1, min(count, len(split))).long()
    return Split(split.inputs[kept], split.targets[kept])


def _speeds(
    models: list[nn.Module], train: Split, held_out: Split, show: Show, device: torch.device, repeats: int
) -> tuple[list[float], list[float]]:
    """Samples a second of each model, (training steps, inference), taken in turns on the same batch."""
    inputs, targets = train.batch(slice(0, show.batch_size), device)
    steps = []
    for model in models:
        trained = copy.deepcopy(model).train()  # the steps must not touch the weights that are compared
        optimizer = make_optimizer(show.optimizer, trained, show.lr)
        steps.append(lambda trained=trained, optimizer=optimizer: training_step(trained, optimizer, inputs, targets))
    training = [len(targets) / seconds for seconds in interleaved_seconds(steps, device, repeats)]

    batch, _ = held_out.batch(slice(0, 256), device)
    copies = [copy.deepcopy(model).eval() for model in models]
    with torch.inference_mode():
        calls = [lambda model=model: model(batch) for model in copies]
        inference = [len(batch) / seconds for seconds in interleaved_seconds(calls, device, repeats)]
    return training, inference


def _table(results: list[Result], device: torch.device):
    figures = ("accuracy\n(torch.nn)", "majority", "training/s\n(torch.nn)", "inference/s\n(torch.nn)", "difference")
    drawn = table(f"bigkern {bigkern.__version__} on {device_name(device)}", "model", "layers", *figures, right=figures)
    drawn.show_lines = True
    for result in results:
        drawn.add_row(
            f"[bold]{result.title}[/]",
            "\n".join(result.layers),
            f"{result.accuracy:.1%}\n({result.accuracy_torch:.1%})",
            f"{result.majority_accuracy:.1%}",
            f"{result.training_speed:,.0f}\n({result.training_speed_torch:,.0f})",
            f"{result.inference_speed:,.0f}\n({result.inference_speed_torch:,.0f})",
            f"{result.largest_difference:.1e}" if result.largest_difference else "0",
        )
    return drawn


def _report(results: list[Result], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "bigkern": bigkern.__version__,
        "torch": torch.__version__,
        "device": device_name(device),
        "seed": args.seed,
        "quick": args.quick,
        "models": [asdict(result) for result in results],
    }
