"""Layer norm by clusters of blocks, for rows that one block cannot hold, where a GPU has clusters (capability 9.0).

The same checks as in test_layer_norm.py, whose kernels serve the widths beside these and every other GPU.
"""

from __future__ import annotations

import json
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
from tests.kernels.test_layer_norm import BF16, F16, F32, check, double, inputs, randn

ROOT = Path(__file__).resolve().parents[2]

# Emulated: 2 multiprocessors of 2 blocks, so that a single row occupies them with clusters of 2, and 64 KiB of shared
# memory, so that rows leave one block's shared memory early.
DEVICE = dict(compute_capability=90, multiprocessors=2, blocks_per_multiprocessor=2, max_shared_bytes=64 << 10)


@pytest.fixture(autouse=True)
def control(device, request):
    """The emulator's control module, None on a GPU."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        yield None
        return
    control = request.getfixturevalue("emulator")
    options = control.options()
    control.set_options(**DEVICE)
    yield control
    control.set_options(**options)


def launches(control, arguments) -> tuple[int, int]:
    """Kernels launched forward and backward, with the gradients of weight and bias, whose last kernel is one more."""
    control.reset_counters()
    _, summed, mean, rstd = _cuda.forward(**arguments)
    forward = control.counters()["launches"]
    grad = randn(*arguments["input"].shape, dtype=arguments["input"].dtype)
    rest = [arguments["weight"], arguments["rms"], arguments["dropout_p"], arguments["philox"], True, False]
    norm_input = arguments["input"] if arguments["residual"] is None else summed
    _cuda.backward(grad, None, norm_input, mean, rstd, *rest)
    return forward, control.counters()["launches"] - forward


# Widths about every switch, and the kernels of each direction: 1 and 2 are a cluster's.
SWITCHES = [
    (F32, 1, 8192, (1, 2)),  # forward in one block's registers
    (F32, 1, 8196, (1, 2)),
    (F32, 3, 8196, (1, 2)),  # forward in one block's shared memory
    (F32, 3, 32768, (1, 2)),
    (F32, 1, 32772, (1, 3)),  # too wide for the backward pass
    (F32, 1, 131072, (1, 3)),
    (F32, 1, 131076, (2, 3)),  # too wide for either
    (BF16, 1, 16392, (1, 2)),
    (BF16, 3, 65536, (1, 2)),
    (BF16, 1, 65544, (1, 3)),
    (BF16, 1, 131072, (1, 3)),
    (BF16, 1, 131080, (2, 3)),
    (F16, 1, 16392, (1, 2)),
    (F32, 1, 8193, (1, 2)),  # single elements
    (F16, 1, 9001, (1, 2)),
    (BF16, 1, 32767, (1, 2)),
    (F32, 1, 32769, (2, 3)),
]
SMALL = [1, 2, 4, 7, 9, 13, 14]


@pytest.mark.parametrize("dtype, rows, cols, kernels", pick(SWITCHES, [SWITCHES[i] for i in SMALL]), ids=str)
def test_widths(dtype, rows, cols, kernels, device, control):
    arguments = inputs(rows, cols, dtype, F32, device)
    if control:
        assert launches(control, arguments) == kernels
    check(arguments, grad_summed=False)


@pytest.mark.emulated
def test_every_switch(control):
    """Which kernels serve a width, and that only capability 9.0 has clusters."""
    for dtype, rows, cols, kernels in pick(SWITCHES, SWITCHES[1:3]):
        assert launches(control, inputs(rows, cols, dtype, dtype, "cpu")) == kernels
    for capability in (80, 100, 120):
        control.set_options(compute_capability=capability)
        assert launches(control, inputs(1, 8196, F32, F32, "cpu")) == (2, 3)


@pytest.mark.parametrize("multiprocessors, rows", [(2, 1), (4, 1), (16, 1), (16, 3)])
def test_cluster_sizes(multiprocessors, rows, device, control):
    """Few rows are cut into more blocks: 2, 4, 8 and 8."""
    if control:
        control.set_options(multiprocessors=multiprocessors)
    check(inputs(rows, 8200, BF16, F32, device, fused=True, dropout_p=0.25))
    check(inputs(rows, 8193, F32, F32, device))


@pytest.mark.parametrize("dtypes", pick([(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16)], [(F32, F32), (F16, F16)]))
@pytest.mark.parametrize("rms", [False, True])
def test_residual_dropout_and_parameters(dtypes, rms, device):
    for cols in (8208, 8201):
        check(inputs(1, cols, *dtypes, device, rms=rms, fused=True, dropout_p=0.5))
    bare = inputs(1, 8208, *dtypes, device, rms=rms)
    check({**bare, "weight": None, "bias": None})
    check(bare, need_weight=False)


@pytest.mark.parametrize("cols", [9216, 4099])
def test_a_cluster_takes_many_rows(cols, device, control):
    """One cluster at a time backward: the exchange's buffers are used again and again."""
    if control:
        control.set_options(multiprocessors=1, max_shared_bytes=8 << 10)
    check(inputs(5, cols, BF16, F32, device, fused=True, dropout_p=0.1))


