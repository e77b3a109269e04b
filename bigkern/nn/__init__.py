"""Layers with the constructors, parameters and state_dict keys of torch.nn's."""

from bigkern.nn.layer_norm import AddLayerNorm, LayerNorm, RMSNorm

__all__ = ["AddLayerNorm", "LayerNorm", "RMSNorm"]
