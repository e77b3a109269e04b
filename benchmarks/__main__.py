"""``python -m benchmarks <op>``: how fast an op is on this machine, beside its peers, on your shapes.

Also ``overhead`` (what a drop-in module costs a call), ``static`` (what the compiler made of the kernels) and ``gpu``
(everything that a GPU can tell).
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from benchmarks import report
from benchmarks.measure import (
    DIRECTIONS,
    Candidate,
    Problem,
    Results,
    backend_candidate,
    environment,
    measure_ceilings,
    measure_problem,
)
from bigkern import backend as backends
from bigkern.tools.evaluation import default_device, device_name, dtype_name, parse_dtype, runnable

_FOLDER = Path(__file__).parent
_OTHER = ("gpu", "overhead", "static")
_INCOMPLETE = 3
_BAD_INPUT = 2
_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse prints its whole usage before an error; one line is easier to find."""

    def error(self, message: str) -> NoReturn:
        self.exit(_BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def ops() -> list[str]:
    """The benchmarked ops: modules of this folder that export ``problems``."""
    return sorted(
        path.stem
        for path in _FOLDER.glob("*.py")
        if re.search(r"^def problems\(", path.read_text(), flags=re.MULTILINE)
    )


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("benchmark", choices=(*ops(), *_OTHER), help="what to measure")
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else _BAD_INPUT
    name = parser.parse_args(argv[:1]).benchmark
    module = importlib.import_module(f"benchmarks.{name}")
    if name in _OTHER:
        return module.main(argv[1:])
    try:
        return run(name, module, _arguments(name, module, argv[1:]))
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is saved; run the same command again to go on", file=sys.stderr)
        return _INTERRUPTED


def _arguments(name: str, module: ModuleType, argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=f"python -m benchmarks {name}", description=module.__doc__)
    parser.add_argument("--function", nargs="+", choices=module.FUNCTIONS, default=module.FUNCTIONS)
    names = getattr(module, "SHAPE_NAMES", "ROWSxCOLS")
    shape = partial(_shape, names=names)
    parser.add_argument("--shape", nargs="+", type=shape, metavar=names, help="default: a list for the device")
    parser.add_argument("--dtype", nargs="+", type=parse_dtype, metavar="bf16", help="bf16, fp16, fp32")
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--backends", nargs="+", choices=backends.NAMES, help="default: the kernels that run here")
    parser.add_argument("--peers", nargs="*", choices=tuple(module.peers()), help="default: every one installed")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--out", type=Path, help="folder of the results; an interrupted run there is continued")
    parser.add_argument("--budget", type=float, default=1200, help="seconds after which no further group is started")
    parser.add_argument("--seconds", type=float, help="timing of one group (default 1 a candidate)")
    parser.add_argument("--fresh", action="store_true", help="measure again what is already there")
    parser.add_argument("--tiny", action="store_true", help="two small shapes, to try the whole path out")
    return parser.parse_args(argv)


def _shape(text: str, names: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    parts = names.split("x")
    # A padding may be 0.
    if len(shape) != len(parts) or any(size < (part != "PADDING") for size, part in zip(shape, parts, strict=True)):
        raise argparse.ArgumentTypeError(f"a shape is {names}, in positive numbers, got {text!r}")
    return shape


def default_folder(device: torch.device) -> Path:
    """GPU results belong to the repository; a CPU's are a by-product."""
    if device.type == "cpu":
        return _FOLDER.parent / "build" / "benchmarks-cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return _FOLDER / "results" / slug


def run(name: str, module: ModuleType, args: argparse.Namespace) -> int:
    """Measures what is not measured yet, writes everything, prints the table."""
    device = torch.device(args.device or default_device())
    kind = "tiny" if args.tiny else device.type
    shapes, dtypes = args.shape or module.SHAPES[kind], args.dtype or module.DTYPES[kind]
    problems = module.problems(tuple(args.function), list(shapes), list(dtypes))
    folder = args.out or default_folder(device)

    results = Results(folder / f"{name}.json", name, environment(device), fresh=args.fresh)
    if results.set_aside:
        print(f"Other sources or another machine measured the earlier results; they are now {results.set_aside}")
    candidates = _candidates(module, args, device, results)
    print(
        f"{name}: {len(problems)} problems on {device_name(device)}, at most {args.budget:.0f} s; results in {folder}"
    )
    if device.type == "cpu":
        print("There is no GPU in this run: the figures are a CPU's, and say nothing of the kernels' speed on a GPU.")
    if results.data["ceilings"] is None:
        results.data["ceilings"] = measure_ceilings(device, 0.1 if args.tiny else 1.0)
    seconds = args.seconds or (0.05 if args.tiny else 1.0) * len(candidates)
    missed = _measure(problems, candidates, device, results, seconds, args)
    results.data["complete"] = not missed
    results.save()

    report.print_results(results)
    report.write_csv(results, results.path.with_suffix(".csv"))
    report.write_markdown(results, results.path.with_suffix(".md"))
    try:
        for path in report.plot(results, folder):
            print(path)
    except ImportError:
        print("no plots: matplotlib is not installed (pip install 'bigkern[plots]')")
    bad = [row for row in results.rows if row.ours and row.status in ("wrong", "failed")]
    for row in bad:
        print(f"{row.candidate} {row.function} {row.shape} {row.dtype}: {row.status}: {row.reason}", file=sys.stderr)
    if bad:
        return 1
    if missed:
        print(f"{missed} of {len(problems)} problems were not started in {args.budget:.0f} s: run the command again")
        return _INCOMPLETE
    return 0


def _candidates(
    module: ModuleType, args: argparse.Namespace, device: torch.device, results: Results
) -> list[Candidate]:
    """Our backends and the peers; those that cannot take part are noted in the results with the reason."""
    if args.backends:
        names = args.backends
    else:
        running, not_run = runnable(device)
        results.data["unavailable"].update({f"bigkern {name}": reason for name, reason in not_run.items()})
        names = [name for name in running if name != "torch"] or ["torch"]
    candidates = [backend_candidate(name) for name in names]
    makers = module.peers()
    for name in makers if args.peers is None else args.peers:
        try:
            candidates.append(makers[name]())
        except ImportError as error:
            results.data["unavailable"][name] = f"not installed ({error})"
    return candidates


def _measure(
    problems: Sequence[Problem],
    candidates: Sequence[Candidate],
    device: torch.device,
    results: Results,
    seconds: float,
    args: argparse.Namespace,
) -> int:
    """Measures problem after problem and saves each direction as it ends.  Returns how many the budget left out."""
    start = time.monotonic()
    missed = 0
    with _progress(len(problems)) as step:
        for problem in problems:
            open_directions = [d for d in args.direction if not results.has(problem.key(d), candidates)]
            if open_directions and time.monotonic() - start > args.budget:
                missed += 1
            elif open_directions:
                measured = measure_problem(
                    problem, open_directions, candidates, device, results.data["ceilings"], seconds
                )
                for rows in measured:
                    results.replace_rows(rows)
            step(f"{problem.case.function} {problem.shape} {dtype_name(problem.dtype)}")
    return missed


@contextmanager
def _progress(total: int) -> Iterator:
    """Yields a function to call after each problem: a bar on a terminal, a line a problem in a log."""
    done = 0

    def line(text: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {text}", flush=True)

    if not sys.stdout.isatty():
        yield line
        return
    try:
        from rich.progress import Progress
    except ImportError:
        yield line
        return
    with Progress() as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


if __name__ == "__main__":
    sys.exit(main())
