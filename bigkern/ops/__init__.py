"""The public functions: argument checks, backend choice, autograd."""

from bigkern.ops.attention import attention, attention_varlen
from bigkern.ops.layer_norm import add_layer_norm, layer_norm, rms_norm

__all__ = ["add_layer_norm", "attention", "attention_varlen", "layer_norm", "rms_norm"]
