"""The promises of ``accelerate``: what is swapped, what stays and why, what is refused, and that nothing else moves."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import bigkern
from bigkern.acceleration import _accelerate, _fusion, _rules
from tests.acceleration.architectures import UNet, inputs, make


def kept(report):
    return {row.path: row.note for row in report.kept}


def test_parameters_optimizer_and_keys_stay():
    model = make("ResNet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    params = dict(model.named_parameters())
    model.layer1.requires_grad_(False)
    model.layer2.eval()
    keys = list(model.state_dict())
    modules = dict(model.named_modules())
    bigkern.accelerate(model)
    assert list(model.state_dict()) == keys
    assert all(param is params[name] for name, param in model.named_parameters())
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not any(param.requires_grad for param in model.layer1.parameters())
    assert not model.layer2[0].conv1.training and model.training
    before = params["fc.weight"].detach().clone()
    model(*inputs("ResNet")).sum().backward()
    optimizer.step()
    assert not torch.equal(params["fc.weight"], before)
    twin = make("ResNet")
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(make("ResNet").state_dict())


def test_the_model_itself_and_modules_in_two_places():
    report = bigkern.accelerate(norm := nn.LayerNorm(4))
    assert type(norm) is bigkern.nn.LayerNorm and report.rows[0].path == "(model)"
    shared = nn.LayerNorm(4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(4, 4))})
    report = bigkern.accelerate(model)
    assert model["a"] is model["b"][0] and type(shared) is bigkern.nn.LayerNorm
    assert report.rows[0].paths == ["a", "b.0"] and "a, also b.0" in str(report)
    assert report.counts == {"LayerNorm": 1}


def test_hooks_go_on_being_called():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(args[2].min().item()))
    report = bigkern.accelerate(model)
    assert "keeps its hook" in str(report)
    model(torch.randn(1, 1, 8, 8))
    assert len(seen) == 1 and seen[0] < 0  # the convolution's own output, not the activation's
    handle = model[1].register_forward_pre_hook(lambda module, args: seen.append("relu"))
    model(torch.randn(1, 1, 8, 8))
    assert seen[-1] == "relu"
    handle.remove()


@pytest.fixture
def kernels(emulator, monkeypatch):
    """The hand-written kernels, emulated, with products of float32: without kernels nothing is fused."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with bigkern.use_backend("cuda"):
        yield


