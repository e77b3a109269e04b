"""``bigkern evaluate``: a trained model on its held-out data, or on other data of the same kind."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path

from bigkern.training.data import CharacterEncoder, Encoder, NumberEncoder, Split, encoder_state
from bigkern.training.display import console, table
from bigkern.training.errors import InputError
from bigkern.training.metrics import Evaluation, are_numbers, evaluate, majority_accuracy
from bigkern.training.tasks import DataOptions, choose_device, device_name, load_dataset, load_split
from bigkern.training.train import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder that bigkern train --out made")
    parser.add_argument(
        "--data", type=Path, help="image folder, CSV or text file, all of it (default: what was held out)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is a GPU)")


def main(args: argparse.Namespace) -> int:
    to = console()
    device = choose_device(args.device)
    model, encoder, parts = load_run(args.run, device)
    name, options = parts["model"]["name"], parts["options"]
    reading = DataOptions(**{field.name: options[field.name] for field in fields(DataOptions)})
    if args.data:
        split, described = load_split(name, encoder, args.data, reading), str(args.data)
    else:
        dataset = load_dataset(name, options["data"], reading)
        if encoder_state(dataset.encoder) != parts["data"]:
            raise InputError(f"{options['data']}: no longer the data that {args.run} was trained on; give --data")
        split, described = dataset.held_out, f"held out of {dataset.description}"
    to.print(f"{name} of {args.run}, {parts['trainer']['epoch']} epochs, on {device_name(device)}")
    to.print(f"data: {len(split):,} samples, {described}")

    result = evaluate(model, split, device)
    if are_numbers(split.targets):
        to.print(_numbers_table(result, split, encoder))
        return 0
    most_frequent = split.targets.flatten().mode().values
    baseline = (split.targets == most_frequent).double().mean().item()
    rows = table("Evaluation", "what", "value", right=("value",))
    rows.add_row("accuracy", f"{result.accuracy:.2%}")
    rows.add_row(f"always {encoder.classes[most_frequent]!r}", f"{baseline:.2%}")
    rows.add_row("cross entropy", f"{result.loss:.4f}")
    if isinstance(encoder, CharacterEncoder):
        rows.add_row("bits per character", f"{result.loss / math.log(2):.3f}")
    rows.add_row("answers", f"{result.targets:,}")
    to.print(rows)
    if not isinstance(encoder, CharacterEncoder):
        counts = split.targets.flatten().bincount(minlength=len(encoder.classes)).tolist()
        recall = table("By class", "class", "samples", "recognised", right=("samples", "recognised"))
        for label, count, share in zip(encoder.classes, counts, result.recall, strict=True):
            recall.add_row(label, f"{count:,}", f"{share:.1%}" if count else "-")
        to.print(recall)
    return 0


def _numbers_table(result: Evaluation, split: Split, encoder: Encoder):
    rows = table("Evaluation", "what", "value", right=("value",))
    rows.add_row("explained variance", f"{result.accuracy:.2%}")
    rows.add_row("always the mean", f"{majority_accuracy(split.targets, split.targets):.2%}")
    rows.add_row("mean squared error", f"{result.loss:.5f}")
    if isinstance(encoder, NumberEncoder):
        rows.add_row(f"root of it, in units of {encoder.target}", f"{encoder.spreads[-1] * result.loss**0.5:,.4g}")
    rows.add_row("numbers", f"{result.targets:,}")
    return rows
