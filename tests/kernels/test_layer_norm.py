"""The layer norm kernels, called as raw ops: every path of the launcher, against torch in float64.

On the CPU these are the emulated kernels, on a GPU the compiled ones.  The public op has tests of its own.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigkern.ops import _extension
from bigkern.ops.layer_norm import _cuda, _torch
from tests import emulated
from tests.conftest import pick
from tests.numerics import assert_close, uninitialised_memory_is_nan
from tests.triton.philox import keep_mask

ROOT = Path(__file__).resolve().parents[2]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
PHILOX = (0x1234_5678_9ABC_DEF0, 0x0FED_CBA9_8765)

# Columns by what serves them; forward and backward change at different widths.
NARROW = [1, 7, 8, 64, 100, 127, 128, 129, 256, 512]  # part of a warp, a warp
BLOCK = [1000, 1001, 2048, 4096, 4099, 8192]  # a block, in registers
BEYOND = [16384, 20008, 20001, 50001]  # in shared memory, or cut into chunks


@pytest.fixture(autouse=True)
def kernels(device, request):
    """The kernels, on a GPU small enough that a few rows keep it busy: 2 multiprocessors when emulated."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        yield
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=2, blocks_per_multiprocessor=2)
    yield
    emulator.set_options(**options)


def randn(*shape, dtype=F32, device="cpu", seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale + shift).to(device, dtype)


def inputs(rows, cols, dtype, parameter_dtype, device, *, fused=False, rms=False, dropout_p=0.0, **values):
    """The arguments of a forward call, by name."""
    return dict(
        input=randn(rows, cols, dtype=dtype, device=device, **values),
        residual=randn(rows, cols, dtype=dtype, device=device, seed=1) if fused else None,
        weight=randn(cols, dtype=parameter_dtype, device=device, seed=2, shift=1.0),
        bias=None if rms else randn(cols, dtype=parameter_dtype, device=device, seed=3),
        eps=1e-5,
        rms=rms,
        dropout_p=dropout_p,
        philox=torch.tensor(PHILOX, device=device) if dropout_p > 0 else None,
    )


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(arguments, *, grad_summed=True, need_weight=True, need_bias=True):
    """Forward and backward by the error rule of tests/numerics.py.  Returns the kernels' results.

    Statistics and gradients are compared for the sum that the kernel rounded: that is what it normalises.
    """
    x, residual, weight = arguments["input"], arguments["residual"], arguments["weight"]
    rms, dropout_p, philox = arguments["rms"], arguments["dropout_p"], arguments["philox"]
    need_bias = need_bias and not rms
    assert _cuda.unsupported(*list(arguments.values())[:-1]) is None
    with uninitialised_memory_is_nan():
        output, summed, mean, rstd = _cuda.forward(**arguments)
    norm_input = x if residual is None else summed
    plain = {**arguments, "input": norm_input, "residual": None, "dropout_p": 0.0}
    torch_result = _torch.forward(**plain)
    truth = _torch.forward(**{name: double(value) for name, value in plain.items()})
    assert_close("output", output, torch_result[0], truth[0])
    # One value a row, where the rule's averages mean little: rstd to its own roundings, and the mean, of which a sum
    # near zero leaves little, to those of the differences from it.
    eps = torch.finfo(F32).eps
    assert ((rstd / truth[3] - 1).abs() <= 2 * eps).all()
    assert summed.shape == ((0,) if residual is None else x.shape) and summed.dtype == x.dtype
    assert mean.shape == ((0,) if rms else (x.shape[0],))
    if not rms:
        assert ((mean - truth[2]).abs() <= eps * (truth[2].abs() + 1 / truth[3])).all()
    if residual is not None:
        torch_sum = _torch.forward(**arguments)[1]
        true_sum = _torch.forward(**{name: double(value) for name, value in arguments.items()})[1]
        assert_close("summed", summed, torch_sum, true_sum)

    grad, grad_of_sum = (randn(*x.shape, dtype=x.dtype, device=x.device, seed=seed) for seed in (4, 5))
    grads = [grad, grad_of_sum if grad_summed else None, norm_input]
    rest = [weight, rms, dropout_p, philox, need_weight, need_bias]
    with uninitialised_memory_is_nan():
        found = _cuda.backward(*grads, mean, rstd, *rest)
    torch_grads = _torch.backward(*grads, *torch_result[2:], *rest)
    true_grads = _torch.backward(*map(double, grads), *truth[2:], *map(double, rest))
    for name, *results in zip(("input", "residual", "weight", "bias"), found, torch_grads, true_grads, strict=True):
        if results[0].numel() == 0:
            assert results[1].numel() == 0, name
        else:
            assert_close(f"grad_{name}", *results)
    return (output, summed, mean, rstd), found


