"""The recurrent layers' benchmark: counted bytes, every combination, peers that say why they do not take part."""

from __future__ import annotations

import sys
import types

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


@pytest.mark.parametrize(("name", "package"), [("flashrnn", "flashrnn"), ("haste", "haste_pytorch")])
def test_a_peer_that_is_not_installed_says_so(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError):
        rnn.peers()[name]()


@pytest.mark.parametrize("function", ["lstm", "gru"])
def test_haste_gets_its_order_of_the_gates(monkeypatch, function):
    """A stand-in that reads the parameters as haste's documentation orders them."""
    module = types.ModuleType("haste_pytorch")

    class Stand(torch.nn.Module):
        def __init__(self, features, hidden):
            super().__init__()
            names = ["kernel", "recurrent_kernel", "bias"] + ["recurrent_bias"] * (function == "gru")
            for name in names:
                self.register_parameter(name, torch.nn.Parameter(torch.empty(1)))

        def forward(self, x, state):
            order = (0, 2, 1, 3) if function == "lstm" else (1, 0, 2)

            def back(weight):
                parts = weight.chunk(len(order), -1)
                return torch.cat([parts[order.index(i)] for i in range(len(order))], -1).t()

            biases = back(self.bias), back(self.recurrent_bias) if function == "gru" else torch.zeros_like(self.bias)
            weights = [back(self.kernel), back(self.recurrent_kernel), *biases]
            operator = torch.lstm if function == "lstm" else torch.gru
            output, *last = operator(x, state, weights, True, 1, 0.0, False, False, False)
            return output, last if function == "lstm" else last[0]

    module.LSTM = module.GRU = Stand
    monkeypatch.setitem(sys.modules, "haste_pytorch", module)
    case = make_case(function, 3, 2, 4, 8)
    inputs = case.make_inputs(torch.float32, "cpu", 0)
    found, expected = rnn.peers()["haste"]().prepare(case)(inputs), case.reference(inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_torch_compile_is_not_tried_on_long_sequences():
    with pytest.raises(Refused, match="unrolls 1024 steps"):
        rnn.peers()["torch.compile"]().prepare(make_case("lstm", 1024, 1, 2, 2))
