"""What a benchmark leaves behind beside its JSON: the table on the terminal, CSV, Markdown, and plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import DIRECTIONS, Results, Row, write_atomically
from bigkern.tools.report import print_table

COLUMNS = (
    "op",
    "shape",
    "dtype",
    "pass",
    "candidate",
    "median",
    "20-80 %",
    "GB/s",
    "of ceiling",
    "host",
    "memory",
    "error",
    "speed",
)


def seconds(value: float | None) -> str:
    """Three significant figures with a unit."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.3g} MiB"


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table.  ``speed`` compares our rows with the best peer, and names it: below 1x it is the faster."""
    head = (row.function, row.shape, row.dtype, row.direction, row.candidate)
    if row.status != "ok":
        return (*head, row.status, *["-"] * 6, row.reason)
    spread = f"{seconds(row.p20_s)} - {seconds(row.p80_s)}"
    bandwidth = f"{row.gb_s:.3g}" if row.cold else f"{row.gb_s:.3g} (cached)"
    error = f"{row.error_ratio:.2f}x"
    return (
        *head,
        seconds(row.median_s),
        spread,
        bandwidth,
        f"{100 * row.ceiling_fraction:.0f} %",
        seconds(row.host_s),
        mebibytes(row.peak_bytes),
        error,
        best_peer(row),
    )


def best_peer(row: Row) -> str:
    rivals = {name: ratio for name, ratio in row.speedup.items() if not name.startswith("bigkern ")}
    if not row.ours or not rivals:
        return ""
    name = min(rivals, key=rivals.__getitem__)
    return f"{rivals[name]:.2f}x {name}"


def title(results: Results) -> str:
    environment, ceilings = results.data["environment"], results.data["ceilings"]
    return (
        f"{results.data['benchmark']} on {environment['device']}, torch {environment['torch']}; ceilings measured "
        f"here: copy {ceilings['copy_gb_s']:.0f} GB/s, matmul {ceilings['matmul_tflop_s']:.3g} TFLOP/s in "
        f"{ceilings['matmul_dtype']}"
    )


def print_results(results: Results) -> None:
    print_table(title(results), COLUMNS, [cells(row) for row in results.rows])
    for name, reason in results.data["unavailable"].items():
        print(f"Not here: {name}: {reason}")


def write_csv(results: Results, path: Path) -> None:
    text = io.StringIO()
    fields = [name for name in Row.__dataclass_fields__ if name != "speedup"]
    writer = csv.DictWriter(text, [*fields, "best_peer"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in results.rows:
        writer.writerow(asdict(row) | {"best_peer": best_peer(row)})
    write_atomically(path, text.getvalue())


def write_markdown(results: Results, path: Path) -> None:
    lines = [f"# {title(results)}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in results.rows]
    lines += [
        "",
        "Medians of interleaved runs with the 20th and 80th percentiles; GB/s from the bytes that must move;",
        "`of ceiling`: time at the measured ceilings over the median; `host`: time to enqueue a call; `memory`: what a",
        "call allocates at its highest; `error`: largest error against float64 over torch's own; `speed`: the fastest",
        "peer's time over ours, so below 1x the peer wins.",
    ]
    lines += [f"Not here: {name}: {reason}." for name, reason in results.data["unavailable"].items()]
    write_atomically(path, "\n".join(lines) + "\n")


def plot(results: Results, folder: Path) -> list[Path]:
    """One picture for each function and dtype: GB/s by shape, a bar a candidate, the copy ceiling as a line.

    Raises ImportError where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    written = []
    rows = [row for row in results.rows if row.status == "ok"]
    candidates = list(dict.fromkeys(row.candidate for row in rows))
    ceiling = results.data["ceilings"]["copy_gb_s"]
    for function, dtype in dict.fromkeys((row.function, row.dtype) for row in rows):
        mine = [row for row in rows if (row.function, row.dtype) == (function, dtype)]
        directions = [direction for direction in DIRECTIONS if any(row.direction == direction for row in mine)]
        shapes = list(dict.fromkeys(row.shape for row in mine))
        figure = Figure(figsize=(max(7.0, 1.1 * len(shapes) + 3), 3.2 * len(directions) + 0.8), layout="constrained")
        axes = figure.subplots(len(directions), 1, squeeze=False, sharex=True)[:, 0]
        for axis, direction in zip(axes, directions, strict=True):
            _bars(axis, [row for row in mine if row.direction == direction], candidates, shapes)
            axis.axhline(ceiling, color="0.3", linestyle="--", linewidth=1, label="copy")
            axis.set_ylabel(f"{direction}, GB/s")
            axis.set_ylim(bottom=0)
        axes[-1].set_xticks(range(len(shapes)), shapes, rotation=20, ha="right")
        axes[-1].set_xlabel("rows x columns")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
        figure.suptitle(f"{function}, {dtype}: {results.data['environment']['device']}", x=0.02, ha="left", fontsize=10)
        path = folder / f"{results.data['benchmark']}-{function}-{dtype}.png"
        figure.savefig(path, dpi=120)
        written.append(path)
    return written


def _bars(axis, rows: Sequence[Row], candidates: Sequence[str], shapes: Sequence[str]) -> None:
    width = 0.8 / len(candidates)
    for index, candidate in enumerate(candidates):
        found = [row for row in rows if row.candidate == candidate]
        if not found:
            continue
        positions = [shapes.index(row.shape) + (index - (len(candidates) - 1) / 2) * width for row in found]
        heights = [row.gb_s for row in found]
        # From the 20th to the 80th percentile of the time.
        below = [max(0.0, row.gb_s - row.bytes / row.p80_s / 1e9) for row in found]
        above = [max(0.0, row.bytes / row.p20_s / 1e9 - row.gb_s) for row in found]
        axis.bar(positions, heights, width, yerr=(below, above), label=candidate, color=f"C{index}", ecolor="0.3")
