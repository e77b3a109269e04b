"""Tables for the terminal: drawn by rich where it is installed, else the same figures plainly."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Words that a table colours, so that a failing row is seen at once.
_STYLES = {"pass": "green", "FAIL": "bold red", "available": "green"}


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print JSON in place of tables, or write it to FILE as well",
    )


def write_json(destination: str | None, data: Any) -> bool:
    """Serves ``--json``.  Returns whether the JSON took the place of the tables."""
    if destination is None:
        return False
    text = json.dumps(data, indent=2) + "\n"
    if destination == "-":
        print(text, end="")
        return True
    Path(destination).write_text(text)
    return False


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints ``rows``; a column whose cells all begin with a digit is set flush right."""
    if not rows:
        print(f"{title}: nothing")
        return
    numeric = [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows) for i in range(len(columns))]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _print_plain(title, columns, rows, numeric)
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if right else "left", no_wrap=right)
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    # Not a terminal means a log or a file: nothing is gained there by folding the rows at 80 columns.
    width = None if sys.stdout.isatty() else 200
    Console(width=width).print(table)


def _print_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> None:
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    print(title)
    for row in (columns, ["-" * width for width in widths], *rows):
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        print("  ".join(cells).rstrip())
