"""The optimizers' steps and norms on every backend: the error rule, every option, every edge of the contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import bigkern
from bigkern import optim
from bigkern.ops.adam._plan import SCRATCH_WORDS, Column, Flag, Hyper, is_dense, pointer_bits
from tests import numerics
from tests.conftest import pick

# More than a chunk of 2,048, with a tail after whole vectors; nothing; a scalar; a tail alone.
SHAPES = pick(((1,), (129,), (2085,), (3, 0), (), (7, 5)), ((2085,), (3, 0), (), (7, 5)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
(STEPS,) = pick((3,), (2,))

ADAM = [
    (optim.Adam, {}),
    (optim.Adam, {"weight_decay": 0.1, "amsgrad": True, "eps": 1e-3}),
    (optim.Adam, {"maximize": True, "betas": (0.0, 0.5), "lr": 0.1}),
    (optim.AdamW, {"lr": 0.05, "weight_decay": 0.3}),
    (optim.AdamW, {"amsgrad": True, "maximize": True}),
]
SGD = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.4}),
]


def theirs(cls):
    return getattr(torch.optim, cls.__name__)


def values(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype, device, shapes=SHAPES, scale=1.0):
    return [nn.Parameter(values(*shape, seed=i, scale=scale).to(device, dtype)) for i, shape in enumerate(shapes)]


def give_gradients(params, step, scale=1.0):
    """Equal values whatever the parameters' dtype: all that are under test hold them exactly."""
    for i, param in enumerate(params):
        grad = values(*param.shape, seed=100 * step + i, scale=scale).to(torch.bfloat16)
        param.grad = grad.to(param.device, torch.float32).to(param.dtype)


def train(make, params, steps=STEPS, scale=1.0):
    optimizer = make(params)
    for step in range(steps):
        give_gradients(params, step, scale)
        optimizer.step()
    return optimizer


def tensors_of(optimizer):
    found = {}
    for i, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found[f"parameter {i}"] = param.detach()
        for name, state in optimizer.state.get(param, {}).items():
            if name != "step" and state is not None:
                found[f"{name} {i}"] = state
    return found


def check_against_torch(cls, options, dtype, device, *, extras=None, scale=1.0):
    """The error rule for parameters and states after some steps, beside torch's for-loop."""
    ours = tensors_of(train(lambda p: cls(p, **options, **(extras or {})), parameters(dtype, device), scale=scale))
    plain = {**options, "foreach": False}
    their = tensors_of(train(lambda p: theirs(cls)(p, **plain), parameters(dtype, device), scale=scale))
    wide = [nn.Parameter(p.detach().double()) for p in parameters(dtype, device)]
    truth = tensors_of(train(lambda p: theirs(cls)(p, **plain), wide, scale=scale))
    assert ours.keys() == their.keys()
    for name, tensor in ours.items():
        numerics.assert_close(f"{cls.__name__} {options} {name}", tensor, their[name], truth[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "cls, options",
    pick([*ADAM, *SGD], [ADAM[1], ADAM[3], SGD[1], SGD[3]]),
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) or "defaults",
)
def test_steps_keep_the_error_rule(backend, device, cls, options, dtype):
    check_against_torch(cls, options, dtype, device)


@pytest.mark.parametrize("cls, options", [ADAM[0], ADAM[2], ADAM[4], SGD[0], SGD[2]], ids=str)
def test_options_in_float32(backend, device, cls, options):
    check_against_torch(cls, options, torch.float32, device)


@pytest.mark.parametrize("scale", pick((1e-3, 1e3), (1e3,)))
def test_scales(backend, device, scale):
    check_against_torch(optim.Adam, {"weight_decay": 0.01}, torch.float32, device, scale=scale)


def test_float64_is_torchs(backend, device):
    params = parameters(torch.float64, device)
    if backend == "torch":
        ours = tensors_of(train(optim.Adam, params))
        their = tensors_of(train(lambda p: torch.optim.Adam(p, fused=True), parameters(torch.float64, device)))
        assert all(torch.equal(ours[name], their[name]) for name in their)
    else:
        before = [param.clone() for param in params]
        with pytest.raises(bigkern.BackendError, match="float64"):
            train(optim.Adam, params)
        assert all(map(torch.equal, before, params))


