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
    dim, seed, offset = 20, 11, 3
    for queries, keys, causal, dropout_p in ((70, 76, False, 0.25), (5, 70, True, 0.0)):
        rng = np.random.default_rng(queries)
        q, grad = rng.standard_normal((2, queries, dim)).astype(np.float32)
        k, v = rng.standard_normal((2, keys, dim)).astype(np.float32)
        results = [
            np.full(shape, np.nan, np.float32) for shape in ((queries, dim), (queries, dim), (keys, dim), (keys, dim))
        ]
        sizes = [ctypes.c_int(value) for value in (queries, keys, dim, causal)]
        randoms = [ctypes.c_float(dropout_p), ctypes.c_int64(seed), ctypes.c_int64(offset)]
        failure = call(library.run_attention, *map(pointer, (q, k, v, grad, *results)), *sizes, *randoms)

        q, k, v, grad = (x.astype(np.float64) for x in (q, k, v, grad))
        scores = q @ k.T * dim**-0.5
        if causal:
            scores = np.where(np.arange(keys) <= np.arange(queries)[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        kept = np.ones_like(weights)
        if dropout_p:
            kept = (philox_uniform(seed, offset, queries * keys).reshape(queries, keys) > dropout_p) / (1 - dropout_p)
        output = (weights * kept) @ v
        grad_weights = (grad @ v.T) * kept
        grad_scores = weights * (grad_weights - (grad * output).sum(1, keepdims=True)) * dim**-0.5
        failure = (
            failure
            or compare("output", results[0], output, 1e-5)
            or compare("grad_query", results[1], grad_scores @ k, 1e-5)
            or compare("grad_key", results[2], grad_scores.T @ q, 1e-5)
            or compare("grad_value", results[3], (weights * kept).T @ grad, 1e-5)
        )
        if failure:
            return f"{queries} x {keys}: {failure}"
    return None


def main(path: str, build: str, kernel: str, schedules: list[str]) -> None:
    library = emulated.open_library(Path(path), build)
    run = {"tile_gemm": tile_gemm, "layer_norm": layer_norm, "attention": attention}[kernel]
    for schedule in schedules:
        order, seed = schedule.split(":")
        # A GPU of one block, so that persistent kernels go round their loops.
        one = dict(workers=1, multiprocessors=1, blocks_per_multiprocessor=1)
        library.control.set_options(order=order, seed=int(seed), **one)
        caught = run(library.functions)
        print(json.dumps({"schedule": schedule, "caught": caught}), flush=True)
        if caught:
            return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
