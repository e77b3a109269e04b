from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from bigkern.models import GRUModel, LSTMModel
from bigkern.models.rnn import gru_with_state_dropout


def test_gru_with_a_mask_of_ones_is_torchs_gru():
    gru = torch.nn.GRU(5, 7, batch_first=True).double()
    inputs = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    stepped = gru_with_state_dropout(gru, inputs, torch.ones(3, 7, dtype=torch.float64))
    fused, _ = gru(inputs)
    torch.testing.assert_close(stepped, fused)
    parameters = [inputs, *gru.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(stepped.square().sum(), parameters),
        torch.autograd.grad(fused.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_masked_unit_is_not_read_but_keeps_its_state():
    gru = torch.nn.GRU(5, 7, batch_first=True)
    inputs = torch.randn(2, 4, 5)
    mask = torch.ones(2, 7)
    mask[:, 3] = 0
    masked = gru_with_state_dropout(gru, inputs, mask)
    with torch.no_grad():
        gru.weight_hh_l0[:, 3] = 0  # no gate reads unit 3
    torch.testing.assert_close(masked, gru(inputs)[0])


@pytest.mark.parametrize("dropout, recurrent_dropout", [(0.5, 0.0), (0.0, 0.5)])
def test_each_dropout_acts_in_training_only(dropout, recurrent_dropout):
    model = GRUModel(11, 3, dropout=dropout, recurrent_dropout=recurrent_dropout)
    inputs = torch.randint(0, 11, (4, 6))
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_without_dropout_training_equals_evaluation():
    model = GRUModel(11, 3, dropout=0, recurrent_dropout=0)
    inputs = torch.randint(0, 11, (4, 6))
    torch.testing.assert_close(model(inputs), model.eval()(inputs))


@pytest.mark.parametrize("name", ["dropout", "recurrent_dropout"])
@pytest.mark.parametrize("p", [-0.1, 1.0, 2])
def test_dropout_outside_its_range_is_refused(name, p):
    with pytest.raises(ValueError, match=f"^{name}: expected 0 <= p < 1"):
        GRUModel(11, 3, **{name: p})


def test_lstm_takes_one_hot_rows_and_token_numbers():
    model = LSTMModel(11)
    numbers = torch.randint(0, 11, (4, 6))
    assert torch.equal(model(numbers), model(functional.one_hot(numbers, 11).float()))
    assert model.lstm.hidden_size == 128
    assert model.lstm.num_layers == 2
