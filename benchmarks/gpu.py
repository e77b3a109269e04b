"""`make gpu`: everything a GPU can tell, in one command that needs no network, resumes, and ends in time.

    python -m benchmarks.gpu                      all steps on this machine's GPU
    python -m benchmarks.gpu --steps tests bench  only these
    python -m benchmarks.gpu --budget 1500        stop starting steps after so many seconds; the next call goes on
    python -m benchmarks.gpu --rehearse           the same steps on the CPU, emulated, at tiny sizes

Steps, in this order, because a wrong instruction explains every later failure: build, conformance (each instruction
wrapper against its emulation, bit for bit), tune (tries the candidate tiles and writes the winners into the sources, so
that the rest speaks of them), tests, sanitizers, accuracy, selfcheck, bench, static.  A step that passed for the same
sources is not repeated; `--restart` forgets.  Results land in benchmarks/results/<gpu>/: gpu.json and gpu.md (this
run), and what the steps write themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The benchmarks exit with 3 when their own budget is spent; called again, they go on.
_RESULTS = {0: "passed", 3: "out of time"}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Step:
    name: str
    command: list[str]
    seconds: int
    """The step is stopped after so long; what it wrote until then stays."""
    environment: dict[str, str] = field(default_factory=dict)


def sources_hash() -> str:
    """Of everything that a result depends on: a change in any source makes every step due again."""
    digest = hashlib.sha256()
    for folder in ("csrc", "bigkern", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp") and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def ops() -> list[str]:
    """The kernels' headers that have a benchmark; the others are parts of theirs."""
    kernels = (ROOT / "csrc" / "kernels").glob("*.cuh")
    return sorted(path.stem for path in kernels if (ROOT / "benchmarks" / f"{path.stem}.py").exists())


def steps(results: Path, rehearse: bool) -> list[Step]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    on = (
        ["--device", "cpu", "--backends", "torch,cuda"]
        if rehearse
        else ["--device", "cuda", "--backends", "cuda,triton,torch"]
    )
    kernels_on = ["--device", on[1], "--backends", "cuda"]
    found = [
        Step(
            "build", [python, "setup.py", "build_ext", "--inplace"], 900, {"BIGKERN_EXT": "auto" if rehearse else "1"}
        ),
        Step("conformance", [*pytest, "tests/device", *kernels_on], 900),
        *([] if rehearse else [Step("tune", [python, "-m", "benchmarks.tune", "--budget", "1200"], 1500)]),
        Step(
            "tests",
            [
                *pytest,
                "tests/kernels",
                "tests/ops",
                "tests/nn",
                "tests/optim",
                "tests/models",
                "tests/acceleration/test_architectures.py",
                "tests/integrations",
                "tests/test_backend.py",
                *on,
            ],
            1800,
        ),
    ]
    # A Hopper GPU runs the older kernels too: where its own do not serve, and for whoever sets BIGKERN_MAX_CAPABILITY.
    older = {"BIGKERN_MAX_CAPABILITY": "80"}
    if not rehearse:
        found.append(Step("tests-sm80", [*pytest, "tests/kernels", "-k", "not hopper", *kernels_on], 900, older))
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in () if rehearse else SANITIZERS:
        # Small cases only: a sanitizer slows a kernel down a hundredfold.
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
        found.append(
            Step(f"sanitizer-{tool}", [*command, *pytest, "tests/kernels", "-m", "sanitized", *kernels_on], 900)
        )
    device = "cpu" if rehearse else "cuda"
    accuracy = ["accuracy", "--device", device, "--json", str(results / "accuracy.json")]
    found += [
        Step("accuracy", [python, "-m", "bigkern", *accuracy], 900),
        Step("selfcheck", [python, "-m", "bigkern", "selfcheck"], 600),
    ]
    for op in ops():
        sizes = ["--tiny"] if rehearse else []
        bench = [python, "-m", "benchmarks", op, "--out", str(results), "--budget", "1200", *sizes]
        found.append(Step(f"bench-{op}", bench, 1500))
    if not rehearse:
        out = ["--out", str(results / "sm80"), "--budget", "600", "--peers"]
        for op in ("attention", "conv"):
            bench = [python, "-m", "benchmarks", op, *out, "--backends", "cuda", "--dtype", "bf16"]
            found.append(Step(f"bench-{op}-sm80", bench, 900, older))
    found.append(Step("static", [python, "-m", "benchmarks.static", "--check"], 300))
    return found


