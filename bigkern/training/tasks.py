"""Which data each model reads, how the model is made to fit it, and the settings that train it well."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigkern.models import BIGKERN, MODELS, Layers
from bigkern.training import corpus, pairs, tagging
from bigkern.training import data as sources
from bigkern.training.data import (
    Dataset,
    Encoder,
    ImageEncoder,
    NumberEncoder,
    PairEncoder,
    Split,
    TagEncoder,
    WordEncoder,
)
from bigkern.training.errors import InputError

MNIST_FOLDER = Path.home() / ".cache" / "bigkern"


@dataclass(frozen=True)
class Defaults:
    """Settings of ``bigkern train`` where the user gives none, and what the model does, in a line."""

    task: str
    data: str
    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "adam"


DEFAULTS = {
    "cnn": Defaults("classifies images", "digits", 15, 64, 1e-3),
    "cnn-small": Defaults("classifies images of 28x28 grey pixels", "digits", 15, 32, 1e-3),
    "cnn-log-softmax": Defaults("classifies images", "digits", 10, 32, 1e-2, "sgd"),
    "gru": Defaults("predicts the next character at each step", "text", 6, 64, 4e-3),
    "gru-tagger": Defaults("tags each character of Python source: name, string, ...", "source", 6, 32, 4e-3),
    "rnn": Defaults("classifies images, read row by row", "digits", 20, 32, 2e-2, "sgd"),
    "lstm": Defaults("predicts the character after a window of 16", "text", 1, 64, 4e-3),
    "transformer": Defaults("classifies texts", "text", 3, 32, 1e-3),
    "attention-classifier": Defaults("classifies texts", "text", 4, 32, 1e-3),
    "self-attention-classifier": Defaults("classifies texts", "text", 3, 32, 1e-3),
    "autoencoder": Defaults("draws images again from 16 numbers", "digits", 20, 32, 2e-3),
    "autoencoder-conv": Defaults("draws images again from 16 numbers", "digits", 20, 32, 2e-3),
    "mlp": Defaults("predicts a number from numbers", "diabetes", 100, 16, 1e-3),
    "feature-transformer": Defaults("classifies images, row by row", "digits", 15, 32, 1e-3),
    "seq2seq": Defaults("writes an answer to a text: numbers in words in digits", "numbers", 5, 32, 2e-3),
    "bert": Defaults("classifies texts", "text", 3, 32, 1e-3),
    "gpt": Defaults("predicts the next character at each step", "text", 2, 32, 2e-3),
}


AUTOENCODERS = ("autoencoder", "autoencoder-conv")
_IMAGE_MODELS = ("cnn", "cnn-small", "cnn-log-softmax", "feature-transformer", "rnn", *AUTOENCODERS)
_TEXT_CLASSIFIERS = ("transformer", "attention-classifier", "self-attention-classifier", "bert")
_EVERY_STEP = ("gru", "gpt")
# Pretrained BERTs bring their own sizes; one that learns from nothing but these texts is small.
_SMALL_BERT = {"dim": 64, "heads": 4, "blocks": 2, "feed_forward": 256}
_STEPS = 64  # of the models that answer at each step


@dataclass(frozen=True)
class DataOptions:
    """How a user's own data is read."""

    image_size: int = 32
    channels: int = 1
    text_column: str = "text"
    label_column: str = "label"


def load_dataset(
    model: str, name: str, options: DataOptions, on_image: Callable[[int, int], None] | None = None
) -> Dataset:
    """The data set called ``name`` (digits, mnist, text, or a path) in the form that ``model`` reads."""
    path = Path(name)
    if model == "mlp":
        if name == "diabetes":
            return sources.diabetes()
        if path.is_file():
            return sources.table_of_numbers(path, options.label_column)
        raise _wrong_data(model, name, path, "diabetes, or a CSV file of numbers with a label column")
    if model in _IMAGE_MODELS:
        dataset = _images(model, name, path, options, on_image)
        if model == "feature-transformer":
            splits = map(sources.as_rows, (dataset.train, dataset.held_out))
            return Dataset(f"{dataset.description}, row by row", *splits, dataset.encoder)
        return sources.to_itself(dataset) if model in AUTOENCODERS else dataset
    if model == "seq2seq":
        if name == "numbers":
            return pairs.numbers_in_words()
        if path.is_file():
            return pairs.answered_texts(path, options.text_column, options.label_column)
        raise _wrong_data(model, name, path, "numbers, or a CSV file with a text and a label column")
    if model in _TEXT_CLASSIFIERS:
        if name == "text":
            return sources.package_sources()
        if path.is_file():
            return sources.labelled_texts(path, options.text_column, options.label_column)
        raise _wrong_data(model, name, path, "text, or a CSV file with a text and a label column")
    if model == "gru-tagger":
        if name == "source":
            return tagging.library_tags(_STEPS)
        if path.is_file():
            return tagging.file_tags(sources.read_text(path), name, _STEPS)
        raise _wrong_data(model, name, path, "source, or a file of Python source")
    every_step = model in _EVERY_STEP
    length = _STEPS if every_step else 16
    if name == "text" and model == "gpt":
        return corpus.library_windows(length)
    if name == "text":
        return sources.language_reference(length, every_step=every_step)
    if path.is_file():
        return sources.text_file(path, length, every_step=every_step)
    raise _wrong_data(model, name, path, "text, or a text file")


