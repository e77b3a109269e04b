"""Runs an op's cases against float64: the errors by which self-check, accuracy report and benchmarks judge.

The rule (CONTRIBUTING.md, numerics): with torch in float64 on the same values as the reference, a kernel's error may be
at most twice torch's own error in the same dtype, plus one rounding: one unit in the last place of the largest element,
and a quarter of one in the 2-norm, where roundings average out.  Where one draw of the inputs leaves the rule, more
draws decide: `pooled`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import math
import pkgutil
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

import bigkern.ops
from bigkern.ops._case import Case, Inputs, Outputs

# Below so many elements roundings do not average out.
_AVERAGING_ELEMENTS = 64

# One draw of few elements is luck, the kernel's and torch's: attention's fp32 gradients of 120 elements leave the rule
# in 1 draw of 100 where the kernel's error is 1.02 of torch's (root mean square of 300 draws), in 4 where it is 1.2.
# Structure makes few of many: the keys' gradient of one query is that query, 200 times.
DRAWS = 8


class Errors(NamedTuple):
    """Distance of a result from the reference, relative to the reference: in the 2-norm, and in the largest element."""

    norm: float
    max: float


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of one case: this backend's errors beside torch's own in the same dtype."""

    op: str
    function: str
    case: str
    quantity: str
    dtype: torch.dtype
    backend: str
    kernel: Errors
    torch: Errors
    result_dtype: torch.dtype
    elements: int

    @property
    def limit(self) -> Errors:
        return limit(self.torch, self.result_dtype, self.elements)

    @property
    def passed(self) -> bool:
        return within(self.kernel, self.limit)

    @property
    def ratios(self) -> Errors:
        return Errors(_ratio(self.kernel.norm, self.torch.norm), _ratio(self.kernel.max, self.torch.max))

    def __str__(self) -> str:
        return (
            f"{self.case}, {dtype_name(self.dtype)}, {self.quantity}: error {self.kernel.norm:.2e} (norm) "
            f"{self.kernel.max:.2e} (max), allowed {self.limit.norm:.2e} and {self.limit.max:.2e}"
        )


def discover() -> dict[str, list[Case]]:
    """Every op that lists cases, by name, in alphabetical order."""
    found = {}
    for module in pkgutil.iter_modules(bigkern.ops.__path__):
        name = f"{bigkern.ops.__name__}.{module.name}._cases"
        if module.ispkg and importlib.util.find_spec(name):
            found[module.name] = importlib.import_module(name).cases()
    return dict(sorted(found.items()))


def runnable(device: torch.device | str) -> tuple[list[str], dict[str, str]]:
    """The backends that can run on ``device``, and for each of the others the reason why not."""
    running, not_run = [], {}
    for name, state in bigkern.backends().items():
        if not state.available:
            not_run[name] = state.reason
        elif name != "torch" and torch.device(device).type == "cpu":
            not_run[name] = "its kernels need a GPU, and this run is on the CPU"
        else:
            running.append(name)
    return running, not_run


def errors(actual: torch.Tensor, reference: torch.Tensor) -> Errors:
    """Relative errors of ``actual``; infinite where it has another shape or is not finite where the reference is."""
    if actual.shape != reference.shape:
        return Errors(math.inf, math.inf)
    if reference.numel() == 0:
        return Errors(0.0, 0.0)
    actual, reference = actual.detach().double(), reference.detach()
    difference = actual - reference
    if not difference.isfinite().all():
        # Equal infinities differ by NaN; a NaN where the reference has one is right.
        same = (actual == reference) | (actual.isnan() & reference.isnan())
        difference, reference = (torch.where(same, 0, tensor) for tensor in (difference, reference))
        if not difference.isfinite().all():
            return Errors(math.inf, math.inf)
    return Errors(
        _relative(difference.norm().item(), reference.norm().item()),
        _relative(difference.abs().max().item(), reference.abs().max().item()),
    )


def limit(torch_errors: Errors, dtype: torch.dtype, elements: int, factor: float = 2.0) -> Errors:
    """What the rule allows a kernel whose result has ``dtype`` and so many elements, where torch errs by this.

    Twice torch's error and one unit in the last place more; a quarter of one in the 2-norm, where roundings average
    out.  Over a few elements they do not, and torch's own error is luck, often 0: there the rule allows four units, the
    roundings of a handful of operations.
    """
    ulp = torch.finfo(dtype).eps
    norm_floor, max_floor = (ulp / 4, ulp) if elements >= _AVERAGING_ELEMENTS else (4 * ulp, 4 * ulp)
    return Errors(factor * torch_errors.norm + norm_floor, factor * torch_errors.max + max_floor)


def within(found: Errors, allowed: Errors) -> bool:
    return found.norm <= allowed.norm and found.max <= allowed.max


def may_be_luck(found: Errors) -> bool:
    """Whether errors beyond the rule call for more draws; no draw mends what is not finite or has another shape."""
    return math.isfinite(found.norm)


