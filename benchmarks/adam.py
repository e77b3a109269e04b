"""A step of Adam, AdamW and SGD over the parameters of whole models: tensor lists, counted bytes, peers, plans.

A shape is a model's name, or COUNTxSIZE: so many tensors of so many elements.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
from collections.abc import Callable, Sequence

import torch

import bigkern.optim
from benchmarks.measure import Candidate, Problem
from benchmarks.static import KernelPlan
from bigkern.ops._case import Case, Inputs, Outputs

FUNCTIONS = ("adam", "adamw", "sgd")
SHAPES = {
    "cuda": ("resnet50", "bert-base", "gpt2", "5000x64", "64x16777216"),
    "cpu": ("resnet50", "1000x64"),
    "tiny": ("30x100",),
}
DTYPES = {"cuda": (torch.float32, torch.bfloat16), "cpu": (torch.float32,), "tiny": (torch.float32,)}

# Arrays read and written for each element, by function: gradient, parameter twice, each state twice.
_ACCESSES = {"adam": 7, "adamw": 7, "sgd": 5}
_FLOPS = {"adam": 18, "adamw": 19, "sgd": 5}
_STATES = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
_OPTIONS = {
    "adam": {"lr": 1e-3, "weight_decay": 0.0},
    "adamw": {"lr": 1e-3, "weight_decay": 0.01},
    "sgd": {"lr": 1e-3, "momentum": 0.9},
}
_STEPS = 10.0

# Four blocks of 256 threads a multiprocessor, each thread with 64 bytes of loads in flight.
static_plan = [
    KernelPlan(r"^(adam|sgd)_step_kernel", 256, 64, vectorised=True),
    KernelPlan(r"^clip_grads_kernel", 256, 64, vectorised=True),
    KernelPlan(r"^grad_norm_kernel", 256, 64, requires={"*": "LDG.128"}),
]


def resnet50() -> list[int]:
    """torchvision's ResNet-50: 161 tensors, 25.6 million elements."""
    sizes = [64 * 3 * 49, 64, 64]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [channels * width, width, width, 9 * width * width, width, width, 4 * width * width]
            sizes += [4 * width, 4 * width]
            if block == 0:
                sizes += [channels * 4 * width, 4 * width, 4 * width]
            channels = 4 * width
    return [*sizes, 2048 * 1000, 1000]


def bert_base() -> list[int]:
    """BERT-base's encoder with pooler: 199 tensors, 109.5 million elements."""
    sizes = [30522 * 768, 512 * 768, 2 * 768, 768, 768]
    for _ in range(12):
        sizes += [768 * 768, 768] * 4 + [768, 768] + [768 * 3072, 3072, 3072 * 768, 768] + [768, 768]
    return [*sizes, 768 * 768, 768]


def gpt2() -> list[int]:
    """The small GPT-2, its output weights tied: 148 tensors, 124.4 million elements."""
    sizes = [50257 * 768, 1024 * 768]
    for _ in range(12):
        sizes += [768, 768, 768 * 2304, 2304, 768 * 768, 768, 768, 768, 768 * 3072, 3072, 3072 * 768, 768]
    return [*sizes, 768, 768]


MODELS = {"resnet50": resnet50, "bert-base": bert_base, "gpt2": gpt2}

SHAPE_NAMES = "MODEL or COUNTxSIZE"


def parse_shape(text: str) -> str:
    """A shape's name, for argparse's ``type=``."""
    if text not in MODELS and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"a shape is {', '.join(MODELS)} or COUNTxSIZE, like 1000x64, got {text!r}")
    return text


def sizes_of(shape: str) -> list[int]:
    """The elements of each tensor."""
    if shape in MODELS:
        return MODELS[shape]()
    count, size = map(int, shape.split("x"))
    return [size] * count


def problems(functions: tuple[str, ...], shapes: list[str], dtypes: list[torch.dtype]) -> list[Problem]:
    """Every combination."""
    found = []
    for function in functions:
        for shape in shapes:
            elements = sum(sizes_of(shape))
            for dtype in dtypes:
                found.append(
                    Problem(
                        case=make_case(function, shape),
                        shape=shape,
                        dtype=dtype,
                        bytes={"step": count_bytes(function, elements, dtype.itemsize)},
                        flops={"step": _FLOPS[function] * elements},
                    )
                )
    return found


def count_bytes(function: str, elements: int, itemsize: int) -> int:
    """What must move at least: 28 bytes an element for Adam in fp32."""
    return _ACCESSES[function] * elements * itemsize


