"""Layer norm on Triton: what it supports, how its kernels are launched, and their registration as bigkern_triton's ops.

The kernels are in _triton_kernels.py.  Tile sizes are chosen here, in Python, from the shape: an autotuner would cost
more per call than a small layer norm takes.
"""

from __future__ import annotations

import torch

from bigkern.ops import _triton_support as support
from bigkern.ops.layer_norm import _schema  # noqa: F401  (declares the ops implemented here)

# The widest row that one program holds; twice that spills registers to memory (compiled for sm_80, sm_90 and sm_100;
# tests/triton/test_aot.py watches these).  The backward pass also holds the running sums of two gradients.
MAX_WHOLE_ROW_FORWARD = 16384
MAX_WHOLE_ROW_BACKWARD = 8192

# What one program of a split row holds.
SPLIT_COLS_FORWARD = 8192
SPLIT_COLS_BACKWARD = 1024

_TILE_ELEMENTS_FORWARD = 4096
_TILE_ELEMENTS_BACKWARD = 2048
_MIN_BLOCK = 16

# 16 warps a multiprocessor in the backward pass, whatever the tile: 65,536 registers / 512 threads.
_BACKWARD_WARPS = 16
_BACKWARD_REGISTERS = 128

# Up to this width, and without dropout, the backward pass fetches the next tile while it works on one.  Otherwise the
# registers that takes would spill.
_MAX_PREFETCHED_BLOCK = 4096

_WARP = 32

_loaded_kernels = None


def unsupported(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
) -> str | None:
    """Why these arguments cannot be served, in plain words, or None."""
    reason = support.unsupported_tensors(input=input, residual=residual, weight=weight, bias=bias)
    if reason is not None:
        return reason
    if residual is not None and residual.dtype != input.dtype:
        return f"residual is {residual.dtype} and input {input.dtype}; the Triton kernel adds tensors of one dtype"
    if residual is None and dropout_p > 0:
        return "the Triton kernel applies dropout only before adding a residual"
    return None


def forward(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    rms: bool,
    dropout_p: float,
    philox: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, summed, mean, rstd) of rows x cols tensors; see bigkern/ops/layer_norm/_schema.py."""
    return torch.ops.bigkern_triton.layer_norm_forward.default(
        input, residual, weight, bias, eps, rms, dropout_p, philox
    )


def backward(
    grad_output: torch.Tensor | None,
    grad_summed: torch.Tensor | None,
    summed: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    rms: bool,
    dropout_p: float,
    philox: torch.Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_input, grad_residual, grad_weight, grad_bias); see bigkern/ops/layer_norm/_schema.py."""
    return torch.ops.bigkern_triton.layer_norm_backward.default(
        grad_output, grad_summed, summed, mean, rstd, weight, rms, dropout_p, philox, need_weight, need_bias
    )