@pytest.mark.parametrize("cols", pick(NARROW + BLOCK, [1, 7, 64, 127, 129, 512, 1000, 1001, 4096]))
@pytest.mark.parametrize("dtypes", pick(DTYPES, [(F32, F32), (BF16, F32)]), ids=str)
@pytest.mark.parametrize("rows", pick([1, 5, 67], [5]))
def test_widths_in_registers(rows, cols, dtypes, device):
    check(inputs(rows, cols, *dtypes, device), grad_summed=False)
    check(inputs(rows, cols, *dtypes, device, fused=True, dropout_p=0.25))


@pytest.mark.parametrize("cols", pick(BEYOND, [16384, 20001]))
@pytest.mark.parametrize("dtypes", pick(DTYPES, [(F32, F32), (BF16, BF16)]), ids=str)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("fused", [False, True])
def test_widths_beyond_registers(rows, cols, dtypes, fused, device):
    """A single row is cut into chunks; five occupy two multiprocessors and stay in shared memory where they fit."""
    check(inputs(rows, cols, *dtypes, device, fused=fused, dropout_p=0.1 * fused), grad_summed=fused)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
def test_dtypes_and_norms(dtypes, rms, device):
    for cols in (96, 1016, 333):
        check(inputs(9, cols, *dtypes, device, rms=rms))
        check(inputs(9, cols, *dtypes, device, rms=rms, fused=True, dropout_p=0.5))


@pytest.mark.parametrize("cols", [64, 2048])
def test_without_parameters(cols, device):
    for weight, bias in [(False, False), (True, False), (False, True)]:
        arguments = inputs(3, cols, BF16, BF16, device)
        arguments["weight"] = arguments["weight"] if weight else None
        arguments["bias"] = arguments["bias"] if bias else None
        check(arguments)


@pytest.mark.parametrize("cols", pick([64, 1000, 16384, 20000], [64, 16384]))
@pytest.mark.parametrize("need_weight, need_bias", [(False, False), (True, False), (False, True)])
def test_only_the_gradients_that_are_needed(cols, need_weight, need_bias, device):
    _, grads = check(inputs(5, cols, BF16, F32, device), need_weight=need_weight, need_bias=need_bias)
    assert grads[2].shape == ((cols,) if need_weight else (0,))
    assert grads[3].shape == ((cols,) if need_bias else (0,))


@pytest.mark.parametrize("cols", pick([16, 72, 1000, 4096, 20000], [72, 1000]))
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_misaligned_views_and_row_strides(cols, dtype, device):
    """Views that start at an odd element, odd row strides, aligned row strides, and one row repeated by stride 0."""

    def view(offset, stride, seed):
        storage = randn(offset + 6 * stride + cols, dtype=dtype, device=device, seed=seed)
        return storage.as_strided((7, cols), (stride, 1), offset)

    arguments = inputs(7, cols, dtype, F32, device, fused=True, dropout_p=0.3)
    for offset, stride in [(1, cols), (0, cols + 1), (8, cols + 8), (0, 0), (3, 0)]:
        check({**arguments, "input": view(offset, stride, 10)})
        check({**arguments, "residual": view(offset, stride, 11)})
    shifted = randn(cols + 1, device=device, seed=12)[1:]
    check({**arguments, "weight": shifted})
    check({**arguments, "bias": shifted})


