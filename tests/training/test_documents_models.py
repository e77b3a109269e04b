"""Each of the documents' models learns from real data, within seconds: digits, Python's own sources, diabetes."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from bigkern.models import TORCH
from bigkern.training.data import Dataset, Split
from bigkern.training.metrics import largest_difference, majority_accuracy
from bigkern.training.tasks import AUTOENCODERS, DEFAULTS, DataOptions, build_model, load_dataset, model_arguments
from bigkern.training.trainer import Trainer


def part(dataset: Dataset, train: int, held_out: int) -> tuple[Split, Split]:
    """So many samples spread over each split."""
    chosen = []
    for split, count in ((dataset.train, train), (dataset.held_out, held_out)):
        kept = torch.linspace(0, len(split) - 1, min(count, len(split))).long()
        chosen.append(Split(split.inputs[kept], split.targets[kept]))
    return tuple(chosen)


# Model: samples to train on, epochs, and what it must reach on held-out data: accuracy, or explained variance.
LEARNS = {
    "cnn": (600, 3, 0.85),
    "cnn-log-softmax": (600, 10, 0.8),
    "attention-classifier": (1000, 5, 0.33),
    "self-attention-classifier": (1000, 4, 0.33),
    "autoencoder": (1000, 8, 0.75),
    "autoencoder-conv": (400, 8, 0.55),
    "mlp": (1000, 30, 0.3),
    "rnn": (1000, 8, 0.8),
    # 0.6 is each character's most frequent tag: more takes memory.
    "gru-tagger": (600, 2, 0.7),
}


@cache
def dataset_for(name: str) -> Dataset:
    return load_dataset(name, DEFAULTS[name].data, DataOptions())


@pytest.mark.parametrize("name", LEARNS)
def test_it_learns_and_its_twin_of_torch_agrees(name):
    samples, epochs, wanted = LEARNS[name]
    defaults = DEFAULTS[name]
    dataset = dataset_for("transformer" if defaults.data == "text" else name)
    train, held_out = part(dataset, samples, 300)
    torch.manual_seed(0)
    arguments = model_arguments(name, dataset)
    model = build_model(name, arguments)
    trainer = Trainer(model, train, held_out, optimizer=defaults.optimizer, lr=defaults.lr, batch_size=16)
    assert trainer.fit(epochs)
    reached = trainer.history[-1].held_out_accuracy
    assert reached >= wanted > majority_accuracy(train.targets, held_out.targets) + 0.1
    twin = build_model(name, arguments, TORCH)
    twin.load_state_dict(model.state_dict())
    assert largest_difference(model, twin, held_out) < 1e-5


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoders_target_is_its_input(name):
    dataset = load_dataset(name, "digits", DataOptions())
    for split in (dataset.train, dataset.held_out):
        inputs, targets = split.batch(slice(0, 4))
        assert inputs.shape[1:] == (1, 8, 8) and torch.equal(inputs, targets)