def gpu_name() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("make gpu: torch sees no CUDA GPU here (--rehearse runs on the CPU)")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def run(step: Step, log: Path, limit: float) -> tuple[str, int | None]:
    """Runs one step, its output to the terminal and to ``log``; returns the result and the status."""
    deadline = time.monotonic() + limit
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    with log.open("wb") as file:
        while time.monotonic() < deadline:
            if not select.select([process.stdout], [], [], 1.0)[0]:
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                status = process.wait()
                return _RESULTS.get(status, "failed"), status
            sys.stdout.write(data.decode(errors="replace"))
            sys.stdout.flush()
            file.write(data)
            file.flush()
    for stop in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
            break
    return "out of time", None


def summary(name: str, record: dict) -> str:
    lines = [
        f"# make gpu on {name}",
        "",
        f"Sources {record['sources']}, torch {record['torch']}, {record['when']}.",
        "",
        "| step | result | seconds | command |",
        "|---|---|---|---|",
    ]
    for step, entry in record["steps"].items():
        lines.append(f"| {step} | {entry['result']} | {entry['seconds']:.0f} | `{entry['command']}` |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", nargs="+", metavar="STEP", help="only these steps (prefixes will do)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no further step after these seconds")
    parser.add_argument("--restart", action="store_true", help="forget which steps have passed")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, emulated; keeps no figures")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands, run nothing")
    args = parser.parse_args(argv)

    import torch

    name = "rehearsal" if args.rehearse else gpu_name() if not args.list else "gpu"
    results = ROOT / "build" / name if args.rehearse else ROOT / "benchmarks" / "results" / name
    chosen = [
        s for s in steps(results, args.rehearse) if not args.steps or any(s.name.startswith(p) for p in args.steps)
    ]
    if not chosen:
        parser.error(f"--steps: none of {', '.join(step.name for step in steps(results, args.rehearse))}")
    if args.list:
        for step in chosen:
            print(f"{step.name:22s} {' '.join(step.command)}")
        return 0

    (results / "logs").mkdir(parents=True, exist_ok=True)
    path, sources = results / "gpu.json", sources_hash()
    record = json.loads(path.read_text()) if path.exists() and not args.restart else {}
    if record.get("sources") != sources:
        record = {"sources": sources, "torch": torch.__version__, "steps": {}}
    start, missed = time.monotonic(), []
    for step in chosen:
        if record["steps"].get(step.name, {}).get("result") == "passed":
            print(f"== {step.name}: passed already")
            continue
        left = args.budget - (time.monotonic() - start)
        if left <= 0:
            missed.append(step.name)
            continue
        print(f"== {step.name}: {' '.join(step.command)}", flush=True)
        began = time.monotonic()
        result, status = run(step, results / "logs" / f"{step.name}.txt", min(step.seconds, left))
        record["steps"][step.name] = {
            "result": result,
            "status": status,
            "seconds": time.monotonic() - began,
            "command": " ".join([Path(step.command[0]).name, *step.command[1:]]).replace(str(ROOT) + "/", ""),
        }
        if step.name == "tune":
            record["sources"] = sources_hash()  # a winner is part of them
        record["when"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        write_atomically(results / "gpu.md", summary(name, record))
        if step.name == "build" and result != "passed":
            break
    failed = [name for name, entry in record["steps"].items() if entry["result"] != "passed"]
    passed = len(record["steps"]) - len(failed)
    print(f"\n{results / 'gpu.md'}: {passed} steps passed, {len(failed)} did not, {len(missed)} not started")
    for name in failed:
        print(f"  {name}: {record['steps'][name]['result']}")
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