def test_strided_gradients(device):
    arguments = inputs(5, 96, BF16, BF16, device, fused=True, dropout_p=0.5)
    _, summed, mean, rstd = _cuda.forward(**arguments)
    grad, grad_summed = (randn(5, 96, dtype=BF16, device=device, seed=seed) for seed in (1, 2))
    rest = [arguments["weight"], False, 0.5, arguments["philox"], True, True]
    expected = _cuda.backward(grad, grad_summed, summed, mean, rstd, *rest)
    for offset, stride in [(0, 104), (1, 97)]:
        spread = []
        for tensor in (grad, grad_summed, summed):
            storage = torch.full((offset + 5 * stride,), torch.nan, dtype=BF16, device=device)
            spread.append(storage.as_strided((5, 96), (stride, 1), offset).copy_(tensor))
        found = _cuda.backward(*spread, mean, rstd, *rest)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cols", pick([64, 1000, 4099, 16384, 30000], [64, 4099, 16384]))
@pytest.mark.parametrize("scale, shift", pick([(1, 1e3), (1e-3, 0), (1e3, 0), (1e-3, 1), (0, 5)], [(1, 1e3), (1e3, 0)]))
def test_scales_and_a_mean_far_from_zero(cols, scale, shift, device):
    for fused in (False, True):
        check(inputs(3, cols, F32, F32, device, fused=fused, scale=scale, shift=shift))


def test_mean_far_from_zero_is_more_exact_than_torch(device):
    """The center is subtracted exactly; what is left of a mean of 1e3 is the rounding of the differences."""
    arguments = inputs(16, 4096, F32, F32, device, shift=1e3)
    output = _cuda.forward(**arguments)[0]
    truth = _torch.forward(**{name: double(value) for name, value in arguments.items()})[0]
    assert (output.double() - truth).abs().max() < 4e-6


@pytest.mark.parametrize("cols", [64, 129, 1000, 16384, 20000])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rms", [False, True])
def test_a_row_with_nan_or_infinity_keeps_it(cols, value, rms, device):
    arguments = inputs(5, cols, F32, F32, device, rms=rms, fused=True)
    clean = _cuda.forward(**arguments)
    arguments["input"][2, cols // 2] = value
    output, summed, mean, rstd = _cuda.forward(**arguments)
    others = [0, 1, 3, 4]
    for found, expected in zip((output, summed, rstd), (clean[0], clean[1], clean[3]), strict=True):
        assert torch.equal(found[others], expected[others])
    expected = _torch.forward(**arguments)[0][2]
    assert torch.equal(output[2].isnan(), expected.isnan())
    assert torch.equal(output[2].nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)) or rms

    grad = randn(5, cols, device=device, seed=3)
    grads = _cuda.backward(grad, None, summed, mean, rstd, arguments["weight"], rms, 0.0, None, True, False)
    assert grads[0][others].isfinite().all() and grads[0][2].isnan().any()
    assert grads[2].isnan().any()


@pytest.mark.parametrize("cols", [5, 8, 1001, 4096, 20000])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_dropout_mask(cols, dropout_p, device):
    """Bit for bit the mask of Philox in numpy, forward and backward."""
    rows, seed, offset = 3, *PHILOX
    kept = torch.from_numpy(keep_mask(seed, offset, torch.arange(rows * cols).numpy(), dropout_p)).view(rows, cols)
    kept = kept.to(device)
    arguments = inputs(rows, cols, F32, F32, device, fused=True, dropout_p=dropout_p)
    arguments["input"].fill_(1.0)
    arguments["residual"].zero_()
    _, summed, mean, rstd = _cuda.forward(**arguments)
    scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0
    assert torch.equal(summed, torch.where(kept, torch.tensor(scale, device=device), 0.0))

    grad_summed = torch.ones(rows, cols, device=device)
    zero = torch.zeros(rows, cols, device=device)
    rest = [arguments["weight"], False, dropout_p, arguments["philox"], False, False]
    grad_input, grad_residual, *_ = _cuda.backward(zero, grad_summed, summed, mean, rstd, *rest)
    assert torch.equal(grad_residual, grad_summed)
    assert torch.equal(grad_input, torch.where(kept, torch.tensor(scale, device=device), 0.0))


