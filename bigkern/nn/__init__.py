"""Layers with the constructors, parameters and state_dict keys of torch.nn's."""

from bigkern.nn.conv import Conv1d, Conv2d, ConvBlock2d, fold_batch_norm
from bigkern.nn.layer_norm import AddLayerNorm, LayerNorm, RMSNorm

__all__ = ["AddLayerNorm", "Conv1d", "Conv2d", "ConvBlock2d", "LayerNorm", "RMSNorm", "fold_batch_norm"]
