"""``bigkern train``: trains one of the models on digits, text or the user's own data, into a folder."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from bigkern.models import layer_runs
from bigkern.training import checkpoint
from bigkern.training.data import Dataset, encoder_from_state, encoder_state
from bigkern.training.display import console, epoch_line, measure_of, served_by, training_progress
from bigkern.training.errors import InputError
from bigkern.training.metrics import are_numbers, evaluating, majority_accuracy
from bigkern.training.tasks import (
    DEFAULTS,
    DataOptions,
    build_model,
    choose_device,
    device_name,
    load_dataset,
    model_arguments,
)
from bigkern.training.trainer import MOMENTUM, OPTIMIZERS, Epoch, Trainer

INTERRUPTED = 130  # the shell's status for a program ended by Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "models: " + "; ".join(
        f"{name} {defaults.task} (--epochs {defaults.epochs} --batch-size {defaults.batch_size} --lr {defaults.lr})"
        for name, defaults in DEFAULTS.items()
    )
    parser.add_argument("model", choices=tuple(DEFAULTS))
    parser.add_argument(
        "--data",
        help="digits, mnist, text, numbers, diabetes, or a path: image folder, CSV file, text file (default: by model)",
    )
    parser.add_argument("--epochs", type=positive_int)
    parser.add_argument("--batch-size", type=positive_int)
    parser.add_argument("--lr", type=positive_float, help="learning rate")
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help=f"default: adam, but sgd for cnn-log-softmax; sgd has momentum {MOMENTUM}",
    )
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is a GPU)")
    parser.add_argument("--out", type=Path, help="folder for the checkpoint (default: runs/MODEL)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out; --epochs may grow")
    images = parser.add_argument_group("an image folder (one subfolder per class)")
    images.add_argument(
        "--image-size", type=positive_int, help="images become this high and wide (default: 32; cnn-small: 28)"
    )
    images.add_argument("--channels", type=int, choices=(1, 3), help="1 for grey (default), 3 for colour")
    texts = parser.add_argument_group("a CSV file (its first line names the columns)")
    texts.add_argument("--text-column", help="default: text")
    texts.add_argument("--label-column", help="default: label")


def main(args: argparse.Namespace) -> int:
    out = args.out or Path("runs") / args.model
    to = console()
    device = choose_device(args.device)
    saved = _saved(args, out)
    options = saved["options"] if saved else _options(args)
    epochs = args.epochs or options["epochs"]
    options = {**options, "epochs": epochs}
    seed = options["seed"]

    reading = DataOptions(**{field.name: options[field.name] for field in fields(DataOptions)})
    with to.status(f"reading {options['data']}") as status:

        def on_image(done: int, total: int) -> None:
            status.update(f"reading {options['data']}: {done:,} of {total:,} images")

        dataset = load_dataset(args.model, options["data"], reading, on_image)
    if saved and encoder_state(dataset.encoder) != saved["data"]:
        raise InputError(f"--resume: {options['data']} is no longer the data that {out} was trained on")
    # Seeded before the model draws its first weights.
    torch.manual_seed(seed)
    arguments = model_arguments(args.model, dataset)
    model = build_model(args.model, arguments)
    trainer = Trainer(
        model,
        dataset.train,
        dataset.held_out,
        optimizer=options["optimizer"],
        lr=options["lr"],
        batch_size=options["batch_size"],
        seed=seed,
        device=device,
    )
    if saved:
        trainer.load_state_dict(saved["trainer"])
    parts = {
        "model": {"name": args.model, "arguments": arguments},
        "data": encoder_state(dataset.encoder),
        "options": options,
    }

    _say_plan(to, args.model, dataset, trainer, options, device, out)
    if trainer.epoch >= epochs:
        to.print(f"{out} has its {epochs} epochs already; --epochs {epochs + 1} or more trains on")
        return 0

    def on_epoch(record: Epoch) -> None:
        if not math.isfinite(record.loss):
            raise InputError(
                f"the loss became {record.loss} in epoch {record.number}; try a smaller --lr than {options['lr']}"
            )
        to.print(epoch_line(record, epochs, measure_of(dataset.train.targets)))

    with training_progress(to, trainer, epochs) as on_step:
        finished = trainer.fit(
            epochs,
            on_step=on_step,
            on_epoch=on_epoch,
            save=lambda state: checkpoint.save(out, {**parts, "trainer": state}),
        )
    path = out / checkpoint.FILE
    if not finished:
        to.print(f"interrupted; saved to {path} after step {trainer.step} of epoch {trainer.epoch + 1}")
        to.print(f"go on with: bigkern train {args.model} --out {out} --resume")
        return INTERRUPTED
    to.print(f"saved to {path}; next: bigkern evaluate {out}, bigkern predict {out} --help")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What training depends on, the user's choices over the defaults; kept in the checkpoint."""
    defaults = DEFAULTS[args.model]
    chosen = {
        "data": defaults.data,
        "epochs": defaults.epochs,
        "batch_size": defaults.batch_size,
        "lr": defaults.lr,
        "optimizer": defaults.optimizer,
        "seed": 0,
        **asdict(DataOptions()),
    }
    return {name: default if getattr(args, name) is None else getattr(args, name) for name, default in chosen.items()}


