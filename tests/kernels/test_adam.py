"""The optimizers' kernels, called as raw ops: every path of the traversal and of each rule.

The tables are written here by hand, from the layout that csrc/kernels/multi_tensor.h and _plan.py share.  What a step
must compute is written again in numpy, operation by operation, and compared bit for bit; torch's own optimizers and
norms judge by the error rule.
"""

from __future__ import annotations

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
from bigkern.ops.adam import _cuda
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


@np.errstate(over="ignore", invalid="ignore")
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
    if (
        philox is not None
        and Flag.STOCHASTIC_ROUNDING in flags
        and tensor["master"] is None
        and tensor["param"].dtype == BF16
    ):
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
    words = philox_words(seed, n // np.uint64(4), (offset + (step << 32)) % 2**64)
    noise = words[np.arange(p.size), (n % np.uint64(4)).astype(int)] >> 16
    bits = np.ascontiguousarray(p).view(np.uint32)
    finite = np.isfinite(p)
    rounded = np.where(finite, bits + np.where(finite, noise, 0).astype(np.uint32), bits) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def assert_same(found, wanted, what=""):
    """Bit for bit; on a GPU the scalars' last bit may differ."""
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


def test_thousands_of_tiny_tensors(device):
    """A block walks over many; its search ends on tensors between empty ones."""
    sizes = [index % 4 for index in range(pick([20_000], [1_500])[0])]
    tensors = [make_tensor(size, F32, F32, device, seed=index % 50) for index, size in enumerate(sizes)]
    found = copies(tensors)
    run(found)
    for index in {0, 1, 2, 3, len(sizes) // 2 + 1, len(sizes) - 1}:
        assert_same(found[index], expected(tensors[index], {}), f"tensor {index}")
    for index, (after, before) in enumerate(zip(found, tensors, strict=True)):
        assert after["step"] == before["step"] + 1, index
        assert before["grad"].numel() == 0 or not torch.equal(after["param"], before["param"]), index


def test_only_empty_tensors_and_none(device):
    tensors = [make_tensor(0, F32, F32, device), make_tensor(0, BF16, F32, device, step=7.0)]
    run(tensors)
    assert [float(tensor["step"]) for tensor in tensors] == [4.0, 8.0]
    rows = torch.zeros(0, len(Column), dtype=torch.int64, device=device)
    empty = torch.zeros(0, dtype=torch.int64, device=device)
    scratch, hyper = new_scratch(device), make_hyper({}, device=device)
    _cuda.adam_step(rows, empty, empty, hyper, scratch, None, None, None, 0.0, False, None)
    assert _cuda.grad_norm(rows, empty, empty, scratch, 2.0, None) == 0
    assert _cuda.clip_grads(rows, empty, empty, scratch, 2.0, 1.0) == 0


# ---- options

OPTIONS = {
    "plain": {},
    "L2": {"weight_decay": 0.05},
    "decoupled": {"weight_decay": 0.05, "flags": Flag.DECOUPLED},
    "maximize": {"flags": Flag.MAXIMIZE},
    "maximize, decoupled, L1": {"flags": Flag.MAXIMIZE | Flag.DECOUPLED, "weight_decay": 0.1, "l1": 1e-2},
    "L1": {"l1": 1e-2},
    "L1 and L2": {"l1": 1e-2, "weight_decay": 0.02},
    "small betas": {"beta1": 0.2, "beta2": 0.5, "eps": 1e-3},
    "betas of 0": {"beta1": 0.0, "beta2": 0.0},
    "nesterov": {"flags": Flag.NESTEROV},
    "dampening": {"dampening": 0.3},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_options(rule, option, device):
    for dtypes in [(F32, F32), (BF16, F32)]:
        for step in (0.0, 4.0):
            check([make_tensor(2060, *dtypes, device, rule=rule, step=step)], OPTIONS[option], rule=rule)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_further_arrays(rule, dtypes, device):
    """amsgrad, fp32 master weights and the moving average, each and all."""
    for amsgrad, master, ema in [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]:
        arrays = dict(amsgrad=amsgrad and rule == "adam", master=master, ema=ema, rule=rule)
        check([make_tensor(size, *dtypes, device, **arrays) for size in (7, 2055)], {"weight_decay": 0.1}, rule=rule)


def test_sgd_without_momentum_or_step(device):
    tensors = [
        make_tensor(2055, dtype, F32, device, rule="sgd", step=step) for dtype in (F32, F16) for step in (None, 2.0)
    ]
    tensors[0]["exp_avg"] = tensors[3]["exp_avg"] = None
    check(tensors, {"weight_decay": 0.1}, rule="sgd")


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_scaled_clipped_and_zeroed_gradients(rule, device):
    tensors = [make_tensor(size, *dtypes, device, rule=rule) for size in (5, 3000) for dtypes in DTYPES[:3]]
    check(tensors, rule=rule, factor=2.0**-10, grad_scale=2.0**10, zero_grads=True)
    coefficient = f32(1) / (f32(7.3) + f32(1e-6)) * f32(2)
    check(tensors, rule=rule, factor=coefficient, total_norm=7.3, max_norm=2.0)
    check(tensors, rule=rule, factor=1.0, total_norm=0.3, max_norm=2.0)
    check(tensors, rule=rule, factor=coefficient / f32(4), total_norm=7.3, max_norm=2.0, grad_scale=4.0, found_inf=0.0)


@pytest.mark.parametrize("zero_grads", [False, True])
def test_found_inf_skips_the_step(zero_grads, device):
    tensors = [make_tensor(size, *dtypes, device) for size in (5, 3001) for dtypes in DTYPES]
    found = copies(tensors)
    run(found, found_inf=1.0, zero_grads=zero_grads, grad_scale=8.0)
    for after, before in zip(found, tensors, strict=True):
        if zero_grads:
            before["grad"].zero_()
        assert all(value is None or torch.equal(after[name], value) for name, value in before.items())


def test_lr_on_the_device(device):
    lr = torch.tensor(0.0123, device=device)
    tensor, same = copies([make_tensor(100, F32, F32, device)] * 2)
    run([tensor], {"lr": lr, "weight_decay": 0.1, "flags": Flag.DECOUPLED})
    run([same], {"lr": float(lr), "weight_decay": 0.1, "flags": Flag.DECOUPLED})
    assert_same(tensor, same)


def test_extremes_stay_where_they_are(device):
    """NaN, infinity and squares beyond fp32's range, as the operations one by one would treat them."""
    tensor = make_tensor(100, F32, F32, device, amsgrad=True)
    tensor["grad"][3], tensor["grad"][50], tensor["grad"][70], tensor["grad"][71] = torch.nan, torch.inf, 1e30, 1e-30
    tensor["exp_avg_sq"][71] = tensor["max_exp_avg_sq"][71] = tensor["exp_avg"][71] = 0
    after = check([tensor])[0]
    assert after["param"].isfinite().sum() == 98 and after["max_exp_avg_sq"][3].isnan()


# ---- stochastic rounding


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_stochastic_rounding_draws_philox(rule, device):
    """Bit for bit, in vectors and one by one; only where a bf16 parameter has no master weights."""
    tensors = [make_tensor(size, BF16, F32, device, rule=rule, seed=size) for size in (11, 4100, 2048)]
    tensors += [
        make_tensor(50, BF16, BF16, device, rule=rule, master=True),
        make_tensor(9, F32, F32, device, rule=rule),
    ]
    odd = make_tensor(301, BF16, F32, device, rule=rule, ema=True)
    odd["param"] = torch.cat([odd["param"][:1], odd["param"]])[1:]
    check([*tensors, odd], {"flags": Flag.STOCHASTIC_ROUNDING}, rule=rule, philox=PHILOX)


def test_stochastic_rounding_is_unbiased(device):
    tensor = make_tensor(40_000, BF16, F32, device)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        tensor[name].fill_(1.0)
    exact = float(expected({**tensor, "param": tensor["param"].float()}, {"lr": 1e-3})["param"][0])
    run([tensor], {"lr": 1e-3, "flags": Flag.STOCHASTIC_ROUNDING}, philox=PHILOX)
    assert tensor["param"].unique().numel() == 2
    assert abs(tensor["param"].double().mean().item() - exact) < 5 * 2**-9 / math.sqrt(40_000)


# ---- addresses


@pytest.mark.parametrize("dtypes", pick(DTYPES, [(F32, F32), (BF16, F32)]), ids=str)
@pytest.mark.parametrize("name", ["grad", "param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "ema"])
def test_misaligned_views(name, dtypes, device):
    """One array that starts at an odd element, among NaN that must stay."""
    tensor = make_tensor(2051, *dtypes, device, amsgrad=True, master=True, ema=True)
    storage = torch.full((2054,), torch.nan, dtype=tensor[name].dtype, device=device)
    moved = {**tensor, name: storage[1:2052].copy_(tensor[name])}
    check([tensor, {**moved, name: moved[name]}, make_tensor(5, F32, F32, device)])
    own = {key: None if value is None else value if key == name else value.clone() for key, value in moved.items()}
    wanted = expected(own, {})
    run([own])
    assert_same(own, wanted)
    assert storage[0].isnan() and storage[2052:].isnan().all()


@pytest.mark.emulated
@pytest.mark.parametrize("rule", ["adam", "sgd", "norm"])
def test_elements_beyond_two_to_the_31(rule):
    """The end of a huge tensor, in address space that is reserved and never touched before it.

    The running count of chunks starts below zero, as if other blocks had worked on the first 2^20 already.
    """
    begin, tail = 1 << 31, 2 * CHUNK + 5
    numel = begin + tail
    no_reserve = 0x4000  # mmap.MAP_NORESERVE, which Python names from 3.13 on
    small = make_tensor(tail, BF16, BF16, rule="adam" if rule == "norm" else rule)
    far = {**small, "step": small["step"].clone()}
    for name in [name for name, value in small.items() if value is not None and name != "step"]:
        memory = mmap.mmap(-1, 2 * numel, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        far[name] = torch.frombuffer(memory, dtype=BF16)
        far[name][begin:] = small[name]
    tensors, _, grads = make_tables([{"grad": torch.zeros(0, dtype=BF16)}, far])
    ends = torch.tensor([-begin // CHUNK, 3])
    if rule == "norm":
        largest = small["grad"].abs().max().float()
        assert _cuda.clip_grads(tensors, ends, grads, new_scratch(), math.inf, 1.0) == largest
        coefficient = f32(1) / (f32(float(largest)) + f32(1e-6))
        assert torch.equal(far["grad"][begin:], (small["grad"].float() * float(coefficient)).bfloat16())
        return
    step = _cuda.adam_step if rule == "adam" else _cuda.sgd_step
    step(tensors, ends, grads, make_hyper({}), new_scratch(), None, None, None, 0.0, False, None)
    found = {name: value if name == "step" or value is None else value[begin:] for name, value in far.items()}
    assert_same(found, expected(small, {}, rule=rule))


# ---- the norm of the gradients


def gradients(device, dtypes=(F32, BF16, F16), sizes=(1, 4, 5, 2048, 0, 5001)):
    return [
        {"grad": randn(size, dtype, device, seed=index, scale=3.0)}
        for index, (size, dtype) in enumerate((size, dtype) for size in sizes for dtype in dtypes)
    ]


def norm_in_double(tensors, norm_type):
    return torch.cat([tensor["grad"].double() for tensor in tensors]).norm(norm_type)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.5])
def test_grad_norm(norm_type, device):
    tensors = gradients(device)
    scratch, tables = new_scratch(device), make_tables(tensors)
    norm = _cuda.grad_norm(*tables, scratch, norm_type, None)
    exact = norm_in_double(tensors, norm_type)
    assert norm.shape == () and norm.dtype == F32
    assert abs(norm.double() / exact - 1) < (2e-7 if norm_type in (1, 2, math.inf) else 1e-6)
    scaled = _cuda.grad_norm(*tables, scratch, norm_type, torch.tensor(4.0, device=device))
    assert scaled == norm / 4 and scratch[0] == 0
    tensors[4]["grad"][0] = torch.nan
    assert _cuda.grad_norm(*tables, scratch, norm_type, None).isnan()


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_clip_grads(norm_type, max_norm, device):
    """torch.nn.utils.clip_grad_norm_ with its roundings; within the limit nothing changes."""
    tensors = gradients(device)
    found, scratch = copies(tensors), new_scratch(device)
    norm = _cuda.clip_grads(*make_tables(found), scratch, norm_type, max_norm)
    assert abs(norm.double() / norm_in_double(tensors, norm_type) - 1) < 2e-7 and scratch[0] == 0
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for after, before in zip(found, tensors, strict=True):
        assert torch.equal(after["grad"], (before["grad"].float() * coefficient).to(before["grad"].dtype))


def test_clipping_to_a_norm_that_is_not_finite(device):
    """As torch: NaN spreads; an infinite norm makes zeros, and NaN of infinities."""
    for value in (torch.nan, torch.inf):
        tensor = {"grad": torch.tensor([1.0, value, 2.0], device=device)}
        param = torch.nn.Parameter(torch.zeros(3, device=device))
        param.grad = tensor["grad"].clone()
        torch.nn.utils.clip_grad_norm_([param], 1.0)
        _cuda.clip_grads(*make_tables([tensor]), new_scratch(device), 2.0, 1.0)
        torch.testing.assert_close(tensor["grad"], param.grad, equal_nan=True, rtol=0, atol=0)


# ---- beside torch


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_many_steps_beside_torch(amsgrad, decoupled, device):
    """The error rule against torch's optimizer in float64, after as many steps on the same gradients."""
    sizes, steps = (700, 2049), pick([100], [40])[0]
    tensors = [make_tensor(size, F32, F32, device, seed=size, amsgrad=amsgrad, step=0.0) for size in sizes]
    for tensor in tensors:
        for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])):
            tensor[name].zero_()
    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    params = {
        dtype: [torch.nn.Parameter(tensor["param"].to(dtype, copy=True)) for tensor in tensors]
        for dtype in (F32, torch.float64)
    }
    optimizers = [make(own, lr=1e-2, weight_decay=0.03, amsgrad=amsgrad) for own in params.values()]
    group = {"weight_decay": 0.03, "flags": Flag.DECOUPLED if decoupled else 0}
    for step in range(steps):
        for index, tensor in enumerate(tensors):
            tensor["grad"] = randn(sizes[index], F32, device, seed=1000 * step + index, scale=10.0 ** (step % 3 - 1))
            for dtype, own in params.items():
                own[index].grad = tensor["grad"].to(dtype)
        run(tensors, group)
        for optimizer in optimizers:
            optimizer.step()
    for index, tensor in enumerate(tensors):
        assert tensor["step"] == steps
        assert_close("param", tensor["param"], *(params[dtype][index].detach() for dtype in (F32, torch.float64)))
        states = [optimizer.state[own[index]] for optimizer, own in zip(optimizers, params.values(), strict=True)]
        for name in ("exp_avg", "exp_avg_sq"):
            assert_close(name, tensor[name], states[0][name], states[1][name])


# ---- schedules, counts, checks


def test_equal_inputs_give_equal_bits(device, request):
    """Under any schedule of the threads and blocks."""
    emulator = request.getfixturevalue("emulator") if device.type == "cpu" else None
    tensors = [make_tensor(size, BF16, F32, device, seed=size) for size in (3, 0, 5000, 17, 2050)]
    first = None
    for schedule in emulator.schedules(seeds=1) if emulator else [{}] * 4:
        if emulator:
            emulator.set_options(**schedule)
        found = copies(tensors)
        norm = _cuda.clip_grads(*make_tables(found), new_scratch(device), 2.0, 0.5)
        run(found, {"flags": Flag.STOCHASTIC_ROUNDING}, philox=PHILOX)
        results = [norm, *(value for tensor in found for value in tensor.values() if value is not None)]
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.sanitized
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_small(rule, device):
    """Every path at once, small enough for the race checker and AddressSanitizer."""
    tensors = [
        make_tensor(size, *DTYPES[index % 6], device, seed=index, rule=rule, master=index == 2, ema=index > 3)
        for index, size in enumerate([3, 2049, 0, 9, 4100, 12, 1])
    ]
    check(tensors, {"flags": Flag.STOCHASTIC_ROUNDING}, rule=rule, philox=PHILOX, grad_scale=1.0, zero_grads=True)


@pytest.mark.sanitized
def test_small_norms(device):
    tensors, scratch = gradients(device, sizes=(3, 2050)), new_scratch(device)
    norm = _cuda.grad_norm(*make_tables(tensors), scratch, 2.0, None)
    assert _cuda.clip_grads(*make_tables(tensors), scratch, 2.0, 1.0) == norm


def test_the_layout_is_that_of_the_kernels():
    """_plan.py's numbers are those of csrc/kernels/multi_tensor.h."""
    header = (ROOT / "csrc/kernels/multi_tensor.h").read_text()

    def names(enum):
        body = re.sub(r"//[^\n]*", "", re.search(rf"enum {enum} : int {{(.*?)}};", header, re.S)[1])
        return [entry.split("=")[0].strip() for entry in body.split(",") if entry.strip()]

    def constant(name):
        return name.title().replace("_", "")

    assert names("TensorColumn") == [f"k{constant(c.name)}Column" for c in Column] + ["kTensorColumns"]
    assert names("HyperColumn") == [f"k{constant(c.name)}Column" for c in Hyper] + ["kHyperColumns"]
    flags = dict(re.findall(r"k(\w+) = (\d+)", re.search(r"enum HyperFlag : int {(.*?)}", header)[1]))
    assert flags == {constant(flag.name): str(flag.value) for flag in Flag}
    assert names("ElementCode") == ["kFloatCode", "kBFloat16Code", "kHalfCode"]
    assert DTYPE_CODES == {F32: 0, BF16: 1, F16: 2}
    assert f"kChunk = {CHUNK};" in header
    assert f"kMaxBlocks = {SCRATCH_WORDS - 2};" in header and "kScratchWords = 2 + kMaxBlocks;" in header


def test_refusals_name_the_argument(device):
    tables = dict(zip(("tensors", "chunk_ends", "grads"), make_tables([make_tensor(5, F32, F32, device)]), strict=True))
    good = {**tables, "hyper": make_hyper({}, device=device), "scratch": new_scratch(device)}
    good |= {"grad_scale": None, "found_inf": None, "total_norm": None, "max_norm": 0.0, "zero_grads": False}
    good["philox"] = None
    bad = {
        "tensors": [(tables["tensors"][:, :-1], r"tensors .*Long \[count, 10\]")],
        "chunk_ends": [(tables["chunk_ends"][:0], r"chunk_ends .*contiguous Long \[1\]")],
        "grads": [(tables["grads"].int(), r"grads .*contiguous Long \[1\]")],
        "hyper": [(good["hyper"].float(), r"hyper .*Double \[groups, 11\]"), (good["hyper"][:0], "hyper")],
        "scratch": [(good["scratch"][1:], "scratch .*2050")],
        "found_inf": [(torch.zeros(2, device=device), "found_inf .*one Float")],
        "grad_scale": [(torch.ones((), dtype=torch.float64, device=device), "grad_scale is Double")],
        "total_norm": [(torch.ones((), device=device), "max_norm is 0; expected more than 0")],
        "philox": [(torch.zeros(3, dtype=torch.int64, device=device), r"philox .*Long \[2\]")],
    }
    for op in (torch.ops.bigkern_cuda.adam_step, torch.ops.bigkern_cuda.sgd_step):
        for name, cases in bad.items():
            for value, message in cases:
                with pytest.raises(RuntimeError, match=message):
                    op(**{**good, name: value})
    for norm_type in (0.0, -1.0, math.nan):
        with pytest.raises(RuntimeError, match="norm_type"):
            torch.ops.bigkern_cuda.grad_norm(*tables.values(), good["scratch"], norm_type, None)
        with pytest.raises(RuntimeError, match="norm_type"):
            torch.ops.bigkern_cuda.clip_grads(*tables.values(), good["scratch"], norm_type, 1.0)


@pytest.mark.emulated
def test_unsupported_says_why():
    assert _cuda.unsupported(torch.zeros(2), F32, "adam_step") is None
    assert _cuda.unsupported(torch.zeros(2, dtype=F16), None, "grad_norm") is None
    assert "float64" in _cuda.unsupported(torch.zeros(2).double(), None, "sgd_step")
    assert "the states are torch.float16" in _cuda.unsupported(torch.zeros(2), F16, "adam_step")


_COUNT = """
import json, sys, torch
from tests import emulated
from tests.kernels.test_adam import _cuda, gradients, make_tables, make_tensor, new_scratch, run
emulator = emulated.load("race")
emulator.set_options(multiprocessors=1, blocks_per_multiprocessor=2)
found = []
def count(function):
    emulator.reset_counters()
    function()
    found.append(emulator.counters())
for arguments in json.loads(sys.argv[1]):
    dtypes = [getattr(torch, name) for name in arguments.pop("dtypes")]
    zero_grads = arguments.pop("zero_grads", False)
    tensors = [make_tensor(size, *dtypes, **arguments) for size in (32768, 20_000)]
    count(lambda: run(tensors, rule=arguments.get("rule", "adam"), zero_grads=zero_grads))
tensors = gradients("cpu", (torch.float32,), (131072, 80_000))
tables = make_tables(tensors)
count(lambda: _cuda.grad_norm(*tables, new_scratch(), 2.0, None))
count(lambda: _cuda.clip_grads(*tables, new_scratch(), 2.0, 1e-3))
print(json.dumps(found))
"""


@pytest.mark.emulated
def test_bytes_moved_are_the_floor():
    """Loads and stores of global memory, counted by the race build, within 5 % for the tables."""
    cases = [
        (28, dict(dtypes=["float32", "float32"])),
        (14, dict(dtypes=["bfloat16", "bfloat16"])),
        (28, dict(dtypes=["bfloat16", "float32"], master=True)),
        (36, dict(dtypes=["float32", "float32"], amsgrad=True)),
        (22, dict(dtypes=["bfloat16", "float32"])),
        (24, dict(dtypes=["float32", "bfloat16"], zero_grads=True)),
        (36, dict(dtypes=["float32", "float32"], ema=True)),
        (20, dict(dtypes=["float32", "float32"], rule="sgd")),
    ]
    environment = {**os.environ, **emulated.environment("race"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _COUNT, json.dumps([arguments for _, arguments in cases])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # The norms move little beside the tables, so theirs are larger.
    cases = [(floor * 52_768, what) for floor, what in cases] + [
        (4 * 211_072, "grad_norm"),
        (12 * 211_072, "clip_grads"),
    ]
    for (floor, what), count in zip(cases, json.loads(done.stdout), strict=True):
        moved = count["global_load_bytes"] + count["global_store_bytes"]
        assert floor <= moved <= 1.05 * floor, (what, moved / floor)
