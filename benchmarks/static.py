"""What the compiler made of every kernel, read without a GPU: registers, spills, occupancy, instructions.

    python -m benchmarks.static                 table of bigkern/_C*.so, one row per kernel and architecture
    python -m benchmarks.static --check         exit 1 when a kernel spills or leaves its plan
    python -m benchmarks.static --write         also rewrite benchmarks/results/static.md, the committed table

The object that ships is the object that is read.  A kernel's plan stands in benchmarks/<op>.py as ``static_plan``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "static.md"

# Per multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"):
# warps, and bytes of shared memory of which each block costs 1 KiB of the system's.
WARPS = {"sm_80": 64, "sm_86": 48, "sm_89": 48, "sm_90a": 64, "sm_100a": 64, "sm_120a": 48}
SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90a": 228, "sm_100a": 228, "sm_120a": 100}
REGISTERS = 65536

INSTRUCTIONS = {
    "LDG": r"\bLDG\b",
    "LDG.128": r"\bLDG\.E(\.\w+)*\.128",
    "STG": r"\bSTG\b",
    "STG.128": r"\bSTG\.E(\.\w+)*\.128",
    "HMMA": r"\bHMMA\.",
    "HGMMA": r"\bHGMMA\.",
    "LDGSTS": r"\bLDGSTS\b",
    "LDSM": r"\bLDSM\b",
    "UTMA": r"\bUTMA\w+|\bUBLKCP\b",
    "UTMALDG": r"\bUTMALDG\b",
    "EX2": r"\bMUFU\.EX2\b",
    "ARRIVE": r"\bWARPGROUP\.ARRIVE\b",
    "LDL": r"\bLDL\b",
    "STL": r"\bSTL\b",
    "BAR": r"\bBAR\.",
    "ATOM": r"\b(ATOM|RED)G?\.",
}


@dataclass
class KernelPlan:
    """What a kernel was planned to be; the check holds every instance on every architecture to it."""

    kernel: str
    """Regular expression on the demangled name."""
    threads: int
    """Threads of the block it is launched with, for the occupancy column."""
    max_registers: int
    vectorised: bool = False
    """The main path moves 16 bytes an instruction: at least one LDG.128 and one STG.128 must stand in the code."""
    shared_bytes: int = 0
    """Dynamic shared memory of a typical launch, for the occupancy column."""
    requires: dict[str, str] = field(default_factory=dict)
    """Further instructions that must appear, by architecture ("*" for all): {"sm_90a": "HGMMA UTMALDG"}."""
    overlapped: bool = False
    """On sm_90a two products of a warpgroup are in flight, and every exponential stands between the wait for the older
    one and the wait for the other. ptxas has moved the second wait above them, where nothing overlaps any more."""
    max_exponentials: int | None = None
    """EX2 in the code on sm_90a, where polynomials take the place of some."""


@dataclass
class Row:
    kernel: str
    arch: str
    registers: int
    shared: int
    local: int
    instructions: Counter
    plan: KernelPlan | None = None
    exponentials: Counter = field(default_factory=Counter)
    """EX2 by how many products of its warpgroup are in flight at most: by the wait before it in the code."""

    @property
    def empty(self) -> bool:
        """Compiled for an architecture that the kernel is not for."""
        return self.registers <= 8 and not any(self.instructions.values())

    @property
    def occupancy(self) -> float | None:
        """Resident warps over the most there can be, from registers and shared memory, at the plan's block size."""
        if self.plan is None or self.arch not in WARPS:
            return None
        warps = -(-self.plan.threads // 32)
        # Registers are granted to a warp in steps of 256, that is 8 a thread.
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32) // warps
        by_shared = SHARED[self.arch] * 1024 // (self.shared + self.plan.shared_bytes + 1024)
        blocks = min(by_registers, by_shared, WARPS[self.arch] // warps, 32 if WARPS[self.arch] == 64 else 24)
        return blocks * warps / WARPS[self.arch]

    def faults(self) -> list[str]:
        found = []
        if self.local or self.instructions["LDL"] or self.instructions["STL"]:
            loads, stores = self.instructions["LDL"], self.instructions["STL"]
            found.append(f"spills: {self.local} bytes local, {loads} LDL, {stores} STL")
        if self.plan is None:
            return [*found, "no plan: add a KernelPlan to the op's static_plan"]
        if self.registers > self.plan.max_registers:
            found.append(f"{self.registers} registers, planned at most {self.plan.max_registers}")
        if self.plan.vectorised and not (self.instructions["LDG.128"] and self.instructions["STG.128"]):
            found.append("no 16-byte loads or stores")
        for arch, names in self.plan.requires.items():
            for name in names.split():
                if arch in ("*", self.arch) and not self.instructions[name]:
                    found.append(f"no {name}")
        # Serialised (C7510 to C7519 of ptxas), each product has an arrival and a wait of its own.
        if 2 * self.instructions["ARRIVE"] > self.instructions["HGMMA"]:
            found.append(f"{self.instructions['HGMMA']} HGMMA in {self.instructions['ARRIVE']} groups: serialised")
        if self.plan.overlapped and self.arch == "sm_90a" and self.exponentials.keys() != {1}:
            found.append(f"exponentials by products in flight: {dict(self.exponentials)}, planned all under one")
        most = self.plan.max_exponentials
        if most is not None and self.arch == "sm_90a" and self.instructions["EX2"] > most:
            found.append(f"{self.instructions['EX2']} EX2, planned at most {most}")
        return [f"{self.kernel} on {self.arch}: {fault}" for fault in found]


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: a toolkit's, the [nvcc] extra's, or the copy inside Triton."""
    candidates = [shutil.which(name), f"/usr/local/cuda/bin/{name}"]
    candidates += [str(path) for path in Path(sys.prefix).glob(f"lib/python*/site-packages/nvidia/cu*/bin/{name}")]
    if spec := importlib.util.find_spec("triton"):
        candidates.append(str(Path(spec.origin).parent / "backends/nvidia/bin" / name))
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return candidate
    raise FileNotFoundError(f"{name} not found: pip install 'bigkern[nvcc]' brings it")


def demangle(names: list[str]) -> dict[str, str]:
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: shorten(text) for name, text in zip(names, plain.splitlines(), strict=True)}


def shorten(name: str) -> str:
    """`void bigkern::f<float, 4>(Params)` -> `f<float, 4>`."""
    name = re.sub(r"^void |bigkern::|\(anonymous namespace\)::", "", name)
    depth = 0
    for index, char in enumerate(name):
        depth += (char == "<") - (char == ">")
        if char == "(" and depth == 0:
            return name[:index]
    return name


def disassemble(path: Path) -> list[Row]:
    """One row per kernel and architecture in an object or shared library."""
    usage: dict[tuple[str, str], dict[str, int]] = {}
    arch = function = ""
    for line in subprocess.run(
        [tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            function = match[1]
        elif "REG:" in line:
            usage[arch, function] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    counts: dict[tuple[str, str], Counter] = {}
    exponentials: dict[tuple[str, str], Counter] = {}
    current: Counter = Counter()
    in_flight = None
    # Offset, perhaps a predicate, then the opcode.
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(?: gsb0, 0x(\d+))?")
    for line in sass(path, sorted({arch for arch, _ in usage})):
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            function = match[1]
            current = counts.setdefault((arch, function), Counter())
            in_flight = None
        elif match := instruction.match(line):
            current[match[1]] += 1
            if match[1].startswith("WARPGROUP.DEPBAR"):
                in_flight = int(match[2])
            elif match[1] == "MUFU.EX2" and in_flight is not None:
                exponentials.setdefault((arch, function), Counter())[in_flight] += 1
    names = demangle(sorted({function for _, function in counts}))
    return [
        Row(
            names[function],
            arch,
            used["REG"],
            used.get("SHARED", 0),
            used.get("LOCAL", 0) + used.get("STACK", 0),
            classify(count),
            exponentials=exponentials.get((arch, function), Counter()),
        )
        for (arch, function), count in counts.items()
        if (used := usage.get((arch, function)))
    ]


def sass(path: Path, archs: list[str]) -> Iterator[str]:
    """The disassembly's lines that name a kernel or an instruction we count.

    One process an architecture, two at a time, and grep in front of Python: all of it is some 300 MB of text.
    """
    wanted = r"arch = |Function : |\b(LDG|STG|HMMA|HGMMA|LDSM|UTMA|UBLKCP|LDL|STL|BAR|ATOM|RED|MUFU\.EX2|WARPGROUP)"

    def disassembled(arch: str) -> list[str]:
        only = ["-arch", arch] if len(archs) > 1 else []  # refused for a cubin, which has one anyway
        dump = subprocess.Popen([tool("cuobjdump"), "-sass", *only, str(path)], stdout=subprocess.PIPE)
        kept = subprocess.run(["grep", "-E", wanted], stdin=dump.stdout, stdout=subprocess.PIPE, text=True)
        if dump.wait():
            raise RuntimeError(f"cuobjdump -sass {path} failed")
        return kept.stdout.splitlines()

    with ThreadPoolExecutor(2) as pool:
        for lines in pool.map(disassembled, archs):
            yield from lines


def classify(opcodes: Counter) -> Counter:
    """Opcodes counted by the kinds of INSTRUCTIONS."""
    found: Counter = Counter()
    for opcode, count in opcodes.items():
        for name, pattern in INSTRUCTIONS.items():
            if re.search(pattern, opcode):
                found[name] += count
    return found


def extension() -> Path:
    found = sorted((ROOT / "bigkern").glob("_C*.so"))
    if not found:
        raise FileNotFoundError("bigkern/_C*.so is not built: run `make build` where nvcc is")
    return found[0]


def compiler() -> str:
    """The nvcc on this machine, as the table's header names it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "nvcc: none"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', said)[1]}"


