"""Recurrent layers: shapes, counted bytes and FLOP, peers, compiled plans.

A row's time is that of the whole layer, input projection and gradients of weights included; the sequential part alone
is what the kernels add to two matrix products.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import bigkern
from benchmarks.measure import Candidate, Problem, Refused, compile_candidate, eager_candidate
from benchmarks.static import KernelPlan
from bigkern.ops._case import Case, Inputs, Outputs
from bigkern.ops.rnn import _cuda
from bigkern.ops.rnn._cases import FUNCTIONS as MODES
from bigkern.ops.rnn._cases import make_case
from bigkern.ops.rnn._schema import CELLS, GATES, SAVED

FUNCTIONS = tuple(MODES)

# steps x batch x features x hidden. First those of the documents' models (a GRU of 128 on 64, an LSTM of 128), cuDNN's
# and FlashRNN's published ones (1024x16x768x768), then what cuDNN's fast path leaves out: odd widths, small and large.
DOCUMENT_SHAPES = ((64, 32, 64, 128), (40, 64, 128, 128))
SHAPES = {
    "cuda": (
        *DOCUMENT_SHAPES,
        (1024, 16, 768, 768),
        (256, 1, 128, 128),
        (256, 64, 64, 64),
        (512, 8, 512, 512),
        (512, 13, 1000, 1000),
        (256, 8, 1536, 1536),
        (64, 128, 1024, 1024),
        (2048, 8, 256, 256),
        (64, 8, 2048, 2048),
    ),
    "cpu": (*DOCUMENT_SHAPES, (28, 32, 28, 128)),
    "tiny": ((3, 2, 4, 8),),
}
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.float32,),
    "tiny": (torch.float32,),
}

_MOST_COMPILED_STEPS = 64

# The grid's kernels have 256 threads, one block a multiprocessor: the weights take what registers there are.
# Compiled for sm_100a and sm_120a they take up to a sixth more. From 129 registers on it is one block in any case.
_PERSISTENT, _STREAMED = 255, 208
static_plan = [
    KernelPlan(r"^rnn_forward_kernel<\w+<(__nv_bfloat16|__half)>, \w+, (true|\(bool\)1)>", 256, _PERSISTENT,
               shared_bytes=16384, requires={"*": "HMMA"}),
    KernelPlan(r"^rnn_backward_kernel<\w+<(__nv_bfloat16|__half)>, \w+, (true|\(bool\)1)>", 256, _PERSISTENT,
               shared_bytes=20480, requires={"*": "HMMA"}),
    KernelPlan(r"^rnn_(forward|backward)_kernel<\w+<(__nv_bfloat16|__half)>, \w+, (false|\(bool\)0)>", 256, 136,
               shared_bytes=16384, requires={"*": "HMMA"}),
    # fp32: LSTM at H = 512.
    KernelPlan(r"^rnn_(forward|backward)_kernel<\w+<float>, float, (true|\(bool\)1)>", 256, _STREAMED,
               shared_bytes=92160),
    KernelPlan(r"^rnn_(forward|backward)_kernel<\w+<float>, float, (false|\(bool\)0)>", 256, _STREAMED,
               shared_bytes=24576),
    KernelPlan(r"^rnn_forward_block_kernel<", 512, 128, shared_bytes=5120, requires={"*": "HMMA"}),
    KernelPlan(r"^rnn_backward_block_kernel<", 256, _PERSISTENT, shared_bytes=50176, requires={"*": "HMMA"}),
    KernelPlan(r"^rnn_start_kernel<", 256, 64),
]  # fmt: skip


def problems(functions: tuple[str, ...], shapes: list[tuple[int, ...]], dtypes: list[torch.dtype]) -> list[Problem]:
    """Every combination.  A shape is (steps, batch, features, hidden)."""
    return [
        Problem(
            case=make_case(function, *shape, initial=0.0),  # as where none is given
            shape="x".join(map(str, shape)),
            dtype=dtype,
            bytes=count_bytes(function, *shape, dtype.itemsize),
            flops=count_flops(function, *shape),
        )
        for function in functions
        for shape in shapes
        for dtype in dtypes
    ]


def count_bytes(function: str, steps: int, batch: int, features: int, hidden: int, itemsize: int) -> dict[str, int]:
    """What must move at least: every operand read once, every result written once, and what forward keeps for backward.

    The projected input is neither: a kernel could make it as it goes.
    """
    cell = CELLS.index(MODES[function])
    gates, states = GATES[cell] * hidden, 2 if function == "lstm" else 1
    weights = gates * (features + hidden + 2)
    data, output = steps * batch * features, steps * batch * hidden
    last = states * batch * hidden
    kept = SAVED[cell] * output
    return {
        "forward": (data + 2 * last + weights + output + kept) * itemsize,
        "backward": (output + last + kept + output + data + weights + last + data + weights + last) * itemsize,
    }


def count_flops(function: str, steps: int, batch: int, features: int, hidden: int) -> dict[str, int]:
    """Those of the products; backward has two for each of forward's."""
    gates = GATES[CELLS.index(MODES[function])] * hidden
    forward = 2 * steps * batch * gates * (features + hidden)
    return {"forward": forward, "backward": 2 * forward}


