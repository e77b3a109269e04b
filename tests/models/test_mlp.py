from __future__ import annotations

import torch
from torch import nn

from bigkern.models import MLPNet


def test_the_documents_sizes():
    model = MLPNet()
    assert [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)] == [(10, 5), (5, 1)]


def test_the_documents_training():
    """100 epochs of Adam, lr 0.001, mean squared error on 100 random samples; then inference and the test loss."""
    inputs, targets = torch.randn(100, 10), torch.randn(100, 1)
    model = MLPNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for epoch in range(100):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 10 == 9:
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    with torch.no_grad():
        assert nn.functional.mse_loss(model(torch.randn(20, 10)), torch.randn(20, 1)).isfinite()
