"""``verify`` sees what is wrong, and shows what is right; it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigkern
from bigkern.acceleration import _fusion, _rules
from tests.acceleration.architectures import inputs, make


class NoEps(bigkern.nn.LayerNorm):
    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, 0.0)


class NoPadding(bigkern.nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        shape = super()._conv_forward(input, weight, bias).shape
        out = bigkern.ops.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
        return F.interpolate(out, shape[2:])


class WrongGradient(bigkern.nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input.detach() * 0.5 + input * 0.5, hx)


PLANTED = {
    "eps ignored": ("ConvNeXt", nn.LayerNorm, NoEps, "output"),
    "padding ignored": ("ResNet", nn.Conv2d, NoPadding, "output"),
    "half a gradient": ("LSTM language model", nn.LSTM, WrongGradient, "gradient"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_wrong_swap_is_caught(bug, monkeypatch):
    name, kind, wrong, where = PLANTED[bug]
    rule = _rules.RULES[kind]
    model = make(name)
    assert bigkern.accelerate(copy.deepcopy(model)).verify(inputs(name), repeats=1).passed
    monkeypatch.setitem(_rules.RULES, kind, _rules.Rule(wrong, rule.call, rule.attributes))
    verification = bigkern.accelerate(model).verify(inputs(name), repeats=1)
    assert not verification.passed
    assert any(row.kind == where for row in verification.failures)
    assert "FAIL" in str(verification) and "FAIL" in verification.to_markdown()


@pytest.mark.emulated
def test_a_wrong_fold_is_caught(emulator, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def wrong(conv, norm):
        scale = torch.rsqrt(norm.running_var) * norm.weight  # without eps
        return conv.weight * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale

    model = make("MobileNet")
    report = bigkern.accelerate(model)
    with bigkern.use_backend("cuda"):
        assert report.verify(inputs("MobileNet"), repeats=1).passed
        monkeypatch.setattr(_fusion, "_fold", wrong)
        verification = report.verify(inputs("MobileNet"), repeats=1)
    assert {row.name for row in verification.failures} == {"output (no_grad)"}


def test_leaves_no_trace():
    model = make("ResNet").train()
    model.layer1.eval()
    report = bigkern.accelerate(model)
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for training in (False, True):
        report.verify(inputs("ResNet"), training=training, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(param.grad is None for param in model.parameters())
    assert report.active and "bigkern" in type(model.stem[0]).__module__


def test_kinds_of_inputs_and_outputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x, scale=1.0):
            return {"scaled": self.norm(x) * scale, "more": [x.sum(), 3]}

    report = bigkern.accelerate(Named())
    x = torch.randn(2, 4, requires_grad=True)
    for given in (x, (x,), [x, 2.0], {"x": x, "scale": 2.0}):
        verification = report.verify(given, repeats=1)
        assert verification.passed
    names = {row.name for row in verification.rows}
    assert {"['scaled']", "['more'][0]", "norm.weight", "input['x']"} <= names
    assert verification.speedup > 0 and "times as fast" in str(verification)


def test_packed_sequences():
    sequences = [torch.randn(length, 4) for length in (5, 3)]
    packed = nn.utils.rnn.pack_sequence(sequences)
    verification = bigkern.accelerate(nn.GRU(4, 8)).verify(packed, repeats=1)
    assert verification.passed
    assert [row.name for row in verification.rows if row.kind == "output"][:2] == ["[0].data", "[1]"]


def test_bad_arguments():
    report = bigkern.accelerate(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="repeats is 0"):
        report.verify(torch.randn(2, 4), repeats=0)

    class Nothing(nn.Module):
        def forward(self, x):
            return "text"

    with pytest.raises(ValueError, match="no tensor to compare"):
        bigkern.accelerate(Nothing()).verify(torch.randn(2))

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x) @ torch.ones(4, 4)

    with pytest.raises(ValueError, match="does not run in float64"):
        bigkern.accelerate(Single()).verify(torch.randn(2, 4))


def test_dropout_does_not_disturb_it():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
    verification = bigkern.accelerate(model).verify(torch.randn(2, 5, 16), repeats=1)
    assert verification.passed and model.training
