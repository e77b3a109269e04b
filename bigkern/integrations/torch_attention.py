"""F.scaled_dot_product_attention on bigkern's kernels, through torch's own registry of flash-attention implementations.

    import bigkern.integrations.torch_attention
    bigkern.integrations.torch_attention.register()
    torch.nn.attention.activate_flash_attention_impl("bigkern")
    ...
    torch.nn.attention.restore_flash_attention_impl()

Then whatever torch would give to flash attention on CUDA (bfloat16 and float16, no mask, head_dim to 256) runs here, in
every model that calls F.scaled_dot_product_attention; masks and float32 stay with torch's other kernels.  Nested
tensors and torch.nn.attention.varlen keep torch's flash attention.  Nothing happens until it is activated.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.library import Library

from bigkern import backend
from bigkern.ops.attention import _cuda, _triton

NAME = "bigkern"

_KERNELS: dict[str, ModuleType] = {"cuda": _cuda, "triton": _triton}


def register() -> None:
    """Make ``"bigkern"`` known to ``torch.nn.attention.activate_flash_attention_impl``.  It activates nothing.

    Raises:
        RuntimeError: this torch has no registry of flash-attention implementations.
    """
    # Not at the top of the file: it imports all of torch._dynamo.
    import torch.nn.attention

    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"bigkern.integrations.torch_attention.register: torch {torch.__version__} has no "
            "torch.nn.attention.register_flash_attention_impl; call bigkern.ops.attention, whose arguments are those "
            "of F.scaled_dot_product_attention"
        )
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=override)


class Handle:
    """What torch keeps while bigkern's kernels are in place of its own."""

    def __init__(self, library: Library):
        self._library: Library | None = library

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None


def override(dispatch_key: str = "CUDA") -> Handle:
    """Put bigkern's kernels in place of torch's flash attention, for tensors of a dispatch key, until ``remove()``."""
    library = Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", forward, dispatch_key)
    library.impl("_scaled_dot_product_flash_attention_backward", backward, dispatch_key)
    return Handle(library)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention``.  ``rng_state`` is bigkern's philox, [seed, offset]."""
    if return_debug_mask:
        raise RuntimeError(
            "bigkern's attention never has the dropout mask as a matrix; return_debug_mask must be False"
        )
    philox = torch.randint(2**63 - 1, (2,), device=query.device) if dropout_p > 0 else None
    options = _options(query, key, is_causal, scale, dropout_p, philox)
    query, key, value = (_unit_rows(tensor) for tensor in (query, key, value))
    kernels = _choose(query, key, value, options)
    output, lse = kernels.forward(query, key, value, *options)
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    state = unused.new_zeros(2) if philox is None else philox.view(torch.uint64)
    debug_mask = query.new_empty(0)
    return _like(output, query), lse, None, None, query.shape[2], key.shape[2], state, unused, debug_mask


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten::_scaled_dot_product_flash_attention_backward``."""
    philox = philox_seed.view(torch.int64) if dropout_p > 0 else None
    options = _options(query, key, is_causal, scale, dropout_p, philox)
    inputs = [_unit_rows(tensor) for tensor in (query, key, value)]
    kernels = _choose(*inputs, options)
    grads = kernels.backward(
        _unit_rows(grad_out),
        None,
        *inputs,
        _unit_rows(out),
        logsumexp,
        *options,
        False,
        False,
        torch.are_deterministic_algorithms_enabled(),
    )
    return tuple(_like(grad, tensor) for grad, tensor in zip(grads, (query, key, value), strict=False))


def _options(
    query: Tensor, key: Tensor, is_causal: bool, scale: float | None, dropout_p: float, philox: Tensor | None
) -> tuple:
    """The raw ops' options from attn_mask on."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    window_right = 0 if is_causal else -1
    return (
        *(None,) * 4,
        query.shape[2],
        key.shape[2],
        -1,
        window_right,
        False,
        0.0,
        scale,
        dropout_p,
        philox,
        False,
    )


def _choose(query: Tensor, key: Tensor, value: Tensor, options: tuple) -> ModuleType:
    """The first kernels that take these; whoever activated them wants them, whatever use_backend says."""
    reasons = {}
    for name, kernels in _KERNELS.items():
        reason = _quarantine(name) or kernels.unsupported(query, key, value, *options)
        if reason is None:
            return kernels
        reasons[name] = reason
    raise RuntimeError(
        "scaled_dot_product_attention was given to bigkern, which cannot serve it: "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        + ". torch.nn.attention.restore_flash_attention_impl() puts torch's kernels back"
    )


def _quarantine(name: str) -> str | None:
    reason = backend.quarantined().get((name, "attention"))
    return None if reason is None else f"quarantined: {reason}"


def _unit_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _like(result: Tensor, like: Tensor) -> Tensor:
    """In the layout that torch's fake kernel promised: the input's."""
    promised = torch.empty_like(like)
    return result if result.stride() == promised.stride() else promised.copy_(result)