def _saved(args: argparse.Namespace, out: Path) -> dict[str, Any] | None:
    """The checkpoint to resume, or None for a fresh run; refuses what would overwrite or contradict one."""
    if not args.resume:
        if (out / checkpoint.FILE).exists():
            raise InputError(
                f"{out}: holds a checkpoint already; --resume goes on with it, another --out leaves it alone"
            )
        return None
    saved = checkpoint.load(out)
    if saved["model"]["name"] != args.model:
        raise InputError(f"--resume: {out} holds a {saved['model']['name']}, not a {args.model}")
    for name, value in saved["options"].items():
        given = getattr(args, name)
        if name != "epochs" and given is not None and given != value:
            raise InputError(f"--resume: {out} was trained with --{name.replace('_', '-')} {value}, not {given}")
    return saved


def _say_plan(
    to, name: str, dataset: Dataset, trainer: Trainer, options: dict, device: torch.device, out: Path
) -> None:
    model = trainer.model
    inputs, _ = trainer.train.batch(slice(0, 2), device)
    with evaluating(model):
        runs = layer_runs(model, inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    baseline = majority_accuracy(dataset.train.targets, dataset.held_out.targets)
    if are_numbers(dataset.train.targets):
        goal = f"always answering the mean explains {baseline:.1%} of their variance"
    else:
        goal = (
            f"{len(dataset.classes)} classes; "
            f"always answering the most frequent one is right {baseline:.1%} of the time"
        )
    to.print(f"{name} ({DEFAULTS[name].task}), {parameters:,} parameters, on {device_name(device)}")
    to.print("layers: " + "; ".join(served_by(runs)))
    to.print(f"data: {dataset.description}")
    to.print(f"      {len(dataset.train):,} samples to train on, {len(dataset.held_out):,} held out, {goal}")
    to.print(
        f"plan: epochs {trainer.epoch + 1} to {options['epochs']} of {trainer.steps_per_epoch:,} batches of "
        f"{options['batch_size']}, {options['optimizer']}, lr {options['lr']}, seed {options['seed']}, into {out}; "
        f"Ctrl-C saves, --resume goes on"
    )


def load_run(run: Path, device: torch.device):
    """(model in evaluation mode, encoder, checkpoint parts) of a trained run."""
    parts = checkpoint.load(run)
    model = build_model(parts["model"]["name"], parts["model"]["arguments"])
    try:
        model.load_state_dict(parts["trainer"]["model"])
    except RuntimeError as error:
        raise InputError(f"{run}: its weights do not fit this version's {parts['model']['name']}") from error
    return model.to(device).eval(), encoder_from_state(parts["data"]), parts


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value