@pytest.mark.sanitized
def test_mixed_dtypes_and_groups_in_one_step(backend, device):
    """Every dtype in one optimizer, each group with options of its own: equal to an optimizer for each."""
    alone, together = [], []
    for seed, dtype in enumerate(DTYPES):
        options = {"lr": 0.01 * (seed + 1), "weight_decay": 0.1 * seed, "betas": (0.8, 0.9 + 0.01 * seed)}
        alone += train(lambda p, options=options: optim.AdamW(p, **options), parameters(dtype, device)).param_groups
        together.append({"params": parameters(dtype, device), **options})
    mixed = optim.AdamW(together)
    for step in range(STEPS):
        for group in mixed.param_groups:
            give_gradients(group["params"], step)
        mixed.step()
    for a, b in zip(alone, mixed.param_groups, strict=True):
        assert all(map(torch.equal, a["params"], b["params"]))


def composed(params, step, options):
    """What the extras mean, in plain torch and float64: one step of Adam on copies (master weights, moments)."""
    lr, (beta1, beta2), eps = options.get("lr", 1e-3), options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
    grads = [param.grad.double() / options.get("grad_scale", 1.0) for param, _ in params]
    if options.get("max_norm"):
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        grads = [grad * min(1.0, options["max_norm"] / (norm.item() + 1e-6)) for grad in grads]
    for (_, state), grad in zip(params, grads, strict=True):
        p, m, v = state["p"], state["m"], state["v"]
        grad = grad + options.get("l1", 0.0) * p.sign()
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p.sub_(lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps))
        if options.get("ema_decay") is not None:
            state["ema"].lerp_(p, 1 - options["ema_decay"])


EXTRAS = {
    "max_norm": {"max_norm": 0.5},
    "max_norm beyond": {"max_norm": 1e4},
    "l1": {"l1": 0.3},
    "ema": {"ema_decay": 0.7},
    "all": {"max_norm": 0.7, "l1": 0.1, "ema_decay": 0.9, "zero_grads": True, "lr": 0.02},
}


@pytest.mark.parametrize("name", EXTRAS)
def test_extras_in_float32(backend, device, name):
    options = EXTRAS[name]
    params = parameters(torch.float32, device)
    states = [
        {"p": p.detach().double(), "m": torch.zeros_like(p).double(), "v": torch.zeros_like(p).double()} for p in params
    ]
    for state in states:
        state["ema"] = state["p"].clone()
    optimizer = optim.Adam(params, **options)
    for step in range(1, STEPS + 1):
        give_gradients(params, step)
        composed(list(zip(params, states, strict=True)), step, options)
        kept = [param.grad for param in params]
        optimizer.step()
        assert all(param.grad is grad for param, grad in zip(params, kept, strict=True))
        if options.get("zero_grads"):
            assert not any(param.grad.any() for param in params)
    for param, state in zip(params, states, strict=True):
        torch.testing.assert_close(param.detach(), state["p"].float(), rtol=2e-6, atol=2e-6)
        if "ema_decay" in options:
            torch.testing.assert_close(optimizer.state[param]["ema_param"], state["ema"].float(), rtol=2e-6, atol=2e-6)
    if "ema_decay" in options:
        weights = [param.detach().clone() for param in params]
        with optimizer.ema_weights():
            assert all(torch.equal(param, optimizer.state[param]["ema_param"]) for param in params)
        assert all(map(torch.equal, params, weights))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_master_weights(backend, device, dtype):
    """Trained as the float32 twin is; the parameter is the rounded master."""
    params = parameters(dtype, device)
    twins = [nn.Parameter(param.detach().float()) for param in params]
    optimizer = train(lambda p: optim.AdamW(p, lr=1e-4, master_weights=True), params)
    twin = train(lambda p: optim.AdamW(p, lr=1e-4), twins)
    for param, wide in zip(params, twins, strict=True):
        state = optimizer.state[param]
        assert torch.equal(state["master_param"], wide) and torch.equal(param, wide.to(dtype))
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], twin.state[wide][name])
    plain = train(lambda p: optim.AdamW(p, lr=1e-4), parameters(dtype, device))
    assert not all(map(torch.equal, plain.param_groups[0]["params"], params)), "too small a test to tell"


