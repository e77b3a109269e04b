"""``bigkern selfcheck``: every op of every backend that runs on this machine, forward and backward, against float64.

A backend that gives a wrong answer, or fails, is quarantined: this process no longer chooses it for that op.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from bigkern import backend as backends
from bigkern.ops._case import Case
from bigkern.tools.evaluation import (
    Reference,
    compare,
    default_device,
    device_name,
    discover,
    dtype_name,
    make_reference,
    runnable,
)
from bigkern.tools.report import add_json_argument, print_table, write_json


@dataclass(frozen=True)
class Check:
    """One case on one backend.  ``outcome``: ``pass``, ``FAIL``, or ``refused`` (not served, says the backend)."""

    op: str
    function: str
    case: str
    dtype: str
    backend: str
    outcome: str
    detail: str = ""


@dataclass
class Report:
    """What a self-check found.  ``not_run`` holds each backend that could not run here, with the reason."""

    device: str
    checks: list[Check] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)
    quarantined: list[tuple[str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not any(check.outcome == "FAIL" for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "FAIL"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", action="append", choices=backends.NAMES, help="check this backend only (repeatable)"
    )
    parser.add_argument("--op", action="append", choices=tuple(discover()), help="check this op only (repeatable)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add_json_argument(parser)


def main(args: argparse.Namespace) -> int:
    report = selfcheck(args.backend, device=args.device, ops=args.op)
    # A backend asked for by name that cannot run is a failure; one that is merely absent is not.
    refused = {name: reason for name, reason in report.not_run.items() if args.backend}
    passed = report.passed and not refused
    if not write_json(args.json, asdict(report) | {"passed": passed}):
        print_report(report)
    return 0 if passed else 1


def selfcheck(
    names: Sequence[str] | None = None,
    *,
    device: torch.device | str | None = None,
    ops: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    seed: int = 0,
) -> Report:
    """Checks the backends ``names`` (default: all that are available) and quarantines those that fail.

    The rule: error against float64 at most twice torch's own in the same dtype, plus one rounding; forward and
    every gradient.  Returns the report; nothing is printed and nothing is raised for a failing backend.
    """
    device = torch.device(device or default_device())
    running, not_run = runnable(device) if names is None else (list(names), {})
    report = Report(device=device_name(device), not_run=not_run)
    for op, cases in discover().items():
        if ops is None or op in ops:
            checks = _check_op(op, cases, running, device, dtypes, seed)
            report.checks.extend(checks)
            for name in running:
                failed = next((check for check in checks if check.backend == name and check.outcome == "FAIL"), None)
                # The torch backend is what remains when all others are quarantined; its failure is reported only.
                if failed and name != "torch":
                    backends.quarantine(name, op, f"self-check failed: {failed.detail}")
                    report.quarantined.append((name, op))
    for name in running:
        mine = [check for check in report.checks if check.backend == name]
        if mine and all(check.outcome == "refused" for check in mine):
            report.not_run[name] = mine[0].detail
    return report


def print_report(report: Report) -> None:
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in report.checks:
        groups.setdefault((check.backend, check.function, check.dtype), []).append(check)
    rows = []
    for (name, function, dtype), checks in groups.items():
        outcomes = [check.outcome for check in checks]
        counts = [str(outcomes.count(outcome)) for outcome in ("pass", "FAIL", "refused")]
        verdict = "FAIL" if "FAIL" in outcomes else "pass" if "pass" in outcomes else "refused"
        rows.append((name, function, dtype, *counts, verdict))
    title = f"Self-check on {report.device}: forward and gradients against float64"
    print_table(title, ("backend", "op", "dtype", "passed", "failed", "refused", "result"), rows)
    for check in report.failures:
        print(f"FAIL {check.backend} {check.function}: {check.detail}")
    for name, op in report.quarantined:
        print(f"Quarantined for this process: {name} for {op}.")
    for name, reason in report.not_run.items():
        print(f"Not run: {name}: {reason}")


def _check_op(
    op: str,
    cases: Sequence[Case],
    names: Sequence[str],
    device: torch.device,
    dtypes: Sequence[torch.dtype] | None,
    seed: int,
) -> list[Check]:
    checks = []
    for case in cases:
        for dtype in case.dtypes:
            if dtypes is not None and dtype not in dtypes:
                continue
            reference = make_reference(case, dtype, device, seed)
            for name in names:
                outcome, detail = _check(op, case, dtype, name, reference)
                checks.append(Check(op, case.function, case.name, dtype_name(dtype), name, outcome, detail))
    return checks


def _check(op: str, case: Case, dtype: torch.dtype, name: str, reference: Reference) -> tuple[str, str]:
    try:
        comparisons = compare(op, case, dtype, name, reference)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except backends.BackendError as refusal:
        return "refused", str(refusal)
    except Exception as failure:
        # Whatever a broken backend raises is its failure, and the next backend's turn.
        return "FAIL", f"{case.name}, {dtype_name(dtype)}: {type(failure).__name__}: {failure}"
    wrong = [str(comparison) for comparison in comparisons if not comparison.passed]
    return ("FAIL", wrong[0]) if wrong else ("pass", "")
