"""The fused recurrent cells compiled for GPUs that are not here: they must compile and keep to registers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bigkern.ops.rnn._schema import CELLS, GATES, SAVED, VARIANTS
from tests.conftest import pick
from tests.triton import aot

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("architecture", pick(aot.ARCHITECTURES, [90]))
@pytest.mark.parametrize("cell", range(4), ids=CELLS)
def test_cells_compile_without_spills(cell, architecture, monkeypatch):
    from triton.runtime import driver

    from bigkern.ops.rnn import _triton, _triton_kernels

    compiled: list = []
    for name in ("cell_forward", "cell_backward"):
        kernel = getattr(_triton_kernels, name)
        monkeypatch.setattr(_triton_kernels, name, aot._Catcher(kernel, compiled))
    before = driver._active
    driver.set_active(aot._Driver(architecture))
    try:
        steps, batch, hidden, half = 2, 3, 64, torch.bfloat16

        def tensor(*shape):
            return torch.zeros(shape, dtype=half)

        h0, c0 = tensor(1, batch, hidden), tensor(1, batch, hidden) if CELLS[cell] == "LSTM" else None
        rows, gates = steps * batch, GATES[cell] * hidden
        bias = tensor(1, hidden) if CELLS[cell] == "GRU" else None
        step = VARIANTS.index("step")
        weights = tensor(1, gates, hidden)
        _triton._forward(tensor(rows, gates), weights, bias, h0, c0, h0 + 1, None, None, cell, True, step)
        saved = tensor(rows, SAVED[cell] * hidden) if SAVED[cell] else tensor(0)
        output = tensor(rows, hidden)
        grads = (output, h0, c0)
        _triton._backward(*grads, output, saved, tensor(1, hidden, gates), h0, c0, None, None, None, cell, step)
    finally:
        driver._active = before
    names = [name for name, _ in compiled]
    assert set(names) == {"cell_forward", "cell_backward"} and len(names) == 2 * steps
    for name, kernel in compiled:
        found = aot.inspect(kernel.asm["cubin"])
        assert found["LDL"] == found["STL"] == found["local"] == found["ATOM"] == 0, (name, found)
        assert found["registers"] <= 64, (name, found)


@pytest.mark.parametrize("architecture", pick(aot.ARCHITECTURES, [90]))
@pytest.mark.parametrize(("cell", "hidden"), pick([(0, 128), (1, 128), (2, 64), (3, 128)], [(2, 64), (3, 128)]))
def test_whole_sequences_compile_without_spills(cell, hidden, architecture, monkeypatch):
    from triton.runtime import driver

    from bigkern.ops.rnn import _triton, _triton_kernels

    compiled: list = []
    for name in ("sequence_forward", "sequence_backward"):
        kernel = getattr(_triton_kernels, name)
        monkeypatch.setattr(_triton_kernels, name, aot._Catcher(kernel, compiled))
    before = driver._active
    driver.set_active(aot._Driver(architecture))
    try:
        lengths, dtype = torch.tensor([4, 2]), torch.bfloat16
        state, gates = torch.zeros(2, 2, hidden, dtype=dtype), GATES[cell] * hidden
        bias = torch.zeros(2, hidden, dtype=dtype) if CELLS[cell] == "GRU" else None
        rows, weight = torch.zeros(6, 2 * gates, dtype=dtype), torch.zeros(2, gates, hidden, dtype=dtype)
        c0, offsets = state if CELLS[cell] == "LSTM" else None, torch.tensor([0, 2, 4, 5])
        _triton._forward(rows, weight, bias, state, c0, state, offsets, lengths, cell, True, 0)
        output, saved = rows[:, : 2 * hidden].contiguous(), torch.zeros(6, 2 * SAVED[cell] * hidden, dtype=dtype)
        grads = (output, state, c0)
        rest = (weight.mT.contiguous(), state, c0, state, offsets, lengths)
        _triton._backward(*grads, output, saved, *rest, cell, 0)
    finally:
        driver._active = before
    assert [name for name, _ in compiled] == ["sequence_forward", "sequence_backward"]
    for name, kernel in compiled:
        found = aot.inspect(kernel.asm["cubin"])
        assert found["LDL"] == found["STL"] == found["local"] == found["ATOM"] == 0, (name, found)
        assert found["registers"] <= 255 and kernel.metadata.shared <= aot.MAX_SHARED[architecture], (name, found)
