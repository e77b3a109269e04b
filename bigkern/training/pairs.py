"""Pairs of a text and its answer, for models that read one and write the other: numbers in words and in digits."""

from __future__ import annotations

from pathlib import Path

import torch

from bigkern.training.data import Dataset, PairEncoder, Split, read_csv
from bigkern.training.errors import InputError

_ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_ONES += [f"{stem}teen" for stem in ["thir", "four", "fif", "six", "seven", "eigh", "nine"]]
_TENS = [f"{stem}ty" for stem in ["twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"]]


def in_words(number: int) -> str:
    """An English name of a number from 0 to 999,999.

    >>> in_words(40_917)
    'forty thousand nine hundred seventeen'
    """
    if not 0 <= number < 1_000_000:
        raise ValueError(f"number: expected 0 to 999,999, got {number}")
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    many, rest = divmod(number, size)
    return f"{in_words(many)} {name}" + (f" {in_words(rest)}" if rest else "")


def numbers_in_words(count: int = 20_000, digits: int = 6) -> Dataset:
    """``count`` different numbers of up to so many digits, of each length as many as there are; a tenth held out."""
    generator = torch.Generator().manual_seed(0)
    smallest = [0, *(10**length for length in range(1, digits))]
    wanted, chosen = count, []
    for left, low in zip(range(digits, 0, -1), smallest, strict=True):
        high = max(low, 1) * 10
        taken = min(high - low, wanted // left)
        chosen += (low + torch.randperm(high - low, generator=generator)[:taken]).tolist()
        wanted -= taken
    order = torch.randperm(len(chosen), generator=generator).tolist()
    texts, answers = zip(*((in_words(chosen[place]), str(chosen[place])) for place in order), strict=True)
    description = f"{len(chosen):,} numbers below {10**digits:,} in English words, to be written in digits"
    return _pairs(description, texts, answers)


def answered_texts(path: Path, text_column: str = "text", label_column: str = "label") -> Dataset:
    """A CSV file of texts and what is to be written for each; a random tenth is held out."""
    texts, answers = read_csv(path, text_column, label_column)
    if len(texts) < 10:
        raise InputError(f"{path}: {len(texts)} rows are too few; at least 10 are needed")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return _pairs(f"{len(texts):,} pairs of {path}", [texts[i] for i in order], [answers[i] for i in order])


def read_split(path: Path, encoder: PairEncoder, text_column: str, label_column: str) -> Split:
    """All of a CSV file as a trained model reads it."""
    texts, answers = read_csv(path, text_column, label_column)
    for answer in answers:
        if strange := set(answer) - set(encoder.symbols[3:]):
            raise InputError(f"{path}: {answer!r} has {min(strange)!r}, which the model does not know")
        if len(answer) >= encoder.length:
            raise InputError(f"{path}: {answer!r} is longer than what the model writes, {encoder.length - 1}")
    return encoder.split(texts, answers)


def _pairs(description: str, texts: list[str] | tuple[str, ...], answers: list[str] | tuple[str, ...]) -> Dataset:
    cut = len(texts) // 10
    encoder = PairEncoder.of(texts, answers)
    splits = [encoder.split(texts[part], answers[part]) for part in (slice(cut, None), slice(cut))]
    return Dataset(f"{description}; a tenth held out", *splits, encoder)
