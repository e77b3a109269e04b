"""Layer norm's cases for ``bigkern selfcheck``, ``bigkern accuracy`` and the benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bigkern.ops import add_layer_norm, layer_norm, rms_norm
from bigkern.ops._case import DTYPES, Case, Inputs, Outputs
from bigkern.ops._torch_philox import dropout

_EPS = 1e-5


def cases() -> list[Case]:
    """Every function over row lengths that take each kernel path, scales 1e-3 to 1e3, and a mean far from zero.

    Small enough that the emulated and interpreted kernels get through them in a minute.
    """
    found = []
    for function in ("layer_norm", "rms_norm", "add_layer_norm"):
        found += [
            make_case(function, 33, 64),
            make_case(function, 5, 127),
            make_case(function, 8, 1024, mean=1e3),
            make_case(function, 8, 1000, scale=1e3),
            make_case(function, 4, 768, scale=1e-3),
            make_case(function, 2, 5000),
            make_case(function, 1, 40000, mean=10.0),
        ]
    found += [
        make_case("layer_norm", 16, 256, affine=False),
        make_case("layer_norm", 16, 256, parameter_dtype=torch.float32, dtypes=(torch.bfloat16, torch.float16)),
        make_case("add_layer_norm", 16, 512, dropout_p=0.1),
        make_case("add_layer_norm", 7, 333, dropout_p=0.5),
    ]
    return found


def make_case(
    function: str,
    rows: int,
    cols: int,
    *,
    mean: float = 0.0,
    scale: float = 1.0,
    affine: bool = True,
    parameter_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """``function`` (layer_norm, rms_norm or add_layer_norm) on a rows x cols normal input of that mean and scale."""
    traits = [
        f"mean {mean:g}" if mean else "",
        f"scale {scale:g}" if scale != 1 else "",
        "" if affine else "no weight",
        "fp32 weight" if parameter_dtype else "",
        f"dropout {dropout_p:g}" if dropout_p else "",
    ]
    adds, biased = function == "add_layer_norm", affine and function != "rms_norm"

    def make_inputs(dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        inputs: Inputs = {"input": (mean + scale * normal(rows, cols)).to(dtype)}
        if adds:
            inputs["residual"] = (mean + scale * normal(rows, cols)).to(dtype)
        if affine:
            inputs["weight"] = (1 + 0.5 * normal(cols)).to(parameter_dtype or dtype)
        if biased:
            inputs["bias"] = normal(cols).to(parameter_dtype or dtype)
        if dropout_p:
            inputs["philox"] = torch.tensor([seed + 1, 4], dtype=torch.int64, device=device)
        return inputs

    def call(inputs: Inputs) -> Outputs:
        x, weight, bias = inputs["input"], inputs.get("weight"), inputs.get("bias")
        if adds:
            output, summed = add_layer_norm(
                x, inputs["residual"], (cols,), weight, bias, _EPS, dropout_p, philox=inputs.get("philox")
            )
            return {"output": output, "summed": summed}
        if function == "rms_norm":
            return {"output": rms_norm(x, (cols,), weight, _EPS)}
        return {"output": layer_norm(x, (cols,), weight, bias, _EPS)}

    def reference(inputs: Inputs) -> Outputs:
        x, weight, bias = inputs["input"], inputs.get("weight"), inputs.get("bias")
        if adds:
            if dropout_p:
                # The mask alone comes from here; the arithmetic is that of torch's dropout, in the dtype of x.
                keep = dropout(torch.ones(rows, cols, device=x.device), dropout_p, inputs["philox"]) > 0
                x = torch.where(keep, x * (1 / (1 - dropout_p)), 0)
            summed = inputs["residual"] + x
            return {"output": _norm(F.layer_norm, summed, weight, bias), "summed": summed}
        if function == "rms_norm":
            return {"output": _norm(F.rms_norm, x, weight)}
        return {"output": _norm(F.layer_norm, x, weight, bias)}

    return Case(
        function=function,
        name=" ".join([function, f"{rows}x{cols}", *filter(None, traits)]),
        make_inputs=make_inputs,
        call=call,
        reference=reference,
        gradients=(
            "input",
            *(["residual"] if adds else []),
            *(["weight"] if affine else []),
            *(["bias"] if biased else []),
        ),
        dtypes=dtypes,
    )


def _norm(function, x: Tensor, *parameters: Tensor | None) -> Tensor:
    weight = parameters[0]
    if weight is None or weight.dtype == x.dtype or x.is_cpu:
        return function(x, x.shape[-1:], *parameters, _EPS)
    # On a GPU torch's operators take one dtype: with fp32 parameters it is fp32 throughout, as under autocast.
    return function(x.to(weight.dtype), x.shape[-1:], *parameters, _EPS).to(x.dtype)