@pytest.mark.parametrize(
    "dtype, moment_dtype",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("cls", (optim.Adam, optim.SGD))
def test_moments_of_another_dtype(backend, device, dtype, moment_dtype, cls):
    options = {"lr": 0.05, **({"momentum": 0.9} if cls is optim.SGD else {"amsgrad": True})}
    optimizer = train(lambda p: cls(p, **options, moment_dtype=moment_dtype), parameters(dtype, device))
    names = ("momentum_buffer",) if cls is optim.SGD else ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    wide = train(lambda p: cls(p, **options), [nn.Parameter(p.detach().float()) for p in parameters(dtype, device)])
    coarse = max(torch.finfo(dtype).eps, torch.finfo(moment_dtype).eps)
    for a, b in zip(optimizer.param_groups[0]["params"], wide.param_groups[0]["params"], strict=True):
        assert all(optimizer.state[a][name].dtype == moment_dtype for name in names)
        torch.testing.assert_close(a.float(), b, rtol=4 * coarse, atol=4 * coarse)
        for name in names:
            torch.testing.assert_close(
                optimizer.state[a][name].float(), wide.state[b][name], rtol=8 * coarse, atol=8 * coarse
            )


def test_stochastic_rounding(backend, device):
    """Right on average, to neighbours only, the same from the same seed; rounding to nearest would not move at all."""
    count, step = 4096, 2.0**-12

    def run(seed):
        param = nn.Parameter(torch.ones(count, dtype=torch.bfloat16, device=device))
        param.grad = torch.ones_like(param)
        torch.manual_seed(seed)
        optim.SGD([param], lr=step, stochastic_rounding=True).step()
        return param.detach().float()

    first = run(1)
    assert torch.equal(first, run(1)) and not torch.equal(first, run(2))
    below = 1 - 2.0**-8
    assert set(first.unique().tolist()) == {below, 1.0}
    share = (first == below).float().mean().item()
    expected = step * 2**8
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)

    param = nn.Parameter(torch.full((3,), math.inf, dtype=torch.bfloat16, device=device))
    param.grad = torch.tensor([1.0, math.nan, 0.0], device=device).bfloat16()
    optim.SGD([param], lr=1.0, stochastic_rounding=True).step()
    assert param[0].isinf() and param[1].isnan() and param[2].isinf()


