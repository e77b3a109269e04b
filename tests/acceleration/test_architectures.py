"""Whole models, none written for bigkern: accelerated, compared forward and backward, put back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

import bigkern
from tests.acceleration.architectures import ARCHITECTURES, inputs, make

# Counts of what must have been swapped, so that a rule that stops to apply is seen.
SWAPPED = {
    "ResNet": {"Conv2d": 10, "Sequential": 2},
    "MobileNet": {"Conv2d": 4, "Sequential": 4},
    "UNet": {"Conv2d": 11, "Sequential": 5},
    "ConvNeXt": {"Conv2d": 3, "LayerNorm": 3},
    "VGG": {"Conv2d": 2, "Sequential": 1},
    "LSTM language model": {"LSTM": 1},
    "GRU tagger": {"GRU": 1, "LayerNorm": 1},
    "cells": {"GRUCell": 1, "LSTMCell": 1, "RNNCell": 1},
    "Transformer": {
        "LayerNorm": 12,
        "MultiheadAttention": 6,
        "Transformer": 1,
        "TransformerDecoder": 1,
        "TransformerDecoderLayer": 2,
        "TransformerEncoder": 1,
        "TransformerEncoderLayer": 2,
    },
    "speech encoder": {"Conv1d": 2, "MultiheadAttention": 1, "RMSNorm": 1, "Sequential": 1},
}
TRANSFORMERS = {
    "bert": {"LayerNorm": 6},
    "gpt2": {"LayerNorm": 5},
    "llama": {},
    "t5": {},
    "vit": {"Conv2d": 1, "LayerNorm": 5},
    "whisper": {"Conv1d": 2, "LayerNorm": 12},
}


def snapshot(model):
    """Whatever restore() must bring back: classes, attributes, tensors by identity and by bits, keys in order."""
    return {
        name: (type(module), module.training, dict(vars(module)), list(module._parameters.items()))
        for name, module in model.named_modules(remove_duplicate=False)
    }


def same(before, after):
    assert list(before) == list(after)
    for name, (kind, training, attributes, parameters) in before.items():
        assert (kind, training) == after[name][:2], name
        assert attributes.keys() == after[name][2].keys(), name
        for key, value in attributes.items():
            assert after[name][2][key] is value, f"{name}.{key}"
        assert all(x is y for (_, x), (_, y) in zip(parameters, after[name][3], strict=True))


def on(device, batch):
    return pytree.tree_map(lambda x: x.detach().to(device).requires_grad_(x.requires_grad), batch)


def check(model, batch, counts, device):
    model.to(device)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    report = bigkern.accelerate(model)
    assert report.counts == counts, report
    assert list(model.state_dict()) == list(state)
    verification = report.verify(on(device, batch), repeats=1)
    assert verification.passed, str(verification)
    assert any(row.kind == "gradient" for row in verification.rows)
    report.restore()
    same(before, snapshot(model))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return report


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_restated_models(name, device):
    check(make(name), inputs(name), SWAPPED[name], device)


@pytest.mark.parametrize("name", ["ResNet", "UNet", "GRU tagger", "cells"])
def test_in_training_mode(name, device):
    """Batch statistics are each batch's; the running ones are put back."""
    model = make(name).to(device)
    report = bigkern.accelerate(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    verification = report.verify(on(device, inputs(name)), training=True, repeats=1)
    assert verification.passed, str(verification)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["speech encoder", "MobileNet", "GRU tagger"])
def test_on_the_emulated_kernels(name, emulator, monkeypatch):
    """The hand-written kernels in the place of torch's, in the same model."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the CPU's products, to compare with, are float32's
    model = make(name)
    with bigkern.use_backend("cuda"):
        report = bigkern.accelerate(model)
        assert {row.backend for row in report.swapped} <= {"cuda", ""}, report
        verification = report.verify(inputs(name), repeats=1)
    assert verification.passed, str(verification)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("attention", ["eager", "bigkern"])
def test_models_of_transformers(name, attention, device):
    pytest.importorskip("transformers", minversion="5.0")
    from bigkern.integrations.transformers import register
    from tests.integrations import transformer_models as models

    register()
    report = check(models.make(name, attention), models.inputs(name), TRANSFORMERS[name], device)
    assert ('attention of transformers runs "eager"' in str(report)) == (attention == "eager")
