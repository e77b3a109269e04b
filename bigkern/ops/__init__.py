"""The public functions: argument checks, backend choice, autograd."""

from bigkern.ops.attention import attention, attention_varlen
from bigkern.ops.attention_decode import attention_decode
from bigkern.ops.conv import conv1d, conv2d
from bigkern.ops.layer_norm import add_layer_norm, layer_norm, rms_norm
from bigkern.ops.rnn import gru, lstm, rnn

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "conv1d",
    "conv2d",
    "gru",
    "layer_norm",
    "lstm",
    "rms_norm",
    "rnn",
]