def make_case(function: str, shape: str) -> Case:
    names = ("param", "grad", *_STATES[function])

    def make_inputs(dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        inputs = {}
        for index, size in enumerate(sizes_of(shape)):
            for name in names:
                values = torch.randn(size, generator=generator, device=device)
                inputs[f"{name} {index}"] = (values.square() + 0.1 if name == "exp_avg_sq" else values).to(dtype)
        return inputs

    return Case(
        function,
        f"{function} {shape}",
        make_inputs,
        call=stepping(function, _bigkern),
        reference=lambda inputs: _step_one_by_one(function, inputs),
        gradients=(),
    )


Make = Callable[[str, list[torch.nn.Parameter], list[dict[str, torch.Tensor]]], torch.optim.Optimizer]


def stepping(function: str, make: Make) -> Callable[[Inputs], Outputs]:
    """A function that makes a step.

    The first call with a set of inputs leaves them alone and returns the new parameters, for the gate; those after it
    step in place, each from where the one before ended, and return nothing: they are what is timed.
    """

    def step(inputs: Inputs) -> Outputs:
        optimizer = inputs.get(step)
        if optimizer is not None:
            optimizer.step()
            return {}
        if step not in inputs:
            inputs[step] = None
            params, optimizer = _optimizer(function, make, _tensors(inputs), copy=True)
            optimizer.step()
            return {"param": torch.cat([param.detach() for param in params])}
        inputs[step] = _optimizer(function, make, _tensors(inputs), copy=False)[1]
        return {}

    return step


def _tensors(inputs: Inputs) -> list[dict[str, torch.Tensor]]:
    """The inputs tensor by tensor: param, grad and states of each."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in inputs.items():
        if isinstance(key, str):
            name, index = key.split()
            found.setdefault(int(index), {})[name] = value
    return [found[index] for index in sorted(found)]


def _optimizer(
    function: str, make: Make, tensors: list[dict[str, torch.Tensor]], copy: bool
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    if copy:
        tensors = [{name: value.clone() for name, value in tensor.items()} for tensor in tensors]
    params = [torch.nn.Parameter(tensor["param"]) for tensor in tensors]
    for param, tensor in zip(params, tensors, strict=True):
        param.grad = tensor["grad"]
    return params, make(function, params, tensors)


def _load(
    optimizer: torch.optim.Optimizer, function: str, tensors: list[dict[str, torch.Tensor]]
) -> torch.optim.Optimizer:
    """The optimizer in the middle of training, its states those of the tensors."""
    state = {}
    for index, tensor in enumerate(tensors):
        state[index] = {name: tensor[name] for name in _STATES[function]}
        if function != "sgd":
            state[index]["step"] = torch.tensor(_STEPS)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return optimizer


def _bigkern(function: str, params: Sequence[torch.nn.Parameter], tensors: list[dict[str, torch.Tensor]]):
    make = {"adam": bigkern.optim.Adam, "adamw": bigkern.optim.AdamW, "sgd": bigkern.optim.SGD}[function]
    return _load(make(params, **_OPTIONS[function]), function, tensors)


def _torch(**chosen: bool) -> Make:
    def make(function: str, params: Sequence[torch.nn.Parameter], tensors: list[dict[str, torch.Tensor]]):
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[function]
        return _load(kind(params, **_OPTIONS[function], **chosen), function, tensors)

    return make


def _step_one_by_one(function: str, inputs: Inputs) -> Outputs:
    """torch's for-loop, a tensor at a time, so that the float64 reference of a large model fits."""
    results = []
    for tensor in _tensors(inputs):
        params, optimizer = _optimizer(function, _torch(foreach=False, fused=False), [tensor], copy=True)
        optimizer.step()
        results.append(params[0].detach())
    return {"param": torch.cat(results)}


def peers() -> dict[str, Callable[[], Candidate]]:
    """Name -> maker; a maker raises ImportError where its package is not installed."""
    return {
        "torch foreach": lambda: _candidate("torch foreach", _torch(foreach=True)),
        "torch fused": lambda: _candidate("torch fused", _torch(fused=True)),
        "apex": _apex,
    }


def _candidate(name: str, make: Make) -> Candidate:
    return Candidate(name, lambda case: stepping(case.function, make))


def _apex() -> Candidate:
    optimizers = importlib.import_module("apex.optimizers")

    def make(function: str, params: Sequence[torch.nn.Parameter], tensors: list[dict[str, torch.Tensor]]):
        if function == "sgd":
            optimizer = optimizers.FusedSGD(params, **_OPTIONS["sgd"])
        else:
            optimizer = optimizers.FusedAdam(params, **_OPTIONS[function], adam_w_mode=function == "adamw")
            optimizer.param_groups[0]["step"] = math.floor(_STEPS)
        for param, tensor in zip(params, tensors, strict=True):
            optimizer.state[param] = {name: tensor[name] for name in _STATES[function]}
        return optimizer

    return _candidate("apex", make)
