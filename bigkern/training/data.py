"""Real data without a network, and the user's own.

* ``digits``: scikit-learn's 1,797 scanned digits of 8x8.
* ``text``: the text of the Python installation itself. For the recurrent models, the language reference in
  ``pydoc_data.topics`` (465 kB of English), read character by character; whole topics are held out. For the classifier,
  passages of source code of eight standard packages, to be told apart; whole files are held out.
* ``source``: the standard library's source, each character to be tagged as part of a name, a string, ... (tagging.py).
* ``diabetes``: scikit-learn's ten measurements of 442 patients, and a number to predict from them.
* ``mnist`` through torchvision, a folder of images, a CSV file with a text and a label column, or one of numbers, a
  text file.

A data set is two splits in memory, and an encoder that turns what a user has (an image file, a text) into what the
model reads. The encoder is stored in checkpoints.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from bigkern.training.errors import InputError, require

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
PACKAGES = ("asyncio", "ctypes", "email", "http", "importlib", "multiprocessing", "unittest", "xml")
UNKNOWN_CHARACTER = "\N{REPLACEMENT CHARACTER}"

# The target of a step that is not to be learned: what torch's cross entropy leaves out.
IGNORED = -100

_CHARACTERS = 96  # as many symbols as cover the text; rarer ones become UNKNOWN_CHARACTER
_WORDS = 4000
_PASSAGE = 64  # words of one passage of source code
_TOKEN = re.compile(r"[A-Za-z_]+|\d+|[^\sA-Za-z_\d]")


@dataclass(frozen=True)
class Split:
    """inputs (N, ...) and targets: class numbers (N,) or (N, T), or numbers (N, ...) to come near to.

    Images may be kept as bytes: a batch is floats in [0, 1].
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.targets.shape[0]

    def batch(self, indices: Tensor | slice, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        inputs, targets = (part[indices].to(device, non_blocking=True) for part in (self.inputs, self.targets))
        return tuple(part.float() / 255 if part.dtype == torch.uint8 else part for part in (inputs, targets))


@dataclass(frozen=True)
class ImageEncoder:
    """Image files as (channels, height, width) floats in [0, 1]."""

    kind: ClassVar[str] = "image"
    shape: list[int]
    classes: list[str]

    def read(self, path: Path) -> Tensor:
        """(channels, height, width) bytes of the image, resized to the encoder's size."""
        image_module = require("PIL.Image", "pillow", "reading images")
        channels, height, width = self.shape
        try:
            with image_module.open(path) as image:
                image = image.convert("L" if channels == 1 else "RGB").resize((width, height), image_module.BILINEAR)
                data = bytearray(image.tobytes())
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
            raise InputError(f"{path}: not an image that can be read ({error})") from error
        return torch.frombuffer(data, dtype=torch.uint8).view(height, width, channels).permute(2, 0, 1).contiguous()

    def encode(self, path: Path) -> Tensor:
        return self.read(path).float() / 255


@dataclass(frozen=True)
class CharacterEncoder:
    """A text as the numbers of its characters, and back. Symbol 0 stands for every character that has none."""

    kind: ClassVar[str] = "characters"
    symbols: list[str]
    length: int

    @classmethod
    def of(cls, text: str, length: int) -> CharacterEncoder:
        common = [symbol for symbol, _ in Counter(text).most_common(_CHARACTERS)]
        return cls([UNKNOWN_CHARACTER, *sorted(set(common) - {UNKNOWN_CHARACTER})], length)

    @property
    def classes(self) -> list[str]:
        return self.symbols

    def encode(self, text: str) -> Tensor:
        numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        return torch.tensor([numbers.get(symbol, 0) for symbol in text], dtype=torch.int64)

    def decode(self, numbers: Iterable[int]) -> str:
        return "".join(self.symbols[number] for number in numbers)


@dataclass(frozen=True)
class TagEncoder:
    """A text as the numbers of its characters (CharacterEncoder's), each of which is of one of the ``classes``."""

    kind: ClassVar[str] = "tags"
    symbols: list[str]
    length: int
    classes: list[str]

    def encode(self, text: str) -> Tensor:
        return CharacterEncoder(self.symbols, self.length).encode(text)


@dataclass(frozen=True)
class WordEncoder:
    """The first ``length`` words of a text as numbers: 0 fills up, 1 stands for a word outside the vocabulary."""

    kind: ClassVar[str] = "words"
    words: list[str]
    length: int
    classes: list[str]

    @classmethod
    def of(cls, texts: Iterable[str], length: int, classes: list[str]) -> WordEncoder:
        counts = Counter(word for text in texts for word in split_words(text))
        return cls(["<padding>", "<unknown>", *(word for word, _ in counts.most_common(_WORDS))], length, classes)

    def encode(self, *texts: str) -> Tensor:
        """(len(texts), length) numbers."""
        numbers = {word: number for number, word in enumerate(self.words)}
        encoded = torch.zeros(len(texts), self.length, dtype=torch.int64)
        for row, text in zip(encoded, texts, strict=True):
            found = [numbers.get(word, 1) for word in split_words(text)[: self.length]]
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return encoded


@dataclass(frozen=True)
class NumberEncoder:
    """Rows of numbers with mean 0 and spread 1 by column, and the ``target`` column's number from the model's.

    ``means`` and ``spreads`` are the columns' in the training data, the target's last.
    """

    kind: ClassVar[str] = "numbers"
    columns: list[str]
    target: str
    means: list[float]
    spreads: list[float]

    @classmethod
    def of(cls, rows: Tensor, columns: list[str], target: str) -> NumberEncoder:
        spreads = rows.std(0, correction=0)
        # A column of equal values stays as it is, less its mean.
        return cls(columns, target, rows.mean(0).tolist(), torch.where(spreads > 0, spreads, 1.0).tolist())

    @property
    def classes(self) -> list[str]:
        return [self.target]

    def encode(self, rows: Tensor) -> Tensor:
        """The first, or all, of the columns (N, up to len(means)) as the model reads them, in float32."""
        count = rows.shape[1]
        means, spreads = (torch.tensor(values[:count], dtype=torch.float64) for values in (self.means, self.spreads))
        return ((rows - means) / spreads).float()

    def decode(self, outputs: Tensor) -> Tensor:
        """(N, 1) outputs of the model in the target's own unit: (N,)."""
        return outputs[:, 0].double() * self.spreads[-1] + self.means[-1]


@dataclass(frozen=True)
class PairEncoder:
    """A text's words as numbers, and the answer's characters: what goes in, and what is to be written.

    Of the words, 0 fills up and 1 stands for one outside the vocabulary; of the symbols, 0 fills up, 1 begins and 2
    ends an answer. Both sides are filled up to ``length``.
    """

    kind: ClassVar[str] = "pairs"
    words: list[str]
    symbols: list[str]
    length: int

    @classmethod
    def of(cls, texts: Sequence[str], answers: Sequence[str]) -> PairEncoder:
        split = [split_words(text) for text in texts]
        words = sorted({word for text in split for word in text})
        symbols = sorted({symbol for answer in answers for symbol in answer})
        length = max(*map(len, split), *(len(answer) + 1 for answer in answers))
        return cls(["<padding>", "<unknown>", *words], ["<padding>", "<start>", "<end>", *symbols], length)

    @property
    def classes(self) -> list[str]:
        return self.symbols

    def encode(self, *texts: str) -> Tensor:
        """(len(texts), length) numbers of the words."""
        return WordEncoder(self.words, self.length, []).encode(*texts)

    def split(self, texts: Sequence[str], answers: Sequence[str]) -> Split:
        """Inputs (N, 2, length): the text, and start and answer; targets (N, length): the answer and its end."""
        numbers = {symbol: number for number, symbol in enumerate(self.symbols)}
        inputs = torch.zeros(len(texts), 2, self.length, dtype=torch.int64)
        targets = torch.full((len(texts), self.length), IGNORED)
        inputs[:, 0] = self.encode(*texts)
        inputs[:, 1, 0] = 1
        for read, written, answer in zip(inputs[:, 1], targets, answers, strict=True):
            found = torch.tensor([numbers[symbol] for symbol in answer], dtype=torch.int64)
            read[1 : len(found) + 1] = found
            written[: len(found)] = found
            written[len(found)] = 2
        return Split(inputs, targets)

    def decode(self, numbers: Iterable[int]) -> str:
        """The answer up to its end."""
        return "".join(self.symbols[number] for number in itertools.takewhile(lambda number: number > 2, numbers))


Encoder = ImageEncoder | CharacterEncoder | TagEncoder | WordEncoder | NumberEncoder | PairEncoder


def encoder_state(encoder: Encoder) -> dict[str, Any]:
    """The encoder as plain values, for a checkpoint."""
    return {"kind": encoder.kind, **asdict(encoder)}


def encoder_from_state(state: dict[str, Any]) -> Encoder:
    kinds = {
        cls.kind: cls for cls in (ImageEncoder, CharacterEncoder, TagEncoder, WordEncoder, NumberEncoder, PairEncoder)
    }
    return kinds[state["kind"]](**{name: value for name, value in state.items() if name != "kind"})


def split_words(text: str) -> list[str]:
    """Words, numbers and single signs, in lower case."""
    return _TOKEN.findall(text.lower())


@dataclass(frozen=True)
class Dataset:
    """What a model trains on and what it is judged by. ``description`` is for people."""

    description: str
    train: Split
    held_out: Split
    encoder: Encoder

    @property
    def classes(self) -> list[str]:
        return self.encoder.classes


def held_out_indices(labels: Sequence[int], fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random (train, held out) indices with ``fraction`` of each class held out: at least one, and never its last."""
    generator = torch.Generator().manual_seed(seed)
    labels_tensor = torch.as_tensor(labels)
    train, held_out = [], []
    for label in labels_tensor.unique():
        members = (labels_tensor == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(1, round(len(members) * fraction)), len(members) - 1)
        held_out.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(held_out).sort().values


def _split(inputs: Tensor, labels: Tensor) -> tuple[Split, Split]:
    train, held_out = held_out_indices(labels, 0.2)
    return Split(inputs[train], labels[train]), Split(inputs[held_out], labels[held_out])


def digits(size: int = 8) -> Dataset:
    """scikit-learn's digits, a fifth of each class held out; ``size`` other than 8 enlarges them, bilinearly."""
    bunch = require("sklearn.datasets", "scikit-learn", "the digits data set").load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    description = "scikit-learn's 1,797 scanned digits, 8x8"
    if size != 8:
        images = functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False).clamp_(0, 1)
        description += f" enlarged to {size}x{size}"
    encoder = ImageEncoder([1, size, size], [str(digit) for digit in range(10)])
    return Dataset(description, *_split(images, torch.from_numpy(bunch.target).long()), encoder)


def to_itself(dataset: Dataset) -> Dataset:
    """Images whose target is the image: what an autoencoder learns from."""
    parts = [Split(part.inputs, part.inputs) for part in (dataset.train, dataset.held_out)]
    return Dataset(f"{dataset.description}, to be drawn again", *parts, dataset.encoder)


def as_rows(split: Split) -> Split:
    """Images (N, channels, height, width) as sequences of their rows (N, height, channels * width), each of which has
    the image's class as its target."""
    rows = split.inputs.transpose(1, 2).flatten(2)
    return Split(rows, split.targets.unsqueeze(1).expand(-1, rows.shape[1]))


def diabetes() -> Dataset:
    """scikit-learn's diabetes: ten measurements of 442 patients, and how far the disease went on in a year."""
    bunch = require("sklearn.datasets", "scikit-learn", "the diabetes data set").load_diabetes()
    rows = torch.cat([torch.from_numpy(bunch.data), torch.from_numpy(bunch.target).unsqueeze(1)], 1)
    return _rows_of_numbers(
        "scikit-learn's diabetes, ten measurements of 442 patients", rows, list(bunch.feature_names), "progression"
    )


def table_of_numbers(path: Path, target: str) -> Dataset:
    """A CSV file of numbers, one column of which is the ``target``."""
    columns, rows = read_numbers(path, target=target)
    if len(rows) < 10:
        raise InputError(f"{path}: {len(rows)} rows are too few; at least 10 are needed")
    return _rows_of_numbers(f"{len(rows):,} rows of {path}", rows, columns, target)


def _rows_of_numbers(description: str, rows: Tensor, columns: list[str], target: str) -> Dataset:
    """(N, len(columns) + 1) float64 rows, the target last; a random fifth of them held out."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    held_out, train = order[: len(rows) // 5].sort().values, order[len(rows) // 5 :].sort().values
    encoder = NumberEncoder.of(rows[train], columns, target)
    encoded = encoder.encode(rows)
    splits = [Split(encoded[part, :-1], encoded[part, -1:]) for part in (train, held_out)]
    return Dataset(f"{description}; a fifth held out", *splits, encoder)


def read_numbers(
    path: Path, *, target: str | None = None, columns: Sequence[str] | None = None
) -> tuple[list[str], Tensor]:
    """The columns' names without the target's, and (N, columns) float64 values with the target's last.

    ``columns`` chooses and orders them (default: all of the file's); without a ``target`` there is none.
    """
    rows = csv.reader(read_text(path).splitlines(keepends=True), strict=True)
    try:
        found = next(rows, [])
        columns = [name for name in found if name != target] if columns is None else list(columns)
        wanted = columns if target is None else [*columns, target]
        for name in wanted:
            if name not in found:
                raise InputError(f"{path}: no column {name!r}; its first line names {', '.join(found) or 'nothing'}")
        places, values = [found.index(name) for name in wanted], []
        for row in rows:
            if not row:
                continue
            if len(row) < len(found):
                raise InputError(f"{path}: line {rows.line_num} has too few columns")
            values.append([_number(row[place], path, rows.line_num) for place in places])
    except csv.Error as error:
        raise InputError(f"{path}: not CSV after line {rows.line_num} ({error})") from error
    if not values or not columns:
        raise InputError(f"{path}: no {'rows below the first line' if columns else 'columns beside the target'}")
    return columns, torch.tensor(values, dtype=torch.float64)


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{path}: line {line}: {text!r} is not a finite number")
    return value


def mnist(folder: Path) -> Dataset:
    """MNIST as torchvision keeps it under ``folder``; torchvision downloads it where it is not there yet."""
    datasets = require("torchvision.datasets", "torchvision", "the MNIST data set")
    try:
        parts = [datasets.MNIST(str(folder), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise InputError(f"MNIST: neither found under {folder} nor downloaded ({error})") from error
    splits = [Split(part.data.unsqueeze(1), part.targets.long()) for part in parts]
    return Dataset("MNIST", *splits, ImageEncoder([1, 28, 28], [str(digit) for digit in range(10)]))


def image_folder(folder: Path, shape: Sequence[int], on_image: Callable[[int, int], None] | None = None) -> Dataset:
    """One subfolder per class, resized to ``shape`` (channels, height, width); a fifth of each class held out.

    ``on_image(done, total)`` is called after each image is read.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"{folder}: expected one subfolder of images per class, at least two; found {len(classes)}")
    encoder = ImageEncoder(list(shape), classes)
    images, labels = read_image_folder(folder, encoder, on_image)
    counts = torch.bincount(labels, minlength=len(classes))
    if counts.min() < 2:
        raise InputError(
            f"{folder / classes[int(counts.argmin())]}: a class needs at least two images ({_SUFFIX_NOTE})"
        )
    channels, height, width = shape
    description = f"{len(labels):,} images of {folder}, as {height}x{width} {'grey' if channels == 1 else 'RGB'}"
    return Dataset(description, *_split(images, labels), encoder)


_SUFFIX_NOTE = f"files ending in {', '.join(IMAGE_SUFFIXES)} count"


def read_image_folder(
    folder: Path, encoder: ImageEncoder, on_image: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """All images below ``folder``/<class>: (N, channels, height, width) bytes and (N,) classes by the encoder."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            label = path.relative_to(folder).parts[0]
            if label in encoder.classes and path.parent != folder:
                files.append((path, encoder.classes.index(label)))
    if not files:
        raise InputError(f"{folder}: no images in subfolders named {', '.join(encoder.classes[:5])} ({_SUFFIX_NOTE})")
    images = torch.empty(len(files), *encoder.shape, dtype=torch.uint8)
    for row, (path, _) in enumerate(files):
        images[row] = encoder.read(path)
        if on_image:
            on_image(row + 1, len(files))
    return images, torch.tensor([label for _, label in files])


def write_image(image: Tensor, path: Path) -> Path:
    """(1 or 3, height, width) floats in [0, 1] as an image file; returns its path."""
    image_module = require("PIL.Image", "pillow", "writing images")
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    channels, height, width = pixels.shape
    data = bytes(pixels.permute(1, 2, 0).flatten().tolist())
    image_module.frombytes("L" if channels == 1 else "RGB", (width, height), data).save(path)
    return path


def read_text(path: Path) -> str:
    """The file as UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_csv(path: Path, text_column: str = "text", label_column: str = "label") -> tuple[list[str], list[str]]:
    """The texts and labels of a CSV file whose first line names its columns."""
    rows = csv.DictReader(read_text(path).splitlines(keepends=True), strict=True)
    try:
        columns = rows.fieldnames or []
        for column in (text_column, label_column):
            if column not in columns:
                raise InputError(
                    f"{path}: no column {column!r}; its first line names {', '.join(columns) or 'nothing'}"
                )
        texts, labels = [], []
        for row in rows:
            if row[text_column] is None or row[label_column] is None:
                raise InputError(f"{path}: line {rows.line_num} has too few columns")
            texts.append(row[text_column])
            labels.append(row[label_column])
    except csv.Error as error:
        raise InputError(f"{path}: not CSV after line {rows.line_num} ({error})") from error
    if not texts:
        raise InputError(f"{path}: no rows below the first line")
    return texts, labels


def labelled_texts(path: Path, text_column: str = "text", label_column: str = "label", length: int = 128) -> Dataset:
    """A CSV file of texts and labels; a fifth of each class held out."""
    texts, labels = read_csv(path, text_column, label_column)
    counts = Counter(labels)
    classes = sorted(counts)
    if len(classes) < 2:
        raise InputError(f"{path}: column {label_column!r} has one class, {classes[0]!r}; telling apart needs two")
    rarest = min(classes, key=counts.__getitem__)
    if counts[rarest] < 2:
        raise InputError(f"{path}: label {rarest!r} has one row; each needs at least two, one of them to be held out")
    numbers = torch.tensor([classes.index(label) for label in labels])
    train, _ = held_out_indices(numbers, 0.2)
    encoder = WordEncoder.of((texts[index] for index in train.tolist()), length, classes)
    description = f"{len(texts):,} texts of {path} in {len(classes)} classes"
    return Dataset(description, *_split(encoder.encode(*texts), numbers), encoder)


def package_sources() -> Dataset:
    """Passages of source code of the standard library; the class is the package. Every fifth file is held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    passages: dict[bool, list[tuple[str, int]]] = {True: [], False: []}
    classes = [name for name in PACKAGES if (library / name / "__init__.py").is_file()]
    if len(classes) < 2:
        raise InputError(f"{library}: this Python comes without the sources of its library; give a CSV file instead")
    for label, name in enumerate(classes):
        files = [path for path in sorted((library / name).rglob("*.py")) if "test" not in path.parts]
        for number, path in enumerate(files):
            words = split_words(path.read_text(encoding="utf-8", errors="replace"))
            for start in range(0, len(words) - _PASSAGE + 1, _PASSAGE):
                passages[number % 5 == 2].append((" ".join(words[start : start + _PASSAGE]), label))
    encoder = WordEncoder.of((text for text, _ in passages[False]), _PASSAGE, classes)
    splits = [
        Split(encoder.encode(*(text for text, _ in part)), torch.tensor([label for _, label in part]))
        for part in (passages[False], passages[True])
    ]
    description = f"passages of {_PASSAGE} words of Python's own {', '.join(classes)}; every fifth file held out"
    return Dataset(description, *splits, encoder)


def language_reference(length: int, *, every_step: bool, stride: int | None = None) -> Dataset:
    """The next character in Python's language reference (``pydoc_data.topics``); every tenth topic is held out."""
    topics = require("pydoc_data.topics", "a Python with pydoc_data", "the built-in text").topics
    texts = [topics[name] for name in sorted(topics)]
    train = "\n".join(text for number, text in enumerate(texts) if number % 10 != 5)
    held_out = "\n".join(text for number, text in enumerate(texts) if number % 10 == 5)
    description = "Python's language reference, character by character; every tenth topic held out"
    return next_character(train, held_out, description, length, every_step=every_step, stride=stride)


def text_file(path: Path, length: int, *, every_step: bool) -> Dataset:
    """The next character in a text file; its last tenth is held out."""
    text = read_text(path)
    cut = len(text) - len(text) // 10
    if len(text) // 10 <= length:
        raise InputError(f"{path}: {len(text):,} characters are too few; at least {10 * (length + 1):,} are needed")
    description = f"{path}, {len(text):,} characters; the last tenth held out"
    return next_character(text[:cut], text[cut:], description, length, every_step=every_step)


def next_character(
    train: str, held_out: str, description: str, length: int, *, every_step: bool, stride: int | None = None
) -> Dataset:
    """Windows of ``length`` characters and what follows: at every step (N, length), or the last only (N,).

    Windows start ``stride`` apart: by default ``length`` where every step is a target, else a quarter of it.
    """
    encoder = CharacterEncoder.of(train, length)
    if stride is None:
        stride = length if every_step else max(1, length // 4)
    splits = [character_windows(encoder.encode(text), length, stride, every_step) for text in (train, held_out)]
    return Dataset(description, *splits, encoder)


def character_windows(numbers: Tensor, length: int, stride: int, every_step: bool) -> Split:
    """Overlapping windows as views of the one text: they take no memory of their own."""
    windows = numbers.unfold(0, length + 1, stride)
    return Split(windows[:, :-1], windows[:, 1:] if every_step else windows[:, -1])
