"""Layers with the constructors, parameters and state_dict keys of torch.nn's."""

from bigkern.nn.attention import (
    MultiheadAttention,
    PositionalEncoding,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from bigkern.nn.conv import Conv1d, Conv2d, ConvBlock2d, fold_batch_norm
from bigkern.nn.layer_norm import AddLayerNorm, LayerNorm, RMSNorm
from bigkern.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AddLayerNorm",
    "Conv1d",
    "Conv2d",
    "ConvBlock2d",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "MultiheadAttention",
    "PositionalEncoding",
    "RMSNorm",
    "RNNCell",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "fold_batch_norm",
]
