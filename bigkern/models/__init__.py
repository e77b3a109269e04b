"""Models of the documents, built from bigkern's layers; any of them can be built of torch.nn's alone as well.

>>> model = CNN((1, 28, 28), classes=10)
>>> twin = CNN((1, 28, 28), classes=10, layers=TORCH)
>>> twin.load_state_dict(model.state_dict())
"""

from bigkern.models.attention_classifier import AttentionClassifier, SelfAttentionClassifier
from bigkern.models.autoencoder import Autoencoder, ConvAutoencoder
from bigkern.models.bert import BERT, BERTForSequenceClassification
from bigkern.models.cnn import CNN, LogSoftmaxCNN, SmallCNN
from bigkern.models.gpt import GPT
from bigkern.models.layers import BIGKERN, TORCH, LayerRun, Layers, layer_kinds, layer_runs
from bigkern.models.mlp import MLPNet
from bigkern.models.rnn import GRUModel, LSTMModel, RNNModel
from bigkern.models.seq2seq import Seq2SeqTransformer
from bigkern.models.transformer import FeatureTransformer, TransformerBlock, TransformerClassifier

# The name of each model on the command line and in checkpoints.
MODELS = {
    "cnn": CNN,
    "cnn-small": SmallCNN,
    "cnn-log-softmax": LogSoftmaxCNN,
    "gru": GRUModel,
    "gru-tagger": GRUModel,
    "rnn": RNNModel,
    "lstm": LSTMModel,
    "transformer": TransformerClassifier,
    "attention-classifier": AttentionClassifier,
    "self-attention-classifier": SelfAttentionClassifier,
    "autoencoder": Autoencoder,
    "autoencoder-conv": ConvAutoencoder,
    "mlp": MLPNet,
    "feature-transformer": FeatureTransformer,
    "seq2seq": Seq2SeqTransformer,
    "bert": BERTForSequenceClassification,
    "gpt": GPT,
}

__all__ = [
    "BERT",
    "BIGKERN",
    "CNN",
    "GPT",
    "MODELS",
    "TORCH",
    "AttentionClassifier",
    "Autoencoder",
    "BERTForSequenceClassification",
    "ConvAutoencoder",
    "FeatureTransformer",
    "GRUModel",
    "LSTMModel",
    "LayerRun",
    "Layers",
    "LogSoftmaxCNN",
    "MLPNet",
    "RNNModel",
    "SelfAttentionClassifier",
    "Seq2SeqTransformer",
    "SmallCNN",
    "TransformerBlock",
    "TransformerClassifier",
    "layer_kinds",
    "layer_runs",
]
