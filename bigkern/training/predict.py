"""``bigkern predict``: what a trained model says of an image, a text or rows of numbers, how it draws an image again,
how it tags a text, or how it goes on with it."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bigkern.models import GPT, Autoencoder, ConvAutoencoder, FeatureTransformer
from bigkern.models.gpt import KVCache
from bigkern.training.data import (
    CharacterEncoder,
    ImageEncoder,
    NumberEncoder,
    PairEncoder,
    TagEncoder,
    WordEncoder,
    read_numbers,
    read_text,
    split_words,
    write_image,
)
from bigkern.training.display import console, table
from bigkern.training.errors import InputError
from bigkern.training.tasks import choose_device
from bigkern.training.train import load_run, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder that bigkern train --out made")
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        help="image files, text files, or CSV files of numbers; without any, a text from standard input",
    )
    parser.add_argument("--text", action="append", help="a text to classify, to tag or to go on with (repeatable)")
    parser.add_argument("--top", type=positive_int, default=3, help="classes to name (default: %(default)s)")
    parser.add_argument(
        "--invert", action="store_true", help="images are dark on light, the model learned light on dark"
    )
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="an autoencoder writes what it drew again there")
    parser.add_argument("--length", type=positive_int, default=200, help="characters to write (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.7, help="0 writes the likeliest character (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the writing (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is a GPU)")


def main(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    model, encoder, _ = load_run(args.run, device)
    if isinstance(encoder, ImageEncoder):
        return _images(model, encoder, args, device)
    if args.invert:
        raise InputError("--invert is for images; this model reads no images")
    if isinstance(encoder, NumberEncoder):
        return _numbers(model, encoder, args, device)
    texts = _texts(args)
    if isinstance(encoder, WordEncoder):
        return _classify(model, encoder, texts, args, device)
    if isinstance(encoder, PairEncoder):
        return _answer(model, encoder, texts, device)
    if isinstance(encoder, TagEncoder):
        return _tag(model, encoder, texts, device)
    return _write_on(model, encoder, texts, args, device)


def _images(model: nn.Module, encoder: ImageEncoder, args: argparse.Namespace, device: torch.device) -> int:
    if args.text:
        raise InputError("--text: this model reads images; give image files")
    if not args.files:
        raise InputError("no image: this model reads images; give image files")
    images = torch.stack([encoder.encode(path) for path in args.files])
    images = 1 - images if args.invert else images
    if isinstance(model, (Autoencoder, ConvAutoencoder)):
        return _draw_again(model, images, args, device)
    if isinstance(model, FeatureTransformer):
        images = images.transpose(1, 2).flatten(2)
    _print_classes(model, images, list(map(str, args.files)), encoder, args.top, device)
    return 0


def _draw_again(model: nn.Module, images: Tensor, args: argparse.Namespace, device: torch.device) -> int:
    with torch.inference_mode():
        drawn_again = model(images.to(device)).cpu()
    if args.draw:
        args.draw.mkdir(parents=True, exist_ok=True)
    rows = table("Drawn again", "image", "mean squared error", *(["written to"] if args.draw else []))
    for path, image, drawn in zip(args.files, images, drawn_again, strict=True):
        written = [str(write_image(drawn, args.draw / f"{path.stem}.png"))] if args.draw else []
        rows.add_row(str(path), f"{(drawn - image).square().mean():.5f}", *written)
    console().print(rows)
    return 0


def _numbers(model: nn.Module, encoder: NumberEncoder, args: argparse.Namespace, device: torch.device) -> int:
    if args.text or not args.files:
        raise InputError(f"this model reads numbers; give CSV files with the columns {', '.join(encoder.columns)}")
    for path in args.files:
        _, values = read_numbers(path, columns=encoder.columns)
        with torch.inference_mode():
            predicted = encoder.decode(model(encoder.encode(values).to(device)).cpu())
        rows = table(str(path), "row", encoder.target, right=("row", encoder.target))
        for number, value in enumerate(predicted.tolist(), start=1):
            rows.add_row(f"{number:,}", f"{value:,.4g}")
        console().print(rows)
    return 0


def _texts(args: argparse.Namespace) -> dict[str, str]:
    """Each text under the name that the output gives it."""
    texts = {str(path): read_text(path) for path in args.files}
    texts.update((_shorten(text), text) for text in args.text or ())
    if not texts:
        try:
            texts["standard input"] = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: not UTF-8 text (byte {error.start})") from error
    for name, text in texts.items():
        if not text.strip():
            raise InputError(f"{name or '--text'}: empty, there is nothing to go by")
    return texts


def _shorten(text: str, width: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _classify(
    model: nn.Module, encoder: WordEncoder, texts: dict[str, str], args: argparse.Namespace, device: torch.device
) -> int:
    for name, text in texts.items():
        if (words := len(split_words(text))) > encoder.length:
            print(f"{name}: {words} words; the model reads the first {encoder.length}", file=sys.stderr)
    _print_classes(model, encoder.encode(*texts.values()), list(texts), encoder, args.top, device)
    return 0


def _answer(model: nn.Module, encoder: PairEncoder, texts: dict[str, str], device: torch.device) -> int:
    for name, text in texts.items():
        words = split_words(text)
        if len(words) > encoder.length:
            print(f"{name}: {len(words)} words; the model reads the first {encoder.length}", file=sys.stderr)
        if strangers := [word for word in words if word not in encoder.words]:
            print(f"{name}: the model does not know {', '.join(strangers)}", file=sys.stderr)
    written = model.greedy(encoder.encode(*texts.values()).to(device)).tolist()
    drawn = table("Answers", "text", "answer")
    for name, numbers in zip(texts, written, strict=True):
        drawn.add_row(name, encoder.decode(numbers))
    console().print(drawn)
    return 0


def _tag(model: nn.Module, encoder: TagEncoder, texts: dict[str, str], device: torch.device) -> int:
    for name, text in texts.items():
        with torch.inference_mode():
            tags = model(encoder.encode(text).unsqueeze(0).to(device))[0].argmax(-1).tolist()
        if len(texts) > 1:
            print(f"{name}:")
        for tag, characters in itertools.groupby(zip(tags, text, strict=True), key=lambda pair: pair[0]):
            part = "".join(character for _, character in characters)
            if part.strip():
                print(f"{encoder.classes[tag]:<10}{part.strip()!r}")
    return 0


def _print_classes(
    model: nn.Module,
    inputs: Tensor,
    names: list[str],
    encoder: ImageEncoder | WordEncoder,
    top: int,
    device: torch.device,
) -> None:
    top = min(top, len(encoder.classes))
    with torch.inference_mode():
        logits = model(inputs.to(device))
        # A model that answers at each step answers last when it has seen all.
        chances, classes = (logits[:, -1] if logits.dim() == 3 else logits).softmax(-1).topk(top)
    ranks = ["class", *(f"{rank}." for rank in range(2, top + 1))]
    drawn = table("Prediction", "input", *ranks)
    for name, row_chances, row_classes in zip(names, chances.tolist(), classes.tolist(), strict=True):
        answers = (f"{encoder.classes[c]} {p:.1%}" for c, p in zip(row_classes, row_chances, strict=True))
        drawn.add_row(name, *answers)
    console().print(drawn)


def _write_on(
    model: nn.Module, encoder: CharacterEncoder, texts: dict[str, str], args: argparse.Namespace, device: torch.device
) -> int:
    generator = torch.Generator().manual_seed(args.seed)
    for text in texts.values():
        print(text, end="")
        for symbol in continuation(model, encoder, text, args.length, args.temperature, generator, device):
            print(symbol, end="", flush=True)
        print()
    return 0


def continuation(
    model: nn.Module,
    encoder: CharacterEncoder,
    text: str,
    length: int,
    temperature: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
):
    """Yields ``length`` characters that follow ``text``, each drawn from softmax(logits / temperature)."""
    tokens = encoder.encode(text)[-encoder.length :]
    read = _reader(model, device)
    for _ in range(length):
        with torch.inference_mode():
            logits = read(tokens)
        # A model that answers at each step answers last for the step that matters.
        # Symbol 0 stands for characters that cannot be written, so it is not in the draw.
        logits = (logits[0, -1] if logits.dim() == 3 else logits[0])[1:].float().cpu()
        if temperature == 0:
            token = 1 + logits.argmax().view(1)
        else:
            token = 1 + torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)
        yield encoder.symbols[int(token)]
        tokens = torch.cat([tokens, token])[-encoder.length :]


def _reader(model: nn.Module, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """What gives the logits after (T,) tokens, which grow by one from call to call. GPT reads the new one alone."""
    if not isinstance(model, GPT):
        return lambda tokens: model(tokens.unsqueeze(0).to(device))
    cache: KVCache | None = None

    def read(tokens: Tensor) -> Tensor:
        nonlocal cache
        unread = tokens[-1:]
        if cache is None or cache.used == cache.capacity:
            # A full cache gives way to one of the text's last half: there are no more positions than it holds.
            unread = tokens if cache is None else tokens[-(cache.capacity // 2 + 1) :]
            cache = KVCache(model, 1, model.max_length)
        return model.read_on(unread.unsqueeze(0).to(device), cache)

    return read


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value
