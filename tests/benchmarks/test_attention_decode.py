"""Decoding's benchmark: counted bytes and FLOP, every combination, peers that say they are not installed."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import attention_decode
from benchmarks.measure import gate
from bigkern.tools.evaluation import make_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counted_bytes_are_those_of_the_tensors(dtype):
    """Counted again from the tensors themselves: in once, but for the rows written over, and out."""
    shape = (2, 4, 2, 3, 40, 16)
    (problem,) = attention_decode.problems(attention_decode.FUNCTIONS, [shape], [dtype])
    inputs = problem.case.make_inputs(dtype, "cpu", 0)
    read = sum(tensor.nbytes for tensor in inputs.values()) - inputs["key"].nbytes - inputs["value"].nbytes
    written = inputs["key"].nbytes + inputs["value"].nbytes + inputs["query"].nbytes
    assert problem.bytes["forward"] == read + written


def test_flop_count_what_each_query_sees():
    assert attention_decode.count_flops(1, 4, 2, 1, 100, 64) == {"forward": 4 * 4 * 64 * 100}
    assert attention_decode.count_flops(1, 4, 2, 2, 100, 64) == {"forward": 4 * 4 * 64 * (99 + 100)}


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError):
        attention_decode.peers()["flash-attn"]()


@pytest.mark.parametrize("name", ["torch", "sdpa math", "sdpa flash"])
def test_torchs_backends_pass_the_gate(name):
    candidate = attention_decode.peers()[name]()
    for problem in attention_decode.problems(("attention_decode",), attention_decode.SHAPES["tiny"], [torch.float32]):
        reference = make_reference(problem.case, torch.float32, "cpu", 0)
        assert gate(candidate, candidate.prepare(problem.case), problem, reference).status == "ok"
