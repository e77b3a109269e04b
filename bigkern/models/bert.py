"""BERT: a Transformer encoder that reads both ways, and the classifier of texts on it.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018
(arXiv:1810.04805).
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from bigkern.models import pretrained
from bigkern.models.layers import BIGKERN, Layers
from bigkern.models.pretrained import Source, layer_sources
from bigkern.models.transformer import PADDING, TransformerBlock, hidden_positions, initial_spread

# What a configuration may say beside its sizes. The first is what it means when it does not say.
_SUPPORTED = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "problem_type": (None, "single_label_classification", "multi_label_classification", "regression"),
}
_OPTIONS = {
    "vocabulary": "vocab_size",
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "blocks": "num_hidden_layers",
    "feed_forward": "intermediate_size",
    "max_length": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "activation": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "eps": "layer_norm_eps",
}


class BERT(nn.Module):
    """The encoder: embeddings of token, position and kind of text, summed and normed, then ``blocks`` post-norm blocks.

    The sizes are BERT-base's. ``padding`` is the token that fills up short texts.

    Raises:
        ValueError: an ``activation`` that has no name here; a text longer than ``max_length``.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 768,
        heads: int = 12,
        blocks: int = 12,
        feed_forward: int = 3072,
        max_length: int = 512,
        token_types: int = 2,
        activation: str = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        eps: float = 1e-12,
        padding: int = PADDING,
        layers: Layers = BIGKERN,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.max_length = max_length
        self.tokens = layers.Embedding(vocabulary, dim)
        self.positions = layers.Embedding(max_length, dim)
        self.token_types = layers.Embedding(token_types, dim)
        self.norm = layers.AddLayerNorm(dim, eps=eps)
        self.dropout = layers.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                heads,
                feed_forward,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation=activation,
                eps=eps,
                layers=layers,
            )
            for _ in range(blocks)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as the paper's code does: normal with spread 0.02 at 768 features, biases 0."""
        spread = initial_spread(self.tokens.embedding_dim)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=spread) if parameter.dim() > 1 else nn.init.zeros_(parameter)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """(N, T) token numbers -> (N, T, dim).

        ``attention_mask`` (N, T) is 0, or False, where there is no word; None: where the token is ``padding``.
        ``token_types`` (N, T) tells the first text of a pair, 0, from the second, 1; None: all are of the first.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"tokens: {length} positions, but max_length is {self.max_length}; cut the text")
        for name, given in (("attention_mask", attention_mask), ("token_types", token_types)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(f"{name}: shape {tuple(given.shape)}; expected the tokens', {tuple(tokens.shape)}")
        padding = hidden_positions(tokens == self.padding if attention_mask is None else attention_mask == 0)
        kinds = self.token_types.weight[0] if token_types is None else self.token_types(token_types)
        # The sum of two of the embeddings goes into the norm's own sum.
        hidden, _ = self.norm(self.tokens(tokens), (self.positions.weight[:length] + kinds).expand(*tokens.shape, -1))
        hidden = self.dropout(hidden)
        for block in self.blocks:
            hidden = block(hidden, padding)
        return hidden


class BERTForSequenceClassification(nn.Module):
    """BERT, and on its first position dense ``dim`` with tanh (the pooler), dropout, dense ``classes``.

    Arguments as :class:`BERT`'s; ``classifier_dropout`` None is ``dropout``.

    >>> model = BERTForSequenceClassification.from_pretrained("bert-base-uncased", classes=2)
    >>> optimizer = bigkern.optim.Adam(model.parameters(), lr=2e-5)
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        *,
        dim: int = 768,
        dropout: float = 0.1,
        classifier_dropout: float | None = None,
        layers: Layers = BIGKERN,
        **encoder: int | float | str,
    ) -> None:
        super().__init__()
        self.bert = BERT(vocabulary, dim=dim, dropout=dropout, layers=layers, **encoder)
        self.pooler = nn.Sequential(layers.Linear(dim, dim), layers.Tanh())
        self.dropout = layers.Dropout(dropout if classifier_dropout is None else classifier_dropout)
        self.classifier = layers.Linear(dim, classes)
        for layer in (self.pooler[0], self.classifier):
            nn.init.normal_(layer.weight, std=initial_spread(dim))
            nn.init.zeros_(layer.bias)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """(N, T) token numbers -> (N, classes) logits; the masks as :meth:`BERT.forward`'s."""
        hidden = self.bert(tokens, attention_mask, token_types)
        return self.classifier(self.dropout(self.pooler(hidden[:, 0])))

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, classes: int | None = None, layers: Layers = BIGKERN
    ) -> BERTForSequenceClassification:
        """The model in a folder that Hugging Face's ``save_pretrained`` wrote, in evaluation mode and float32.

        config.json and model.safetensors (whole or in parts), or pytorch_model.bin, of a BertForSequenceClassification.
        With ``classes`` the head is drawn anew for so many, to be fine-tuned, and the weights may be of any BERT with
        a pooler: heads that the file has are left alone.

        Raises:
            ValueError: another architecture, an option or activation that is not supported, tensors that are missing,
                left over or of another shape, a damaged file.
        """
        config = pretrained.read_config(directory, "bert")
        pretrained.check_options(directory, config, _SUPPORTED)
        arguments = pretrained.options(directory, config, _OPTIONS)
        if arguments["dim"] % arguments["heads"]:
            raise ValueError(f"{directory}: hidden_size {arguments['dim']} is no multiple of its heads")
        weights = {_today(name): tensor for name, tensor in pretrained.read_weights(directory).items()}
        weights.pop("bert.embeddings.position_ids", None)  # the numbers 0, 1, 2, ... that old files hold
        if classes is not None:
            weights = {name: weight for name, weight in weights.items() if name.startswith("bert.")}
        model = cls(
            classes=classes or len(config.get("id2label") or {0: "", 1: ""}),
            classifier_dropout=config.get("classifier_dropout"),
            padding=config.get("pad_token_id") or 0,
            layers=layers,
            **arguments,
        )
        sources = weight_sources(len(model.bert.blocks))
        drawn = ("classifier.weight", "classifier.bias") if classes is not None else ()
        sources = {key: source for key, source in sources.items() if key not in drawn}
        pretrained.load(model, weights, sources, where=directory, drawn=drawn)
        return model.eval()


