"""Measuring, shared by every benchmark.

Order of work for one problem: the correctness gate, which no candidate is timed without passing; then interleaved
rounds, in which every candidate is sampled once, in an order that turns, so that clock drift and a noisy neighbour hit
all alike; then medians, percentiles, and ratios paired by round.  Inputs rotate over more memory than the last-level
cache holds.  On a GPU a sample is a short queue of calls between two events, enqueued while the device is held busy, so
that it holds device time only; the time the host takes to enqueue a call is a column of its own.

One JSON file a benchmark, rewritten whole (temporary file, rename) after every group of rows:

    schema            2
    benchmark         "layer_norm"
    environment       device (name), type ("cuda"|"cpu"), capability, cache_bytes, torch, cuda, triton, python, bigkern,
                      source (digest of the installed package: rows of different sources are never mixed)
    ceilings          copy_gb_s, matmul_tflop_s, matmul_dtype: measured on this machine, in this run
    unavailable       {candidate: reason}, for candidates that could not take part at all
    complete          false while groups are missing (interrupted, or out of budget)
    rows              one each (problem, direction, candidate):
        function, shape, dtype, direction ("forward"|"backward", of an optimizer "step"), candidate, ours (bool)
        status            "ok", "wrong" (stopped by the gate), "refused" (candidate does not serve this), "failed"
        reason            why, unless ok
        error_ratio       largest error over torch's own in the same dtype, over all outputs and gradients
        median_s, p20_s, p80_s   seconds a call
        host_s            seconds the host needs to enqueue a call (GPU), else null
        peak_bytes        memory one call allocates at its highest, beyond inputs and saved activations (GPU), else null
        samples, calls    samples taken; calls in each
        bytes, flops      counted for the problem, the same for every candidate
        gb_s, tflop_s     bytes, flops over the median
        ceiling_fraction  time at the machine's ceilings over the median
        rotated_bytes     memory over which the inputs rotate
        cold              whether that is at least twice the last-level cache
        speedup           {other candidate: its time over this one's}: above 1 this candidate is the faster
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import bigkern
from bigkern.ops._case import Case, Inputs, Outputs
from bigkern.tools.evaluation import (
    Reference,
    device_name,
    dtype_name,
    errors,
    limit,
    make_cotangents,
    make_reference,
    run,
    uninitialised_memory_is_nan,
)

SCHEMA = 2
DIRECTIONS = ("forward", "backward", "step")

# A peer may be less exact than we allow ourselves, yet must compute the same thing; its error ratio is shown.
OUR_FACTOR = 2.0
PEER_FACTOR = 16.0

_MIN_ROUNDS = 5
_MAX_ROUNDS = 100
_SAMPLE_SECONDS = 2e-3  # long beside an event's resolution (about 0.5 us) and a clock's cost
# A sample's queue must fit the driver's (about 1,000 launches), with several kernels a call.
_MAX_CALLS = {"cuda": 32, "cpu": 1000}
_MAX_SETS = {"cuda": 64, "cpu": 8}


class Refused(Exception):
    """A candidate does not serve a problem; the message says why."""


@dataclass(frozen=True)
class Problem:
    """A case at one dtype with what each of its directions moves and computes, at least."""

    case: Case
    shape: str
    dtype: torch.dtype
    bytes: dict[str, int]
    flops: dict[str, int]

    def key(self, direction: str) -> tuple[str, str, str, str]:
        return (self.case.function, self.shape, dtype_name(self.dtype), direction)


@dataclass(frozen=True)
class Candidate:
    """Something that solves problems.  ``prepare`` returns the function for a case, or raises ``Refused``."""

    name: str
    prepare: Callable[[Case], Callable[[Inputs], Outputs]]
    ours: bool = False
    # Entered around every use, for example to choose a backend.
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def backend_candidate(name: str) -> Candidate:
    """bigkern's public functions on one backend."""
    return Candidate(f"bigkern {name}", lambda case: case.call, ours=True, context=lambda: bigkern.use_backend(name))


