"""``attn_implementation="bigkern"`` beside eager attention, on tiny models with random weights."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from bigkern.integrations import transformers as integration  # noqa: E402
from tests.conftest import pick  # noqa: E402
from tests.integrations.transformer_models import CAUSAL, LENGTH, MODELS, VOCABULARY, inputs, make  # noqa: E402
from tests.numerics import assert_close, cotangent  # noqa: E402

PADDINGS = pick(("none", "left", "right"), ("none", "left"))


@pytest.fixture(autouse=True, scope="module")
def registered():
    integration.register()


def run(model, batch):
    """(logits, gradients by name) where there is no padding."""
    logits = model(**batch).logits
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:2]:
        logits = logits[mask.bool()]
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    grads = torch.autograd.grad(logits, list(params.values()), cotangent(logits), allow_unused=True)
    return logits.detach(), dict(zip(params, grads, strict=True))


def in_double(batch):
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_match_eager(name, padding, device):
    if padding == "left" and name == "gemma2":
        padding = "right"  # no torch attention has its softcap, and eager's gradient of a row without keys is NaN
    batch = inputs(name, padding)
    if padding != "none" and "attention_mask" not in batch:
        pytest.skip("takes no padding")
    batch = {key: value.to(device) for key, value in batch.items()}
    ours, eager = make(name, "bigkern").to(device), make(name).to(device)
    assert ours.config._attn_implementation == "bigkern"
    logits, grads = run(ours, batch)
    eager_logits, eager_grads = run(eager, batch)
    exact = copy.deepcopy(eager).double()
    if name != "gemma2":
        exact.set_attn_implementation("sdpa")
    truth, true_grads = run(exact, in_double(batch))
    assert_close("logits", logits, eager_logits, truth)
    # Biases of keys have no gradient but rounding: measured against the largest gradient there is.
    largest = max(grad.abs().max() for grad in true_grads.values() if grad is not None)
    for param, grad in grads.items():
        if grad is None:
            assert eager_grads[param] is None
            continue
        error = (grad - true_grads[param]).abs().max()
        own = (eager_grads[param] - true_grads[param]).abs().max()
        assert error <= 2 * own + torch.finfo(torch.float32).eps * largest, param


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_emulated_kernels(name, emulator):
    """The hand-written kernels themselves; grouped queries, a padding mask and a causal one."""
    import bigkern

    batch = inputs(name, "left")
    eager = make(name)
    with bigkern.use_backend("cuda"), torch.no_grad():
        # Attention alone: the rest of the model is torch's.
        logits = make(name, "bigkern")(**batch).logits
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = eager(**batch).logits
        truth = copy.deepcopy(eager).double()(**batch).logits
    assert_close("logits", logits[mask], expected[mask], truth[mask])


@pytest.mark.parametrize("name", [*CAUSAL, "t5", "whisper"])
def test_generation_with_cache_is_equal_token_for_token(name):
    batch = inputs(name, "left")
    batch.pop("decoder_input_ids", None)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=True)
    expected = make(name).generate(**batch, **options)
    assert torch.equal(make(name, "bigkern").generate(**batch, **options), expected)


@pytest.mark.parametrize("name", MODELS)
def test_output_attentions_is_served(name):
    batch = inputs(name)
    with torch.no_grad():
        ours, eager = (make(name, kind)(**batch, output_attentions=True) for kind in ("bigkern", "eager"))
    found = [key for key in eager if key.endswith("attentions") and eager[key]]
    assert found
    for key in found:
        assert len(ours[key]) == len(eager[key])
        for weights, expected in zip(ours[key], eager[key], strict=True):
            torch.testing.assert_close(weights, expected)


@pytest.mark.slow
def test_output_attentions_under_compile_is_served():
    model = make("gpt2", "bigkern")
    batch = inputs("gpt2")
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(**batch, output_attentions=True)
        eager = make("gpt2")(**batch, output_attentions=True)
    for weights, expected in zip(compiled.attentions, eager.attentions, strict=True):
        torch.testing.assert_close(weights, expected)


def test_dropout_in_training():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        attention_dropout=0.5,
        attn_implementation="bigkern",
    )
    model = transformers.LlamaForCausalLM(config)
    batch = inputs("llama")

    def logits(seed):
        torch.manual_seed(seed)
        return model(**batch).logits

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


def test_every_way_of_choosing_it(tmp_path):
    torch.manual_seed(0)
    batch = inputs("llama")
    config = make("llama").config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="bigkern").eval()
    assert model.config._attn_implementation == "bigkern"
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="bigkern").eval()
    assert loaded.config._attn_implementation == "bigkern"
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        loaded.set_attn_implementation("sdpa")
        loaded.set_attn_implementation("bigkern")
        assert torch.equal(loaded(**batch).logits, expected)


def test_compiles_without_a_graph_break():
    model, batch = make("llama", "bigkern"), inputs("llama", "left")
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**batch).logits
        torch.testing.assert_close(compiled, model(**batch).logits)


def test_packed_sequences():
    """Two sequences one behind the other, told apart by their lengths, are what they are alone."""
    model = make("llama", "bigkern")
    ids = inputs("llama")["input_ids"]
    lengths = torch.tensor([0, 4, LENGTH], dtype=torch.int32)
    positions = torch.cat((torch.arange(4), torch.arange(LENGTH - 4))).unsqueeze(0)
    row = ids[:1]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=part).logits for part in (row[:, :4], row[:, 4:])], 1)
        # transformers finds the sequences in the positions and makes a mask.
        torch.testing.assert_close(model(input_ids=row, position_ids=positions, use_cache=False).logits, expected)
    layer = model.model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 4, LENGTH, 8).unbind()
    output, _ = integration.attention_forward(
        layer, q, k, v, None, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=5, max_length_k=5
    )
    parts = [
        integration.attention_forward(layer, *(x[:, :, part] for x in (q, k, v)), None)[0]
        for part in (slice(0, 4), slice(4, None))
    ]
    torch.testing.assert_close(output, torch.cat(parts, 1))


def test_what_it_does_not_know_is_refused():
    layer = make("llama").model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 4, 5, 8).unbind()
    with pytest.raises(ValueError, match="does not know s_aux, which LlamaAttention passes"):
        integration.attention_forward(layer, q, k, v, None, s_aux=torch.zeros(4))
    lengths = torch.tensor([0, 5], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, max_length_q=5, max_length_k=5)
    with pytest.raises(ValueError, match="take none of them"):
        integration.attention_forward(layer, q, k, v, torch.ones(1, 1, 5, 5, dtype=torch.bool), **packed)
    with pytest.raises(ValueError, match="a batch of one"):
        integration.attention_forward(layer, *(x.expand(2, -1, -1, -1) for x in (q, k, v)), None, **packed)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'bigkern\[transformers\]'"):
        integration.register()
