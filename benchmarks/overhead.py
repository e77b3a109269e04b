"""What a bigkern module costs a call beside torch.nn's own.

Promised on a CPU: at most 3 us a call more at tiny shapes, at most 5 % more at the documents' model shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import bigkern
from benchmarks.layer_norm import DOCUMENT_SHAPES
from benchmarks.measure import SCHEMA, Contestant, Stopwatch, environment, interleave, percentile
from bigkern.tools.evaluation import default_device, device_name
from bigkern.tools.report import add_json_argument, print_table, write_json

# Of each kind: ours, torch's, the shapes of the calls.
PAIRS: dict[str, tuple[Callable[[int], torch.nn.Module], Callable[[int], torch.nn.Module]]] = {
    "LayerNorm": (bigkern.nn.LayerNorm, torch.nn.LayerNorm),
    "RMSNorm": (bigkern.nn.RMSNorm, torch.nn.RMSNorm),
}
TINY_SHAPES = ((1, 8), (4, 64), (32, 64))
MODES = ("inference", "forward", "forward+backward")
TINY_SECONDS = 3e-6
DOCUMENT_FRACTION = 0.05


class Overhead(NamedTuple):
    """Seconds a call: the 5th percentile of short samples, because whatever disturbs so little work only adds to it."""

    module: str
    shape: str
    mode: str
    ours_s: float
    torch_s: float
    ours_median_s: float
    torch_median_s: float
    tiny: bool

    @property
    def difference_s(self) -> float:
        return self.ours_s - self.torch_s

    @property
    def kept(self) -> bool:
        """Whether the promise for this kind of shape is kept."""
        return self.difference_s <= (TINY_SECONDS if self.tiny else DOCUMENT_FRACTION * self.torch_s)


def measure(kind: str, shape: tuple[int, int], mode: str, device: torch.device, seconds: float) -> Overhead:
    """Times both modules on the same input, interleaved, for ``seconds``."""
    make_ours, make_torch = PAIRS[kind]
    # One thread and the time that it ran: microseconds are looked for, and neither a second thread's waking nor another
    # process's turn on the core shall count.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(shape, device=device, requires_grad=mode != "inference")
    contestants = [
        Contestant(
            name, torch.no_grad if mode == "inference" else contextlib.nullcontext, [_call(module.to(device), x, mode)]
        )
        for name, module in (("ours", make_ours(shape[1])), ("torch", make_torch(shape[1])))
    ]
    interleave(contestants, Stopwatch(device, time.thread_time), seconds, sample_seconds=5e-4, rounds=1000)
    torch.set_num_threads(threads)
    # On a GPU the host's time is the overhead; the device's own is the business of the other benchmarks.
    ours, theirs = (
        [sample.seconds if sample.host_seconds is None else sample.host_seconds for sample in contestant.samples]
        for contestant in contestants
    )
    return Overhead(
        kind,
        "x".join(map(str, shape)),
        mode,
        percentile(ours, 0.05),
        percentile(theirs, 0.05),
        statistics.median(ours),
        statistics.median(theirs),
        shape in TINY_SHAPES,
    )


def _call(module: torch.nn.Module, x: torch.Tensor, mode: str) -> Callable[[], object]:
    if mode != "forward+backward":
        return lambda: module(x)
    wanted, incoming = [x, *module.parameters()], torch.ones_like(x)
    return lambda: torch.autograd.grad(module(x), wanted, incoming)


def to_json(rows: Sequence[Overhead], device: torch.device) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "benchmark": "overhead",
        "environment": environment(device),
        "rows": [row._asdict() | {"difference_s": row.difference_s, "kept": row.kept} for row in rows],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing of each row (default 1)")
    parser.add_argument("--module", nargs="+", choices=tuple(PAIRS), default=tuple(PAIRS))
    parser.add_argument("--check", action="store_true", help="exit 1 when a promise is broken")
    add_json_argument(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device or default_device())
    rows = [
        measure(kind, shape, mode, device, args.seconds)
        for kind in args.module
        for shape in (*TINY_SHAPES, *DOCUMENT_SHAPES)
        for mode in MODES
    ]
    if not write_json(args.json, to_json(rows, device)):
        _print(rows, device)
    return 1 if args.check and not all(row.kept for row in rows) else 0


def _print(rows: Sequence[Overhead], device: torch.device) -> None:
    print_table(
        f"Cost of a call beside torch.nn's, fp32, one thread, on {device_name(device)}",
        ("module", "shape", "pass", "bigkern us", "torch us", "medians us", "more us", "more %", "promise", "kept"),
        [
            (
                row.module,
                row.shape,
                row.mode,
                f"{1e6 * row.ours_s:.2f}",
                f"{1e6 * row.torch_s:.2f}",
                f"{1e6 * row.ours_median_s:.2f}, {1e6 * row.torch_median_s:.2f}",
                f"{1e6 * row.difference_s:+.2f}",
                f"{100 * row.difference_s / row.torch_s:+.1f}",
                "<= 3 us" if row.tiny else "<= 5 %",
                "pass" if row.kept else "FAIL",
            )
            for row in rows
        ],
    )