def eager_candidate() -> Candidate:
    return Candidate("torch", lambda case: case.reference)


def compile_candidate() -> Candidate:
    return Candidate("torch.compile", _compiled)


def _compiled(case: Case) -> Callable[[Inputs], Outputs]:
    import torch._functorch.config

    torch.compiler.reset()
    # Timing a backward alone runs it many times over one graph, which donated buffers forbid.
    torch._functorch.config.donated_buffer = False
    return torch.compile(case.reference, dynamic=False)


@dataclass
class Row:
    function: str
    shape: str
    dtype: str
    direction: str
    candidate: str
    ours: bool
    status: str
    reason: str = ""
    error_ratio: float | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    host_s: float | None = None
    peak_bytes: int | None = None
    samples: int = 0
    calls: int = 0
    bytes: int = 0
    flops: int = 0
    gb_s: float | None = None
    tflop_s: float | None = None
    ceiling_fraction: float | None = None
    rotated_bytes: int = 0
    cold: bool = False
    speedup: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return (self.function, self.shape, self.dtype, self.direction)


# ---- the gate


@dataclass(frozen=True)
class Verdict:
    status: str
    reason: str
    error_ratio: float | None


def gate(
    candidate: Candidate, function: Callable[[Inputs], Outputs], problem: Problem, reference: Reference
) -> Verdict:
    """Runs the candidate forward and backward once and judges each output and gradient against float64."""
    factor = OUR_FACTOR if candidate.ours else PEER_FACTOR
    try:
        # torch.compile would trace the mode; its generated code writes whole buffers or fails the comparison anyway.
        poison = uninitialised_memory_is_nan() if candidate.ours else contextlib.nullcontext()
        with candidate.context(), poison:
            actual = run(function, reference.inputs, problem.case.gradients, reference.cotangents)
        synchronize(_device_of(reference.inputs))
    except (Refused, bigkern.backend.BackendError) as refusal:
        return Verdict("refused", str(refusal), None)
    except Exception as failure:
        # Peers are foreign code: whatever they raise belongs in their row, not in the way of the others.
        return Verdict("failed", f"{type(failure).__name__}: {failure}".splitlines()[0], None)
    worst = 0.0
    for name, exact in reference.exact.items():
        if name not in actual:
            return Verdict("wrong", f"no {name}", None)
        found, own = errors(actual[name], exact), reference.torch_errors[name]
        allowed = limit(own, actual[name].dtype, actual[name].numel(), factor)
        if not (found.norm <= allowed.norm and found.max <= allowed.max):
            error, most = f"{found.norm:.1e} (norm) {found.max:.1e} (max)", f"{allowed.norm:.1e} and {allowed.max:.1e}"
            return Verdict("wrong", f"{name}: error {error}, allowed {most}", None)
        floor = torch.finfo(actual[name].dtype).eps
        worst = max(worst, found.norm / max(own.norm, floor), found.max / max(own.max, floor))
    return Verdict("ok", "", worst)


# ---- timing


@dataclass(frozen=True)
class Sample:
    seconds: float
    host_seconds: float | None


class Stopwatch:
    """Times a queue of calls on one device."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self.device = device
        self._clock = clock
        # Held busy for as long as the host needs to enqueue the calls, the device then runs them back to back.
        self._clock_hz = 2e9

    def sample(self, calls: Sequence[Callable[[], object]], host_seconds: float = 0.0) -> Sample:
        """Seconds a call.  ``host_seconds``: a call's enqueueing time, from an earlier sample."""
        if self.device.type != "cuda":
            start = self._clock()
            for call in calls:
                call()
            return Sample((self._clock() - start) / len(calls), None)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(1.5 * self._clock_hz * host_seconds * len(calls)) + 1000)
        before.record()
        start = time.perf_counter()
        for call in calls:
            call()
        host = (time.perf_counter() - start) / len(calls)
        after.record()
        after.synchronize()
        return Sample(before.elapsed_time(after) / 1e3 / len(calls), host)


