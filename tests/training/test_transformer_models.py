"""The Transformers learn from real data, each to a stated figure, within seconds."""

from __future__ import annotations

import pytest
import torch

from bigkern.models import TORCH
from bigkern.training import corpus, data, pairs
from bigkern.training.data import Dataset, Split
from bigkern.training.metrics import exact_matches, largest_difference, majority_accuracy
from bigkern.training.tasks import DataOptions, build_model, load_dataset, model_arguments
from bigkern.training.trainer import Trainer


def train(name: str, dataset: Dataset, epochs: int, batch_size: int, lr: float, **sizes: int) -> Trainer:
    """Trains the model and sets it beside its twin of torch.nn with the same weights."""
    torch.manual_seed(0)
    arguments = {**model_arguments(name, dataset), **sizes}
    model = build_model(name, arguments)
    trainer = Trainer(model, dataset.train, dataset.held_out, lr=lr, batch_size=batch_size)
    assert trainer.fit(epochs)
    twin = build_model(name, arguments, TORCH)
    twin.load_state_dict(model.state_dict())
    assert largest_difference(model, twin, dataset.held_out) < 1e-4
    return trainer


def test_seq2seq_writes_numbers_it_has_not_seen():
    dataset = pairs.numbers_in_words(3000, 4)
    sizes = dict(encoder_blocks=1, decoder_blocks=1, feed_forward=128)
    model = train("seq2seq", dataset, epochs=6, batch_size=32, lr=2e-3, **sizes).model
    assert exact_matches(model, dataset.held_out) >= 0.85
    encoder = dataset.encoder
    known = dataset.train.inputs[:200, 0]
    greedy, beams = model.greedy(known), model.beam(known, 4)
    assert torch.equal(greedy, model.beam(known, 1).tokens[:, 0])
    assert (beams.scores[:, 0] >= model.beam(known, 1).scores[:, 0] - 1e-4).all()
    answers = [encoder.decode(row) for row in dataset.train.targets[:200].tolist()]
    for written in (greedy, beams.tokens[:, 0]):
        right = sum(encoder.decode(row) == answer for row, answer in zip(written.tolist(), answers, strict=True))
        assert right >= 175


def test_gpt_knows_more_of_the_text_than_pairs_of_characters_tell():
    dataset = corpus.library_windows(64, 200_000)
    trainer = train("gpt", dataset, epochs=1, batch_size=16, lr=3e-3, dim=64, heads=2, blocks=2)
    bits = trainer.history[-1].held_out_loss / torch.log(torch.tensor(2.0)).item()
    assert bits < corpus.baseline_bits(dataset, 2)


def test_the_feature_transformer_tells_digits_by_their_rows():
    dataset = load_dataset("feature-transformer", "digits", DataOptions())
    assert dataset.train.inputs.shape[1:] == (8, 8) and dataset.train.targets.shape[1:] == (8,)
    trainer = train("feature-transformer", dataset, epochs=4, batch_size=32, lr=1e-3)
    assert trainer.history[-1].held_out_accuracy >= 0.85
    # each step has seen all rows
    first, last = (
        trainer.model.eval()(dataset.held_out.inputs)[:, step].argmax(-1) == dataset.held_out.targets[:, 0]
        for step in (0, -1)
    )
    assert first.double().mean() > 0.8 and last.double().mean() > 0.8


def test_bert_from_nothing_tells_packages_apart():
    dataset = data.package_sources()
    kept = torch.linspace(0, len(dataset.train) - 1, 1200).long()
    part = Split(dataset.train.inputs[kept], dataset.train.targets[kept])
    held_out = Split(dataset.held_out.inputs[::6], dataset.held_out.targets[::6])
    dataset = Dataset(dataset.description, part, held_out, dataset.encoder)
    trainer = train("bert", dataset, epochs=3, batch_size=16, lr=1e-3)
    assert trainer.history[-1].held_out_accuracy > majority_accuracy(part.targets, held_out.targets) + 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_images_as_rows(channels):
    split = data.as_rows(Split(torch.arange(2 * channels * 12).view(2, channels, 3, 4), torch.tensor([5, 6])))
    assert split.inputs.shape == (2, 3, 4 * channels)
    assert split.inputs[1, 2, :4].tolist() == torch.arange(2 * channels * 12).view(2, channels, 3, 4)[1, 0, 2].tolist()
    assert split.targets.tolist() == [[5] * 3, [6] * 3]