@pytest.mark.sanitized
@pytest.mark.parametrize("cls, options", [(optim.Adam, {}), (optim.SGD, {"momentum": 0.9, "dampening": 0.5})])
def test_gradient_scale_and_found_inf(backend, device, cls, options):
    """Scaled gradients give the same step; found_inf leaves everything as it is, the step counter too."""
    plain = train(lambda p: cls(p, **options), parameters(torch.float32, device))
    params = parameters(torch.float32, device)
    optimizer = cls(params, **options)
    for step in range(STEPS):
        give_gradients(params, 99)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0, device=device), torch.tensor(1.0, device=device)
        before = {name: tensor.clone() for name, tensor in tensors_of(optimizer).items()}
        optimizer.step()
        after = tensors_of(optimizer)
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        give_gradients(params, step)
        for param in params:
            param.grad.mul_(8)
        optimizer.found_inf = torch.tensor(0.0, device=device)
        optimizer.step()
    for a, b in zip(plain.param_groups[0]["params"], params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        if cls is optim.Adam:
            assert optimizer.state[b]["step"].item() == STEPS


def test_gradient_scaler(backend, device):
    """torch's own GradScaler: an infinite gradient is skipped and the scale halved, and clipping sees unscaled ones."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4).to(device)
    optimizer = optim.Adam(model.parameters(), lr=0.1, max_norm=1.0)
    twin = nn.Linear(8, 4).to(device)
    twin.load_state_dict(model.state_dict())
    plain = torch.optim.Adam(twin.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    x = values(16, 8).to(device)
    for factor in (1.0, math.inf, 3.0):
        for m, o in ((model, optimizer), (twin, plain)):
            o.zero_grad()
            loss = m(x).square().mean() * factor
            if m is model:
                scaler.scale(loss).backward()
                scaler.step(o)
                scaler.update()
            elif math.isfinite(factor):
                loss.backward()
                nn.utils.clip_grad_norm_(m.parameters(), 1.0)
                o.step()
    assert scaler.get_scale() == 512.0
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Memory


@pytest.mark.sanitized
def test_views_that_start_anywhere(backend, device):
    """Parameters and gradients at odd offsets, of odd sizes, side by side in one buffer: nothing beside them moves."""
    sizes = (1, 3, 2048, 2049, 17)
    expected = train(lambda p: optim.Adam(p, lr=0.1), parameters(torch.float32, device, [(n,) for n in sizes]))
    buffer = torch.full((sum(sizes) + 2 * len(sizes) + 1,), -7.0, device=device)
    grads = torch.full_like(buffer, -9.0)
    params, at = [], 1
    for i, size in enumerate(sizes):
        part = buffer[at : at + size]
        part.copy_(values(size, seed=i))
        params.append(nn.Parameter(part))
        params[-1].grad = grads[at : at + size]
        at += size + 2
    optimizer = optim.Adam(params, lr=0.1, zero_grads=True)
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad.copy_(values(*param.shape, seed=100 * step + i).bfloat16())
        optimizer.step()
    assert all(map(torch.equal, expected.param_groups[0]["params"], params))
    assert (buffer == -7.0).sum() == 2 * len(sizes) + 1
    assert (grads == -9.0).sum() == 2 * len(sizes) + 1


@pytest.mark.parametrize("layout", ("channels_last", "transposed", "strided gradient", "expanded gradient"))
def test_layouts(backend, device, layout):
    a, b = (nn.Parameter(values(2, 3, 4, 5).to(device)) for _ in range(2))
    if layout == "channels_last":
        a.data = a.data.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        a.data = a.data.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    ours, their = optim.Adam([a], lr=0.1, amsgrad=True, zero_grads=True), torch.optim.Adam([b], lr=0.1, amsgrad=True)
    for step in range(STEPS):
        grad = values(2, 3, 4, 5, seed=step).to(device)
        if layout == "strided gradient":
            a.grad = grad.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        elif layout == "expanded gradient":
            a.grad = grad = grad[:1].expand(2, 3, 4, 5)
        else:
            a.grad = grad.clone(memory_format=torch.preserve_format)
        b.grad = grad.clone()
        ours.step()
        their.step()
        assert not a.grad.any()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert ours.state[a]["exp_avg"].stride() == a.stride()


def test_parameters_with_gaps_are_torchs(backend, device):
    param = nn.Parameter(torch.ones(4, 8, device=device)[:, ::2])
    param.grad = torch.ones(4, 4, device=device)
    if backend == "torch":
        optim.SGD([param], lr=0.5).step()
        assert (param == 0.5).all()
    else:
        with pytest.raises(bigkern.BackendError, match="gaps or overlaps"):
            optim.SGD([param], lr=0.5).step()
        assert (param == 1).all()


def test_is_dense():
    x = torch.zeros(2, 3, 4)
    assert all(map(is_dense, (x, x.permute(2, 0, 1), x[0], x[:, :1].transpose(0, 1)[:, :1], torch.zeros(0, 3))))
    assert not any(map(is_dense, (x[:, ::2], x[..., :2], torch.zeros(1).expand(3), x.to_sparse())))


@pytest.mark.parametrize("bad", (math.inf, math.nan))
def test_infinities_and_nan_stay_where_they_are(backend, device, bad):
    a, b = (parameters(torch.float32, device, [(300,), (5,)]) for _ in range(2))
    for params in (a, b):
        give_gradients(params, 0)
        params[0].grad[7] = bad
        params[0].data[9] = bad
    optim.Adam(a, weight_decay=0.1).step()
    torch.optim.Adam(b, weight_decay=0.1).step()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)
        assert torch.equal(x.isfinite(), y.isfinite())


def test_equal_runs_give_equal_bits(backend, device):
    runs = [
        tensors_of(train(lambda p: optim.Adam(p, max_norm=0.1, l1=0.01), parameters(torch.float32, device)))
        for _ in range(2)
    ]
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


# Norms


@pytest.mark.sanitized
@pytest.mark.parametrize("norm_type", (2.0, 1.0, math.inf, 3.5))
@pytest.mark.parametrize("dtype", pick(DTYPES, DTYPES[:2]), ids=str)
def test_clip_grad_norm(backend, device, norm_type, dtype):
    params = parameters(dtype, device, (*SHAPES, (5000,)))
    params.append(nn.Parameter(torch.ones(3, device=device)))  # without gradient
    give_gradients(params[:-1], 0)
    truth = torch.linalg.vector_norm(torch.cat([p.grad.double().flatten() for p in params[:-1]]), norm_type)
    grads = [param.grad.clone() for param in params[:-1]]
    for max_norm in (1e6, 0.5):
        norm = optim.clip_grad_norm_(params, max_norm, norm_type)
        coarse = 1e-5 if backend != "torch" else max(1e-5, 2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(norm.double(), truth, rtol=coarse, atol=0)
        factor = min(1.0, max_norm / (truth.item() + 1e-6))
        for param, grad in zip(params[:-1], grads, strict=True):
            torch.testing.assert_close(
                param.grad, (grad.double() * factor).to(dtype), rtol=2 * torch.finfo(dtype).eps + 2 * coarse, atol=1e-8
            )
    assert params[-1].grad is None


def test_clip_grad_norm_of_what_is_not_finite(backend, device):
    param = nn.Parameter(torch.ones(5000, device=device))
    for bad in (math.inf, math.nan):
        param.grad = torch.ones_like(param)
        param.grad[4321] = bad
        before = param.grad.clone()
        with pytest.raises(RuntimeError, match="non-finite"):
            optim.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
        assert torch.equal(param.grad.nan_to_num(5.0), before.nan_to_num(5.0)), "nothing half applied"
        for norm_type in (2.0, math.inf):
            param.grad = before.clone()
            norm = optim.clip_grad_norm_(param, 1.0, norm_type)
            assert norm.isnan() if math.isnan(bad) else norm.isinf()
    assert optim.clip_grad_norm_([], 1.0) == 0


def test_clip_grad_norm_refuses_what_only_torch_has(backend, device):
    param = nn.Parameter(torch.ones(4, device=device))
    param.grad = torch.ones_like(param)
    if backend == "torch":
        assert optim.clip_grad_norm_(param, 1.0, 0.0) == 1
    else:
        with pytest.raises(bigkern.BackendError, match=r"norm_type is 0\.0"):
            optim.clip_grad_norm_(param, 1.0, 0.0)


# Options that are tensors


@pytest.mark.parametrize("where", ("device", "float64"))
def test_tensor_learning_rate(backend, device, where):
    lr = torch.tensor(0.1, device=device) if where == "device" else torch.tensor([0.1], dtype=torch.float64)
    params = parameters(torch.float32, device)
    optimizer = optim.Adam(params, lr=lr)
    twins = parameters(torch.float32, device)
    twin = torch.optim.Adam(twins, lr=0.1)
    for step in range(STEPS):
        lr.fill_(0.1 / (step + 1))
        twin.param_groups[0]["lr"] = 0.1 / (step + 1)
        for p, o in ((params, optimizer), (twins, twin)):
            give_gradients(p, step)
            o.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_tensor_betas(backend, device):
    betas = torch.tensor(0.8), torch.tensor(0.9)
    found = train(lambda p: optim.Adam(p, betas=betas, lr=0.1), parameters(torch.float32, device))
    expected = train(lambda p: optim.Adam(p, betas=(0.8, 0.9), lr=0.1), parameters(torch.float32, device))
    for a, b in zip(found.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# What is refused


def test_complex_is_torchs(backend, device):
    params = [nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))]
    params[0].grad = torch.full_like(params[0], 1 + 2j)
    if backend == "torch":
        twin = nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))
        twin.grad = params[0].grad.clone()
        optim.Adam(params, lr=0.1).step()
        torch.optim.Adam([twin], lr=0.1).step()
        assert torch.equal(params[0], twin)
    else:
        with pytest.raises(bigkern.BackendError, match="complex64"):
            optim.Adam(params, lr=0.1).step()
        assert (params[0] == 1).all()


def test_differentiable_is_torchs(backend, device):
    param = nn.Parameter(torch.ones(3, device=device))
    param.grad = torch.ones(3, device=device, requires_grad=True)
    moved = param.clone()
    moved.grad = param.grad
    optimizer = optim.SGD([param], lr=0.5, differentiable=True)
    if backend == "torch":
        optimizer.param_groups[0]["params"] = [moved]
        grad = param.grad
        moved.retain_grad()
        moved.grad = grad
        optimizer.step()
        assert torch.equal(torch.autograd.grad(moved.sum(), grad)[0], torch.full_like(grad, -0.5))
    else:
        with pytest.raises(bigkern.BackendError, match="differentiable=True"):
            optimizer.step()
    with pytest.raises(ValueError, match="which has no max_norm"):
        optim.Adam([param], differentiable=True, max_norm=1.0)


def test_sparse_gradients(backend, device):
    def sparse():
        param = nn.Parameter(torch.ones(4, 2, device=device))
        param.grad = torch.eye(4, 2, device=device).to_sparse()
        return param

    other = nn.Parameter(torch.ones(3, device=device))
    other.grad = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients, please consider SparseAdam"):
        optim.Adam([other, sparse()]).step()
    assert (other == 1).all()
    if backend == "torch":
        param = sparse()
        optim.SGD([param], lr=0.5).step()
        assert torch.equal(param, 1 - 0.5 * torch.eye(4, 2, device=device))
    else:
        with pytest.raises(bigkern.BackendError, match="sparse"):
            optim.SGD([sparse()], lr=0.5).step()


def test_gradients_of_another_kind_are_refused_before_anything_moves(backend, device):
    if backend == "torch":
        pytest.skip("torch's own operators check")
    first, second = parameters(torch.float32, device, [(5,), (6,)])
    optimizer = optim.Adam([first, second])
    for wrong in (torch.ones(6, device=device).bfloat16(), torch.ones(3, device=device)):
        give_gradients([first, second], 0)
        before = [first.clone(), second.clone()]
        second.grad.data = wrong
        with pytest.raises((TypeError, ValueError), match=r"gradient has (dtype|shape)"):
            optimizer.step()
        assert all(map(torch.equal, before, (first, second)))


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (optim.Adam, {"lr": -1.0}, "Invalid learning rate: -1.0"),
        (optim.Adam, {"eps": -1.0}, "Invalid epsilon value: -1.0"),
        (optim.Adam, {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        (optim.AdamW, {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
        (optim.Adam, {"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        (optim.Adam, {"lr": torch.tensor(0.1), "foreach": True}, "lr as a Tensor is not supported"),
        (optim.SGD, {"lr": -1.0}, "Invalid learning rate: -1.0"),
        (optim.SGD, {"momentum": -1.0}, "Invalid momentum value: -1.0"),
        (optim.SGD, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        (optim.Adam, {"max_norm": 0.0}, "Invalid max_norm value: 0.0"),
        (optim.SGD, {"l1": -1.0}, "Invalid l1 value: -1.0"),
        (optim.Adam, {"ema_decay": 1.0}, "Invalid ema_decay value: 1.0"),
        (optim.Adam, {"moment_dtype": torch.int8}, "Invalid moment_dtype value: torch.int8"),
    ],
    ids=str,
)
def test_bad_options(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(1))], **options)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_bad_parameters():
    param = nn.Parameter(torch.ones(1))
    for cls in (optim.Adam, optim.AdamW, optim.SGD):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            cls([])
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            cls([{"params": [param]}, {"params": [param]}])
        with pytest.raises(TypeError, match="should be an iterable of Tensors"):
            cls(param)
        with pytest.raises(RuntimeError, match="cannot be"):
            cls([param], fused=True, foreach=True)
    with pytest.raises(ValueError, match="Invalid l1 value"):
        optim.Adam([{"params": [param], "l1": -1.0}])
    with pytest.raises(ValueError, match="keeps no moving average"), optim.Adam([param]).ema_weights():
        pass


# The raw ops


def test_raw_ops(backend, device):
    if backend == "torch":
        pytest.skip("the torch backend has no raw op")
    ops = getattr(torch.ops, f"bigkern_{backend}")
    param, grad = torch.ones(2100, device=device), torch.full((2100,), 2.0, device=device)
    tensors = torch.zeros(1, len(Column), dtype=torch.int64)
    tensors[0, Column.PARAM], tensors[0, Column.NUMEL] = param.data_ptr(), param.numel()
    hyper = torch.zeros(1, len(Hyper), dtype=torch.float64)
    hyper[0, Hyper.LR], hyper[0, Hyper.FLAGS] = 0.25, float(Flag.MAXIMIZE)
    tables = [tensors, torch.tensor([2]), torch.tensor([grad.data_ptr()])]
    tables, hyper = [table.to(device) for table in tables], hyper.to(device)
    scratch = torch.zeros(SCRATCH_WORDS, dtype=torch.int64, device=device)
    ops.sgd_step(*tables, hyper, scratch, None, None, None, 0.0, False, None)
    assert (param == 1.5).all()
    norm = torch.library.opcheck(
        ops.grad_norm.default, (*tables, scratch, 2.0, None), test_utils=("test_schema", "test_faketensor")
    )
    assert set(norm.values()) == {"SUCCESS"}
    torch.testing.assert_close(ops.grad_norm(*tables, scratch, 2.0, None).item(), 2 * math.sqrt(2100))
    assert pointer_bits(0) == 0.0