@dataclass
class Contestant:
    """A candidate made ready: one closure for each rotating set of inputs."""

    name: str
    context: Callable[[], contextlib.AbstractContextManager]
    closures: list[Callable[[], object]]
    calls: int = 1
    host_seconds: float = 0.0
    position: int = 0
    samples: list[Sample] = field(default_factory=list)
    peak_bytes: int | None = None

    def take(self, stopwatch: Stopwatch) -> Sample:
        turn = [self.closures[(self.position + i) % len(self.closures)] for i in range(self.calls)]
        self.position += self.calls
        with self.context():
            return stopwatch.sample(turn, self.host_seconds)


def peak_bytes(contestant: Contestant, device: torch.device) -> int | None:
    """What one call allocates at its highest, its results included; None where torch's allocator does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with contestant.context():
        contestant.closures[0]()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def warm_up(contestant: Contestant, stopwatch: Stopwatch, sample_seconds: float = _SAMPLE_SECONDS) -> None:
    """Compiles and caches what there is to, then sets the calls a sample takes."""
    for _ in range(3):
        contestant.take(stopwatch)
    contestant.calls = len(contestant.closures)
    sample = contestant.take(stopwatch)
    contestant.host_seconds = sample.host_seconds or 0.0
    sample = contestant.take(stopwatch)
    contestant.calls = max(1, min(_MAX_CALLS[stopwatch.device.type], math.ceil(sample_seconds / sample.seconds)))


def interleave(
    contestants: Sequence[Contestant],
    stopwatch: Stopwatch,
    seconds: float,
    sample_seconds: float = _SAMPLE_SECONDS,
    rounds: int = _MAX_ROUNDS,
) -> None:
    """Samples all contestants round by round until ``seconds`` have passed: at least 5 rounds, at most ``rounds``."""
    for contestant in contestants:
        warm_up(contestant, stopwatch, sample_seconds)
    start = time.monotonic()
    for turn in range(rounds):
        if turn >= _MIN_ROUNDS and time.monotonic() - start > seconds:
            break
        first = turn % len(contestants)
        for contestant in (*contestants[first:], *contestants[:first]):
            contestant.samples.append(contestant.take(stopwatch))


def percentile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    rank = fraction * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def speedup(mine: Sequence[Sample], other: Sequence[Sample]) -> float:
    """Median over the rounds of the other's time over mine."""
    return statistics.median(theirs.seconds / own.seconds for own, theirs in zip(mine, other, strict=True))


# ---- the machine


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: a GPU's L2, a CPU's L3."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes)


