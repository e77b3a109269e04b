"""Every check that needs no GPU, as ``make test`` runs it: one pytest process a world, then counts of what ran.

    python -m tests.run           the selection that covers every row of the contracts
    python -m tests.run --all     the whole parameter grid
    python -m tests.run --only emulated-race interpreted

Exit status 1 when anything failed, or when a world that must have executed kernels executed none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


class World(NamedTuple):
    """One process: its pytest arguments, its environment, and the kind of kernel run it must show."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    shows: str | None


def worlds() -> list[World]:
    from tests import emulated

    # One worker a core. Tests spread freely (builds are cached and locked) but for those marked xdist_group.
    spread = ["-n", str(min(2, os.cpu_count() or 1)), "--dist", "loadgroup"]
    sanitized = ["tests/kernels", "tests/ops", "tests/device", "-m", "sanitized", "--backends", "cuda", *spread]
    return [
        World("torch and emulated", ["tests", *spread], {}, "emulated"),
        World(
            "interpreted", ["tests/triton", "tests/ops", "tests/nn", *spread], {"TRITON_INTERPRET": "1"}, "interpreted"
        ),
        World("emulated-race", [*sanitized, "--emulated-build", "race"], emulated.environment("race"), "emulated"),
        World("emulated-asan", [*sanitized, "--emulated-build", "asan"], emulated.environment("asan"), "emulated"),
    ]


def lint() -> bool:
    """ruff and clang-format over the tracked sources."""
    sources = subprocess.run(
        ["git", "ls-files", "*.cuh", "*.cu", "*.h", "*.cpp"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    commands = [
        [BIN / "ruff", "check", "."],
        [BIN / "ruff", "format", "--check", "."],
        [BIN / "clang-format", "--dry-run", "--Werror", *sources],
    ]
    return sum(subprocess.run(command, cwd=ROOT).returncode != 0 for command in commands) == 0


def run(world: World, full: bool, reports: Path) -> tuple[bool, dict[str, int]]:
    """Runs one world; returns whether it passed and the sum of its processes' counts."""
    folder = reports / world.name.replace(" ", "-")
    folder.mkdir()
    # Torch's threads would fight those of the other pytest workers and of the emulator for the same cores.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "BIGKERN_TEST_REPORT": str(folder)} | world.environment
    if full:
        environment["BIGKERN_TEST_GRID"] = "full"
    command = [sys.executable, "-m", "pytest", *world.arguments]
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    counts: dict[str, int] = {}
    rows = [file.read_text() for file in sorted(folder.glob("planted-*.txt"))]
    if rows:
        print(f"\nplanted bugs, and what caught each:\n  {'  '.join(rows)}", flush=True)
    for file in folder.glob("*.json"):
        for key, value in json.loads(file.read_text()).items():
            counts[key] = counts.get(key, 0) + value
    return status == 0, counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the whole parameter grid (make test-all)")
    parser.add_argument("--only", nargs="+", metavar="WORLD", help="run only these worlds, by name")
    args = parser.parse_args()
    chosen = [world for world in worlds() if not args.only or world.name in args.only]
    if args.only and len(chosen) != len(args.only):
        parser.error(f"--only: unknown world; there are {', '.join(world.name for world in worlds())}")

    reports = Path(tempfile.mkdtemp(prefix="bigkern-tests-"))
    failures, totals = [], {}
    try:
        if not args.only:
            print("== lint", flush=True)
            if not lint():
                failures.append("lint")
        for world in chosen:
            print(f"== {world.name}: pytest {' '.join(world.arguments)}", flush=True)
            start = time.perf_counter()
            passed, counts = run(world, args.all, reports)
            if not passed:
                failures.append(world.name)
            if world.shows and not counts.get(world.shows):
                failures.append(f"{world.name} ran no {world.shows} kernel")
            for key, value in counts.items():
                totals[key] = totals.get(key, 0) + value
            print(f"   {time.perf_counter() - start:.0f} s", flush=True)
    finally:
        shutil.rmtree(reports, ignore_errors=True)

    print("\nchecks that ran kernels on this machine:")
    print(
        f"  emulated CUDA   {totals.get('emulated', 0):6d} tests, {totals.get('emulated_launches', 0)} kernel launches"
    )
    print(f"  interpreted     {totals.get('interpreted', 0):6d} tests of Triton kernels")
    print(f"  compiled        {totals.get('compiled', 0):6d} tests of code compiled for GPUs")
    for failure in failures:
        print(f"FAILED: {failure}")
    print(f"{totals.get('passed', 0)} passed, {totals.get('failed', 0)} failed, {totals.get('skipped', 0)} skipped")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
