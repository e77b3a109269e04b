"""Layers with the constructors, parameters and state_dict keys of torch.nn's."""

from bigkern.nn.layer_norm import AddLayerNorm, LayerNorm, RMSNorm
from bigkern.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "AddLayerNorm", "GRUCell", "LSTMCell", "LayerNorm", "RMSNorm", "RNNCell"]