@pytest.mark.parametrize("cols", [64, 1000, 4096, 16384, 20001])
def test_equal_inputs_give_equal_bits(cols, device, request):
    """Under any schedule of the threads."""
    emulator = request.getfixturevalue("emulator") if device.type == "cpu" else None
    schedules = emulator.schedules(seeds=1) if emulator else [{}] * 4
    arguments = inputs(9, cols, BF16, F32, device, fused=True, dropout_p=0.25)
    grad = randn(9, cols, dtype=BF16, device=device, seed=3)
    first = None
    for schedule in schedules:
        if emulator:
            emulator.set_options(**schedule)
        _, summed, mean, rstd = forward = _cuda.forward(**arguments)
        rest = [arguments["weight"], False, 0.25, arguments["philox"], True, True]
        results = (*forward, *_cuda.backward(grad, grad, summed, mean, rstd, *rest))
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.sanitized
@pytest.mark.parametrize("cols", [12, 7, 200, 1000, 1001, 9216])
def test_small(cols, device):
    """One width for every path but the widest, small enough for the race checker and AddressSanitizer."""
    check(inputs(5, cols, F32, F32, device, fused=True, dropout_p=0.25))


@pytest.mark.sanitized
@pytest.mark.parametrize("rows, cols", [(2, 16384), (1, 9001)])
def test_small_wide(rows, cols, device):
    check(inputs(rows, cols, F32, F32, device), grad_summed=False)


