"""The optimizers' kernels, called as raw ops: every path of the traversal and of each rule.

The tables are written here by hand, from the layout that csrc/kernels/multi_tensor.h and _plan.py share.  What a step
must compute is written again in numpy, operation by operation, and compared bit for bit; torch's own optimizers and
norms judge by the error rule.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bigkern.ops import _extension
from bigkern.ops.adam import _cuda, _plan
from bigkern.ops.adam._plan import CHUNK, DTYPE_CODES, SCRATCH_WORDS, Column, Flag, Hyper
from tests import emulated
from tests.conftest import pick
from tests.numerics import assert_close
from tests.triton.philox import words as philox_words

ROOT = Path(__file__).resolve().parents[2]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Parameter and gradient, states.
DTYPES = [(F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]
STATES = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("exp_avg",)}
ADDRESSES = {
    "param": Column.PARAM,
    "exp_avg": Column.EXP_AVG,
    "exp_avg_sq": Column.EXP_AVG_SQ,
    "max_exp_avg_sq": Column.MAX_EXP_AVG_SQ,
    "master": Column.MASTER,
    "ema": Column.EMA,
    "step": Column.STEP,
}
DEFAULTS = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, l1=0.0, ema_decay=0.9, momentum=0.9)
PHILOX = (0x1234_5678_9ABC_DEF0, 0x0FED_CBA9_8765)

# One path each: part of a vector, vectors and a tail, whole tiles, several chunks with a tail.
SIZES = [1, 3, 4, 7, 8, 100, 255, 1024, 1027, 2047, 2048, 2049, 6144, 9999]


@pytest.fixture(autouse=True)
def kernels(device, request):
    """The kernels, on a GPU small enough that a block walks over several tensors: 3 blocks when emulated."""
    if device.type == "cuda":
        reason = _extension.load()
        assert reason is None, reason
        yield
        return
    emulator = request.getfixturevalue("emulator")
    options = emulator.options()
    emulator.set_options(multiprocessors=3, blocks_per_multiprocessor=1)
    yield
    emulator.set_options(**options)


def randn(size, dtype=F32, device="cpu", seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator) * scale).to(device, dtype)


def make_tensor(
    size, dtype, state_dtype, device="cpu", *, seed=0, rule="adam", amsgrad=False, master=False, ema=False, step=3.0
):
    """The arrays of one parameter, by name, as after some steps; those that are absent are None."""
    tensor = dict.fromkeys(ADDRESSES)
    tensor |= {"grad": randn(size, dtype, device, seed), "param": randn(size, dtype, device, seed + 1)}
    for name in STATES[rule]:
        tensor[name] = randn(size, F32, device, seed + len(name), 0.1).abs().to(state_dtype)
    if amsgrad:
        tensor["max_exp_avg_sq"] = randn(size, F32, device, seed + 5, 0.1).abs().to(state_dtype)
    if master:
        tensor["master"] = randn(size, F32, device, seed + 6)
        tensor["param"] = tensor["master"].to(dtype)
    if ema:
        tensor["ema"] = randn(size, F32, device, seed + 7)
    if step is not None:
        tensor["step"] = torch.tensor(step, device=device)
    return tensor


def copies(tensors):
    return [{name: None if value is None else value.clone() for name, value in t.items()} for t in tensors]


def make_hyper(*groups, device="cpu"):
    """Rows of options; missing ones are DEFAULTS or 0, ``lr`` may be a tensor."""
    rows = torch.zeros(len(groups), len(Hyper), dtype=torch.float64)
    for row, group in zip(rows, groups, strict=True):
        for name, value in {**DEFAULTS, **group}.items():
            if isinstance(value, torch.Tensor):
                row[Hyper.LR_POINTER] = torch.tensor([value.data_ptr()]).view(torch.float64)[0]
            else:
                row[Hyper[name.upper()]] = float(value)
    return rows.to(device)


def make_tables(tensors, groups=None):
    """(tensors, chunk_ends, grads) of the raw ops."""
    rows = torch.zeros(len(tensors), len(Column), dtype=torch.int64)
    ends, end = [], 0
    for index, tensor in enumerate(tensors):
        for name, column in ADDRESSES.items():
            rows[index, column] = 0 if tensor.get(name) is None else tensor[name].data_ptr()
        grad, state = tensor["grad"], tensor.get("exp_avg")
        rows[index, Column.NUMEL] = grad.numel()
        rows[index, Column.DTYPES] = DTYPE_CODES[grad.dtype] | DTYPE_CODES[F32 if state is None else state.dtype] << 8
        rows[index, Column.GROUP] = groups[index] if groups else 0
        end += -(-grad.numel() // CHUNK)
        ends.append(end)
    device = tensors[0]["grad"].device if tensors else "cpu"
    grads = [tensor["grad"].data_ptr() for tensor in tensors]
    return rows.to(device), *(torch.tensor(values, dtype=torch.int64, device=device) for values in (ends, grads))


def new_scratch(device="cpu"):
    return torch.zeros(SCRATCH_WORDS, dtype=torch.int64, device=device)


def run(tensors, *groups, rule="adam", rows=None, scratch=None, zero_grads=False, philox=None, max_norm=0.0, **scalars):
    """One step over the tensors, in place.  ``scalars``: grad_scale, found_inf, total_norm."""
    device = tensors[0]["grad"].device
    scalars = {
        name: torch.tensor(scalars[name], device=device) if name in scalars else None
        for name in ("grad_scale", "found_inf", "total_norm")
    }
    hyper = make_hyper(*(groups or ({},)), device=device)
    scratch = new_scratch(device) if scratch is None else scratch
    philox = None if philox is None else torch.tensor(philox, device=device)
    step = _cuda.adam_step if rule == "adam" else _cuda.sgd_step
    step(*make_tables(tensors, rows), hyper, scratch, *scalars.values(), max_norm, zero_grads, philox)
    assert scratch[0] == 0


# ---- the same again in numpy


def f32(value):
    return np.float32(value)


def fma(a, b, c):
    """One rounding, up to ties beyond 64 bits."""
    exact = np.asarray(a, np.longdouble) * np.asarray(b, np.longdouble) + np.asarray(c, np.longdouble)
    return exact.astype(np.float32)


def lerp(start, end, weight):
    weight = f32(weight)
    return fma(weight, end - start, start) if abs(weight) < 0.5 else fma(weight - f32(1), end - start, end)


def floats(tensor):
    return tensor.float().cpu().numpy()


def expected(tensor, group, number=0, *, rule="adam", factor=1.0, philox=None):
    """What one step must leave in the tensor, by name."""
    h = {**dict.fromkeys(("dampening", "flags"), 0), **DEFAULTS, **group}
    flags, result = Flag(int(h["flags"])), dict(tensor)
    lr, step = float(h["lr"]), 0.0 if tensor["step"] is None else float(tensor["step"]) + 1
    state = tensor["exp_avg"]
    p = floats(tensor["param"] if tensor["master"] is None else tensor["master"])
    g = floats(tensor["grad"]) * f32(-factor if Flag.MAXIMIZE in flags else factor)
    if h["l1"]:
        g = fma(f32(h["l1"]), np.sign(p), g)
    if h["weight_decay"] and Flag.DECOUPLED in flags:
        p = p * f32(1 - lr * h["weight_decay"])
    elif h["weight_decay"]:
        g = fma(f32(h["weight_decay"]), p, g)
    if rule == "adam":
        m = lerp(floats(tensor["exp_avg"]), g, 1 - h["beta1"])
        v = fma(f32(1 - h["beta2"]) * g, g, floats(tensor["exp_avg_sq"]) * f32(h["beta2"]))
        result |= {"exp_avg": m, "exp_avg_sq": v}
        if tensor["max_exp_avg_sq"] is not None:
            result["max_exp_avg_sq"] = v = np.maximum(v, floats(tensor["max_exp_avg_sq"]))
        denominator = np.sqrt(v) / f32(math.sqrt(1 - h["beta2"] ** step)) + f32(h["eps"])
        p = p + f32(-lr / (1 - h["beta1"] ** step)) * m / denominator
    else:
        if state is not None:
            b = fma(f32(1 - h["dampening"]), g, floats(state) * f32(h["momentum"]))
            result["exp_avg"] = b = g if step == 1 else b
            g = fma(f32(h["momentum"]), b, g) if Flag.NESTEROV in flags else b
        p = fma(f32(-lr), g, p)
    result["param"] = p
    if philox is not None and Flag.STOCHASTIC_ROUNDING in flags and tensor["master"] is None:
        result["param"] = round_stochastically(p, number, int(step), philox)
    if tensor["master"] is not None:
        result["master"] = p
    if tensor["ema"] is not None:
        stored = (
            p if tensor["master"] is not None else floats(torch.as_tensor(result["param"]).to(tensor["param"].dtype))
        )
        result["ema"] = lerp(floats(tensor["ema"]), stored, 1 - h["ema_decay"])
    if tensor["step"] is not None:
        result["step"] = np.asarray(step, np.float32)
    return {name: None if value is None else torch.as_tensor(value).to(tensor[name]) for name, value in result.items()}


def round_stochastically(p, number, step, philox):
    """bf16 values as float32: the upper 16 bits after a random 16-bit number was added to the lower ones."""
    seed, offset = philox
    n = number * CHUNK + np.arange(p.size, dtype=np.uint64)
    words = np.stack(philox_words(seed, n // np.uint64(4), (offset + (step << 32)) % 2**64))
    noise = words[(n % np.uint64(4)).astype(int), np.arange(p.size)] >> 16
    bits = np.ascontiguousarray(p).view(np.uint32)
    finite = np.isfinite(p)
    rounded = np.where(finite, bits + np.where(finite, noise, 0).astype(np.uint32), bits) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def assert_same(found, wanted, what=""):
    """Bit for bit; on a GPU the scalars' last bit may differ, computed by its own pow."""
    for name, value in wanted.items():
        if value is None:
            continue
        if value.device.type == "cpu":
            assert torch.equal(found[name].nan_to_num(), value.nan_to_num()), f"{what} {name}"
            assert torch.equal(found[name].isnan(), value.isnan()), f"{what} {name}"
        else:
            torch.testing.assert_close(found[name], value, rtol=4 * torch.finfo(value.dtype).eps, atol=1e-7)


