"""Runs a library made from tests/planted over schedules and says what went wrong under each; in its own process.

    python -m tests.planted.trial LIBRARY BUILD KERNEL SCHEDULES...

Prints one JSON object a schedule: {"schedule": "random:3", "caught": null | "what was seen"}.  Stops at the first
catch; an AddressSanitizer report ends the process instead, and the caller reads it from stderr.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from pathlib import Path

import numpy as np

from tests import emulated


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 values that are already bf16, as bf16 bit patterns."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def bf16_values(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers in fp32 that bf16 holds."""
    bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32) & 0xFFFF0000
    return bits.view(np.float32)


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


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
    return normalise(library.run_layer_norm, [*cases, (3, 8, (1 << 30) + 8)])


def layer_norm_cluster(library: ctypes.CDLL) -> str | None:
    """Clusters of two and four blocks, vectors and single elements; backward, one cluster takes all rows."""
    return normalise(library.run_layer_norm_cluster, [(3, 4100, 4100), (1, 12000, 12000), (2, 4099, 4099)])


def normalise(run, cases: list[tuple[int, int, int]]) -> str | None:
    """Forward and backward of matrices of so many rows and columns with such a row stride."""
    for rows, cols, stride in cases:
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
        failure = call(run, pointer(x), ctypes.c_int64(stride), *arrays, *sizes)

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


class ConvShape(ctypes.Structure):
    """As in csrc/kernels/conv.h."""

    _fields_ = [
        ("images", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("channels", "height", "width", "filters", "kernel_h", "kernel_w")),
        *((name, ctypes.c_int) for name in ("out_h", "out_w", "stride_h", "stride_w", "padding_h", "padding_w")),
        *((name, ctypes.c_int) for name in ("dilation_h", "dilation_w", "groups")),
    ]


def conv(library: ctypes.CDLL) -> str | None:
    """Chunks and single elements of channels, tails of k, a ring that goes round, pools with halos and without, and a
    residual where there is no pool.

    Small integers: sums are exact, equal maxima are frequent and the first of them is asked for.
    """
    for shape, pool in (
        # images, channels, height, width, filters, R, S, stride, padding; kernel, stride and padding of the pool
        ((2, 12, 7, 6, 8, 3, 3, 1, 1), (3, 2, 1)),
        ((2, 3, 6, 7, 5, 3, 2, 2, 1), (2, 2, 0)),
        ((3, 8, 9, 8, 4, 3, 3, 2, 2), (0, 0, 0)),
    ):
        failure = conv_case(library, shape, pool)
        if failure:
            return f"{shape} {pool}: {failure}"
    return None


