"""Which tile is the fastest on this GPU: tries a kernel's candidates and writes the winner into its source.

    python -m benchmarks.tune                    every kernel that has candidates
    python -m benchmarks.tune --only attention   those whose name begins so
    python -m benchmarks.tune --budget 1200      start no candidate after so many seconds; the next call goes on
    python -m benchmarks.tune --list             what would be tried, without a GPU

A kernel's tile is one struct in its source, and its candidates stand in benchmarks/<op>.py as ``tunables``.  Each is
written into the source, built and measured by that op's benchmark, which times nothing that is wrong.  The fastest by
the geometric mean over the shapes stays; a kernel with a candidate still unmeasured keeps the tile it had.  Figures:
benchmarks/results/<gpu>/tune.json and tune.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import write_atomically

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Tunable:
    """One struct that a measured run may choose."""

    name: str
    path: str
    """The source, from the repository's root."""
    line: str
    """What the source says before the struct's value: text that occurs once, up to and with the equals sign."""
    candidates: tuple[str, ...]
    """Values in braces, as the source spells them; one of them is there now."""
    capability: tuple[int, int]
    """The GPUs that run the kernel, as torch.cuda.get_device_capability."""
    benchmark: tuple[str, ...]
    """Arguments of ``python -m benchmarks`` that measure this kernel and little else."""

    def read(self, text: str) -> str:
        """The value that the source has now."""
        parts = text.split(self.line)
        if len(parts) != 2:
            raise ValueError(f"{self.path}: {self.line!r} occurs {len(parts) - 1} times, not once")
        return parts[1].split(";", 1)[0].strip()

    def write(self, text: str, value: str) -> str:
        before, after = text.split(self.line)
        return f"{before}{self.line} {value};{after.split(';', 1)[1]}"


def tunables(only: Sequence[str] = ()) -> list[Tunable]:
    found = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if "\ntunables" in path.read_text() and path.name != Path(__file__).name:
            found += importlib.import_module(f"benchmarks.{path.stem}").tunables
    return [t for t in found if not only or any(t.name.startswith(name) for name in only)]


def build() -> str | None:
    """Why the extension does not build; None when it does."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return None if done.returncode == 0 else f"does not build: {done.stdout.strip().splitlines()[-1:]}"


def measure(tunable: Tunable) -> tuple[float | None, str]:
    """Geometric mean of the medians in seconds, or the reason why there is none."""
    folder = ROOT / "build" / "tune"
    op, *arguments = tunable.benchmark
    command = [sys.executable, "-m", "benchmarks", op, *arguments, "--backends", "cuda", "--peers", "--fresh"]
    done = subprocess.run([*command, "--out", str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        rows = json.loads((folder / f"{op}.json").read_text())["rows"]
    except FileNotFoundError:
        return None, done.stdout.decode(errors="replace").strip()[-500:] or "the benchmark wrote nothing"
    bad = [row for row in rows if row["median_s"] is None]
    if bad or not rows or done.returncode:
        return None, f"{bad[0]['status']}: {bad[0]['reason']}" if bad else f"the benchmark ended with {done.returncode}"
    return math.exp(sum(math.log(row["median_s"]) for row in rows) / len(rows)), ""


def version(tunable: Tunable, text: str) -> str:
    """Of the source but for the value: figures of another version are not taken up again."""
    return hashlib.sha256(tunable.write(text, "").encode()).hexdigest()[:12]


def tune(
    tunable: Tunable,
    record: dict,
    save: Callable[[], None],
    in_time: Callable[[], bool],
    build: Callable[[], str | None] = build,
    measure: Callable[[Tunable], tuple[float | None, str]] = measure,
) -> bool:
    """Measures what ``record`` lacks and leaves the winner in the source.  Returns whether every one was tried."""
    path = ROOT / tunable.path
    text = path.read_text()
    before = tunable.read(text)
    entry = record.setdefault(tunable.name, {})
    if entry.get("version") != version(tunable, text):
        entry.clear()
        entry.update(version=version(tunable, text), before=before, candidates={})
    chosen = before
    try:
        for value in tunable.candidates:
            if value in entry["candidates"]:
                continue
            if not in_time():
                return False
            print(f"== {tunable.name}: {value}", flush=True)
            write_atomically(path, tunable.write(text, value))
            reason = build()
            seconds, reason = (None, reason) if reason else measure(tunable)
            entry["candidates"][value] = {"seconds": seconds, "reason": reason}
            save()
        timed = {value: found["seconds"] for value, found in entry["candidates"].items() if found["seconds"]}
        chosen = min(timed, key=timed.get) if timed else before
        entry["winner"] = chosen if timed else None
        save()
        return True
    finally:
        write_atomically(path, tunable.write(text, chosen))


def summary(record: dict) -> str:
    lines = ["# Tiles tried", "", "| kernel | tile | geometric mean | |", "|---|---|---|---|"]
    for name, entry in record.items():
        for value, found in entry["candidates"].items():
            time_text = f"{found['seconds'] * 1e6:.1f} us" if found["seconds"] else found["reason"].replace("|", "/")
            notes = [word for word in ("before", "winner") if entry.get(word) == value]
            lines.append(f"| {name} | `{value}` | {time_text} | {', '.join(notes)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="kernels whose name begins so")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no candidate after these seconds")
    parser.add_argument("--restart", action="store_true", help="forget what was measured")
    parser.add_argument("--list", action="store_true", help="print kernels and candidates, build and measure nothing")
    args = parser.parse_args(argv)
    chosen = tunables(args.only)
    if not chosen:
        parser.error(f"--only: no kernel's name begins so; there are {', '.join(t.name for t in tunables())}")
    if args.list:
        for tunable in chosen:
            now = tunable.read((ROOT / tunable.path).read_text())
            print(f"{tunable.name}: {', '.join(tunable.candidates)}; now {now} ({tunable.path})")
        return 0

    from benchmarks.gpu import gpu_name

    results = ROOT / "benchmarks" / "results" / gpu_name()
    import torch

    here = torch.cuda.get_device_capability()
    chosen = [tunable for tunable in chosen if tunable.capability == here]
    path = results / "tune.json"
    record = json.loads(path.read_text()) if path.exists() and not args.restart else {}

    def save() -> None:
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        write_atomically(results / "tune.md", summary(record))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # the source must get its tile back
    deadline = time.monotonic() + args.budget
    try:
        tried = [tune(tunable, record, save, lambda: time.monotonic() < deadline) for tunable in chosen]
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept; run the same command again to go on", file=sys.stderr)
        return 130
    if reason := build():
        print(reason, file=sys.stderr)
        return 1
    print(summary(record) if chosen else f"no kernel has candidates for compute capability {here[0]}.{here[1]}")
    return 0 if all(tried) else 3


if __name__ == "__main__":
    sys.exit(main())