def _kernels():
    global _loaded_kernels
    if _loaded_kernels is None:
        from bigkern.ops.layer_norm import _triton_kernels

        _loaded_kernels = _triton_kernels
    return _loaded_kernels


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _tile(rows: int, block: int, elements: int, programs: int) -> tuple[int, int]:
    """(rows a tile, warps): about `elements` a tile, 16 a thread; less when that leaves some `programs` without one."""
    tile_rows = max(1, elements // block)
    while tile_rows > 1 and tile_rows * programs > rows:
        tile_rows //= 2
    return tile_rows, min(32, max(1, tile_rows * block // (16 * _WARP)))


def _forward(input, residual, weight, bias, eps, rms, dropout_p, philox):
    rows, cols = input.shape
    device = input.device
    output = torch.empty((rows, cols), dtype=input.dtype, device=device)
    summed = torch.empty(0 if residual is None else (rows, cols), dtype=input.dtype, device=device)
    mean = torch.empty(0 if rms else rows, dtype=torch.float32, device=device)
    rstd = torch.empty(rows, dtype=torch.float32, device=device)

    input_stride = input.stride(0)
    residual_stride = input_stride if residual is None else residual.stride(0)
    align = support.alignment(cols, input_stride, residual_stride)
    dropout_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    if dropout_p == 0.0:
        philox = None
    kernels = _kernels()
    with support.device_guard(device):
        if cols <= MAX_WHOLE_ROW_FORWARD:
            block = max(_MIN_BLOCK, _power_of_two(cols))
            tile_rows, warps = _tile(rows, block, _TILE_ELEMENTS_FORWARD, support.multiprocessors(device))
            splits = 1
            source, split_mean, split_squares = input, None, None
        else:
            block = SPLIT_COLS_FORWARD
            tile_rows, warps = _tile(rows, block, block, 1)
            splits = support.ceil_div(cols, block)
            split_squares = torch.empty((rows, splits), dtype=torch.float32, device=device)
            split_mean = None if rms else torch.empty_like(split_squares)
            kernels.layer_norm_split_statistics_kernel[(rows, splits)](
                input,
                residual,
                None if residual is None else summed,
                philox,
                split_mean,
                split_squares,
                rows,
                cols // align,
                input_stride // align,
                residual_stride // align,
                dropout_p,
                dropout_scale,
                ALIGN=align,
                BLOCK=block,
                num_warps=warps,
            )
            if residual is not None:
                source, input_stride, residual, philox = summed, cols, None, None
            else:
                source = input
        kernels.layer_norm_forward_kernel[(support.ceil_div(rows, tile_rows), splits)](
            source,
            residual,
            weight,
            bias,
            output,
            None if residual is None else summed,
            None if rms else mean,
            rstd,
            philox,
            split_mean,
            split_squares,
            rows,
            cols // align,
            input_stride // align,
            residual_stride // align,
            eps,
            dropout_p,
            dropout_scale,
            RMS=rms,
            ALIGN=align,
            ROWS=tile_rows,
            BLOCK=block,
            SPLITS=_power_of_two(splits),
            num_warps=warps,
        )
    return output, summed, mean, rstd


def _backward(grad_output, grad_summed, summed, mean, rstd, weight, rms, dropout_p, philox, need_weight, need_bias):
    rows, cols = summed.shape
    device = summed.device
    if dropout_p == 0.0:
        philox = None
    dropout_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    grad_input = torch.empty((rows, cols), dtype=summed.dtype, device=device)
    grad_residual = torch.empty(0 if philox is None else (rows, cols), dtype=summed.dtype, device=device)
    parameter_dtype = summed.dtype if weight is None else weight.dtype
    grad_weight = torch.empty(cols if need_weight else 0, dtype=parameter_dtype, device=device)
    grad_bias = torch.empty(cols if need_bias else 0, dtype=parameter_dtype, device=device)

    grad_output_stride = grad_output.stride(0)
    summed_stride = summed.stride(0)
    grad_summed_stride = summed_stride if grad_summed is None else grad_summed.stride(0)
    align = support.alignment(cols, grad_output_stride, summed_stride, grad_summed_stride)
    if rms:
        mean = None
    kernels = _kernels()
    with support.device_guard(device):
        multiprocessors = support.multiprocessors(device)
        if cols <= MAX_WHOLE_ROW_BACKWARD:
            block = max(_MIN_BLOCK, _power_of_two(cols))
            col_blocks, splits = 1, 1
            split_products = split_gradients = None
        else:
            block = SPLIT_COLS_BACKWARD
            col_blocks, splits = support.ceil_div(cols, block), support.ceil_div(cols, SPLIT_COLS_FORWARD)
            split_products = torch.empty((rows, splits), dtype=torch.float32, device=device)
            split_gradients = None if rms else torch.empty_like(split_products)
            kernels.layer_norm_split_sums_kernel[(rows, splits)](
                grad_output,
                summed,
                mean,
                rstd,
                weight,
                split_products,
                split_gradients,
                rows,
                cols // align,
                grad_output_stride // align,
                summed_stride // align,
                ALIGN=align,
                BLOCK=SPLIT_COLS_FORWARD,
                num_warps=16,
            )
        tile_rows, warps = _tile(rows, block, _TILE_ELEMENTS_BACKWARD, multiprocessors)
        # As many programs as run at once, so that each keeps the parameters' gradients to itself over many rows.
        resident = multiprocessors * max(1, _BACKWARD_WARPS // warps)
        programs = min(support.ceil_div(rows, tile_rows), max(1, resident // col_blocks))
        partial_weight = torch.empty((programs, cols), dtype=torch.float32, device=device) if need_weight else None
        partial_bias = torch.empty((programs, cols), dtype=torch.float32, device=device) if need_bias else None
        kernels.layer_norm_backward_kernel[(programs, col_blocks)](
            grad_output,
            grad_summed,
            summed,
            mean,
            rstd,
            weight,
            philox,
            split_products,
            split_gradients,
            grad_input,
            None if philox is None else grad_residual,
            partial_weight,
            partial_bias,
            rows,
            cols // align,
            splits,
            grad_output_stride // align,
            grad_summed_stride // align,
            summed_stride // align,
            dropout_p,
            dropout_scale,
            ALIGN=align,
            ROWS=tile_rows,
            BLOCK=block,
            SPLITS=_power_of_two(splits),
            STAGES=2 if block <= _MAX_PREFETCHED_BLOCK and philox is None else 1,
            num_warps=warps,
            maxnreg=_BACKWARD_REGISTERS,
        )
        if need_weight or need_bias:
            # At least one cache line of columns, and not many more programs than run at once.
            finish_cols = min(1024, max(32, _power_of_two(support.ceil_div(cols, 4 * multiprocessors))))
            kernels.layer_norm_finish_kernel[(support.ceil_div(cols, finish_cols),)](
                partial_weight,
                partial_bias,
                grad_weight if need_weight else None,
                grad_bias if need_bias else None,
                programs,
                cols // align,
                ALIGN=align,
                ROWS=_TILE_ELEMENTS_BACKWARD // finish_cols,
                BLOCK=finish_cols,
                num_warps=4,
            )
    return grad_input, grad_residual, grad_weight, grad_bias


support.register("layer_norm_forward", _forward)
support.register("layer_norm_backward", _backward)
