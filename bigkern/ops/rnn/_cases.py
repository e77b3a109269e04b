"""The recurrent layers' cases for ``bigkern selfcheck``, ``bigkern accuracy`` and the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from bigkern.ops import gru, lstm, rnn
from bigkern.ops._case import DTYPES, Case, Inputs, Outputs
from bigkern.ops.rnn._schema import CELLS, GATES

FUNCTIONS = {"rnn": "RNN_TANH", "lstm": "LSTM", "gru": "GRU"}
_OURS = {"rnn": rnn, "lstm": lstm, "gru": gru}
_TORCHS = {"rnn": torch.rnn_tanh, "lstm": torch.lstm, "gru": torch.gru}


def cases() -> list[Case]:
    """Every cell over widths that take each kernel, small enough for the emulated and interpreted kernels."""
    found = []
    for function in FUNCTIONS:
        found += [
            make_case(function, 6, 3, 5, 16),
            make_case(function, 3, 9, 4, 37, bidirectional=True),
            make_case(function, 3, 2, 6, 131, initial=0.25),  # the states are exchanged with tags
            make_case(function, 4, 2, 5, 24, scale=1e-3),
            make_case(function, 4, 9, 5, 24, scale=1e3),  # saturated: few gradients matter, so many are drawn
        ]
    found.append(make_case("lstm", 3, 2, 4, 16, layers=2))
    found.append(make_case("gru", 40, 1, 3, 8))
    return found


def make_case(
    function: str,
    steps: int,
    batch: int,
    features: int,
    hidden: int,
    *,
    layers: int = 1,
    bidirectional: bool = False,
    scale: float = 1.0,
    initial: float = 1.0,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """``function`` (rnn, lstm or gru) on a normal (steps, batch, features) input of that scale, from normal states of
    the scale ``initial`` or, if that is less, ``scale``.
    """
    mode, directions = FUNCTIONS[function], 2 if bidirectional else 1
    gates = GATES[CELLS.index(mode)] * hidden
    states = ["h0", "c0"] if mode == "LSTM" else ["h0"]
    traits = [
        f"{layers} layers" if layers > 1 else "",
        "bidirectional" if bidirectional else "",
        f"scale {scale:g}" if scale != 1 else "",
    ]
    names = [
        f"{name}_l{layer}{suffix}"
        for layer in range(layers)
        for suffix in ("", "_reverse")[:directions]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]

    def make_inputs(dtype: torch.dtype, device: torch.device | str, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        inputs: Inputs = {"input": (scale * normal(steps, batch, features)).to(dtype)}
        for name in states:
            inputs[name] = (min(scale, initial) * normal(layers * directions, batch, hidden)).to(dtype)
        for name in names:
            width = features if name.startswith("weight_ih_l0") else directions * hidden
            width = hidden if name.startswith("weight_hh") else width
            shape = (gates, width) if name.startswith("weight") else (gates,)
            inputs[name] = (hidden**-0.5 * normal(*shape)).to(dtype)
        return inputs

    def run(operator, inputs: Inputs) -> Outputs:
        hx = tuple(inputs[name] for name in states)
        params = [inputs[name] for name in names]
        rest = (params, True, layers, 0.0, False, bidirectional, False)
        output, *last = operator(inputs["input"], hx if mode == "LSTM" else hx[0], *rest)
        return {"output": output, **dict(zip(("hn", "cn"), last, strict=False))}

    return Case(
        function=function,
        name=" ".join([function, f"{steps}x{batch}x{features} to {hidden}", *filter(None, traits)]),
        make_inputs=make_inputs,
        call=lambda inputs: run(_OURS[function], inputs),
        reference=lambda inputs: run(_TORCHS[function], inputs),
        gradients=("input", *states, *names),
        dtypes=dtypes,
    )
