"""The documents' recurrent models: the plain RNN, a GRU that answers at each step, a stacked LSTM that answers last."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import bigkern.nn
from bigkern.models.layers import BIGKERN, Layers


def gru_with_state_dropout(gru: nn.GRU, inputs: Tensor, mask: Tensor) -> Tensor:
    """A one-layer, batch-first GRU whose gates read the previous state through ``mask`` (recurrent dropout).

    inputs (N, T, input_size), mask (N, hidden_size) -> (N, T, hidden_size). The mask is the same at each step and the
    state that is carried on is not masked (Gal and Ghahramani, 2016: https://arxiv.org/abs/1512.05287): masking that
    too would scale a state which the update gate keeps by 1 / (1 - p) at every step. With a mask of ones this is
    ``gru(inputs)[0]``. torch's fused GRU has no place for a mask, hence the steps in Python; bigkern.nn.GRU has.
    """
    from_input = functional.linear(inputs, gru.weight_ih_l0, gru.bias_ih_l0)
    state = inputs.new_zeros(inputs.shape[0], gru.hidden_size)
    states = []
    for step in from_input.unbind(1):
        from_state = functional.linear(state * mask, gru.weight_hh_l0, gru.bias_hh_l0)
        gates_input, new_input = step.split([2 * gru.hidden_size, gru.hidden_size], dim=1)
        gates_state, new_state = from_state.split([2 * gru.hidden_size, gru.hidden_size], dim=1)
        reset, update = torch.sigmoid(gates_input + gates_state).chunk(2, dim=1)
        proposal = torch.tanh(new_input + reset * new_state)
        state = torch.lerp(proposal, state, update)
        states.append(state)
    return torch.stack(states, dim=1) if states else inputs.new_zeros(*inputs.shape[:2], gru.hidden_size)


class GRUModel(nn.Module):
    """The documents' GRU model: embedding (vocabulary, dim), GRU (units), dense ``classes`` at each step.

    In training, ``dropout`` falls on what the GRU reads and ``recurrent_dropout`` on the state its gates read; each
    mask is drawn once per sequence and kept for all of its steps, as Keras does.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        dim: int = 64,
        units: int = 128,
        dropout: float = 0.1,
        recurrent_dropout: float = 0.1,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__()
        for name, p in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
            if not 0 <= p < 1:
                raise ValueError(f"{name}: expected 0 <= p < 1, got {p}")
        self.dropout = dropout
        self.recurrent_dropout = recurrent_dropout
        self.embedding = layers.Embedding(vocabulary, dim)
        self.gru = layers.GRU(dim, units, batch_first=True)
        if isinstance(self.gru, bigkern.nn.GRU):
            self.gru.recurrent_dropout = recurrent_dropout
        self.output = layers.Linear(units, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) token numbers -> (N, T, classes) logits."""
        inputs = self.embedding(tokens)
        if self.training and self.dropout > 0:
            inputs = inputs * _mask(inputs, inputs.shape[2], self.dropout).unsqueeze(1)
        if self.training and self.recurrent_dropout > 0 and not isinstance(self.gru, bigkern.nn.GRU):
            states = gru_with_state_dropout(
                self.gru, inputs, _mask(inputs, self.gru.hidden_size, self.recurrent_dropout)
            )
        else:
            states, _ = self.gru(inputs)
        return self.output(states)


def _mask(like: Tensor, width: int, p: float) -> Tensor:
    return functional.dropout(like.new_ones(like.shape[0], width), p)


class RNNModel(nn.Module):
    """The documents' plain RNN: ``h' = tanh(W_x x + b + W_h h + b')``, a dense layer of ``classes`` on every state.

    It reads (T, features), or an image (channels, height, width) row by row, from the top.
    """

    def __init__(
        self, features: int, classes: int, *, units: int = 128, every_step: bool = False, layers: Layers = BIGKERN
    ) -> None:
        super().__init__()
        self.every_step = every_step
        self.rnn = layers.RNN(features, units, batch_first=True)
        self.output = layers.Linear(units, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, T, features), or images (N, channels, T, width) of channels * width features a row -> (N, classes) logits
        of the last step; (N, T, classes) of all with ``every_step``.
        """
        if inputs.dim() == 4:
            inputs = inputs.transpose(1, 2).flatten(2)
        states, _ = self.rnn(inputs)
        return self.output(states if self.every_step else states[:, -1])


class LSTMModel(nn.Module):
    """The documents' stacked LSTM: LSTM 128 at each step, LSTM 128 at the last, dense ``vocabulary``.

    It reads (T, vocabulary): each step a one-hot row. Token numbers are taken too and made one-hot here, so that a
    data set need not hold mostly zeros.
    """

    def __init__(self, vocabulary: int, *, units: int = 128, layers: Layers = BIGKERN) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.lstm = layers.LSTM(vocabulary, units, num_layers=2, batch_first=True)
        self.output = layers.Linear(units, vocabulary)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as Keras, the document's framework, does: Glorot, orthogonal states, open forget gates.

        With torch's own, smaller weights a one-hot row hardly reaches the second layer, and the first hundreds of steps
        learn no more than how frequent each token is.
        """
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("weight_ih"):
                nn.init.xavier_uniform_(parameter)
            elif name.startswith("weight_hh"):
                for gate in parameter.data.chunk(4):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):
                    # the gates' order is input, forget, cell, output
                    nn.init.ones_(parameter.data.chunk(4)[1])
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, vocabulary) one-hot, or (N, T) token numbers -> (N, vocabulary) logits of the token that follows."""
        if not tokens.is_floating_point():
            tokens = functional.one_hot(tokens, self.vocabulary).to(self.output.weight.dtype)
        states, _ = self.lstm(tokens)
        return self.output(states[:, -1])
