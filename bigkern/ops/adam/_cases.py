"""The optimizers' cases for ``bigkern selfcheck`` and ``bigkern accuracy``: one step from a state in mid-training."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops._case import Case, Inputs, Outputs
from bigkern.ops.adam import TORCH, implementation
from bigkern.ops.adam._plan import Column, Flag, Hyper, Tables, pointers
from bigkern.ops.adam._torch import Step

_LR, _BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _MOMENTUM, _STEPS = 0.01, 0.9, 0.999, 1e-8, 0.1, 0.9, 10


def cases() -> list[Case]:
    """Adam, AdamW and SGD on less and on more than a chunk, with gradients small and large."""
    return [
        _case(function, numel, scale)
        for function in ("adam", "adamw", "sgd")
        for numel, scale in ((7, 1.0), (4096, 1.0), (5001, 1e3), (5001, 1e-3))
    ]


def _case(function: str, numel: int, scale: float) -> Case:
    names = ("param", "momentum_buffer") if function == "sgd" else ("param", "exp_avg", "exp_avg_sq")

    def make_inputs(dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        found = {
            name: torch.randn(numel, generator=generator, device=device) * (1.0 if name == "param" else scale)
            for name in (*names, "grad")
        }
        if function != "sgd":
            found["exp_avg_sq"] = found["exp_avg_sq"].square() + 0.1 * scale * scale
        return {name: tensor.to(dtype) for name, tensor in found.items()}

    def call(inputs: Inputs) -> Outputs:
        return _step(function, inputs, names, None)

    def reference(inputs: Inputs) -> Outputs:
        return _step(function, inputs, names, TORCH)

    return Case(function, f"{function} {numel}, scale {scale:g}", make_inputs, call, reference, ())


def _step(function: str, inputs: Inputs, names: tuple[str, ...], module) -> Outputs:
    results = {name: inputs[name].detach().clone() for name in names}
    param, grad = results["param"], inputs["grad"]
    steps = torch.full((), float(_STEPS), device=param.device)
    request = "sgd_step" if function == "sgd" else "adam_step"
    module = module or implementation(request, param, param.dtype)
    if module is TORCH:
        _torch_step(function, results, grad, steps)
        return results
    states = {Column.EXP_AVG: [results[names[1]]]}
    if function != "sgd":
        states |= {Column.EXP_AVG_SQ: [results["exp_avg_sq"]], Column.STEP: [steps]}
    tables = Tables([param], {Column.PARAM: [param], **states}, [param.dtype], [0])
    hyper = [0.0] * len(Hyper)
    for column, value in (
        (Hyper.LR, _LR),
        (Hyper.BETA1, _BETA1),
        (Hyper.BETA2, _BETA2),
        (Hyper.EPS, _EPS),
        (Hyper.WEIGHT_DECAY, _WEIGHT_DECAY),
        (Hyper.MOMENTUM, _MOMENTUM),
        (Hyper.FLAGS, float(Flag.DECOUPLED) if function == "adamw" else 0.0),
    ):
        hyper[column] = value
    tables.point_at(pointers([grad]), hyper)
    getattr(module, request)(
        tables.tensors,
        tables.chunk_ends,
        tables.grads,
        tables.hyper,
        tables.scratch,
        None,
        None,
        None,
        0.0,
        False,
        None,
    )
    return results


def _torch_step(function: str, results: dict[str, Tensor], grad: Tensor, steps: Tensor) -> None:
    """torch's for-loop, whose roundings are what torch errs by."""
    moments = {name: [state] for name, state in results.items() if name != "param"}
    step = Step(
        [results["param"]], [grad], moments, [None], [None], None, None, None, None, 0.0, 0.0, 0.0, False, False
    )
    options = {"lr": _LR, "weight_decay": _WEIGHT_DECAY, "maximize": False, "foreach": False, "fused": False}
    if function == "sgd":
        TORCH.sgd_step(step, {**options, "momentum": _MOMENTUM, "dampening": 0.0, "nesterov": False})
    else:
        TORCH.adam_step(
            step,
            [steps],
            {
                **options,
                "beta1": _BETA1,
                "beta2": _BETA2,
                "eps": _EPS,
                "amsgrad": False,
                "decoupled_weight_decay": function == "adamw",
            },
        )
