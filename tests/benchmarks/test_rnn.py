"""The recurrent layers' benchmark: counted bytes, every combination, peers that say why they do not take part."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import rnn
from benchmarks.measure import Refused
from bigkern.ops.rnn._cases import make_case


@pytest.mark.parametrize("function", rnn.FUNCTIONS)
def test_counted_bytes_are_those_of_the_tensors(function):
    """Counted again from the tensors themselves, and what the forward pass keeps beside them."""
    sizes = (3, 2, 4, 8)
    case = make_case(function, *sizes)
    inputs = case.make_inputs(torch.float32, "cpu", 0)
    outputs = case.reference(inputs)
    kept = {"rnn": 0, "lstm": 5, "gru": 4}[function] * outputs["output"].nbytes

    def nbytes(tensors):
        return sum(tensor.nbytes for tensor in tensors)

    counted = rnn.count_bytes(function, *sizes, 4)
    assert counted["forward"] == nbytes(inputs.values()) + nbytes(outputs.values()) + kept
    # In: the outputs' gradients, what was kept, the output, the inputs.  Out: each input's gradient.
    read = nbytes(outputs.values()) + kept + outputs["output"].nbytes + nbytes(inputs.values())
    assert counted["backward"] == read + nbytes(inputs.values())


def test_counted_flops():
    assert rnn.count_flops("lstm", 2, 3, 5, 7) == {"forward": 2 * 2 * 3 * 28 * 12, "backward": 4 * 2 * 3 * 28 * 12}


def test_problems_are_every_combination():
    found = rnn.problems(("rnn", "gru"), [(2, 1, 3, 4), (3, 2, 5, 8)], [torch.float32, torch.bfloat16])
    assert len({(p.case.function, p.shape, p.dtype) for p in found}) == len(found) == 8
    assert found[0].key("forward") == ("rnn", "2x1x3x4", "fp32", "forward")


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashrnn", None)
    with pytest.raises(ImportError):
        rnn.peers()["flashrnn"]()


def test_torch_compile_is_not_tried_on_long_sequences():
    with pytest.raises(Refused, match="unrolls 1024 steps"):
        rnn.peers()["torch.compile"]().prepare(make_case("lstm", 1024, 1, 2, 2))
