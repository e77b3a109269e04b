"""Attention's benchmark: counted bytes and FLOP, every combination, peers that refuse or say they are not installed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention
from benchmarks.measure import Refused, gate
from bigkern.tools.evaluation import make_reference

SHAPE = (2, 4, 2, 12, 20, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", attention.FUNCTIONS)
def test_counted_bytes_are_those_of_the_tensors(function, dtype):
    """Counted again from the tensors themselves: what goes in once, what comes out once, and lse."""
    (problem,) = attention.problems((function,), [SHAPE], [dtype])
    inputs = problem.case.make_inputs(dtype, "cpu", 0)
    inputs.pop("philox", None)
    read = sum(tensor.nbytes for tensor in inputs.values())
    output = problem.case.reference(problem.case.make_inputs(dtype, "cpu", 0))["output"].nbytes
    lse = 4 * 2 * 4 * 12
    assert problem.bytes["forward"] == read + output + lse
    gradients = sum(inputs[name].nbytes for name in problem.case.gradients)
    assert problem.bytes["backward"] == read + 2 * output + lse + gradients


def test_flop_of_the_windows():
    full, causal, window = (attention.count_flops(f, 1, 1, 1, 4096, 4096, 64)["forward"]
                            for f in ("attention", "attention_causal", "attention_window"))  # fmt: skip
    assert full == 4 * 4096 * 4096 * 64
    assert causal == 4 * 64 * 4096 * 4097 // 2
    assert window == 4 * 64 * sum(min(i + 1, 1024) for i in range(4096))
    backward = attention.count_flops("attention", 1, 1, 1, 4096, 4096, 64)["backward"]
    assert backward == full * 5 // 2


def test_gpu_shapes_hold_the_planned_ones():
    shapes = attention.SHAPES["cuda"]
    assert {shape[5] for shape in shapes} >= {64, 128, 256} and {shape[3] for shape in shapes} >= {512, 32768}


@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_a_peer_that_is_not_installed_says_so(monkeypatch, name):
    import sys

    monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)
    with pytest.raises(ImportError):
        attention.peers()[name]()


def test_torchs_backends_serve_what_they_can():
    """The math backend runs here: it must pass the gate where it does not refuse."""
    candidate = attention.peers()["sdpa math"]()
    served = set()
    for problem in attention.problems(attention.FUNCTIONS, [SHAPE], [torch.float32]):
        try:
            function = candidate.prepare(problem.case)
        except Refused:
            continue
        if "dropout" in problem.case.function:
            continue  # torch draws a mask of its own
        reference = make_reference(problem.case, torch.float32, "cpu", 0)
        assert gate(candidate, function, problem, reference).status == "ok"
        served.add(problem.case.function)
    assert served == {"attention", "attention_causal", "attention_bool_mask", "attention_bias"}
