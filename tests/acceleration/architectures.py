"""Models as people write them, none with a word of bigkern in it: what ``accelerate`` is held against.

Restated from their papers, small; those of transformers stand in tests/integrations/transformer_models.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class BasicBlock(nn.Module):
    """He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(x.mean((2, 3)))


class MobileNet(nn.Module):
    """Inverted residuals: Sandler et al., 2018 (arXiv:1801.04381), with SiLU as in EfficientNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.expand = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Ronneberger, Fischer, Brox, 2015 (arXiv:1505.04597)."""

    def __init__(self):
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, padding="same"),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            )

        self.down1, self.down2, self.bottom = double(1, 8), double(8, 16), double(16, 32)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join2, self.join1 = double(32, 16), double(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        x = self.bottom(self.pool(b))
        x = self.join2(torch.cat((self.up2(x), b), 1))
        return self.out(self.join1(torch.cat((self.up1(x), a), 1)))


class LayerNorm2d(nn.LayerNorm):
    """A subclass with a forward of its own, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Liu et al., 2022 (arXiv:2201.03545)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), LayerNorm2d(16, eps=1e-6))
        self.blocks = nn.Sequential(ConvNeXtBlock(16), ConvNeXtBlock(16))
        self.norm, self.head = nn.LayerNorm(16, eps=1e-6), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))


class LSTMLanguageModel(nn.Module):
    """Zaremba, Sutskever, Vinyals, 2014 (arXiv:1409.2329), with tied embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.drop = nn.Dropout(0.2)
        self.lstm = nn.LSTM(16, 16, 2, batch_first=True, dropout=0.2)
        self.decoder = nn.Linear(16, 50)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.drop(self.lstm(self.drop(self.embedding(tokens)))[0]))


class GRUTagger(nn.Module):
    """Packed batches, both directions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 12, padding_idx=0)
        self.gru = nn.GRU(12, 16, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.out = nn.Linear(32, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1).cpu()
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.out(self.norm(states))


class Cells(nn.Module):
    """A loop of one's own over cells."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.LSTMCell(8, 12), nn.GRUCell(12, 12), nn.RNNCell(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        lstm = gru = rnn = None
        for step in x:
            lstm = self.first(step, lstm)
            gru = self.second(lstm[0], gru)
            rnn = self.third(gru, rnn)
        return rnn


class Translator(nn.Module):
    """torch.nn.Transformer with its masks; Vaswani et al., 2017 (arXiv:1706.03762)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 32, padding_idx=0)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True, norm_first=True)
        self.out = nn.Linear(32, 50)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], target.device, torch.bool)
        hidden = self.transformer(
            self.embedding(source),
            self.embedding(target),
            tgt_mask=causal,
            src_key_padding_mask=source == 0,
            memory_key_padding_mask=source == 0,
        )
        return self.out(hidden)


class SpeechEncoder(nn.Module):
    """Conv1d in front, attention and RMSNorm behind; wav2vec's shape."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, 16, 10, 5), nn.GELU(), nn.Conv1d(16, 16, 3, 2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2)
        )
        self.norm = nn.RMSNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.features(x).transpose(1, 2))
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


class VGG(nn.Sequential):
    """A Sequential of Sequentials, as torchvision's; Simonyan, Zisserman, 2014 (arXiv:1409.1556)."""

    def __init__(self):
        super().__init__(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2, 2),
                nn.Conv2d(8, 16, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2, 2),
            ),
            nn.Flatten(),
            nn.Sequential(nn.Linear(16 * 4 * 4, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, 10)),
        )


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _tokens(rows: int, length: int, padding: bool = False) -> Tensor:
    tokens = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(2))
    if padding:
        tokens[1, length // 2 :] = 0
    return tokens


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "ResNet": (ResNet, lambda: (_draw(2, 3, 32, 32).requires_grad_(),)),
    "MobileNet": (MobileNet, lambda: (_draw(2, 3, 16, 16),)),
    "UNet": (UNet, lambda: (_draw(2, 1, 16, 16),)),
    "ConvNeXt": (ConvNeXt, lambda: (_draw(2, 3, 16, 16),)),
    "VGG": (VGG, lambda: (_draw(2, 3, 16, 16),)),
    "LSTM language model": (LSTMLanguageModel, lambda: (_tokens(3, 9),)),
    "GRU tagger": (GRUTagger, lambda: (_tokens(3, 8, padding=True),)),
    "cells": (Cells, lambda: (_draw(5, 3, 8),)),
    "Transformer": (Translator, lambda: (_tokens(3, 8, padding=True), _tokens(3, 6))),
    "speech encoder": (SpeechEncoder, lambda: (_draw(2, 1, 200),)),
}


def make(name: str) -> nn.Module:
    """The model with random weights and, in its batch norms, statistics that say something."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name][0]()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


def inputs(name: str) -> tuple[Tensor, ...]:
    return ARCHITECTURES[name][1]()