def peers() -> dict[str, Callable[[], Candidate]]:
    """Name -> maker; a maker raises ImportError where its package is not installed.  "torch" is cuDNN on a GPU; "flags"
    is our own CUDA grid without tags (csrc/kernels/rnn_grid.cuh), whatever the width.
    """
    return {
        "torch": eager_candidate,
        "torch.compile": _compiled,
        "flags": _flags,
        "flashrnn": _flashrnn,
        "haste": _haste,
    }


def _flags() -> Candidate:
    """Beside "bigkern cuda" it says what tags are worth: there a 16-bit grid takes them wherever it may."""
    cuda = bigkern.backends()["cuda"]
    if not cuda.available:
        raise ImportError(cuda.reason)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        forward = functools.partial(_cuda.forward, variant="flags")
        with bigkern.use_backend("cuda"), mock.patch.object(_cuda, "forward", forward):
            yield

    return Candidate("bigkern cuda, flags", lambda case: case.call, context=context)


def _compiled() -> Candidate:
    """torch.compile unrolls the steps into one graph, and compiles for hours where there are many."""
    whole = compile_candidate()

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        steps = int(case.name.split()[1].split("x")[0])
        if steps > _MOST_COMPILED_STEPS:
            raise Refused(f"torch.compile unrolls {steps} steps; at most {_MOST_COMPILED_STEPS} are tried")
        return whole.prepare(case)

    return Candidate(whole.name, prepare)


def _flashrnn() -> Candidate:
    flashrnn = importlib.import_module("flashrnn").flashrnn

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        if case.function != "lstm":
            raise Refused("compared on the LSTM only")

        def call(t: Inputs) -> Outputs:
            # One head: Wx (batch, steps, gates, heads, hidden), R (gates, heads, hidden, hidden), b (gates, heads,
            # hidden), states (2, batch, 1, heads, hidden). Another order of its gates would not pass the gate.
            gates = torch.nn.functional.linear(t["input"], t["weight_ih_l0"], t["bias_ih_l0"] + t["bias_hh_l0"])
            steps, batch, hidden = *t["input"].shape[:2], t["h0"].shape[2]
            weight = t["weight_hh_l0"].view(4, 1, hidden, hidden)
            states, _ = flashrnn(
                gates.view(steps, batch, 4, 1, hidden).transpose(0, 1),
                weight,
                gates.new_zeros(4, 1, hidden),
                states=torch.stack([t["h0"], t["c0"]]).view(2, batch, 1, 1, hidden),
                function="lstm",
                backend="cuda_fused",
            )
            h, c = states[0].view(batch, steps, hidden).transpose(0, 1), states[1].view(batch, steps, hidden)
            return {"output": h, "hn": h[-1:], "cn": c[:, -1].unsqueeze(0)}

        return call

    return Candidate("flashrnn", prepare)


def _haste() -> Candidate:
    haste = importlib.import_module("haste_pytorch")

    def prepare(case: Case) -> Callable[[Inputs], Outputs]:
        if case.function not in ("lstm", "gru"):
            raise Refused("compared on the LSTM and the GRU only")
        is_lstm = case.function == "lstm"

        def columns(weight: torch.Tensor) -> torch.Tensor:
            """haste's order of the gates (i, g, f, o; z, r, n) along the last dimension. Another would not pass."""
            parts = (weight.t() if weight.dim() == 2 else weight).chunk(4 if is_lstm else 3, -1)
            return torch.cat([parts[i] for i in ((0, 2, 1, 3) if is_lstm else (1, 0, 2))], -1)

        def call(t: Inputs) -> Outputs:
            features, hidden = t["input"].shape[2], t["h0"].shape[2]
            if (features, hidden) not in modules:
                modules[features, hidden] = (haste.LSTM if is_lstm else haste.GRU)(features, hidden)
            module = modules[features, hidden]
            weights = {"kernel": columns(t["weight_ih_l0"]), "recurrent_kernel": columns(t["weight_hh_l0"])}
            if is_lstm:
                weights["bias"] = columns(t["bias_ih_l0"] + t["bias_hh_l0"])
            else:
                weights |= {"bias": columns(t["bias_ih_l0"]), "recurrent_bias": columns(t["bias_hh_l0"])}
            state = (t["h0"], t["c0"]) if is_lstm else t["h0"]
            output, last = torch.func.functional_call(module, weights, (t["input"], state))
            return {"output": output, "hn": last[0], "cn": last[1]} if is_lstm else {"output": output, "hn": last}

        modules: dict[tuple[int, int], torch.nn.Module] = {}
        return call

    return Candidate("haste", prepare)