def plans() -> list[KernelPlan]:
    """Every op's plan, from the benchmark modules."""
    found = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        if (ROOT / "csrc/kernels" / f"{path.stem}.cuh").exists():
            found += importlib.import_module(f"benchmarks.{path.stem}").static_plan
    return found


def in_order(arch: str) -> tuple[int, str]:
    """The shipped architectures as WARPS lists them, then any other that a user built for."""
    return (list(WARPS).index(arch) if arch in WARPS else len(WARPS), arch)


def report(path: Path) -> list[Row]:
    rows = sorted(disassemble(path), key=lambda row: (row.kernel, in_order(row.arch)))
    planned = plans()
    for row in rows:
        row.plan = next((plan for plan in planned if re.search(plan.kernel, row.kernel)), None)
    return rows


def markdown(rows: list[Row]) -> str:
    """The committed table: one line a kernel, one column an architecture, so that a change reads well in a diff."""
    archs = sorted({row.arch for row in rows}, key=in_order)
    spilling = sum(bool(row.local or row.instructions["LDL"] or row.instructions["STL"]) for row in rows)
    count = sum(not row.empty for row in rows)
    lines = [
        "# What the compiler made of every kernel",
        "",
        f"Written by `python -m benchmarks.static --write` from the shipped object ({compiler()}); no speed measured.",
        "Registers, then occupancy at the planned block size (\\*: with a typical launch's dynamic shared memory);",
        "the last columns are of sm_90a: static shared bytes, 16-byte among all global loads, among all global stores.",
        "A dash: that architecture has another kernel instead.",
        f"Spills (LDL, STL, stack): {spilling} of {count} kernels.",
        "",
        "| kernel | planned | " + " | ".join(archs) + " | shared | LDG.128 | STG.128 |",
        "|---|---|" + "---|" * (len(archs) + 3),
    ]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        mine = {row.arch: row for row in rows if row.kernel == kernel}
        last = mine.get("sm_90a") or next(iter(mine.values()))
        cells = [
            f"{row.registers}, {'?' if row.occupancy is None else f'{row.occupancy:.0%}'}"
            + ("\\*" if row.plan and row.plan.shared_bytes else "")
            if (row := mine.get(arch)) and not row.empty
            else "-"
            for arch in archs
        ]
        planned = f"≤ {last.plan.max_registers}" if last.plan else "none"
        loads = f"{last.instructions['LDG.128']}/{last.instructions['LDG']}"
        stores = f"{last.instructions['STG.128']}/{last.instructions['STG']}"
        lines.append(f"| `{kernel}` | {planned} | {' | '.join(cells)} | {last.shared} | {loads} | {stores} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when a kernel spills or leaves its plan")
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    try:
        rows = report(extension())
    except FileNotFoundError as error:
        print(f"static: {error}", file=sys.stderr)
        return 2
    print(markdown(rows))
    if args.write:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(markdown(rows))
    faults = [fault for row in rows for fault in row.faults()]
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if args.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
