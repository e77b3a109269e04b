"""The optimizers' benchmark: tensor lists of real models, counted bytes, steps that are gated and timed apart."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import pytest
import torch

from benchmarks import adam, conftest
from benchmarks.measure import backend_candidate, gate
from bigkern.tools.evaluation import make_reference


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [("resnet50", 161, 25_557_032), ("bert-base", 199, 109_482_240), ("gpt2", 148, 124_439_808)],
)
def test_tensor_lists_are_those_of_the_models(model, tensors, elements):
    """The counts that torchvision and transformers report for them."""
    sizes = adam.sizes_of(model)
    assert (len(sizes), sum(sizes)) == (tensors, elements)


def test_other_shapes():
    assert adam.sizes_of("3x64") == [64, 64, 64]
    assert sum(adam.sizes_of("64x16777216")) >= 1e9 and "64x16777216" in adam.SHAPES["cuda"]
    for wrong in ("resnet", "4x", "0x4", "4x4x4"):
        with pytest.raises(argparse.ArgumentTypeError, match="COUNTxSIZE"):
            adam.parse_shape(wrong)
    assert adam.parse_shape("gpt2") == "gpt2"


@pytest.mark.parametrize("function", adam.FUNCTIONS)
def test_counted_bytes_are_those_of_the_arrays(function):
    """Everything but the gradient is read and written."""
    problem = adam.problems((function,), ["3x50"], [torch.bfloat16])[0]
    inputs = problem.case.make_inputs(torch.bfloat16, "cpu", 0)
    moved = sum(value.nbytes * (1 if name.startswith("grad") else 2) for name, value in inputs.items())
    assert problem.bytes == {"step": moved}
    assert adam.count_bytes("adam", 10**9, 4) == 28 * 10**9


@pytest.mark.parametrize("function", adam.FUNCTIONS)
@pytest.mark.parametrize("peer", ["bigkern torch", "torch foreach", "torch fused"])
def test_every_candidate_passes_the_gate_then_steps_in_place(function, peer):
    problem = adam.problems((function,), ["3x50"], [torch.float32])[0]
    candidate = backend_candidate("torch") if peer == "bigkern torch" else adam.peers()[peer]()
    with candidate.context():
        call = candidate.prepare(problem.case)
        reference = make_reference(problem.case, torch.float32, "cpu", 0)
        assert gate(candidate, call, problem, reference).status == "ok"

        inputs = problem.case.make_inputs(torch.float32, "cpu", 0)
        before = inputs["param 1"].clone()
        first = call(inputs)["param"]
        assert torch.equal(inputs["param 1"], before) and not torch.equal(first[50:100], before)
        assert call(inputs) == {}
        assert call(inputs) == {}
        assert not torch.equal(inputs["param 1"], before)


def test_a_wrong_step_does_not_pass():
    problem = adam.problems(("adam",), ["3x50"], [torch.float32])[0]
    reference = make_reference(problem.case, torch.float32, "cpu", 0)
    candidate = adam.peers()["torch foreach"]()
    call = adam.stepping("adamw", adam._torch(foreach=True))
    assert gate(candidate, call, problem, reference).status == "wrong"


def test_apex_is_called_with_its_own_signature(monkeypatch):
    """FusedAdam counts steps in the group; torch stands in for its kernel."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "apex", None)
        with pytest.raises(ImportError):
            adam.peers()["apex"]()

    class FusedAdam(torch.optim.Adam):
        def __init__(self, params, lr, weight_decay, adam_w_mode):
            super().__init__(params, lr=lr, weight_decay=weight_decay, decoupled_weight_decay=adam_w_mode)

        def step(self):
            for state in self.state.values():
                state.setdefault("step", torch.tensor(float(self.param_groups[0]["step"])))
            super().step()

    module = ModuleType("apex.optimizers")
    module.FusedAdam, module.FusedSGD = FusedAdam, torch.optim.SGD
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    for function in adam.FUNCTIONS:
        problem = adam.problems((function,), ["2x33"], [torch.float32])[0]
        candidate = adam.peers()["apex"]()
        reference = make_reference(problem.case, torch.float32, "cpu", 0)
        assert gate(candidate, candidate.prepare(problem.case), problem, reference).status == "ok"


def test_pytest_benchmarks_has_every_op():
    functions = {problem.case.function for problem, _, _ in conftest.trials_on("cpu")}
    assert {"adam", "layer_norm"} <= functions
