"""The public functions: argument checks, backend choice, autograd."""

from bigkern.ops.layer_norm import add_layer_norm, layer_norm, rms_norm
from bigkern.ops.rnn import gru, lstm, rnn

__all__ = ["add_layer_norm", "gru", "layer_norm", "lstm", "rms_norm", "rnn"]
