from __future__ import annotations

import copy
import io
import signal
import threading

import pytest
import torch
from torch import nn

from bigkern.training.data import Split
from bigkern.training.trainer import Trainer, make_optimizer


def trainer(optimizer="adam", **options):
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(50, 6, generator=generator)
    targets = (inputs[:, 0] > 0).long()
    # dropout: the generator's state matters to every step
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    train, held_out = Split(inputs[:37], targets[:37]), Split(inputs[37:], targets[37:])
    return Trainer(model, train, held_out, **{"lr": 0.01, "batch_size": 8, "optimizer": optimizer, **options})


def through_a_file(state):
    """As a checkpoint would hold it: nothing is shared, and only plain values and tensors are allowed."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def without_times(history):
    return [record._replace(seconds=0) for record in history]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_loss_falls(optimizer):
    trained = trainer(optimizer)
    assert trained.fit(15)
    losses = [record.loss for record in trained.history]
    assert losses[-1] < 0.7 * losses[0]
    assert trained.history[-1].held_out_accuracy > 0.7


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("stop_after", [3, 5, 7])  # mid-epoch, at an epoch's last step, in the next epoch
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(optimizer, stop_after):
    whole = trainer(optimizer)
    assert whole.fit(3)

    saved = []
    steps = 0

    def press_ctrl_c(_):
        nonlocal steps
        steps += 1
        if steps == stop_after:
            signal.raise_signal(signal.SIGINT)

    first = trainer(optimizer)
    assert not first.fit(3, on_step=press_ctrl_c, save=lambda state: saved.append(through_a_file(state)))
    assert steps == stop_after

    torch.manual_seed(999)
    second = trainer(optimizer)
    torch.manual_seed(999)
    second.load_state_dict(saved[-1])
    assert (second.epoch * 5 + second.step) == stop_after
    assert second.fit(3)

    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key]), key
    assert without_times(second.history) == without_times(whole.history)


def test_more_epochs_later_equal_all_at_once():
    whole = trainer()
    whole.fit(4)
    parts = trainer()
    parts.fit(2)
    state = through_a_file(parts.state_dict())
    again = trainer()
    again.load_state_dict(state)
    again.fit(4)
    for ours, theirs in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_second_ctrl_c_is_not_waited_for():
    def press_twice(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer().fit(1, on_step=press_twice)


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer().fit(1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_trains_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(trainer().fit(1)))
    thread.start()
    thread.join()
    assert results == [True]


def test_every_sample_once_an_epoch_in_an_order_of_its_own():
    seen = []

    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, inputs):
            if self.training:
                seen.append(inputs[:, 0].clone())
            return self.weight.expand(len(inputs), 2)

    split = Split(torch.arange(20.0).unsqueeze(1), torch.zeros(20, dtype=torch.int64))
    Trainer(Recorder(), split, split, batch_size=6).fit(2)
    assert [len(batch) for batch in seen] == [6, 6, 6, 2] * 2
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert torch.equal(first.sort().values, torch.arange(20.0))
    assert torch.equal(second.sort().values, torch.arange(20.0))
    assert not torch.equal(first, second)


def test_evaluation_is_in_evaluation_mode_and_training_mode_comes_back():
    trained = trainer()
    modes = []
    trained.model[2].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trained.fit(1)
    assert modes == [True] * 5 + [False]
    assert trained.model.training


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="expected one of adam, sgd, got 'lion'"):
        make_optimizer("lion", nn.Linear(1, 1), 0.1)


def test_running_figures_are_means_over_the_epoch():
    trained = trainer()
    figures = []
    before = copy.deepcopy(trained.running)
    trained.fit(1, on_step=lambda t: figures.append(t.running))
    assert before == (0, 0)
    assert figures[-1] == (trained.history[0].loss, trained.history[0].accuracy)