@pytest.mark.emulated
def test_fused_children_are_still_there(kernels):
    """Sliced, iterated over, exchanged, hooked or in training mode, a Sequential is what it was."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).eval()
    twin = copy.deepcopy(model)
    report = bigkern.accelerate(model)
    assert "0+1+2+3" in str(report)
    x = torch.randn(2, 1, 9, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x))
        torch.testing.assert_close(model[:2](x), twin[:2](x))
        y = x
        for layer in model:
            y = layer(y)
        torch.testing.assert_close(y, twin(x))
        # What is loaded or trained afterwards counts.
        for net in (model, twin):
            net[1].running_mean.data.add_(1)
            net[1].weight.data.mul_(2)
        torch.testing.assert_close(model(x), twin(x))
        for net in (model, twin):
            net[2] = nn.Sigmoid()
        torch.testing.assert_close(model(x), twin(x))
        for net in (model, twin):
            net.train()
        torch.testing.assert_close(model(x), twin(x))
        torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
CHAINS = {
    "conv2d, norm, gelu, pool": (
        lambda: (nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU("tanh"), nn.MaxPool2d(3, 2, 1)),
        [("gelu_tanh", (3, 2, 1), True)],
    ),
    "conv1d, norm without affine, silu": (
        lambda: (nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4, affine=False), nn.SiLU()),
        [("silu", None, True)],
    ),
    "conv2d, pool": (lambda: (nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)), [(None, (2, 2, 0), True)]),
    "two": (
        lambda: (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.Dropout(), nn.ReLU()),
        [("relu", None, True)],
    ),
    "nothing certain": (
        lambda: (
            nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Conv2d(4, 4, 1),
            nn.LeakyReLU(),
        ),
        [],
    ),
}


@pytest.mark.emulated
@pytest.mark.parametrize("chain", CHAINS)
def test_one_operation_where_it_says_so(chain, kernels, monkeypatch):
    calls = []
    for layer, kind in list(_fusion._KINDS.items()):

        def spy(*args, activation, max_pool, convolve=kind.convolve):
            calls.append((activation, max_pool, args[2] is not None))
            return convolve(*args, activation=activation, max_pool=max_pool)

        monkeypatch.setitem(_fusion._KINDS, layer, kind._replace(convolve=spy))
    layers, expected = CHAINS[chain]
    torch.manual_seed(0)
    model = nn.Sequential(*layers()).eval()
    for module in model:
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    report = bigkern.accelerate(model)
    x = torch.randn(2, 1, 9) if isinstance(model[0], nn.Conv1d) else torch.randn(2, 1, 9, 9)
    verification = report.verify(x, repeats=1)
    assert verification.passed, str(verification)
    calls.clear()
    with torch.no_grad():
        model(x)
    assert calls == expected
    # The gradients of a batch norm's parameters go through the batch norm.
    calls.clear()
    model(x)
    assert len(calls) == (0 if isinstance(model[1], _BATCH_NORMS) else len(expected))
    # torch's operators gain nothing by it.
    calls.clear()
    with bigkern.use_backend("torch"), torch.no_grad():
        model(x)
    assert not calls


def test_restore_while_training_goes_on():
    model = make("Transformer")
    report = bigkern.accelerate(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*inputs("Transformer")).sum().backward()
    optimizer.step()
    state = copy.deepcopy(model.state_dict())
    report.restore()
    report.restore()
    assert not any(type(module).__module__.startswith("bigkern") for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="was restored"):
        report.verify(inputs("Transformer"))


def test_what_stays_and_why():
    class Mine(nn.LayerNorm):
        pass

    def weird(layer):
        layer.forward = lambda x: x
        return layer

    def prepared(layer):
        layer.qconfig = torch.ao.quantization.default_qconfig
        return layer

    class Wrapped(torch.Tensor):
        pass

    odd = nn.LayerNorm(4)
    odd.weight = nn.Parameter(torch.ones(4).as_subclass(Wrapped))
    lazy = nn.Conv2d(1, 2, 3)
    lazy.weight = nn.UninitializedParameter()
    model = nn.ModuleDict(
        {
            "subclass": Mine(4),
            "parametrized": parametrizations.weight_norm(nn.Conv2d(1, 2, 3)),
            "replaced": weird(nn.LayerNorm(4)),
            "prepared": prepared(nn.Conv2d(1, 2, 3)),
            "complex": nn.Conv2d(1, 2, 3, dtype=torch.complex64),
            "scripted": torch.jit.script(nn.LayerNorm(4)),
            "tensor": odd,
            "lazy": lazy,
            "ours": bigkern.nn.AddLayerNorm(4),
            "swapped": nn.LayerNorm(4),
        }
    )
    report = bigkern.accelerate(model)
    reasons = kept(report)
    assert "a subclass of torch.nn.LayerNorm" in reasons["subclass"]
    assert "parametrized: weight" in reasons["parametrized"]
    assert "forward of this instance was replaced" in reasons["replaced"]
    assert "prepared for quantization" in reasons["prepared"]
    assert "weight is torch.complex64" in reasons["complex"]
    assert "weight is a Wrapped" in reasons["tensor"]
    assert "weight is not initialised yet" in reasons["lazy"]
    assert "ours" not in reasons and type(model["swapped"]) is bigkern.nn.LayerNorm
    assert report.others["RecursiveScriptModule"] == 1


def test_pruned_and_weight_normed_modules_are_swapped_and_work():
    """Their hooks run before whatever forward there is."""
    model = make("speech encoder").eval()
    prune.l1_unstructured(model.features[0], "weight", 0.5)
    with pytest.warns(FutureWarning):
        weight_norm(model.features[2])
    prune.random_unstructured(model.norm, "weight", 0.5)
    with torch.no_grad():
        expected = model(*inputs("speech encoder"))
    report = bigkern.accelerate(model)
    assert not report.kept
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs("speech encoder")), expected)
    assert report.verify(inputs("speech encoder"), repeats=1).passed
    prune.remove(model.features[0], "weight")
    assert (model.features[0].weight == 0).float().mean() == 0.5


def test_a_layer_stays_where_its_encoder_makes_nested_tensors():
    class MyEncoder(nn.TransformerEncoder):
        pass

    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = MyEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        report = bigkern.accelerate(model)
        assert "passes nested tensors" in kept(report)["layers.0"] and not report.swapped
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
    plain = nn.TransformerEncoder(layer, 2).eval()
    assert not bigkern.accelerate(plain).kept


def test_only_and_skip():
    report = bigkern.accelerate(make("Transformer"), only="transformer.encoder")
    assert {row.path.split(".")[1] for row in report.rows} == {"encoder"}
    report = bigkern.accelerate(make("Transformer"), only=[nn.LayerNorm, "*.self_attn"])
    assert report.counts == {"LayerNorm": 12, "MultiheadAttention": 4}
    report = bigkern.accelerate(make("ResNet"), skip=["layer?.*", nn.Sequential])
    assert report.counts == {"Conv2d": 1} and kept(report)["layer1.0.conv1"] == "skip"
    with pytest.raises(ValueError, match=r"only='encoder' matches no module; the model has embedding"):
        bigkern.accelerate(make("Transformer"), only="encoder")
    with pytest.raises(ValueError, match=r"skip=.*RMSNorm.* matches no module"):
        bigkern.accelerate(make("Transformer"), skip=nn.RMSNorm)
    with pytest.raises(TypeError, match="only has a int"):
        bigkern.accelerate(make("Transformer"), only=[3])


def test_without_fusion():
    report = bigkern.accelerate(make("UNet"), fuse=False)
    assert report.counts == {"Conv2d": 11}


def test_bad_models():
    with pytest.raises(TypeError, match="model is a function"):
        bigkern.accelerate(lambda x: x)
    with pytest.raises(ValueError, match=r"parameter 0\.weight is on the meta device"):
        bigkern.accelerate(nn.Sequential(nn.Linear(2, 2, device="meta")))
    with pytest.raises(TypeError, match=r"torch\.jit"):
        bigkern.accelerate(torch.jit.script(nn.Sequential(nn.LayerNorm(4))))
    exported = torch.export.export(nn.Sequential(nn.LayerNorm(4)), (torch.randn(2, 4),))
    with pytest.raises(TypeError, match="ExportedProgram"):
        bigkern.accelerate(exported)
    with pytest.raises(TypeError, match="a graph of operators"):
        bigkern.accelerate(exported.module())


@pytest.mark.parametrize("place", ["backend", "swap", "fuse"])
def test_an_error_in_the_middle_leaves_the_model_as_it_was(place, monkeypatch):
    model = nn.ModuleList([nn.LSTM(4, 4), make("UNet")])
    kinds = [(type(module), set(vars(module))) for module in model.modules()]
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:
            raise RuntimeError("planted")
        return original(*args, **kwargs)

    owner, name = {
        "backend": (_rules.Rule, "backend"),
        "swap": (_accelerate.Swap, "apply"),
        "fuse": (_fusion, "runs"),
    }[place]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="planted"):
        bigkern.accelerate(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == kinds


def test_twice_and_copies():
    model = make("LSTM language model")
    first = bigkern.accelerate(model)
    second = bigkern.accelerate(model)
    assert first.counts == {"LSTM": 1} and second.counts == {}
    again = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    tokens = inputs("LSTM language model")
    for other in (model, again, loaded):
        other.eval()
        assert type(other.lstm) is bigkern.nn.LSTM
        assert torch.equal(other(*tokens), model(*tokens))
        assert other.decoder.weight is other.embedding.weight
    assert model.double()(*tokens).dtype == torch.float64


def test_restore_refuses_what_was_changed_since():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    report = bigkern.accelerate(model)
    parametrizations.weight_norm(model[1])
    with pytest.raises(RuntimeError, match="another class than accelerate gave them"):
        report.restore()
    assert type(model[0]) is bigkern.nn.LayerNorm
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    report.restore()
    assert type(model[0]) is type(model[1]) is nn.LayerNorm


def test_report_shows_everything():
    model = UNet()
    report = bigkern.accelerate(model, skip="out")
    text, markdown = str(report), report.to_markdown()
    for shown in ("down1.* (2)", "bigkern.nn.Conv2d", "0+1, 2+3+4", "skip", "10 Conv2d", "torch"):
        assert shown in text and shown in markdown, shown
    assert "without a counterpart in bigkern: 5 BatchNorm2d, 2 ConvTranspose2d" in text
    assert "accelerate: UNet" in text and repr(report) == "<Report: 15 swapped, 1 kept>"
    with bigkern.use_backend("torch"):
        assert "torch was asked for" in str(bigkern.accelerate(UNet()))


@pytest.mark.emulated
def test_report_names_the_backend_and_its_reasons(emulator):
    with bigkern.use_backend("cuda"):
        model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4, proj_size=2), nn.LayerNorm(4).double()])
        rows = {row.path: row for row in bigkern.accelerate(model).rows}
    assert rows["0"].backend == "cuda" and rows["0"].why == ""
    assert rows["1"].backend == "none" and "proj_size" in rows["1"].why
    assert "float64" in rows["2"].why
