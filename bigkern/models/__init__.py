"""Models of the documents, built from bigkern's layers; any of them can be built of torch.nn's alone as well.

>>> model = CNN((1, 28, 28), classes=10)
>>> twin = CNN((1, 28, 28), classes=10, layers=TORCH)
>>> twin.load_state_dict(model.state_dict())
"""

from bigkern.models.cnn import CNN, SmallCNN
from bigkern.models.layers import BIGKERN, TORCH, LayerRun, Layers, layer_kinds, layer_runs
from bigkern.models.rnn import GRUModel, LSTMModel
from bigkern.models.transformer import PositionalEncoding, TransformerBlock, TransformerClassifier

# The name of each model on the command line and in checkpoints.
MODELS = {
    "cnn": CNN,
    "cnn-small": SmallCNN,
    "gru": GRUModel,
    "lstm": LSTMModel,
    "transformer": TransformerClassifier,
}

__all__ = [
    "BIGKERN",
    "CNN",
    "MODELS",
    "TORCH",
    "GRUModel",
    "LSTMModel",
    "LayerRun",
    "Layers",
    "PositionalEncoding",
    "SmallCNN",
    "TransformerBlock",
    "TransformerClassifier",
    "layer_kinds",
    "layer_runs",
]
