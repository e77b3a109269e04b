"""BERT: Hugging Face's weights, logits and gradients; what a folder may hold and what it may not; fine-tuning."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import bigkern
from bigkern.models import TORCH, BERTForSequenceClassification
from bigkern.models.bert import weight_sources
from tests.models.hugging_face import compare, save

BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "num_labels": 3,
}


def inputs():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 50, (4, 11), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    mask[1, :4] = 0
    mask[2, 1:] = 0
    types = (torch.arange(11) > 5).long().expand(4, -1)
    return tokens, mask, types


def small(**arguments):
    sizes = dict(dim=16, heads=2, blocks=1, feed_forward=24, max_length=12, dropout=0.0, attention_dropout=0.0)
    return BERTForSequenceClassification(20, 3, **{**sizes, **arguments})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bert")
    return made, save("BertForSequenceClassification", "BertConfig", made, **BERT)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_logits_and_gradients_are_transformers(tmp_path, activation):
    theirs = save("BertForSequenceClassification", "BertConfig", tmp_path, hidden_act=activation, **BERT)
    ours = BERTForSequenceClassification.from_pretrained(tmp_path)
    tokens, mask, types = inputs()

    def call(model):
        if model is ours:
            return model(tokens, mask, types)
        return model(input_ids=tokens, attention_mask=mask, token_type_ids=types).logits

    compare(call, ours, theirs, weight_sources(BERT["num_hidden_layers"]))


def test_padding_is_masked_by_its_token_without_a_mask(folder):
    ours = BERTForSequenceClassification.from_pretrained(folder[0])
    tokens, _, _ = inputs()
    padded = torch.cat([tokens, torch.zeros(4, 5, dtype=torch.int64)], 1)
    torch.testing.assert_close(ours(padded), ours(tokens), rtol=1e-5, atol=1e-6)
    mask = (padded != 0).long()
    torch.testing.assert_close(folder[1](input_ids=padded, attention_mask=mask).logits, ours(padded))


def test_a_text_without_words_and_no_texts_at_all():
    for layers in (bigkern.models.BIGKERN, TORCH):
        model = small(layers=layers).eval()
        assert torch.isfinite(model(torch.zeros(2, 5, dtype=torch.int64))).all()
        assert model(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 3)


def test_dropout_acts_in_training_only(folder):
    model = BERTForSequenceClassification.from_pretrained(folder[0])
    tokens, _, _ = inputs()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    assert model.bert.blocks[0].attention.dropout == 0.1


def test_old_names_a_bare_encoder_and_a_pickle(folder, tmp_path):
    """As the first BERTs were saved: gamma and beta, no prefix, pytorch_model.bin. Another head is drawn."""
    path, theirs = folder
    shutil.copy(path / "config.json", tmp_path)
    state = {
        name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in theirs.state_dict().items()
        if not name.startswith("classifier")
    }
    state["embeddings.position_ids"] = torch.arange(24).unsqueeze(0)
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = BERTForSequenceClassification.from_pretrained(tmp_path, classes=5)
    tokens, mask, types = inputs()
    hidden = theirs.bert(input_ids=tokens, attention_mask=mask, token_type_ids=types).pooler_output
    assert ours.classifier.weight.shape == (5, 32)
    torch.testing.assert_close(ours.pooler(ours.bert(tokens, mask, types)[:, 0]), hidden, rtol=1e-4, atol=1e-5)


def test_weights_in_parts(folder, tmp_path):
    path, theirs = folder
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokens, mask, _ = inputs()
    whole, parts = map(BERTForSequenceClassification.from_pretrained, (path, tmp_path))
    assert torch.equal(whole(tokens, mask), parts(tokens, mask))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "roberta"}, "type 'roberta'; this class loads 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'; supported is 'absol"),
        ({"is_decoder": True}, "is_decoder = True; supported is False"),
        ({"hidden_act": "quick_gelu"}, "activation: expected one of relu, gelu, .*, got 'quick_gelu'"),
        ({"hidden_size": None}, "its config lacks hidden_size"),
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of its heads"),
        ({"num_hidden_layers": 3}, "16 missing tensors: bert.encoder.layer.2.attention.output.LayerNorm.bias"),
        ({"num_hidden_layers": 1}, "16 unexpected tensors: bert.encoder.layer.1"),
        ({"vocab_size": 51}, r"word_embeddings.weight: shape \(50, 32\), the config says \(51, 32\)"),
    ],
)
def test_what_a_config_may_not_say(folder, tmp_path, change, message):
    shutil.copy(folder[0] / "model.safetensors", tmp_path)
    config = json.loads((folder[0] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        BERTForSequenceClassification.from_pretrained(tmp_path)


def test_what_a_call_may_not_say():
    model = small()
    with pytest.raises(ValueError, match="13 positions, but max_length is 12"):
        model(torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"attention_mask: shape \(1, 4\); expected the tokens', \(1, 5\)"):
        model(torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 4))


def test_fine_tuning_a_loaded_encoder(folder):
    """The document's use: pretrained weights, a new head, Adam. Which of two words a text has, wherever it stands."""
    torch.manual_seed(0)
    model = BERTForSequenceClassification.from_pretrained(folder[0], classes=2).train()
    optimizer = bigkern.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(2)

    def batch(texts):
        labels = torch.randint(0, 2, (texts,), generator=generator)
        tokens = torch.randint(3, 50, (texts, 8), generator=generator)
        return tokens.scatter(1, torch.randint(1, 8, (texts, 1), generator=generator), labels[:, None] + 1), labels

    for _ in range(150):
        tokens, labels = batch(32)
        loss = torch.nn.functional.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, labels = batch(500)
    assert (model.eval()(tokens).argmax(1) == labels).double().mean() >= 0.9