def chunk_numbers(tensors):
    """The number of each tensor's first chunk."""
    counts = [-(-tensor["grad"].numel() // CHUNK) for tensor in tensors]
    return [sum(counts[:index]) for index in range(len(counts))]


def check(tensors, *groups, rule="adam", rows=None, factor=1.0, philox=None, **arguments):
    """A step on copies, against numpy; returns the copies."""
    groups = groups or ({},)
    found = copies(tensors)
    run(found, *groups, rule=rule, rows=rows, philox=philox, **arguments)
    for index, (tensor, number) in enumerate(zip(tensors, chunk_numbers(tensors), strict=True)):
        group = groups[rows[index] if rows else 0]
        wanted = expected(tensor, group, number, rule=rule, factor=factor, philox=philox)
        if arguments.get("zero_grads"):
            wanted["grad"] = torch.zeros_like(tensor["grad"])
        assert_same(found[index], wanted, f"tensor {index}")
    return found


# ---- sizes and dtypes


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_sizes_and_dtypes(rule, dtypes, device):
    """Every size for itself, then all in one launch."""
    tensors = [make_tensor(size, *dtypes, device, seed=10 * size, rule=rule) for size in SIZES]
    for tensor in pick(tensors, tensors[::4]):
        check([tensor], rule=rule)
    check(tensors, rule=rule)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_mixed_dtypes_and_groups_in_one_launch(rule, device):
    groups = ({}, {"lr": 1e-3, "weight_decay": 0.1}, {"lr": 0.3, "beta1": 0.3, "momentum": 0.0, "eps": 1e-3})
    tensors = [
        make_tensor(size, *DTYPES[index % len(DTYPES)], device, seed=index, rule=rule, step=float(index % 5))
        for index, size in enumerate([5, 3000, 0, 17, 8192, 1, 0, 0, 2048, 511, 4100, 12, 6])
    ]
    check(tensors, *groups, rule=rule, rows=[index % 3 for index in range(len(tensors))])