def conv_case(library: ctypes.CDLL, shape: tuple[int, ...], pool: tuple[int, int, int]) -> str | None:
    images, channels, height, width, filters, rows, cols, stride, padding = shape
    rng = np.random.default_rng(sum(shape))

    def integers(*sizes):
        return rng.integers(-2, 3, sizes).astype(np.float32)

    x, weight, bias = (
        integers(images, height, width, channels),
        integers(filters, rows, cols, channels),
        integers(filters),
    )
    out_h, out_w = ((n + 2 * padding - k) // stride + 1 for n, k in ((height, rows), (width, cols)))
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    plain = np.zeros((images, out_h, out_w, filters), np.float32)
    taps = [
        (r, s, np.s_[:, r : r + stride * out_h : stride, s : s + stride * out_w : stride])
        for r in range(rows)
        for s in range(cols)
    ]
    for r, s, under in taps:
        plain += padded[under][:, :out_h, :out_w] @ weight[:, r, s].T
    kernel, step, pad = pool
    residual = None if kernel else integers(*plain.shape)
    active = np.maximum(plain + bias + (0 if kernel else residual), 0)
    size = (
        ((out_h + 2 * pad - kernel) // step + 1, (out_w + 2 * pad - kernel) // step + 1) if kernel else (out_h, out_w)
    )
    wanted, places = active.copy(), np.zeros((images, *size, filters), np.int64)
    grad = integers(images, *size, filters)
    wanted_grad = np.where(active <= 0, 0, grad) if not kernel else np.zeros_like(active)
    if kernel:
        wanted = np.empty_like(places, np.float32)
        for i, j in np.ndindex(*size):
            top, left = i * step - pad, j * step - pad
            inside = [(y, x) for y in range(top, top + kernel) for x in range(left, left + kernel)]
            inside = [(y, x) for y, x in inside if 0 <= y < out_h and 0 <= x < out_w]
            window = np.stack([active[:, y, x] for y, x in inside])
            first = window.argmax(0)
            wanted[:, i, j] = window.max(0)
            places[:, i, j] = np.array([(y - top) * kernel + x - left for y, x in inside])[first]
            for index, (y, x_) in enumerate(inside):
                wanted_grad[:, y, x_] += np.where((first == index) & (wanted[:, i, j] > 0), grad[:, i, j], 0)
    wanted_input, wanted_weight = np.zeros_like(padded), np.empty_like(weight)
    for r, s, under in taps:
        wanted_input[under][:, :out_h, :out_w] += wanted_grad @ weight[:, r, s]
        wanted_weight[:, r, s] = np.einsum("npqk,npqc->kc", wanted_grad, padded[under][:, :out_h, :out_w])

    output, grad_conv, grad_input, grad_weight, grad_bias = (
        np.full(sizes, np.nan, np.float32) for sizes in (wanted.shape, plain.shape, x.shape, weight.shape, bias.shape)
    )
    argmax = np.full(places.shape, 255, np.uint8)
    struct = ConvShape(
        images, channels, height, width, filters, rows, cols, out_h, out_w, stride, stride, padding, padding, 1, 1, 1
    )
    turned = np.ascontiguousarray(weight.transpose(3, 1, 2, 0))
    arrays = [x, weight, turned, bias, residual, grad, output, argmax, grad_conv, grad_input, grad_weight, grad_bias]
    return (
        call(library.run_conv, ctypes.byref(struct), *map(ctypes.c_int, pool), *map(pointer, arrays))
        or compare("output", output, wanted, 0)
        or (compare("argmax", argmax.astype(np.float32), places, 0) if kernel else None)
        or compare("grad_conv", grad_conv, wanted_grad, 0)
        or compare("grad_input", grad_input, wanted_input[:, padding : padding + height, padding : padding + width], 0)
        or compare("grad_weight", grad_weight, wanted_weight, 0)
        or compare("grad_bias", grad_bias, wanted_grad.sum((0, 1, 2)), 0)
    )


def adam(library: ctypes.CDLL) -> str | None:
    """Tensors with tails, empty ones and a misaligned one; then the end of one beyond 2^31 elements, twice.

    That one lies in address space that is reserved but never touched; its count of chunks starts below zero.
    """
    rng = np.random.default_rng(1)
    chunk, far = 2048, 1 << 31
    sizes = (5, 0, 2049, 4096, 7, 3001)
    arrays = [[np.abs(rng.standard_normal(size)).astype(np.float32) for _ in range(4)] for size in sizes]
    arrays[-1] = [np.concatenate([values[:1], values])[1:] for values in arrays[-1]]
    failure = adam_steps(library, arrays, np.cumsum([-(-size // chunk) for size in sizes]))
    if failure:
        return failure
    # Not from malloc: AddressSanitizer would mark each of these bytes.
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    huge = [np.frombuffer(mmap.mmap(-1, 4 * (far + 100), flags=flags), np.float32) for _ in range(4)]
    for values in huge:
        values[far:] = np.abs(rng.standard_normal(100))
    empty = [np.empty(0, np.float32)] * 4
    failure = adam_steps(library, [empty, huge], np.array([-far // chunk, 1]), far)
    return f"beyond 2^31 elements: {failure}" if failure else None


def adam_steps(library: ctypes.CDLL, arrays: list, ends: np.ndarray, begin: int = 0) -> str | None:
    """Two steps on [param, exp_avg, exp_avg_sq, grad], the second with gradients that were allocated anew."""
    steps = np.zeros((len(arrays), 16), np.float32)  # apart from one another, as torch's are
    scratch, norm, ends = np.zeros(2 + 2048, np.int64), np.zeros(1, np.float32), ends.astype(np.int64)
    hyper = np.array([[1e-2, 0, 0.9, 0.999, 1e-8, 0, 0, 0, 0, 0, 0]])
    tensors = np.zeros((len(arrays), 10), np.int64)
    for row, step, (param, exp_avg, exp_avg_sq, _) in zip(tensors, steps, arrays, strict=True):
        row[:3] = [values.ctypes.data for values in (param, exp_avg, exp_avg_sq)]
        row[6:8] = step.ctypes.data, param.size
    for turn in (1, 2):
        own = [[values[begin:].astype(np.float64) for values in tensor] for tensor in arrays]
        total = np.sqrt(sum((tensor[3] ** 2).sum() for tensor in own))
        grads = np.array([tensor[3].ctypes.data for tensor in arrays], np.int64)
        tables = [pointer(tensors), pointer(ends), pointer(grads), ctypes.c_int64(len(arrays))]
        rest = [pointer(hyper), pointer(scratch), ctypes.c_float(0.5 * total), pointer(norm)]
        failure = call(library.run_adam, *tables, *rest) or compare("norm", norm, np.array([total]), 1e-6)
        for tensor, (p, m, v, g) in zip(arrays, own, strict=True):
            g = 0.5 * g
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - 1e-2 / (1 - 0.9**turn) * m / (np.sqrt(v / (1 - 0.999**turn)) + 1e-8)
            for name, got, wanted in zip(("param", "exp_avg", "exp_avg_sq", "grad"), tensor, (p, m, v, g), strict=True):
                if wanted.size:
                    failure = failure or compare(name, got[begin:], wanted, 2e-6)
        if failure or (steps[:, 0] != turn).any():
            return failure or f"wrong steps {steps[:, 0]} after {turn}"
        if begin == 0:
            for tensor in arrays:
                tensor[3] = np.concatenate([2 * tensor[3], np.full(4, np.nan, np.float32)])[: tensor[3].size]
    return None


def conv_hopper(library: ctypes.CDLL) -> str | None:
    """One block: tiles over several images, tails of everything, rings that go round, the phases of a stride. Two that
    share pixels.
    """
    for images, channels, height, width, filters, kernel, stride, padding, staged, cluster in (
        (5, 160, 9, 8, 40, 3, 1, 1, False, 1),
        (2, 40, 8, 7, 40, 3, 2, 1, True, 1),
        (3, 640, 11, 8, 128, 1, 1, 0, False, 2),
        (1, 128, 8, 15, 128, 1, 1, 0, False, 2),
    ):
        rng = np.random.default_rng(channels)
        x, weight = (
            rng.integers(-1, 2, shape).astype(np.float32)
            for shape in ((images, height, width, channels), (filters, kernel, kernel, channels))
        )
        out_h, out_w = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        wanted = np.zeros((images, out_h, out_w, filters), np.float32)
        for r, s in np.ndindex(kernel, kernel):
            under = padded[:, r : r + stride * out_h : stride, s : s + stride * out_w : stride]
            wanted += under[:, :out_h, :out_w] @ weight[:, r, s].T
        output = np.full_like(wanted, np.nan)
        sizes = [ctypes.c_int(n) for n in (images, channels, height, width, filters, kernel, stride, padding)]
        sizes += [ctypes.c_int(staged), ctypes.c_int(cluster)]
        failure = call(library.run_conv_hopper, *sizes, pointer(x), pointer(weight), pointer(output))
        failure = failure or compare("output", output, np.maximum(wanted, 0), 1e-6)
        if failure:
            return f"stride {stride}, cluster {cluster}: {failure}"
    return None


def conv_hopper_weight(library: ctypes.CDLL) -> str | None:
    """Rings that go round, filters beyond the tile, alone with places to fill up, in a cluster with padding."""
    for cluster, (images, height, width, padding) in ((1, (13, 14, 14, 0)), (2, (32, 7, 7, 1))):
        channels, filters, kernel, stride = 64, 120, 2, 2
        out_h, out_w = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        rng = np.random.default_rng(images)
        grad, x = (
            rng.integers(-2, 3, shape).astype(np.float32)
            for shape in ((images, out_h, out_w, filters), (images, height, width, channels))
        )
        padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        weight = np.zeros((filters, kernel, kernel, channels), np.float32)
        for r, s in np.ndindex(kernel, kernel):
            under = padded[:, r : r + stride * out_h : stride, s : s + stride * out_w : stride][:, :out_h, :out_w]
            weight[:, r, s] = np.tensordot(grad, under, ((0, 1, 2), (0, 1, 2)))
        found, found_bias = np.full_like(weight, np.nan), np.full(filters, np.nan, np.float32)
        sizes = (images, channels, height, width, filters, kernel, stride, padding, cluster)
        arrays = (pointer(grad), pointer(x), pointer(found), pointer(found_bias))
        failure = call(library.run_conv_hopper_weight, *map(ctypes.c_int, sizes), *arrays)
        failure = failure or compare("grad_weight", found, weight, 1e-6)
        failure = failure or compare("grad_bias", found_bias, grad.sum((0, 1, 2)), 1e-6)
        if failure:
            return f"{cluster} blocks a cluster: {failure}"
    return None


def conv_stem(library: ctypes.CDLL) -> str | None:
    """One block: several boxes with halos, lines in chunks and by elements, runs of both parities, both layouts.

    Small integers: sums are exact, equal maxima are frequent and the first of them is asked for.
    """
    for images, channels, height, width, filters, kernel, stride, padding, last in (
        (2, 3, 30, 32, 24, 5, 2, 1, True),
        (1, 2, 17, 19, 21, 4, 1, 2, False),
    ):
        rng = np.random.default_rng(width)
        x, weight, bias = (
            rng.integers(-1, 2, shape).astype(np.float32)
            for shape in ((images, height, width, channels), (filters, kernel, kernel, channels), (filters,))
        )
        out_h, out_w = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        # A border of -1 is never a maximum of what relu leaves.
        active = np.full((images, out_h + 3, out_w + 3, filters), -1, np.float32)
        inner = active[:, 1:-2, 1:-2]
        inner[:] = bias
        for r, s in np.ndindex(kernel, kernel):
            under = padded[:, r : r + stride * out_h : stride, s : s + stride * out_w : stride]
            inner += under[:, :out_h, :out_w] @ weight[:, r, s].T
        np.maximum(inner, 0, out=inner)
        size = ((out_h - 1) // 2 + 1, (out_w - 1) // 2 + 1)
        window = np.stack([active[:, y : y + 2 * size[0] : 2, z : z + 2 * size[1] : 2] for y, z in np.ndindex(3, 3)])
        window = window[:, :, : size[0], : size[1]]
        wanted, places = window.max(0), window.argmax(0)
        given = [x, weight]
        if not last:
            given = [np.ascontiguousarray(array.transpose(0, 3, 1, 2)) for array in given]
            wanted, places = (array.transpose(0, 3, 1, 2) for array in (wanted, places))
        output, argmax = np.full(wanted.shape, np.nan, np.float32), np.full(wanted.shape, 255, np.uint8)
        sizes = [ctypes.c_int(n) for n in (images, channels, height, width, filters, kernel, stride, padding, last)]
        failure = (
            call(library.run_conv_stem, *sizes, *map(pointer, (*given, bias, output, argmax)))
            or compare("output", output, wanted, 0)
            or compare("argmax", argmax.astype(np.float32), places, 0)
        )
        if failure:
            return f"stride {stride}: {failure}"
    return None


def rnn(library: ctypes.CDLL) -> str | None:
    """A packed bidirectional LSTM in each variant, several blocks and a padded group; the reference is torch's.

    On the grid once with tags and once, as some initial states are beyond 2, with flags.
    """
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
    wide = states[0].index_fill(2, torch.tensor([5]), 2.5)
    for variant, h0 in (("block", wide), ("grid", wide), ("grid", wide.clamp(-1, 1)), ("step", wide)):
        states[0] = h0
        exact = _torch.forward(
            gates.double(), weight.double(), None, *map(torch.Tensor.double, states), None, *packed, 2, True
        )
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


def philox_uniform(seed: int, offset: int, count: int) -> np.ndarray:
    """fp32 in (0, 1] by the scalar algorithm as Salmon et al. print it."""
    words = []
    for group in range(-(-count // 4)):
        counter, key = [offset % 2**32, offset >> 32, group % 2**32, group >> 32], [seed % 2**32, seed >> 32]
        for _ in range(10):
            low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [
                (high >> 32) ^ counter[1] ^ key[0],
                high % 2**32,
                (low >> 32) ^ counter[3] ^ key[1],
                low % 2**32,
            ]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        words += counter
    return (np.array(words[:count], np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)


def attention(library: ctypes.CDLL) -> str | None:
    """Three tiles of keys, the last one ragged, two of queries; head_dim 20; causal from the corner, or dropout."""
    dim, seed, offset, slope = 20, 11, 3, 0.25
    for queries, keys, causal, dropout_p in ((70, 76, False, 0.25), (5, 70, True, 0.0)):
        rng = np.random.default_rng(queries)
        q, grad = rng.standard_normal((2, queries, dim)).astype(np.float32)
        k, v = rng.standard_normal((2, keys, dim)).astype(np.float32)
        shapes = ((queries, dim), (queries, dim), (keys, dim), (keys, dim), (1,))
        results = [np.full(shape, np.nan, np.float32) for shape in shapes]
        sizes = [ctypes.c_int(value) for value in (queries, keys, dim, causal)]
        randoms = [ctypes.c_float(slope), ctypes.c_float(dropout_p), ctypes.c_int64(seed), ctypes.c_int64(offset)]
        failure = call(library.run_attention, *map(pointer, (q, k, v, grad, *results)), *sizes, *randoms)

        q, k, v, grad = (x.astype(np.float64) for x in (q, k, v, grad))
        distance = np.abs(np.arange(keys) - np.arange(queries)[:, None])
        scores = q @ k.T * dim**-0.5 - slope * distance
        if causal:
            scores = np.where(np.arange(keys) <= np.arange(queries)[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        kept = np.ones_like(weights)
        if dropout_p:
            kept = (philox_uniform(seed, offset, queries * keys).reshape(queries, keys) > dropout_p) / (1 - dropout_p)
        output = (weights * kept) @ v
        grad_weights = (grad @ v.T) * kept
        grad_biases = weights * (grad_weights - (grad * output).sum(1, keepdims=True))
        grad_scores = grad_biases * dim**-0.5
        failure = (
            failure
            or compare("output", results[0], output, 1e-5)
            or compare("grad_query", results[1], grad_scores @ k, 1e-5)
            or compare("grad_key", results[2], grad_scores.T @ q, 1e-5)
            or compare("grad_value", results[3], (weights * kept).T @ grad, 1e-5)
            or compare("grad_slope", results[4], -(grad_biases * distance).sum(keepdims=True)[0], 1e-4)
        )
        if failure:
            return f"{queries} x {keys}: {failure}"
    return None


def attention_hopper_backward(library: ctypes.CDLL) -> str | None:
    """Causal: two heads share two tiles of keys, which one block walks over. Packed, with dropout: two sequences, of
    which the second has infinities that must not reach the first.
    """
    return hopper_gradients(library, 64, (([(150, 200)], True, 0.0), ([(70, 140), (9, 20)], False, 0.25)))


def attention_hopper_backward_wide(library: ctypes.CDLL) -> str | None:
    """Each warpgroup has one gradient and half of the scores: two tiles of keys and three of queries; packed sequences
    with dropout.
    """
    return hopper_gradients(library, 192, (([(130, 100)], True, 0.0), ([(70, 80), (9, 20)], False, 0.25)))


def hopper_gradients(library: ctypes.CDLL, dim: int, cases: tuple) -> str | None:
    """Cases: (queries, keys) of each sequence, packed where they are several; causal; dropout_p."""
    heads, scale, seed, offset = 2, 0.125, 11, 3
    for lengths, causal, dropout_p in cases:
        (queries, keys), packed = lengths[0], len(lengths) > 1
        totals = [sum(x) for x in zip(*lengths, strict=True)]
        rng = np.random.default_rng(queries)
        q, g = (bf16_values(rng, (heads, totals[0], dim)) for _ in range(2))
        k, v = (bf16_values(rng, (1, totals[1], dim)) for _ in range(2))
        for x, rows in ((q, queries), (g, queries), (k, keys), (v, keys)):
            x[:, rows:] = np.inf
        scores = np.einsum("hid,jd->hij", q[:, :queries], k[0, :keys], dtype=np.float64) * scale
        if causal:
            scores = np.where(np.arange(keys) <= np.arange(queries)[:, None], scores, -np.inf)
        lse = np.log(np.exp(scores).sum(2))
        weights = np.exp(scores - lse[..., None])
        kept = np.ones_like(weights)
        if dropout_p:
            # The element's number goes by the longest lengths, here the first sequence's.
            kept = (philox_uniform(seed, offset, kept.size).reshape(kept.shape) > dropout_p) / (1 - dropout_p)
        gradient = g[:, :queries].astype(np.float64)
        grad_weights = np.einsum("hid,jd->hij", gradient, v[0, :keys]) * kept
        delta = (weights * grad_weights).sum(2)
        grad_scores = weights * (grad_weights - delta[..., None])

        statistics = np.full((heads, totals[0], 2), 1.0, np.float32)
        statistics[:, :queries, 0] = lse if dropout_p else lse * np.log2(np.e)
        statistics[:, :queries, 1] = delta
        tiles = -(-queries // 64)
        sums = np.zeros((len(lengths), heads, tiles, 2, 4, dim // 16, 8, 4, 2, 2), np.float32)
        results = [np.full(k.shape, 0xFFFF, np.uint16) for _ in range(2)]
        bits = [bf16(x) for x in (q, k, v, g)]
        starts = [np.cumsum([0, *x]).astype(np.int32) for x in zip(*lengths, strict=True)]
        sizes = [len(lengths) if packed else 0, heads, *totals, dim, causal, 1]
        failure = call(
            library.run_attention_hopper_backward,
            *map(pointer, (*bits, statistics, sums, *results, *starts)),
            *map(ctypes.c_int, sizes),
            *(ctypes.c_int(x) for x in (queries, keys)),
            *(ctypes.c_float(dropout_p), ctypes.c_int64(seed), ctypes.c_int64(offset)),
        )
        # Half of the columns, 16 rows, 8 columns, row, two columns, 8 rows further, column.
        grad_q = sums[0].transpose(0, 1, 3, 7, 5, 2, 4, 6, 8).reshape(heads, tiles * 64, dim)[:, :queries]
        grad_k, grad_v = ((x[0, :keys].astype(np.uint32) << 16).view(np.float32) for x in results)
        failure = (
            failure
            or compare("grad_query", grad_q, np.einsum("hij,jd->hid", grad_scores, k[0, :keys]), 0.01)
            or compare("grad_key", grad_k, np.einsum("hij,hid->jd", grad_scores, q[:, :queries]) * scale, 0.01)
            or compare("grad_value", grad_v, np.einsum("hij,hid->jd", weights * kept, gradient), 0.01)
        )
        if failure:
            return f"{lengths}: {failure}"
    return None


def attention_hopper(library: ctypes.CDLL) -> str | None:
    """Several tiles of queries and keys; packed sequences, the last of which is NaN and must stay alone; the same where
    three heads share tiles with an empty fourth place.
    """
    dim, cases = (
        64,
        (
            ([0, 200], [0, 300], 2, 2),
            ([0, 70, 70, 300, 310], [0, 130, 150, 420, 440], 2, 2),
            ([0, 30], [0, 40], 6, 2),
            ([0, 20, 20, 70, 72], [0, 30, 40, 90, 95], 3, 1),
        ),
    )
    for cu_q, cu_k, heads, kv_heads in cases:
        queries, keys, causal = cu_q[-1], cu_k[-1], len(cu_q) > 2
        rng = np.random.default_rng(queries)
        sizes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
        bits = [bf16(rng.standard_normal((*size, dim)).astype(np.float32)) for size in sizes]
        q, k, v = ((x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in bits)
        k, v = (np.repeat(x, heads // kv_heads, 0) for x in (k, v))
        ends = len(cu_q) - 2 if causal else len(cu_q) - 1
        if causal:
            bits[2][:, cu_k[-2] :] = 0x7FC0  # NaN
        output = np.full((heads, queries, dim), 0x7FC0, np.uint16)
        lse = np.full((heads, queries), np.nan, np.float32)
        starts = [np.array(x, np.int32) for x in (cu_q, cu_k)]
        numbers = (len(cu_q) - 1 if causal else 0, heads, kv_heads, queries, keys, causal)
        places = map(pointer, (*bits, output, lse, *starts))
        failure = call(library.run_attention_hopper, *places, *map(ctypes.c_int, numbers))
        found = (output.astype(np.uint32) << 16).view(np.float32)
        for i in range(ends):
            rows, cols = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            count, seen = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
            if count == 0:
                continue
            scores = q[:, rows] @ k[:, cols].transpose(0, 2, 1) * dim**-0.5
            if causal:
                hidden = np.arange(seen) > np.arange(count)[:, None] + seen - count
                scores = np.where(hidden, -np.inf, scores)
            weights = np.exp(scores - scores.max(2, keepdims=True))
            wanted = weights @ v[:, cols] / weights.sum(2, keepdims=True)
            sums = np.log(weights.sum(2)) + scores.max(2)
            failure = (
                failure
                or compare(f"output of sequence {i}", found[:, rows], wanted, 2e-2)
                or compare(f"lse of sequence {i}", lse[:, rows], sums, 1e-5)
            )
        if failure:
            return failure
    return None


def attention_decode(library: ctypes.CDLL) -> str | None:
    """Several tiles of keys to a warp, parts that end within one, new rows at the end of a cache of NaN.

    By TMA: rings that go round, new rows that end where a tile of 16 does, and a cluster of three blocks.
    """
    return decode(library.run_attention_decode_hopper, 24, ((606, 1), (462, 3)), in_bf16=True) or decode(
        library.run_attention_decode, 20, ((200, 1), (460, 3)), in_bf16=False
    )


def decode(run, dim: int, cases: tuple[tuple[int, int], ...], *, in_bf16: bool) -> str | None:
    """Rows in the cache and parts of each case."""
    heads, queries, new = 3, 2, 2
    for length, splits in cases:
        rng = np.random.default_rng(length)
        capacity, end = length + new + 1, length + new
        values = bf16_values if in_bf16 else lambda rng, shape: rng.standard_normal(shape).astype(np.float32)
        q, k, v = values(rng, (heads, queries, dim)), *(2 * values(rng, (2, end, dim)))
        caches = [np.full((capacity, dim), np.nan, np.float32) for _ in range(2)]
        for cache, rows in zip(caches, (k, v), strict=True):
            cache[:length] = rows[:length]
        output = np.full(q.shape, np.nan, np.float32)
        sizes = [ctypes.c_int(value) for value in (heads, queries, capacity, length, new, dim, splits)]
        added = [np.ascontiguousarray(rows[length:]) for rows in (k, v)]
        arrays = [bf16(x) if in_bf16 else x for x in (q, *caches, *added, output)]
        failure = call(run, *map(pointer, arrays), *sizes)
        if in_bf16:
            *caches, output = (((arrays[i].astype(np.uint32) << 16).view(np.float32)) for i in (1, 2, 5))

        scores = q.astype(np.float64) @ k.T.astype(np.float64) * dim**-0.5
        scores = np.where(np.arange(end) <= end - queries + np.arange(queries)[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(2, keepdims=True))
        weights /= weights.sum(2, keepdims=True)
        failure = (
            failure
            or compare("output", output, weights @ v, 0.01 if in_bf16 else 1e-5)
            or compare("key_cache", caches[0][:end], k, 0.0)
            or compare("value_cache", caches[1][:end], v, 0.0)
        )
        if failure:
            return f"{length} rows, {splits} parts, {'TMA' if in_bf16 else 'copied'}: {failure}"
    return None


# A GPU of one block, so that persistent kernels go round their loops; or several at once, where blocks meet.
ONE_BLOCK = dict(workers=1, multiprocessors=1, blocks_per_multiprocessor=1)
GPUS = {
    "adam": dict(workers=1, multiprocessors=3, blocks_per_multiprocessor=1, resident=3),
    "conv_hopper": dict(**ONE_BLOCK, compute_capability=90),
    "layer_norm_cluster": dict(workers=1, multiprocessors=2, blocks_per_multiprocessor=1, compute_capability=90),
    "conv_hopper_weight": dict(workers=1, multiprocessors=2, blocks_per_multiprocessor=1, compute_capability=90),
    "rnn": dict(workers=1, multiprocessors=8, blocks_per_multiprocessor=1),
    "attention_decode": dict(multiprocessors=4, blocks_per_multiprocessor=1, compute_capability=90),
}


def main(path: str, build: str, kernel: str, schedules: list[str]) -> None:
    library = emulated.open_library(Path(path), build)
    run = {
        "tile_gemm": tile_gemm,
        "layer_norm": layer_norm,
        "layer_norm_cluster": layer_norm_cluster,
        "adam": adam,
        "conv": conv,
        "conv_hopper": conv_hopper,
        "conv_hopper_weight": conv_hopper_weight,
        "conv_stem": conv_stem,
        "rnn": rnn,
        "attention": attention,
        "attention_hopper": attention_hopper,
        "attention_decode": attention_decode,
        "attention_hopper_backward": attention_hopper_backward,
        "attention_hopper_backward_wide": attention_hopper_backward_wide,
    }[kernel]
    for schedule in schedules:
        order, seed = schedule.split(":")
        library.control.set_options(order=order, seed=int(seed), **GPUS.get(kernel, ONE_BLOCK))
        caught = run(library.functions)
        print(json.dumps({"schedule": schedule, "caught": caught}), flush=True)
        if caught:
            return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
