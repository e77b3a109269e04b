"""``bigkern accuracy``: each kernel's error against float64 beside torch's own error in the same dtype.

A ratio of 1.0 is torch's own accuracy; the project's goal is a median of at most 1.0, its tests demand at most 2.0 plus
one rounding.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bigkern import backend as backends
from bigkern.tools.evaluation import (
    Comparison,
    compare,
    default_device,
    device_name,
    discover,
    dtype_name,
    make_reference,
    parse_dtype,
    runnable,
)
from bigkern.tools.report import add_json_argument, print_table, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=tuple(discover()), help="this op only (repeatable)")
    parser.add_argument(
        "--dtype", action="append", type=parse_dtype, help="bf16, fp16 or fp32 (repeatable; default all)"
    )
    parser.add_argument("--backend", action="append", choices=backends.NAMES, help="default: every available one")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    add_json_argument(parser)


def main(args: argparse.Namespace) -> int:
    device = args.device or default_device()
    names, not_run = (args.backend, {}) if args.backend else runnable(device)
    comparisons, refusals = accuracy(names, device=device, ops=args.op, dtypes=args.dtype, seed=args.seed)
    if not write_json(args.json, to_json(comparisons, device) | {"refused": refusals, "not_run": not_run}):
        print_report(comparisons, device)
        for name, reason in (refusals | not_run).items():
            print(f"Not compared: {name}: {reason}")
    # A backend that was asked for by name has to appear.
    absent = set(args.backend or ()) - set(by_backend(comparisons))
    return 0 if not absent and all(comparison.passed for comparison in comparisons) else 1


def accuracy(
    names: Sequence[str],
    *,
    device: torch.device | str | None = None,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    seed: int = 0,
) -> tuple[list[Comparison], dict[str, str]]:
    """Compares every output and gradient of every case, dtype and backend asked for.

    Returns the comparisons, and ``"<backend>, <case>, <dtype>"`` -> reason for what a backend does not serve.
    """
    device = device or default_device()
    comparisons, refusals = [], {}
    for op, cases in discover().items():
        for case in cases if ops is None or op in ops else ():
            for dtype in case.dtypes:
                if dtypes is None or dtype in dtypes:
                    reference = make_reference(case, dtype, device, seed)
                    for name in names:
                        try:
                            comparisons.extend(compare(op, case, dtype, name, reference))
                        except backends.BackendError as refusal:
                            refusals[f"{name}, {case.name}, {dtype_name(dtype)}"] = str(refusal)
    return comparisons, refusals


def medians(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Median over all comparisons of the error's ratio to torch's own, by norm and by largest element."""
    return {
        "norm": statistics.median(comparison.ratios.norm for comparison in comparisons),
        "max": statistics.median(comparison.ratios.max for comparison in comparisons),
    }


def by_backend(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.backend, []).append(comparison)
    return groups


def to_json(comparisons: Sequence[Comparison], device: torch.device | str) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "median_ratio": {name: medians(group) for name, group in by_backend(comparisons).items()},
        "rows": [
            {
                "op": row.op,
                "function": row.function,
                "case": row.case,
                "quantity": row.quantity,
                "dtype": dtype_name(row.dtype),
                "backend": row.backend,
                "error_norm": row.kernel.norm,
                "error_max": row.kernel.max,
                "torch_error_norm": row.torch.norm,
                "torch_error_max": row.torch.max,
                "passed": row.passed,
            }
            for row in comparisons
        ],
    }


def print_report(comparisons: Sequence[Comparison], device: torch.device | str) -> None:
    print_table(
        f"Error against float64 on {device_name(device)}, relative to the reference (torch: torch's own, same dtype)",
        ("backend", "case", "dtype", "quantity", "norm", "torch", "ratio", "max", "torch", "ratio", "rule"),
        [
            (
                row.backend,
                row.case,
                dtype_name(row.dtype),
                row.quantity,
                f"{row.kernel.norm:.2e}",
                f"{row.torch.norm:.2e}",
                f"{row.ratios.norm:.2f}",
                f"{row.kernel.max:.2e}",
                f"{row.torch.max:.2e}",
                f"{row.ratios.max:.2f}",
                "pass" if row.passed else "FAIL",
            )
            for row in comparisons
        ],
    )
    for name, group in by_backend(comparisons).items():
        median = medians(group)
        print(
            f"{name}: median error {median['norm']:.2f}x torch's own by norm, {median['max']:.2f}x by largest element, "
            f"over {len(group)} comparisons"
        )
