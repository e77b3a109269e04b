"""The raw ops of the recurrent layers: functional, without autograd, one schema for each kernel backend.

Implementations are registered elsewhere: ``bigkern_cuda`` by csrc/torch/rnn.cpp, ``bigkern_triton`` by _triton.py.

A raw op is the sequential part of one layer, all its directions D together; what is one product over all steps (the
input projection, the gradients of weights) stays outside.  Rows are the (step, sequence) pairs in time-major order:
``steps * batch`` of them, or those of a packed batch, whose sequences are sorted by falling length.

=============  =======================  ===================================================================
gates          (rows, D * G * H)        input projection with its biases; G gates: 1 (RNN), 4 (LSTM), 3 (GRU)
weight_hh      (D, G * H, H)            in torch's order of gates
weight_t       (D, H, G * H)            its transpose
bias_hn        (D, H)                   GRU's: the bias that the reset gate multiplies too
h0, c0, mask   (D, batch, H)            c0 is LSTM's; the mask multiplies h before the product only
offsets        (steps,) int64           packed: the first row of each step
lengths        (batch,) int64           packed: the steps of each sequence
zone           (rows, D * H)            zoneout: h' = zone * h + (1 - zone) * new h; a number, ``zoneout``, if None
cell_zone      (rows, D * H)            the same of LSTM's c, and ``cell_zoneout``; h' is made of the new c
saved          (rows, D * S * H)        for backward; S: 0 (RNN), 5 (LSTM: i, f, g, o, c), 4 (GRU: r, z, n, W h + b_hn);
                                        with zoneout one more: RNN's h before it, LSTM's c after it
grad_hidden    (rows, D * H)            GRU's gradient of W h + b_hn: n's gradient times r
=============  =======================  ===================================================================

``cell`` is an index of CELLS, ``variant`` one of VARIANTS.  ``bigkern_triton`` has no zoneout.  A result that does not
apply is an empty (0,) tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACES = ("bigkern_cuda", "bigkern_triton")

CELLS = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")
GATES = (1, 1, 4, 3)
SAVED = (0, 0, 5, 4)

# Which kernel: chosen by shape; one block for each eight sequences; blocks that keep the weights and exchange h; a
# launch for each step; the grid without tags on what it exchanges, for comparison (csrc/kernels/rnn_grid.cuh).  Asking
# for one that cannot serve is an error.
VARIANTS = ("auto", "block", "grid", "step", "flags")

_FORWARD = (
    "(Tensor gates, Tensor weight_hh, Tensor? bias_hn, Tensor h0, Tensor? c0, Tensor? mask, Tensor? offsets,"
    " Tensor? lengths, int cell, bool save, int variant, Tensor? zone=None, Tensor? cell_zone=None, float zoneout=0,"
    " float cell_zoneout=0)"
    " -> (Tensor output, Tensor hn, Tensor cn, Tensor saved)"
)
_BACKWARD = (
    "(Tensor? grad_output, Tensor? grad_hn, Tensor? grad_cn, Tensor output, Tensor saved, Tensor weight_t, Tensor h0,"
    " Tensor? c0, Tensor? mask, Tensor? offsets, Tensor? lengths, int cell, int variant, Tensor? zone=None,"
    " Tensor? cell_zone=None, float zoneout=0, float cell_zoneout=0)"
    " -> (Tensor grad_gates, Tensor grad_hidden, Tensor grad_h0, Tensor grad_c0)"
)


def _forward_fake(
    gates: Tensor,
    weight_hh: Tensor,
    bias_hn: Tensor | None,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    save: bool,
    variant: int,
    zone: Tensor | None = None,
    cell_zone: Tensor | None = None,
    zoneout: float = 0.0,
    cell_zoneout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = gates.shape[0]
    directions, batch, hidden = h0.shape
    zoned = zone is not None or cell_zone is not None or zoneout != 0 or cell_zoneout != 0
    count = SAVED[cell] + (zoned and CELLS[cell] != "GRU") if save else 0
    return (
        gates.new_empty((rows, directions * hidden)),
        gates.new_empty((directions, batch, hidden)),
        gates.new_empty((directions, batch, hidden) if c0 is not None else (0,)),
        gates.new_empty((rows, directions * count * hidden) if count else (0,)),
    )


def _backward_fake(
    grad_output: Tensor | None,
    grad_hn: Tensor | None,
    grad_cn: Tensor | None,
    output: Tensor,
    saved: Tensor,
    weight_t: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    lengths: Tensor | None,
    cell: int,
    variant: int,
    zone: Tensor | None = None,
    cell_zone: Tensor | None = None,
    zoneout: float = 0.0,
    cell_zoneout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = output.shape[0]
    directions, batch, hidden = h0.shape
    return (
        output.new_empty((rows, directions * GATES[cell] * hidden)),
        output.new_empty((rows, directions * hidden) if CELLS[cell] == "GRU" else (0,)),
        output.new_empty((directions, batch, hidden)),
        output.new_empty((directions, batch, hidden) if c0 is not None else (0,)),
    )


for _namespace in NAMESPACES:
    for _name, _signature, _fake in (
        ("rnn_forward", _FORWARD, _forward_fake),
        ("rnn_backward", _BACKWARD, _backward_fake),
    ):
        torch.library.define(f"{_namespace}::{_name}", _signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(f"{_namespace}::{_name}", _fake)
