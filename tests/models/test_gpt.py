"""GPT: GPT-2's weights, logits, gradients and greedy text; generation with and without the cache; choosing tokens."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch

from bigkern.models import BIGKERN, GPT, TORCH
from bigkern.models.gpt import KVCache, choose, weight_sources
from tests.models.hugging_face import compare, save

GPT2 = {
    "vocab_size": 60,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tokens(*shape, seed=1):
    return torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(seed))


def small(**arguments):
    model = GPT(60, **{**dict(dim=16, heads=2, blocks=2, max_length=20), **arguments})
    liven(model.tokens.weight, model.positions.weight)
    return model


def liven(tokens, positions):
    """Positions as large as tokens: otherwise a random model, whose output is its input's embedding, repeats itself."""
    torch.nn.init.normal_(tokens, std=0.5)
    torch.nn.init.normal_(positions, std=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("gpt2")
    return made, save("GPT2LMHeadModel", "GPT2Config", made, **GPT2)


@pytest.mark.parametrize("sizes", [{}, {"activation_function": "relu", "n_inner": 40}], ids=["gelu_new", "relu"])
def test_logits_and_gradients_are_transformers(tmp_path, sizes):
    theirs = save("GPT2LMHeadModel", "GPT2Config", tmp_path, **GPT2, **sizes)
    ours = GPT.from_pretrained(tmp_path)
    text = tokens(3, 17)

    def call(model):
        return model(text) if model is ours else model(input_ids=text).logits

    compare(call, ours, theirs, weight_sources(GPT2["n_layer"]))


def test_greedy_text_is_transformers(folder, tmp_path):
    theirs = copy.deepcopy(folder[1])
    liven(theirs.transformer.wte.weight, theirs.transformer.wpe.weight)
    theirs.save_pretrained(tmp_path)
    text = tokens(4, 5)
    expected = theirs.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=20, do_sample=False)
    written = GPT.from_pretrained(tmp_path).generate(text, 20, eos=0)
    assert torch.equal(written, expected)
    assert len(set(written[:, 5:].flatten().tolist())) > 3


def test_old_names_and_a_bare_decoder(folder, tmp_path):
    """As OpenAI's GPT-2 lies on the hub: no prefix, the causal masks among the weights, no head."""
    import safetensors.torch

    shutil.copy(folder[0] / "config.json", tmp_path)
    state = {n.removeprefix("transformer."): t.contiguous() for n, t in folder[1].transformer.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(32, 32).tril()[None, None]
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    text = tokens(2, 6)
    assert torch.equal(GPT.from_pretrained(tmp_path)(text), GPT.from_pretrained(folder[0])(text))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "bert"}, "type 'bert'; this class loads 'gpt2'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True; supported is False"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False; supported is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False; supported is True"),
        ({"activation_function": "quick_gelu"}, "activation: expected one of relu, .*, got 'quick_gelu'"),
        ({"n_layer": 2}, r"12 unexpected tensors: transformer\.h\.2"),
        ({"n_layer": 4}, r"12 missing tensors: transformer\.h\.3"),
        ({"n_head": 5}, "n_embd 32 is no multiple of n_head, 5"),
        ({"n_positions": 31}, r"transformer.wpe.weight: shape \(32, 32\), the config says \(31, 32\)"),
    ],
)
def test_what_a_config_may_not_say(folder, tmp_path, change, message):
    shutil.copy(folder[0] / "model.safetensors", tmp_path)
    config = json.loads((folder[0] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_a_head_of_its_own_is_refused(folder, tmp_path):
    import safetensors.torch

    shutil.copy(folder[0] / "config.json", tmp_path)
    state = {name: tensor.clone() for name, tensor in folder[1].state_dict().items()}
    state["lm_head.weight"] += 1
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the tokens' embedding"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_the_cache_changes_no_token(sampled, backend, device):
    model = small().to(device)
    text = tokens(3, 4).to(device)

    def written(use_cache):
        generator = torch.Generator(device).manual_seed(5)
        options = dict(do_sample=sampled, top_k=10, temperature=1.5, generator=generator)
        return model.generate(text, 12, use_cache=use_cache, **options)

    with_cache = written(True)
    assert torch.equal(with_cache, written(False))
    assert with_cache.shape == (3, 16) and torch.equal(with_cache[:, :4], text)
    assert len(set(with_cache[:, 4:].flatten().tolist())) > 6


def test_reading_on_gives_the_logits_of_reading_anew():
    model, text = small().eval(), tokens(2, 20)
    cache = KVCache(model, 2, 20)
    for start, end in ((0, 7), (7, 8), (8, 15), (15, 20)):
        torch.testing.assert_close(model.read_on(text[:, start:end], cache), model(text[:, :end])[:, -1])
    with pytest.raises(ValueError, match="21 positions, but max_length is 20"):
        model.read_on(text[:, :1], cache)
    with pytest.raises(ValueError, match="room for 3 tokens, 0 are used and 4 are to join"):
        model.read_on(text[:, :4], KVCache(model, 2, 3))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "anew"])