def pooled(draws: Sequence[Errors]) -> Errors:
    """Root mean square of the errors over draws of the inputs, the first among them.

    A kernel that is wrong in one draw alone is still found: its error there is orders of magnitude above the limit.
    """
    return Errors(*(math.sqrt(statistics.fmean(value**2 for value in values)) for values in zip(*draws, strict=True)))


def to_float64(inputs: Inputs) -> Inputs:
    """The same values in float64; integer tensors and plain values are passed on."""
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def run(
    function: Callable[[Inputs], Outputs], inputs: Inputs, gradients: Sequence[str], cotangents: Outputs
) -> Outputs:
    """A function's outputs, and its gradients as ``grad_<input>``."""
    leaves = {
        name: value.detach().requires_grad_(name in gradients) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    outputs = function(leaves)
    if not gradients:
        return {name: output.detach() for name, output in outputs.items()}
    grads = torch.autograd.grad(
        list(outputs.values()), [leaves[name] for name in gradients], [cotangents[name] for name in outputs]
    )
    results = {name: output.detach() for name, output in outputs.items()}
    results.update({f"grad_{name}": grad for name, grad in zip(gradients, grads, strict=True)})
    return results


def make_cotangents(outputs: Outputs, seed: int) -> Outputs:
    """Random gradients of the outputs, in their dtypes."""
    result = {}
    for index, (name, output) in enumerate(outputs.items()):
        generator = torch.Generator(output.device).manual_seed(seed + 7919 * (index + 1))
        result[name] = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    return result


@dataclass(frozen=True)
class Reference:
    """Inputs of a case with the right answer and torch's own error: computed once, compared with every backend."""

    inputs: Inputs
    cotangents: Outputs
    exact: Outputs
    torch_errors: dict[str, Errors]
    device: torch.device | str
    seed: int


def make_reference(case: Case, dtype: torch.dtype, device: torch.device | str, seed: int) -> Reference:
    inputs = case.make_inputs(dtype, device, seed)
    with torch.no_grad():
        cotangents = make_cotangents(case.reference(inputs), seed)
    exact = run(case.reference, to_float64(inputs), case.gradients, to_float64(cotangents))
    own = run(case.reference, inputs, case.gradients, cotangents)
    return Reference(inputs, cotangents, exact, {name: errors(own[name], exact[name]) for name in exact}, device, seed)


def compare(op: str, case: Case, dtype: torch.dtype, backend: str, reference: Reference) -> list[Comparison]:
    """Runs ``case`` on ``backend`` and compares each output and gradient, by `pooled` errors if one draw fails.

    Raises what the backend raises.
    """
    comparisons = _compare(op, case, dtype, backend, reference)
    doubtful = {row.quantity for row in comparisons if not row.passed and may_be_luck(row.kernel)}
    if not doubtful:
        return comparisons
    draws = [comparisons]
    for seed in range(reference.seed + 1, reference.seed + DRAWS):
        another = make_reference(case, dtype, reference.device, seed)
        draws.append(_compare(op, case, dtype, backend, another))
    return [_pool(rows) if rows[0].quantity in doubtful else rows[0] for rows in zip(*draws, strict=True)]


def _compare(op: str, case: Case, dtype: torch.dtype, backend: str, reference: Reference) -> list[Comparison]:
    with bigkern.use_backend(backend), uninitialised_memory_is_nan():
        actual = run(case.call, reference.inputs, case.gradients, reference.cotangents)
    missing = set(reference.exact) ^ set(actual)
    if missing:
        raise RuntimeError(f"{case.name}: outputs differ from the reference's: {', '.join(sorted(missing))}")
    return [
        Comparison(
            op=op,
            function=case.function,
            case=case.name,
            quantity=name,
            dtype=dtype,
            backend=backend,
            kernel=errors(actual[name], exact),
            torch=reference.torch_errors[name],
            result_dtype=actual[name].dtype,
            elements=exact.numel(),
        )
        for name, exact in reference.exact.items()
    ]


def _pool(rows: Sequence[Comparison]) -> Comparison:
    kernel, own = (pooled([getattr(row, side) for row in rows]) for side in ("kernel", "torch"))
    return replace(rows[0], kernel=kernel, torch=own)


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fills every new tensor with NaN, so that an element which a kernel leaves unwritten shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Dd]eterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
            torch.utils.deterministic.fill_uninitialized_memory = fill


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: torch.device | str) -> str:
    """The hardware's own name, for tables and file names."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({_cpu_model()}, {torch.get_num_threads()} threads)"


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def parse_dtype(name: str) -> torch.dtype:
    """``bf16`` or ``bfloat16``; for argparse's ``type=``."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if name in (dtype_name(dtype), str(dtype).removeprefix("torch.")):
            return dtype
    raise argparse.ArgumentTypeError(f"dtype is bf16, fp16 or fp32, got {name!r}")


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _relative(distance: float, size: float) -> float:
    return distance / size if size > 0 else distance


def _ratio(kernel: float, own: float) -> float:
    if kernel == own:
        return 1.0
    return kernel / own if own > 0 else math.inf
