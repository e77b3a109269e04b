"""What each character of Python source is part of: a task with a rule, which tokenize knows and a model must find.

A model that reads from the left needs its memory for it: whether a letter is a name's, a keyword's, a string's or a
comment's is told by what came before.
"""

from __future__ import annotations

import io
import keyword
import tokenize

import torch
from torch import Tensor

from bigkern.training.corpus import library_texts
from bigkern.training.data import CharacterEncoder, Dataset, Split, TagEncoder
from bigkern.training.errors import InputError

TAGS = ["space", "name", "keyword", "number", "string", "comment", "operator"]
_CHARACTERS = 400_000
_KINDS = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment", tokenize.OP: "operator"}
# f-strings are tokens of their own from Python 3.12 on.
_KINDS |= {
    getattr(tokenize, name): "string"
    for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    if name in dir(tokenize)
}


def tag_source(text: str) -> Tensor:
    """The number in TAGS of each character, up to the last that tokenize could read: (at most len(text),) int64."""
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    tags = torch.zeros(len(text), dtype=torch.int64)
    end = 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            begin, end = (starts[line - 1] + column for line, column in (token.start, token.end))
            kind = _KINDS.get(token.type)
            if token.type == tokenize.NAME:
                kind = "keyword" if keyword.iskeyword(token.string) else "name"
            if kind is not None:
                tags[begin:end] = TAGS.index(kind)
    except (tokenize.TokenError, SyntaxError):
        pass  # a text that ends in the middle of a statement, or is no Python from here on
    return tags[: min(end, len(text))]


def library_tags(length: int) -> Dataset:
    """The standard library's top modules, every tenth file held out."""
    train, held_out = (
        text[:most] for text, most in zip(library_texts(), (_CHARACTERS, _CHARACTERS // 10), strict=True)
    )
    description = f"the source text of Python's own modules, {_CHARACTERS:,} characters; every tenth file held out"
    return _dataset(train, held_out, description, CharacterEncoder.of(train, length))


def file_tags(text: str, name: str, length: int) -> Dataset:
    """A user's source file; its last tenth is held out, from the beginning of a line on."""
    cut = text.rfind("\n", 0, len(text) - len(text) // 10) + 1
    train, held_out = text[:cut], text[cut:]
    return _dataset(
        train,
        held_out,
        f"{name}, {len(text):,} characters; the last tenth held out",
        CharacterEncoder.of(train, length),
    )


def tagged_windows(text: str, encoder: TagEncoder) -> Split:
    """Windows of the encoder's length beside each other, and the tag of each character."""
    tags = tag_source(text)
    count = len(tags) // encoder.length
    if count == 0:
        raise InputError(
            f"tokenize reads {len(tags):,} characters of Python here; at least {encoder.length} are needed"
        )
    inputs, targets = (
        part[: count * encoder.length].view(count, encoder.length) for part in (encoder.encode(text), tags)
    )
    return Split(inputs, targets)


def most_frequent_tags(train: Split, held_out: Split) -> float:
    """Accuracy on ``held_out`` of giving each character the tag that it most often has in ``train``: the baseline."""
    symbols = int(max(train.inputs.max(), held_out.inputs.max())) + 1
    counts = torch.zeros(symbols, len(TAGS), dtype=torch.int64)
    counts.view(-1).scatter_add_(
        0, (train.inputs * len(TAGS) + train.targets).flatten(), torch.ones(train.inputs.numel(), dtype=torch.int64)
    )
    return (counts.argmax(1)[held_out.inputs] == held_out.targets).double().mean().item()


def _dataset(train: str, held_out: str, description: str, characters: CharacterEncoder) -> Dataset:
    encoder = TagEncoder(characters.symbols, characters.length, TAGS)
    return Dataset(description, tagged_windows(train, encoder), tagged_windows(held_out, encoder), encoder)