@pytest.mark.emulated
def test_rows_more_than_two_to_the_31_elements_apart():
    """Address space that is reserved and never touched but for three rows of it."""
    rows, cols, stride = 3, 1000, (1 << 31) + 8
    size = ((rows - 1) * stride + cols) * 2
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve) as memory:
        buffer = (ctypes.c_char * size).from_buffer(memory)
        far = torch.frombuffer(buffer, dtype=BF16, count=size // 2).as_strided((rows, cols), (stride, 1))
        arguments = inputs(rows, cols, BF16, F32, "cpu", fused=True)
        near = _cuda.forward(**arguments)
        far.copy_(arguments["residual"])
        assert all(map(torch.equal, _cuda.forward(**{**arguments, "residual": far}), near))
        far.copy_(arguments["input"])
        assert all(map(torch.equal, _cuda.forward(**{**arguments, "input": far}), near))

        grad = randn(rows, cols, dtype=BF16, seed=3)
        _, summed, mean, rstd = near
        rest = [mean, rstd, arguments["weight"], False, 0.0, None, True, True]
        expected = _cuda.backward(grad, grad, summed, *rest)
        far.copy_(summed)
        assert all(map(torch.equal, _cuda.backward(grad, grad, far, *rest), expected))
        far.copy_(grad)
        assert all(map(torch.equal, _cuda.backward(far, far, summed, *rest), expected))
        del far, buffer


@pytest.mark.slow
def test_more_than_65535_rows(device):
    check(inputs(70_000, 8, F32, F32, device))


def test_no_rows_and_no_columns(device):
    for rows, cols in [(0, 8), (3, 0)]:
        arguments = inputs(rows, cols, F32, F32, device)
        output, _, mean, rstd = _cuda.forward(**arguments)
        assert output.shape == (rows, cols) and mean.shape == rstd.shape == (rows,)
        grads = _cuda.backward(output, None, output, mean, rstd, arguments["weight"], False, 0.0, None, True, True)
        assert grads[0].shape == (rows, cols) and torch.equal(grads[2], torch.zeros(cols, device=device))


def test_refusals_name_the_argument(device):
    """Raw ops check what keeps a kernel inside its tensors."""
    good = inputs(4, 8, F32, F32, device, fused=True, dropout_p=0.5)
    bad = {
        "input": [(randn(4, device=device), "input .* expected two dimensions"), (good["input"].double(), "Double")],
        "residual": [
            (good["residual"][:3], r"residual is Float \[3, 8\].*expected Float \[4, 8\]"),
            (good["residual"].bfloat16(), "residual is BFloat16.*expected Float"),
            (randn(8, 4, device=device).t(), "residual has column stride 4"),
            (None, "without a residual"),
        ],
        "weight": [
            (good["weight"][:7], r"weight .*expected a contiguous Float \[8\]"),
            (good["weight"].half(), "bias"),
        ],
        "philox": [(None, "philox is missing"), (torch.zeros(2, device=device), r"philox .*Long \[2\]")],
        "dropout_p": [(1.5, "dropout_p is 1.5")],
    }
    for name, cases in bad.items():
        for value, message in cases:
            with pytest.raises(RuntimeError, match=message):
                torch.ops.bigkern_cuda.layer_norm_forward(**{**good, name: value})
    mean = rstd = torch.ones(4, device=device)
    call = torch.ops.bigkern_cuda.layer_norm_backward
    with pytest.raises(RuntimeError, match="grad_output is missing"):
        call(None, good["input"], good["input"], mean, rstd, None, False, 0.0, None, False, False)
    with pytest.raises(RuntimeError, match=r"rstd is .*expected a contiguous Float \[4\]"):
        call(good["input"], None, good["input"], mean, rstd[:3], None, False, 0.0, None, False, False)


@pytest.mark.emulated
def test_unsupported_says_why():
    good = inputs(4, 8, BF16, F32, "cpu")
    reasons = {
        "float64": {"input": good["input"].double()},
        "residual is torch.float32": {"residual": good["input"].float()},
        "parameters of one dtype": {"bias": good["bias"].bfloat16()},
        "the same, or float32": {"weight": good["weight"].half(), "bias": None},
        "before adding a residual": {"dropout_p": 0.5},
        "no bias": {"rms": True},
        "meta": {"input": good["input"].to("meta")},
    }
    for reason, changed in reasons.items():
        arguments = {**good, **changed}
        arguments.pop("philox")
        assert reason in _cuda.unsupported(**arguments)


@pytest.mark.emulated
def test_cpu_tensors_without_the_emulated_kernels():
    script = """
import torch
from bigkern.ops.layer_norm import _cuda
reason = _cuda.unsupported(torch.ones(2, 2), None, None, None, 1e-5, False, 0.0)
assert "only emulated" in reason, reason
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


# Without parameters: every row reads them again, from the caches.
_COUNT = """
import json, torch
from tests import emulated
from tests.kernels.test_layer_norm import BF16, F32, inputs, randn
from bigkern.ops.layer_norm import _cuda
emulator = emulated.load("race")
emulator.set_options(multiprocessors=1, blocks_per_multiprocessor=1)
found = []
def count(function, *args, **kwargs):
    emulator.reset_counters()
    results = function(*args, **kwargs)
    found.append(emulator.counters())
    return results
for rows, cols in [(512, 64), (256, 1000), (64, 4096)]:
    arguments = inputs(rows, cols, BF16, BF16, "cpu", fused=True)
    arguments |= {"weight": None, "bias": None}
    grad = randn(rows, cols, dtype=BF16)
    count(_cuda.forward, **{**arguments, "residual": None})
    _, summed, mean, rstd = count(_cuda.forward, **arguments)
    count(_cuda.backward, grad, None, summed, mean, rstd, None, False, 0.0, None, False, False)
    count(_cuda.backward, grad, grad, summed, mean, rstd, None, False, 0.0, None, False, False)
    count(_cuda.backward, grad, None, summed, mean, rstd, None, False, 0.0, None, True, True)
print(json.dumps(found))
"""


@pytest.mark.emulated
def test_bytes_moved_are_the_floor():
    """Loads and stores of global memory, counted by the race build, are those of csrc/kernels/layer_norm.cuh's floors.

    The counter sees each lane's load of its row's statistics, which are one transaction of a warp.
    """
    environment = {**os.environ, **emulated.environment("race"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _COUNT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = iter(json.loads(done.stdout))
    for rows, cols, lanes in [(512, 64, 4), (256, 1000, 128), (64, 4096, 256)]:
        matrix, statistics = 2 * rows * cols, 8 * rows
        sums, gradients = 8 * cols, 4 * cols  # of one block, and rounded
        for loads, stores in [
            (matrix, matrix + statistics),
            (2 * matrix, 2 * matrix + statistics),
            (2 * matrix + statistics * lanes, matrix),
            (3 * matrix + statistics * lanes, matrix),
            (2 * matrix + statistics * lanes + sums, matrix + sums + gradients),
        ]:
            count = next(counts)
            assert (count["global_load_bytes"], count["global_store_bytes"]) == (loads, stores)
