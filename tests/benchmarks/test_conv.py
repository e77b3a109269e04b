"""Convolution's benchmark: counted bytes and FLOP, every combination, peers, and the whole run at a tiny size."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import conv
from benchmarks.measure import Refused, gate
from bigkern.tools.evaluation import make_reference

SHAPE = (2, 8, 9, 7, 16, 3, 2, 1, 1)
DEPTHWISE = (1, 8, 6, 5, 8, 3, 1, 1, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", conv.FUNCTIONS)
@pytest.mark.parametrize("shape", [SHAPE, DEPTHWISE, (1, 3, 17, 15, 8, 7, 2, 3, 1)])
def test_counted_bytes_are_those_of_the_tensors(function, dtype, shape):
    """Counted again from the tensors themselves: what goes in once, what comes out once."""
    case = conv.make_conv_case(function, shape)
    inputs = case.make_inputs(dtype, "cpu", 0)
    output = case.reference(inputs)["output"]
    counted = conv.count_bytes(function, shape, dtype.itemsize)
    given = sum(tensor.nbytes for tensor in inputs.values())
    assert counted["forward"] == given + output.nbytes
    # In: the output's gradient and what the epilogue saved, input and weight.  Out: the gradient of everything given.
    saved = output.nbytes * ("relu" in function) + output.numel() * ("pool" in function)
    read = output.nbytes + saved + inputs["input"].nbytes + inputs["weight"].nbytes
    assert counted["backward"] == read + given


def test_counted_flops():
    """2 N P Q K C R S (issue: 3x3, 64 channels at 56 x 56)."""
    forward = 2 * 32 * 56 * 56 * 64 * 64 * 9
    assert conv.count_flops((32, 64, 56, 56, 64, 3, 1, 1, 1)) == {"forward": forward, "backward": 2 * forward}
    assert conv.count_flops((1, 8, 6, 5, 8, 3, 1, 1, 8))["forward"] == 2 * 6 * 5 * 8 * 9


def test_shapes_hold_the_planned_ones():
    shapes = conv.SHAPES["cuda"]
    assert len(set(shapes)) == len(shapes)
    planned = [(64, 56, 56, 64, 3, 1, 1, 1), (3, 224, 224, 64, 7, 2, 3, 1), (32, 112, 112, 32, 3, 1, 1, 32)]
    assert all((images, *shape) in shapes for images in (32, 256) for shape in planned)


def test_problems_are_every_combination():
    found = conv.problems(("conv2d", "conv2d_relu_pool"), [SHAPE, DEPTHWISE], [torch.float32, torch.bfloat16])
    assert len({(p.case.function, p.shape, p.dtype) for p in found}) == len(found) == 8
    assert found[0].key("forward") == ("conv2d", "2x8x9x7x16x3x2x1x1", "fp32", "forward")


def test_conv_then_pool_is_the_same_and_only_with_a_pool():
    candidate = conv.peers()["conv then pool"]()
    (pooled,) = conv.problems(("conv2d_relu_pool",), [SHAPE], [torch.float32])
    reference = make_reference(pooled.case, torch.float32, "cpu", 0)
    assert gate(candidate, candidate.prepare(pooled.case), pooled, reference).status == "ok"
    with pytest.raises(Refused):
        candidate.prepare(conv.make_conv_case("conv2d", SHAPE))


def test_the_whole_run_at_a_tiny_size(tmp_path, monkeypatch):
    ceilings = {"copy_gb_s": 10.0, "matmul_tflop_s": 1.0, "matmul_dtype": "fp32"}
    monkeypatch.setattr(command, "measure_ceilings", lambda *args: ceilings)
    arguments = "conv --device cpu --tiny --seconds 0.01 --backends torch --peers torch --shape 1x4x6x5x8x3x1x1x1"
    assert command.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "conv.json").read_text())["rows"]
    assert {(row["function"], row["direction"]) for row in rows} == {
        (function, direction) for function in conv.FUNCTIONS for direction in ("forward", "backward")
    }
    assert all(row["status"] == "ok" for row in rows)


def test_a_shape_has_nine_parts(capsys):
    with pytest.raises(SystemExit):
        command.main(["conv", "--shape", "4x4"])
    assert "IMAGESxCHANNELS" in capsys.readouterr().err