def test_texts_of_unequal_length_are_each_alone(use_cache, backend, device):
    model, text = small().to(device), tokens(4, 7).to(device)
    lengths = torch.tensor([3, 7, 1, 5], device=device)
    alone = [model.generate(row[None, :n], 6)[0].tolist() for row, n in zip(text, lengths.tolist(), strict=True)]
    assert len({token for row in alone for token in row[-6:]}) > 6
    for padding in (0, 9):
        given = text.masked_fill(torch.arange(7, device=device) >= lengths.unsqueeze(1), padding)
        written = model.generate(given, 6, lengths=lengths, use_cache=use_cache)
        assert written.tolist() == [row + [0] * (13 - len(row)) for row in alone]
    eos = alone[0][-4]
    written = model.generate(text, 6, lengths=lengths, use_cache=use_cache, eos=eos).tolist()
    for found, row, n in zip(written, alone, lengths.tolist(), strict=True):
        stop = row.index(eos, n) + 1 if eos in row[n:] else len(row)
        assert found[:stop] == row[:stop] and set(found[stop:]) <= {eos}


def test_lengths_that_are_refused():
    model, text = small(), tokens(2, 4)
    assert model.generate(text, 0, lengths=torch.tensor([4, 1])).tolist() == [
        text[0].tolist(),
        [int(text[1, 0]), 0, 0, 0],
    ]
    for lengths, error, message in (
        ([1, 2], TypeError, "expected an int32 or int64 tensor"),
        (torch.tensor([1]), ValueError, r"expected shape \(2,\), got \(1,\)"),
        (torch.tensor([0, 4]), ValueError, r"from 1 to 4, got \[0, 4\]"),
        (torch.tensor([1, 5]), ValueError, r"from 1 to 4, got \[1, 5\]"),
    ):
        with pytest.raises(error, match=message):
            model.generate(text, 2, lengths=lengths)
    cache = KVCache(model, 2, 9)
    model.read_on(text, cache)
    with pytest.raises(ValueError, match="only the first texts of a cache"):
        model.read_on(text, cache, torch.tensor([1, 2]))


def test_no_position_sees_ahead():
    for layers in (BIGKERN, TORCH):
        model, text = small(layers=layers), tokens(2, 9)
        other = text.clone()
        other[:, 6:] = tokens(2, 3, seed=2)
        torch.testing.assert_close(model(text)[:, :6], model(other)[:, :6])
        assert not torch.allclose(model(text)[:, 6:], model(other)[:, 6:])


def test_a_text_that_has_ended_is_filled_up():
    model, text = small(), tokens(3, 4)
    free = model.generate(text, 12)
    eos = int(free[0, 6])
    ended = model.generate(text, 12, eos=eos)
    for row, whole in zip(ended.tolist(), free.tolist(), strict=True):
        stop = whole.index(eos, 4) + 1 if eos in whole[4:] else len(whole)
        assert row[:stop] == whole[:stop][: len(row)] and set(row[stop:]) <= {eos}
    # when all have ended, so does the generation
    assert model.generate(text[:1], 12, eos=eos).shape[1] == free[0].tolist().index(eos, 4) + 1


def test_generation_leaves_the_model_as_it_was():
    model, text = small(dropout=0.5), tokens(1, 4)
    model.train()
    assert torch.equal(model.generate(text, 5), model.generate(text, 5))
    assert model.training and model.generate(text, 0).shape == (1, 4)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="22 positions, but max_length is 20"):
        model.generate(text, 18)
    with pytest.raises(ValueError, match=r"expected \(N, T\) with T of 1 or more, got \(1, 0\)"):
        model.generate(text[:, :0], 3)
    with pytest.raises(ValueError, match="max_new_tokens: expected 0 or more, got -1"):
        model.generate(text, -1)


def test_choosing_by_chance():
    logits = torch.tensor([[0.5, 0.2, 0.25, 0.05]]).log()

    def drawn(**options):
        generator = torch.Generator().manual_seed(0)
        found = choose(logits.expand(4000, -1), do_sample=True, generator=generator, **options)
        return (found.bincount(minlength=4) / 4000).tolist()

    assert choose(logits).tolist() == [0]
    assert drawn() == pytest.approx([0.5, 0.2, 0.25, 0.05], abs=0.03)
    assert drawn(top_k=2) == pytest.approx([2 / 3, 0, 1 / 3, 0], abs=0.03)
    assert drawn(top_k=9) == drawn()
    assert drawn(top_p=0.75) == pytest.approx([2 / 3, 0, 1 / 3, 0], abs=0.03)
    assert drawn(top_p=0.76) == pytest.approx([0.5 / 0.95, 0.2 / 0.95, 0.25 / 0.95, 0], abs=0.03)
    assert drawn(top_p=1e-9) == [1, 0, 0, 0]
    assert drawn(temperature=0.5) == pytest.approx(
        [0.25 / 0.355, 0.04 / 0.355, 0.0625 / 0.355, 0.0025 / 0.355], abs=0.03
    )


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_what_cannot_be_chosen_by(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        small().generate(tokens(1, 2), 1, do_sample=True, **options)


def test_bfloat16_generates():
    model = small().bfloat16()
    assert model.generate(tokens(2, 4), 6).shape == (2, 10)
