"""Runs a library made from tests/planted over schedules and says what went wrong under each; in its own process.

    python -m tests.planted.trial LIBRARY BUILD KERNEL SCHEDULES...

Prints one JSON object a schedule: {"schedule": "random:3", "caught": null | "what was seen"}.  Stops at the first
catch; an AddressSanitizer report ends the process instead, and the caller reads it from stderr.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np

from tests import emulated


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 values that are already bf16, as bf16 bit patterns."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def call(function, *args) -> str | None:
    error = ctypes.create_string_buffer(4096)
    if function(*args, error, ctypes.c_int(len(error))):
        return error.value.decode()
    return None


def compare(name: str, got: np.ndarray, wanted: np.ndarray, tolerance: float) -> str | None:
    """NaN in `got` is a difference: outputs are pre-filled with it."""
    scale = max(1.0, float(np.abs(wanted).max()))
    difference = np.abs(got.astype(np.float64) - wanted)
    if not difference.max() <= tolerance * scale:
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(difference), np.inf, difference)), got.shape)
        return f"wrong {name}{list(map(int, worst))}: {got[worst]:.4g}, wanted {wanted[worst]:.4g}"
    return None


def tile_gemm(library: ctypes.CDLL) -> str | None:
    """Tails in every dimension, five steps of k, several blocks; small integers, so that bf16 products are exact."""
    for m, n, k in ((100, 72, 136), (64, 64, 32)):
        rng = np.random.default_rng(m)
        a, b = rng.integers(-8, 9, (m, k)).astype(np.float32), rng.integers(-8, 9, (k, n)).astype(np.float32)
        a_bits, b_bits = bf16(a), bf16(b)
        c = np.full((m, n), np.nan, np.float32)
        sizes = [ctypes.c_int(value) for value in (m, n, k)]
        failure = call(library.run_tile_gemm, pointer(a_bits), pointer(b_bits), pointer(c), *sizes)
        failure = failure or compare("c", c, a.astype(np.float64) @ b, 1e-6)
        if failure:
            return failure
    return None


def layer_norm(library: ctypes.CDLL) -> str | None:
    """One width for every path: part of a warp, a block, shared memory, chunks; vectors and single elements.

    The last case is a far row stride, in address space that is reserved but never touched.
    """
    cases = [(13, 12, 12), (5, 200, 200), (6, 1000, 1000), (9, 77, 80), (5, 9216, 9216), (2, 30000, 30000)]
    for rows, cols, stride in [*cases, (3, 8, (1 << 30) + 8)]:
        rng = np.random.default_rng(cols)
        x = np.empty((rows - 1) * stride + cols, np.float32)  # untouched pages cost nothing
        rows_of_x = np.lib.stride_tricks.as_strided(x, (rows, cols), (4 * stride, 4))
        rows_of_x[:] = rng.standard_normal((rows, cols)) + 3
        weight, bias = rng.standard_normal((2, cols)).astype(np.float32)
        grad = rng.standard_normal((rows, cols)).astype(np.float32)
        output, grad_input = (np.full((rows, cols), np.nan, np.float32) for _ in range(2))
        grad_weight, grad_bias = (np.full(cols, np.nan, np.float32) for _ in range(2))
        arrays = [pointer(v) for v in (weight, bias, grad, output, grad_input, grad_weight, grad_bias)]
        sizes = [ctypes.c_int64(rows), ctypes.c_int64(cols)]
        failure = call(library.run_layer_norm, pointer(x), ctypes.c_int64(stride), *arrays, *sizes)

        exact = rows_of_x.astype(np.float64)
        mean, rstd = exact.mean(1, keepdims=True), 1 / np.sqrt(exact.var(1, keepdims=True) + 1e-5)
        hat, scaled = (exact - mean) * rstd, grad.astype(np.float64) * weight
        wanted_grad = rstd * (scaled - scaled.mean(1, keepdims=True) - hat * (scaled * hat).mean(1, keepdims=True))
        failure = (
            failure
            or compare("output", output, hat * weight + bias, 1e-5)
            or compare("grad_input", grad_input, wanted_grad, 1e-5)
            or compare("grad_weight", grad_weight, (grad * hat).sum(0), 1e-5)
            or compare("grad_bias", grad_bias, grad.astype(np.float64).sum(0), 1e-5)
        )
        if failure:
            return f"{rows} x {cols}: {failure}"
    return None


def rnn(library: ctypes.CDLL) -> str | None:
    """A packed bidirectional LSTM in each variant, several blocks and a padded group; the reference is torch's."""
    import torch

    from bigkern.ops.rnn import _torch
    from bigkern.ops.rnn._schema import VARIANTS

    lengths, hidden, directions = [4, 4, 2], 37, 2
    sizes = [sum(length > t for length in lengths) for t in range(lengths[0])]
    rows, batch = sum(lengths), len(lengths)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    offsets = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    gates, weight = normal(rows, directions * 4 * hidden), normal(directions, 4 * hidden, hidden) / 4
    states = [normal(directions, batch, hidden) for _ in range(2)]
    grad = normal(rows, directions * hidden)
    packed = offsets, torch.tensor(lengths)
    exact = _torch.forward(
        gates.double(), weight.double(), None, *map(torch.Tensor.double, states), None, *packed, 2, True
    )
    for variant in ("block", "grid", "step"):
        found = [torch.full_like(tensor, torch.nan, dtype=torch.bfloat16) for tensor in exact]
        grads = [torch.full_like(tensor, torch.nan) for tensor in (gates, *states)]
        tensors = [gates, weight, weight.mT.contiguous(), *states, *packed, grad, *found, *grads]
        integers = [ctypes.c_int64(lengths[0]), ctypes.c_int64(batch)]
        integers += [ctypes.c_int(value) for value in (hidden, directions, VARIANTS.index(variant))]
        failure = call(library.run_rnn, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *integers)
        kept = [tensor.double() for tensor in (found[0], found[3], weight, *states)]
        true_grads = _torch.backward(grad.double(), None, None, *kept, None, *packed, 2)
        names = ("output", "hn", "cn", "saved", "grad_gates", "grad_h0", "grad_c0")
        truths = (*exact, true_grads[0], *true_grads[2:])
        for name, got, wanted in zip(names, (*found, *grads), truths, strict=True):
            failure = failure or compare(name, got.float().numpy(), wanted.numpy(), 0.03)
        if failure:
            return f"{variant}: {failure}"
    return None


def main(path: str, build: str, kernel: str, schedules: list[str]) -> None:
    library = emulated.open_library(Path(path), build)
    run = {"tile_gemm": tile_gemm, "layer_norm": layer_norm, "rnn": rnn}[kernel]
    # A GPU of one block, so that persistent kernels go round their loops; or of as many as exchange with each other.
    resident = {"rnn": 8}.get(kernel, 1)
    for schedule in schedules:
        order, seed = schedule.split(":")
        device = dict(workers=1, multiprocessors=resident, blocks_per_multiprocessor=1)
        library.control.set_options(order=order, seed=int(seed), **device)
        caught = run(library.functions)
        print(json.dumps({"schedule": schedule, "caught": caught}), flush=True)
        if caught:
            return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