def environment(device: torch.device) -> dict[str, Any]:
    gpu = device.type == "cuda"
    with contextlib.suppress(ImportError):
        import triton
    return {
        "device": device_name(device),
        "type": device.type,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if gpu else None,
        "cache_bytes": cache_bytes(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if "triton" in locals() else None,
        "python": platform.python_version(),
        "bigkern": bigkern.__version__,
        "source": _source_digest(),
    }


def _source_digest() -> str:
    digest = hashlib.sha256()
    package = Path(bigkern.__file__).parent
    for path in sorted((*package.rglob("*.py"), *package.glob("*.so"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def measure_ceilings(device: torch.device, seconds: float = 1.0) -> dict[str, Any]:
    """What this machine reaches with the simplest work there is: a copy, and a large matrix product."""
    stopwatch = Stopwatch(device)
    gpu = device.type == "cuda"
    count = 2**28 if gpu else 2**24
    source, target = (torch.ones(count, dtype=torch.float32, device=device) for _ in range(2))
    size, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b, c = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
    work = {
        "copy": Contestant("copy", contextlib.nullcontext, [lambda: target.copy_(source)]),
        "matmul": Contestant("matmul", contextlib.nullcontext, [lambda: torch.mm(a, b, out=c)]),
    }
    for contestant in work.values():
        interleave([contestant], stopwatch, seconds / 2)
    # The better samples: a ceiling that a neighbour's work had lowered would flatter every candidate.
    reached = {name: percentile([s.seconds for s in contestant.samples], 0.2) for name, contestant in work.items()}
    return {
        "copy_gb_s": 2 * source.nbytes / reached["copy"] / 1e9,
        "matmul_tflop_s": 2 * size**3 / reached["matmul"] / 1e12,
        "matmul_dtype": dtype_name(dtype),
    }


# ---- one problem


@dataclass
class Rotation:
    """Sets of inputs with their output gradients, in more memory than the cache holds where that is affordable."""

    inputs: list[Inputs]
    cotangents: list[Outputs]
    rotated_bytes: int
    cold: bool


def make_rotation(problem: Problem, device: torch.device, seed: int) -> Rotation:
    first = problem.case.make_inputs(problem.dtype, device, seed)
    with torch.no_grad():
        cotangents = make_cotangents(problem.case.reference(first), seed)
    tensors = (value for value in (*first.values(), *cotangents.values()) if isinstance(value, torch.Tensor))
    set_bytes = sum(tensor.nbytes for tensor in tensors)
    cache = cache_bytes(device)
    count = max(2, min(_MAX_SETS[device.type], math.ceil(2 * cache / set_bytes)))
    inputs = [first, *(problem.case.make_inputs(problem.dtype, device, seed + i) for i in range(1, count))]
    incoming = [cotangents, *({name: value.clone() for name, value in cotangents.items()} for _ in range(1, count))]
    return Rotation(inputs, incoming, count * set_bytes, count * set_bytes >= 2 * cache)


def measure_problem(
    problem: Problem,
    directions: Sequence[str],
    candidates: Sequence[Candidate],
    device: torch.device,
    ceilings: dict[str, Any],
    seconds: float,
    seed: int = 0,
) -> Iterator[list[Row]]:
    """Yields, direction by direction, one row a candidate; ``seconds`` bounds the timing of each direction."""
    functions, verdicts = {}, {}
    reference = make_reference(problem.case, problem.dtype, device, seed)
    for candidate in candidates:
        try:
            functions[candidate.name] = candidate.prepare(problem.case)
        except Refused as refusal:
            verdicts[candidate.name] = Verdict("refused", str(refusal), None)
        else:
            verdicts[candidate.name] = gate(candidate, functions[candidate.name], problem, reference)
    # The float64 reference is several times the size of the problem.
    del reference
    passed = [candidate for candidate in candidates if verdicts[candidate.name].status == "ok"]
    rotation = make_rotation(problem, device, seed)
    for direction in directions:
        contestants = [make_contestant(c, functions[c.name], problem, direction, rotation) for c in passed]
        if contestants:
            interleave(contestants, Stopwatch(device), seconds)
        for contestant in contestants:
            contestant.peak_bytes = peak_bytes(contestant, device)
        timed = {contestant.name: contestant for contestant in contestants}
        yield [
            _row(problem, direction, candidate, verdicts[candidate.name], timed, rotation, ceilings)
            for candidate in candidates
        ]


def make_contestant(
    candidate: Candidate,
    function: Callable[[Inputs], Outputs],
    problem: Problem,
    direction: str,
    rotation: Rotation,
) -> Contestant:
    closures = []
    with candidate.context():
        for inputs, cotangents in zip(rotation.inputs, rotation.cotangents, strict=True):
            leaves = {
                name: value.detach().requires_grad_(name in problem.case.gradients)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in inputs.items()
            }
            closures.append(
                _backward_call(function, leaves, problem.case.gradients, cotangents)
                if direction == "backward"
                else _forward_call(function, leaves)
            )
    return Contestant(candidate.name, candidate.context, closures)


def _forward_call(function: Callable[[Inputs], Outputs], leaves: Inputs) -> Callable[[], object]:
    return lambda: function(leaves)


def _backward_call(
    function: Callable[[Inputs], Outputs], leaves: Inputs, gradients: Sequence[str], cotangents: Outputs
) -> Callable[[], object]:
    outputs = function(leaves)
    roots = list(outputs.values())
    wanted = [leaves[name] for name in gradients]
    incoming = [cotangents[name] for name in outputs]
    return lambda: torch.autograd.grad(roots, wanted, incoming, retain_graph=True)


def _row(
    problem: Problem,
    direction: str,
    candidate: Candidate,
    verdict: Verdict,
    timed: dict[str, Contestant],
    rotation: Rotation,
    ceilings: dict[str, Any],
) -> Row:
    judged = (verdict.status, verdict.reason, verdict.error_ratio)
    row = Row(*problem.key(direction), candidate.name, candidate.ours, *judged)
    row.bytes, row.flops = problem.bytes[direction], problem.flops[direction]
    row.rotated_bytes, row.cold = rotation.rotated_bytes, rotation.cold
    contestant = timed.get(candidate.name)
    if contestant is None:
        return row
    seconds = [sample.seconds for sample in contestant.samples]
    row.median_s, row.p20_s, row.p80_s = (percentile(seconds, fraction) for fraction in (0.5, 0.2, 0.8))
    hosts = [sample.host_seconds for sample in contestant.samples if sample.host_seconds is not None]
    row.host_s = statistics.median(hosts) if hosts else None
    row.peak_bytes = contestant.peak_bytes
    row.samples, row.calls = len(seconds), contestant.calls
    row.gb_s = row.bytes / row.median_s / 1e9
    row.tflop_s = row.flops / row.median_s / 1e12
    floor_s = max(row.bytes / (ceilings["copy_gb_s"] * 1e9), row.flops / (ceilings["matmul_tflop_s"] * 1e12))
    row.ceiling_fraction = floor_s / row.median_s
    row.speedup = {
        name: speedup(contestant.samples, other.samples) for name, other in timed.items() if name != candidate.name
    }
    return row


def _device_of(inputs: Inputs) -> torch.device:
    return next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))


# ---- results on disk


class Results:
    """A benchmark's JSON file.  Opening it continues an interrupted run of the same sources on the same machine."""

    def __init__(self, path: Path, benchmark: str, env: dict[str, Any], fresh: bool = False):
        self.path = path
        self.set_aside: Path | None = None
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "benchmark": benchmark,
            "environment": env,
            "ceilings": None,
            "unavailable": {},
            "complete": False,
            "rows": [],
        }
        if path.exists() and not fresh:
            earlier = json.loads(path.read_text())
            if earlier.get("schema") == SCHEMA and earlier["environment"] == env:
                self.data = earlier
            else:
                self.set_aside = path.with_suffix(".previous.json")
                os.replace(path, self.set_aside)

    @property
    def rows(self) -> list[Row]:
        return [Row(**row) for row in self.data["rows"]]

    def has(self, key: tuple[str, str, str, str], candidates: Sequence[Candidate]) -> bool:
        """Whether every candidate's row of this problem and direction is there."""
        present = {row.candidate for row in self.rows if row.key == key}
        return {candidate.name for candidate in candidates} <= present

    def replace_rows(self, rows: Sequence[Row]) -> None:
        """Puts in a group of rows measured together, in place of any earlier ones of the same problem, and saves."""
        keys = {row.key for row in rows}
        kept = [row for row in self.data["rows"] if Row(**row).key not in keys]
        self.data["rows"] = kept + [row.__dict__ for row in rows]
        self.save()

    def save(self) -> None:
        write_atomically(self.path, json.dumps(self.data, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """A reader, or an interrupted run, sees the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
