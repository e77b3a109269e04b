"""The modules stand for torch.nn's: constructors, parameters, state, repr, copies, padding modes; batch norm folded."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import bigkern.nn
from bigkern.nn import Conv1d, Conv2d, ConvBlock2d, fold_batch_norm
from tests import numerics

PAIRS = [(Conv1d, torch.nn.Conv1d), (Conv2d, torch.nn.Conv2d)]
pairs = pytest.mark.parametrize(("ours", "torchs"), PAIRS, ids=["Conv1d", "Conv2d"])
MODES = ["zeros", "reflect", "replicate", "circular"]


@pytest.fixture(autouse=True)
def full_float32():
    """Products of float32 are float32, on torch's side too: the default of torch.backends.cudnn is TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def data(module: torch.nn.Module, channels: int = 4, device: torch.device | str = "cpu") -> torch.Tensor:
    """An input for a module of four input channels."""
    generator = torch.Generator().manual_seed(1)
    size = (9,) if isinstance(module, torch.nn.Conv1d) else (9, 8)
    return torch.randn(2, channels, *size, generator=generator).to(device)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module


@pairs
def test_constructor_is_torchs(ours, torchs):
    assert inspect.signature(ours) == inspect.signature(torchs)


def test_the_blocks_constructor_begins_with_torchs():
    mine, torchs = (list(inspect.signature(c).parameters.values()) for c in (ConvBlock2d, torch.nn.Conv2d))
    assert [(p.name, p.default, p.kind) for p in mine[: len(torchs)]] == [(p.name, p.default, p.kind) for p in torchs]
    assert {p.name: p.default for p in mine[len(torchs) :]} == {"activation": "relu", "max_pool": None}
    assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(torchs) :])


ARGUMENTS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"dtype": torch.bfloat16},
]


@pairs
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_parameters_initial_values_keys_and_repr_are_torchs(ours, torchs, arguments):
    torch.manual_seed(3)
    mine = ours(4, 6, 3, **arguments)
    torch.manual_seed(3)
    theirs = torchs(4, 6, 3, **arguments)
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert mine.state_dict()[key].dtype == value.dtype
        assert torch.equal(mine.state_dict()[key], value)
    for module in (randomised(mine), randomised(theirs)):
        torch.manual_seed(4)
        module.reset_parameters()
    assert torch.equal(mine.weight, theirs.weight)


@pairs
def test_state_dict_goes_both_ways(ours, torchs):
    for source, target in ((ours(4, 6, 3), torchs(4, 6, 3)), (torchs(4, 6, 3), ours(4, 6, 3))):
        assert target.load_state_dict(source.state_dict()) == ([], [])
        torch.testing.assert_close(source(data(source)), target(data(source)))


def test_block_with_a_residual(backend, device):
    block = ConvBlock2d(4, 6, 3, padding=1, activation="gelu").to(device)
    x, residual = torch.randn(2, 4, 5, 5, device=device), torch.randn(2, 6, 5, 5, device=device)
    plain = F.conv2d(x, block.weight, block.bias, padding=1)
    torch.testing.assert_close(block(x, residual), F.gelu(plain + residual), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block(x), F.gelu(plain), rtol=1e-5, atol=1e-5)
    pooled = ConvBlock2d(4, 6, 3, padding=1, max_pool=2).to(device)
    with pytest.raises(ValueError, match="residual with max_pool=2"):
        pooled(x, residual)


def test_the_blocks_state_dict_goes_both_ways():
    ours, theirs = ConvBlock2d(4, 6, 3, max_pool=2), torch.nn.Conv2d(4, 6, 3)
    assert theirs.load_state_dict(ours.state_dict()) == ([], [])
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    torch.testing.assert_close(ours(data(ours)), F.max_pool2d(F.relu(theirs(data(ours))), 2))


