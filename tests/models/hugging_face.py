"""Random models of transformers' own, to be loaded and matched."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bigkern.models.pretrained import Source
from tests.numerics import assert_close, cotangent

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def save(model: str, config: str, folder: Path, **sizes: object) -> nn.Module:
    """A random model of transformers' class ``model``, in evaluation mode, saved into ``folder``.

    Every parameter is drawn, norms and biases too: at their usual 1 and 0 a mixed-up one would not show.
    """
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")
    pytest.importorskip("safetensors", reason="safetensors is not installed (pip install '.[test]')")
    torch.manual_seed(3)
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.15 if parameter.dim() > 1 else 0.3))
    made.save_pretrained(folder)
    return made


def compare(
    call: Callable[[nn.Module], Tensor], ours: nn.Module, theirs: nn.Module, sources: dict[str, Source]
) -> None:
    """The numerics rule for the outputs, and for the gradients of all parameters; truth is their model in float64.

    Through several layers the error of one small gradient is a matter of luck, on both sides. So each is brought to
    unit size, and the rule holds for all of them as one tensor; torch's error is the larger one of transformers'
    two attentions: torch's fused operator, and plain products.
    """
    plain, truth = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    plain.set_attn_implementation("eager")
    outputs, grads = zip(*(_run(call, model) for model in (ours, theirs, plain, truth)), strict=True)
    _assert_close("outputs", *outputs)
    parts: list[list[Tensor]] = [[], [], [], []]
    for name, grad in grads[0].items():
        same = [grad, *(sources[name].read(others) for others in grads[1:])]
        size = same[3].square().mean().sqrt()
        for part, tensor in zip(parts, same, strict=True):
            part.append((tensor.double() / size).flatten().to(tensor.dtype))
    _assert_close("gradients", *map(torch.cat, parts))


def _run(call: Callable[[nn.Module], Tensor], model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = call(model)
    output.backward(cotangent(output))
    return output.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _assert_close(name: str, actual: Tensor, fused: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert_close(name, actual, max(fused, plain, key=lambda result: (result - truth).abs().max().item()), truth)