def weight_sources(blocks: int) -> dict[str, Source]:
    """Where each parameter of a BERTForSequenceClassification of so many blocks comes from."""
    sources = {
        **{
            f"bert.{ours}.weight": Source((f"bert.embeddings.{theirs}_embeddings.weight",))
            for ours, theirs in (("tokens", "word"), ("positions", "position"), ("token_types", "token_type"))
        },
        **layer_sources("bert.norm", "bert.embeddings.LayerNorm"),
        **layer_sources("pooler.0", "bert.pooler.dense"),
        **layer_sources("classifier", "classifier"),
    }
    for number in range(blocks):
        ours, theirs = f"bert.blocks.{number}", f"bert.encoder.layer.{number}"
        for part in ("weight", "bias"):
            sources[f"{ours}.attention.in_proj_{part}"] = Source(
                tuple(f"{theirs}.attention.self.{name}.{part}" for name in ("query", "key", "value"))
            )
        sources |= layer_sources(f"{ours}.attention.out_proj", f"{theirs}.attention.output.dense")
        sources |= layer_sources(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm")
        sources |= layer_sources(f"{ours}.feed_forward.0", f"{theirs}.intermediate.dense")
        sources |= layer_sources(f"{ours}.feed_forward.2", f"{theirs}.output.dense")
        sources |= layer_sources(f"{ours}.feed_forward_norm", f"{theirs}.output.LayerNorm")
    return sources


def _today(name: str) -> str:
    """A tensor's name as today's files have it: the first BERTs call a norm's weight gamma, and bare encoders lack
    the prefix."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name
