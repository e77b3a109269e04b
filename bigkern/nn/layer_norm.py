"""Layer norm, RMS norm, and layer norm fused with the residual sum before it, as modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bigkern.ops import add_layer_norm, layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on bigkern's kernels: same constructor, parameters, initial values, keys and repr.

    See :func:`bigkern.ops.layer_norm` for dtypes and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on bigkern's kernels: same constructor, parameters, initial values, keys and repr.

    See :func:`bigkern.ops.rms_norm` for dtypes and errors.
    """

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AddLayerNorm(torch.nn.LayerNorm):
    """Residual sum, dropout and layer norm in one pass: ``norm(residual + dropout(input))``.

    It stands for ``torch.nn.Dropout`` and ``torch.nn.LayerNorm`` in a Transformer block.  Parameters and keys are
    those of torch.nn.LayerNorm, so a state_dict goes both ways.

    Args:
        normalized_shape, eps, elementwise_affine, bias: as torch.nn.LayerNorm.
        dropout_p: probability of an element of ``input`` to be dropped while training, in [0, 1].
        device, dtype: of the parameters.

    Call with ``(input, residual)``, tensors of one shape that ends in ``normalized_shape``: the sublayer's result
    first, then the residual stream.  Returns ``(output, summed)``: the next sublayer's input, and the next residual.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1]; see :func:`bigkern.ops.add_layer_norm` for those of a call.

    Example::

        norm = bigkern.nn.AddLayerNorm(768, dropout_p=0.1)
        hidden, stream = norm(attention(hidden), stream)
    """

    __constants__ = [*torch.nn.LayerNorm.__constants__, "dropout_p"]  # noqa: RUF012  (torch's convention)
    dropout_p: float

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"AddLayerNorm: dropout_p is {dropout_p}; it is a probability and must be in [0, 1]")
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout_p = dropout_p

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(
            input, residual, self.normalized_shape, self.weight, self.bias, self.eps, self.dropout_p, self.training
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}"
