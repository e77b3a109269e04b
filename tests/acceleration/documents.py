"""The tables of docs/swap.md, as ``accelerate`` prints them.

python -m tests.acceleration.documents --write     after a change of what is swapped
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from torch import nn

import bigkern
from tests.acceleration import architectures

PAGE = Path(__file__).resolve().parents[2] / "docs" / "swap.md"
_PLACE = re.compile(r"(<!-- report: (.+?) -->\n).*?(<!-- end -->)", flags=re.S)


def _bert() -> nn.Module:
    from tests.integrations import transformer_models

    return transformer_models.make("bert", "sdpa")


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "ResNet": ("A ResNet of torch.nn's layers", lambda: architectures.make("ResNet")),
    "Transformer": ("A translator around torch.nn.Transformer", lambda: architectures.make("Transformer")),
    "BERT": ("BERT of transformers", _bert),
}


def rendered(text: str) -> str:
    """``text`` with every table as it is today."""

    def replace(match: re.Match) -> str:
        title, make = MODELS[match[2]]
        return f"{match[1]}**{title}**\n\n{bigkern.accelerate(make()).to_markdown()}{match[3]}"

    return _PLACE.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.acceleration.documents", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {PAGE.name}")
    text = rendered(PAGE.read_text())
    if parser.parse_args().write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