@pytest.mark.parametrize("scale, shift", [(1, 1e3), (1e3, 0), (1e-3, 1)])
def test_scales_and_a_mean_far_from_zero(scale, shift, device):
    check(inputs(1, 8200, F32, F32, device, scale=scale, shift=shift))
    arguments = inputs(1, 12288, F32, F32, device, shift=1e3)
    truth = _torch.forward(**{name: double(value) for name, value in arguments.items()})[0]
    assert (_cuda.forward(**arguments)[0].double() - truth).abs().max() < 4e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_nan_or_infinity_keeps_it(value, device, control):
    if control:
        control.set_options(multiprocessors=1, max_shared_bytes=8 << 10)
    arguments = inputs(3, 8200, F32, F32, device)
    clean = _cuda.forward(**arguments)
    arguments["input"][1, 8000] = value
    output, _, mean, rstd = _cuda.forward(**arguments)
    others = [0, 2]
    for found, expected in zip((output, mean, rstd), (clean[0], clean[2], clean[3]), strict=True):
        assert torch.equal(found[others], expected[others])
    assert output[1].isnan().any()
    grad = randn(3, 8200, device=device, seed=3)
    grads = _cuda.backward(
        grad, None, arguments["input"], mean, rstd, arguments["weight"], False, 0.0, None, True, True
    )
    assert grads[0][others].isfinite().all() and grads[0][1].isnan().any()


@pytest.mark.parametrize("cols", [8208, 8201])
def test_equal_inputs_give_equal_bits(cols, device, control):
    """Under any schedule of the threads and of the cluster's blocks."""
    if control:
        control.set_options(multiprocessors=3, blocks_per_multiprocessor=1, max_shared_bytes=8 << 10)
    arguments = inputs(3, cols, BF16, F32, device, fused=True, dropout_p=0.25)
    grad = randn(3, cols, dtype=BF16, device=device, seed=3)
    first = None
    for schedule in control.schedules(seeds=2) if control else [{}] * 4:
        if control:
            control.set_options(**schedule)
        _, summed, mean, rstd = forward = _cuda.forward(**arguments)
        rest = [arguments["weight"], False, 0.25, arguments["philox"], True, True]
        results = (*forward, *_cuda.backward(grad, grad, summed, mean, rstd, *rest))
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.sanitized
@pytest.mark.parametrize("rows, cols", [(1, 8200), (3, 4098)])
def test_small(rows, cols, device, control):
    """Both kernels of each direction, small enough for the race checker and AddressSanitizer."""
    if control:
        control.set_options(multiprocessors=1, max_shared_bytes=8 << 10)
    check(inputs(rows, cols, F32, F32, device, fused=True, dropout_p=0.25))


_COUNT = """
import json
from tests import emulated
from tests.kernels.test_layer_norm import BF16, inputs, randn
from tests.kernels.test_layer_norm_cluster import DEVICE
from bigkern.ops.layer_norm import _cuda
emulator = emulated.load("race")
emulator.set_options(**DEVICE)
found = []
for fused in (False, True):
    arguments = inputs(1, 16416, BF16, BF16, "cpu", fused=fused) | {"weight": None, "bias": None}
    emulator.reset_counters()
    _, summed, mean, rstd = _cuda.forward(**arguments)
    found.append(emulator.counters())
    grad = randn(1, 16416, dtype=BF16)
    emulator.reset_counters()
    _cuda.backward(grad, None, arguments["input"], mean, rstd, None, False, 0.0, None, False, False)
    found.append(emulator.counters())
print(json.dumps(found))
"""


@pytest.mark.emulated
def test_a_row_is_read_once():
    """Bytes of global memory, counted by the race build, are the floors of csrc/kernels/layer_norm.cuh."""
    environment = {**os.environ, **emulated.environment("race"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _COUNT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = iter(json.loads(done.stdout))
    matrix, statistics = 2 * 16416, 8
    threads = 4 * 512  # backward, of which each loads the statistics of its row
    for tensors in (1, 2):
        forward, backward = next(counts), next(counts)
        assert forward["global_load_bytes"] == tensors * matrix
        assert forward["global_store_bytes"] == tensors * matrix + statistics
        assert backward["global_load_bytes"] == 2 * matrix + statistics * threads
        assert backward["global_store_bytes"] == matrix
