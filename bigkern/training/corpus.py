"""The text that language models read: the sources of Python's standard library, code and English side by side.

Modules at the top of the library (``argparse.py``, ``ast.py``, ...), in the order of their names; every tenth file is
held out whole.  Equal on every machine with the same Python.

>>> corpus = library_characters(500_000)
>>> corpus.train, corpus.held_out, len(corpus.symbols)  # (500000,) and (50000,) int64 numbers below 97
"""

from __future__ import annotations

import math
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bigkern.training.data import CharacterEncoder, Dataset, character_windows, split_words
from bigkern.training.errors import InputError


class Corpus(NamedTuple):
    """A text as int64 token numbers, and each number's symbol; symbol 0 stands for all that have no number."""

    train: Tensor
    held_out: Tensor
    symbols: list[str]


def library_texts() -> tuple[str, str]:
    """(text to train on, held-out text): the library's top modules, every tenth file held out."""
    library = Path(sysconfig.get_paths()["stdlib"])
    # Names with an underscore first hold tables made by machines, such as _sysconfigdata_... of the build.
    files = [path for path in sorted(library.glob("*.py")) if not path.name.startswith("_")]
    if len(files) < 20:
        raise InputError(f"{library}: this Python comes without the sources of its library; give a text file instead")
    texts: dict[bool, list[str]] = {False: [], True: []}
    for number, path in enumerate(files):
        texts[number % 10 == 5].append(path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(texts[False]), "\n".join(texts[True])


def library_characters(characters: int | None = None) -> Corpus:
    """The library character by character; ``characters`` cuts the text to train on, and what is held out to a tenth."""
    train, held_out = library_texts()
    if characters is not None:
        train, held_out = train[:characters], held_out[: characters // 10]
    encoder = CharacterEncoder.of(train, 0)
    return Corpus(encoder.encode(train), encoder.encode(held_out), encoder.symbols)


def library_words(vocabulary: int = 4000, words: int | None = None) -> Corpus:
    """The library's words, numbers and signs in lower case; the rarer ones are ``<unknown>``, symbol 0."""
    train, held_out = map(split_words, library_texts())
    if words is not None:
        train, held_out = train[:words], held_out[: words // 10]
    symbols = ["<unknown>", *(word for word, _ in Counter(train).most_common(vocabulary - 1))]
    numbers = {word: number for number, word in enumerate(symbols)}
    return Corpus(*(torch.tensor([numbers.get(word, 0) for word in part]) for part in (train, held_out)), symbols)


def library_windows(length: int, characters: int | None = None) -> Dataset:
    """Windows of ``length`` characters of the library and, for each of them, the character that follows."""
    corpus = library_characters(characters)
    splits = [character_windows(part, length, length, every_step=True) for part in (corpus.train, corpus.held_out)]
    description = (
        f"the source text of Python's own modules, {len(corpus.train):,} characters; every tenth file held out"
    )
    return Dataset(description, *splits, CharacterEncoder(corpus.symbols, length))


def ngram_bits(train: Tensor, held_out: Tensor, symbols: int, order: int) -> float:
    """Bits a token of ``held_out`` under an n-gram model of ``order`` tokens counted in ``train``: the baseline.

    Interpolated with the shorter contexts by Witten and Bell's rule (1991): a context seen n times with k different
    successors gives k / (n + k) to the shorter one, and the empty context to the uniform distribution.

    Args:
        train, held_out: int64 token numbers below ``symbols``, of any shape, read in order.
        order: tokens of the n-gram, the predicted one included; ``symbols ** order`` must be below 2**63.
    """
    if order < 1 or order * math.log2(max(symbols, 2)) >= 63:
        raise ValueError(f"order: expected 1 or more with {symbols} ** order below 2 ** 63, got {order}")
    train, held_out = train.flatten(), held_out.flatten()
    chance = torch.full((len(held_out) - order + 1,), 1.0 / symbols, dtype=torch.float64)
    for length in range(1, order + 1):
        grams, counts = _codes(train, length, symbols).unique(return_counts=True)
        contexts, context_of = grams.div(symbols, rounding_mode="floor").unique(return_inverse=True)
        seen = torch.zeros(len(contexts), dtype=torch.int64).scatter_add_(0, context_of, counts)
        kinds = context_of.bincount(minlength=len(contexts))
        # What is predicted is the same for every length: the token at order - 1 and after.
        asked = _codes(held_out, length, symbols)[order - length :]
        n, k = (_look_up(asked.div(symbols, rounding_mode="floor"), contexts, part) for part in (seen, kinds))
        count = _look_up(asked, grams, counts)
        chance = torch.where(n > 0, (count + k * chance) / (n + k).clamp(min=1), chance)
    return -chance.log2().mean().item()


def _codes(tokens: Tensor, length: int, symbols: int) -> Tensor:
    """Each run of ``length`` tokens as one number."""
    windows = tokens.unfold(0, length, 1)
    return sum((windows[:, place] * symbols ** (length - 1 - place) for place in range(length)), 0)


def _look_up(keys: Tensor, table: Tensor, values: Tensor) -> Tensor:
    """The value of each key in the sorted table, or 0, in float64."""
    place = torch.searchsorted(table, keys).clamp(max=len(table) - 1)
    return torch.where(table[place] == keys, values[place], 0).double()