def _images(
    model: str, name: str, path: Path, options: DataOptions, on_image: Callable[[int, int], None] | None
) -> Dataset:
    small = model == "cnn-small"
    if name == "digits":
        return sources.digits(28 if small else 8)
    if name == "mnist":
        return sources.mnist(MNIST_FOLDER)
    if path.is_dir():
        shape = (1, 28, 28) if small else (options.channels, options.image_size, options.image_size)
        return sources.image_folder(path, shape, on_image)
    raise _wrong_data(model, name, path, "digits, mnist, or a folder with one subfolder of images per class")


def _wrong_data(model: str, name: str, path: Path, wanted: str) -> InputError:
    if not path.exists():
        return InputError(f"--data {name}: no such file or data set; {model} takes {wanted}")
    return InputError(f"--data {name}: {model} takes {wanted}")


def model_arguments(model: str, dataset: Dataset) -> dict[str, Any]:
    """The constructor's arguments that fit ``model`` to ``dataset``."""
    encoder = dataset.encoder
    classes = len(dataset.classes)
    if isinstance(encoder, ImageEncoder):
        if model in AUTOENCODERS:
            return {"input_shape": encoder.shape}
        if model == "feature-transformer":
            channels, height, width = encoder.shape
            sizes = {"hidden_dim": 256, "n_layers": 2, "n_heads": 4}  # the document's example
            return {"input_dim": channels * width, "output_dim": classes, "max_length": height, **sizes}
        if model == "rnn":
            return {"features": encoder.shape[0] * encoder.shape[2], "classes": classes}
        arguments: dict[str, Any] = {"input_shape": encoder.shape, "classes": classes}
        if model == "cnn":
            # Unpadded, three convolutions and two poolings use up 17 pixels; smaller images need the padding.
            arguments["padding"] = 0 if min(encoder.shape[1:]) >= 18 else 1
        return arguments
    if isinstance(encoder, WordEncoder):
        sizes = {**_SMALL_BERT, "max_length": encoder.length} if model == "bert" else {}
        return {"vocabulary": len(encoder.words), "classes": classes, **sizes}
    if isinstance(encoder, PairEncoder):
        sizes = {"source_vocabulary": len(encoder.words), "target_vocabulary": len(encoder.symbols)}
        return {**sizes, "max_length": encoder.length}
    if isinstance(encoder, NumberEncoder):
        return {"features": len(encoder.columns)}
    if model == "gpt":
        return {"vocabulary": classes, "max_length": encoder.length}
    if isinstance(encoder, TagEncoder):
        return {"vocabulary": len(encoder.symbols), "classes": classes}
    return {"vocabulary": classes} if model == "lstm" else {"vocabulary": classes, "classes": classes}


def build_model(name: str, arguments: dict[str, Any], layers: Layers = BIGKERN) -> nn.Module:
    try:
        return MODELS[name](**arguments, layers=layers)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def load_split(model: str, encoder: Encoder, path: Path, options: DataOptions) -> Split:
    """All of a user's data as a trained model reads it: its image size, its vocabulary, its classes."""
    if isinstance(encoder, ImageEncoder):
        if not path.is_dir():
            raise InputError(f"{path}: expected a folder with one subfolder of images per class")
        images, labels = sources.read_image_folder(path, encoder)
        split = Split(images, images if model in AUTOENCODERS else labels)
        return sources.as_rows(split) if model == "feature-transformer" else split
    if isinstance(encoder, NumberEncoder):
        _, rows = sources.read_numbers(path, target=encoder.target, columns=encoder.columns)
        encoded = encoder.encode(rows)
        return Split(encoded[:, :-1], encoded[:, -1:])
    if isinstance(encoder, WordEncoder):
        texts, labels = sources.read_csv(path, options.text_column, options.label_column)
        strangers = sorted(set(labels) - set(encoder.classes))
        if strangers:
            raise InputError(
                f"{path}: label {strangers[0]!r} is not one that the model knows ({', '.join(encoder.classes)})"
            )
        return Split(encoder.encode(*texts), torch.tensor([encoder.classes.index(label) for label in labels]))
    if isinstance(encoder, PairEncoder):
        return pairs.read_split(path, encoder, options.text_column, options.label_column)
    text = sources.read_text(path)
    if isinstance(encoder, TagEncoder):
        return tagging.tagged_windows(text, encoder)
    if len(text) <= encoder.length:
        raise InputError(f"{path}: {len(text)} characters are too few; the model reads {encoder.length} at a time")
    return sources.character_windows(encoder.encode(text), encoder.length, encoder.length, model in _EVERY_STEP)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: expected cpu or cuda")
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
