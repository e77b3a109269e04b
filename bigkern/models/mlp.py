"""The documents' smallest network: two dense layers that predict a number."""

from __future__ import annotations

from torch import Tensor, nn

from bigkern.models.layers import BIGKERN, Layers


class MLPNet(nn.Module):
    """The documents' MLP Net: dense 10 -> 5, ReLU, dense 5 -> 1, trained by mean squared error."""

    def __init__(self, features: int = 10, hidden: int = 5, outputs: int = 1, *, layers: Layers = BIGKERN) -> None:
        super().__init__()
        self.layers = nn.Sequential(layers.Linear(features, hidden), layers.ReLU(), layers.Linear(hidden, outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, features) -> (N, outputs)."""
        return self.layers(inputs)