@pytest.mark.parametrize(
    "module",
    [
        Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
        Conv2d(4, 6, (3, 2), groups=2),
        ConvBlock2d(4, 6, 3, activation="silu", max_pool=(3, 2, 1)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_deepcopy_and_pickle(module):
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert type(twin) is type(module) and repr(twin) == repr(module)
        assert torch.equal(module(data(module)), twin(data(module)))


def test_the_blocks_repr():
    assert repr(ConvBlock2d(3, 64, 7, stride=2, padding=3, max_pool=(3, 2, 1))) == (
        "ConvBlock2d(3, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), activation='relu', max_pool=(3, 2, 1))"
    )


def test_bad_arguments_of_the_block():
    with pytest.raises(ValueError, match=r"ConvBlock2d: activation is 'tanh'; supported are None, 'relu'"):
        ConvBlock2d(3, 4, 3, activation="tanh")
    with pytest.raises(ValueError, match=r"ConvBlock2d: max_pool is \(2, 2\); it must be an int or have three parts"):
        ConvBlock2d(3, 4, 3, max_pool=(2, 2))
    with pytest.raises(ValueError, match="groups"):
        ConvBlock2d(3, 4, 3, groups=2)


def call(module):
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *parameters: torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))


@pairs
@pytest.mark.parametrize("mode", MODES)
def test_forward_and_gradients(backend, device, ours, torchs, mode):
    mine = ours(4, 6, 3, padding=2, padding_mode=mode, stride=2, device=device)
    theirs = torchs(4, 6, 3, padding=2, padding_mode=mode, stride=2, device=device)
    inputs = [data(mine, device=device).requires_grad_(), *mine.parameters()]
    numerics.check(call(mine), call(theirs), inputs, names=["input", "weight", "bias"])


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("padding", ["same", 1])
def test_the_blocks_forward_and_gradients(backend, device, padding_mode, padding):
    mine = ConvBlock2d(
        4, 6, (3, 2), padding=padding, padding_mode=padding_mode, activation="gelu", max_pool=2, device=device
    )
    theirs = torch.nn.Conv2d(4, 6, (3, 2), padding=padding, padding_mode=padding_mode, device=device)

    def reference(x, weight, bias):
        return F.max_pool2d(F.gelu(call(theirs)(x, weight, bias)), 2)

    inputs = [data(mine, device=device).requires_grad_(), *mine.parameters()]
    numerics.check(call(mine), reference, inputs, names=["input", "weight", "bias"])


def test_a_channels_last_model_stays_so(backend, device):
    model = torch.nn.Sequential(Conv2d(4, 8, 3), ConvBlock2d(8, 8, 3, max_pool=2), Conv2d(8, 4, 1)).to(device)
    model = model.to(memory_format=torch.channels_last)
    x = data(model[0], device=device)
    output = model(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert all(p.grad.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


def test_trains_as_torchs(backend, device):
    """The same steps from the same weights give the same losses, to rounding."""

    def losses(*features):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*features, torch.nn.Flatten(), torch.nn.Linear(24, 3)).to(device)
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 0.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x, target = torch.randn(6, 2, 8, 8, device=device), torch.arange(6, device=device) % 3
        found = []
        for _ in range(6):
            loss = F.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    pool, relu = torch.nn.MaxPool2d(2), torch.nn.ReLU()
    mine = losses(ConvBlock2d(2, 4, 3, padding=1, max_pool=2), Conv2d(4, 6, 3))
    theirs = losses(torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), relu, pool), torch.nn.Conv2d(4, 6, 3))
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert mine[-1] < 0.9 * mine[0]


# Batch norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("make", [Conv1d, Conv2d, torch.nn.Conv2d])
def test_folded_batch_norm_does_what_it_did(make, bias, affine):
    conv = make(4, 6, 3, groups=2, bias=bias)
    kind = torch.nn.BatchNorm1d if isinstance(conv, torch.nn.Conv1d) else torch.nn.BatchNorm2d
    bn = randomised(kind(6, affine=affine)).eval()
    before = copy.deepcopy(conv.state_dict())
    folded = fold_batch_norm(conv, bn)
    assert type(folded) is type(conv)
    torch.testing.assert_close(folded(data(conv)), bn(conv(data(conv))), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in conv.state_dict().items())
    assert folded.weight.requires_grad and folded.bias.requires_grad


def test_folded_into_a_block_it_stands_before_the_activation():
    block = ConvBlock2d(4, 6, 3, activation="silu", max_pool=2)
    bn = randomised(torch.nn.BatchNorm2d(6)).eval()
    conv = torch.nn.Conv2d(4, 6, 3)
    conv.load_state_dict(block.state_dict())
    expected = F.max_pool2d(F.silu(bn(conv(data(conv)))), 2)
    torch.testing.assert_close(fold_batch_norm(block, bn)(data(conv)), expected, rtol=1e-5, atol=1e-5)


def test_folding_keeps_dtype_and_memory_format():
    conv = Conv2d(4, 6, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    folded = fold_batch_norm(conv, torch.nn.BatchNorm2d(6).eval())
    assert folded.weight.dtype == folded.bias.dtype == torch.bfloat16
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("conv", "bn", "error", "message"),
    [
        (
            torch.nn.Linear(4, 6),
            torch.nn.BatchNorm1d(6).eval(),
            TypeError,
            "conv is a Linear; expected a Conv1d or Conv2d",
        ),
        (Conv2d(4, 6, 3), torch.nn.BatchNorm1d(6).eval(), TypeError, "bn is a BatchNorm1d; .* a BatchNorm2d"),
        (Conv2d(4, 6, 3), torch.nn.LayerNorm(6).eval(), TypeError, "bn is a LayerNorm"),
        (Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6), ValueError, r"training mode.*bn\.eval\(\)"),
        (
            Conv2d(4, 6, 3),
            torch.nn.BatchNorm2d(6, track_running_stats=False).eval(),
            ValueError,
            "no running statistics",
        ),
        (Conv2d(4, 6, 3), torch.nn.BatchNorm2d(4).eval(), ValueError, "bn has 4 features and conv 6 output channels"),
    ],
    ids=["linear", "rank", "kind", "training", "statistics", "channels"],
)
def test_what_cannot_be_folded(conv, bn, error, message):
    with pytest.raises(error, match=f"fold_batch_norm: .*{message}"):
        fold_batch_norm(conv, bn)


def test_exported_names():
    assert {"Conv1d", "Conv2d", "ConvBlock2d", "fold_batch_norm"} <= set(bigkern.nn.__all__)
