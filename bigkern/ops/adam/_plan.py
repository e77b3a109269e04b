"""The tables that describe a list of tensors to the kernels; csrc/kernels/multi_tensor.h reads them.

``tensors`` (n x len(Column), int64) holds addresses, 0 for what is absent; ``chunk_ends`` (n, int64) the running count
of chunks, by which blocks find their share; ``grads`` (n, int64) the gradients' addresses, apart because they alone
change from step to step; ``hyper`` (groups x len(Hyper), float64) the options of the parameter groups.
"""

from __future__ import annotations

import contextlib
import struct
from array import array
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from operator import attrgetter

import torch
from torch import Tensor

try:  # One call that compares types, dtypes, devices, sizes and strides of a thousand tensors in 80 us.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

# The unit in which work is dealt to blocks: elements of one tensor.
CHUNK = 2048

# Of int64: counters of finished blocks, zero between launches, and a double for each block.
SCRATCH_WORDS = 2 + 2048


class Column(IntEnum):
    """Columns of ``tensors``."""

    PARAM = 0
    EXP_AVG = 1  # SGD: the momentum buffer
    EXP_AVG_SQ = 2
    MAX_EXP_AVG_SQ = 3
    MASTER = 4  # fp32 copy of the parameter
    EMA = 5  # fp32 moving average of the parameter
    STEP = 6  # fp32 count of the steps taken
    NUMEL = 7
    DTYPES = 8  # codes of parameter (and gradient) and, in the next byte, of the states
    GROUP = 9  # row of ``hyper``


class Hyper(IntEnum):
    """Columns of ``hyper``."""

    LR = 0
    LR_POINTER = 1  # bits of the address of an fp32 learning rate on the device, or 0
    BETA1 = 2
    BETA2 = 3
    EPS = 4
    WEIGHT_DECAY = 5
    L1 = 6
    EMA_DECAY = 7
    MOMENTUM = 8
    DAMPENING = 9
    FLAGS = 10


class Flag(IntFlag):
    """Of ``Hyper.FLAGS``."""

    MAXIMIZE = 1
    DECOUPLED = 2
    NESTEROV = 4
    STOCHASTIC_ROUNDING = 8


DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_data_ptr = Tensor.data_ptr


class Layouts:
    """Whether tensors have the dtypes, devices, shapes and strides that others had, at little cost."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._expected = [_layout(tensor) for tensor in tensors]
        self._guards = None
        if TensorGuards is not None and tensors:
            sizes = [list(tensor.shape) for tensor in tensors]
            strides = [list(tensor.stride()) for tensor in tensors]
            with contextlib.suppress(TypeError):  # another torch's signature
                self._guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def match(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` are laid out as those that the object was made from, one by one."""
        # The guards look at more than the layout, so only their consent counts.
        if self._guards is not None and self._guards.check(*tensors):
            return True
        return len(tensors) == len(self._expected) and all(map(_has_layout, tensors, self._expected))


def _layout(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _has_layout(tensor: Tensor, layout: tuple) -> bool:
    return not tensor.is_sparse and _layout(tensor) == layout


def pointers(tensors: Sequence[Tensor]) -> list[int]:
    """The addresses of the tensors' first elements."""
    return list(map(_data_ptr, tensors))


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each in a place of its own, in any order of dimensions."""
    if tensor.layout != torch.strided:
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


class Tables:
    """The device tables of a list of tensors on one device, and where the gradients and options are put for a launch.

    Args:
        like: the parameters, or the gradients of an op without states: they give device, sizes and dtypes.
        columns: for each column of addresses, a tensor or None for each entry of ``like``.
        moment_dtypes: of the states, for each entry.
        groups: the row of ``hyper``, for each entry.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        columns: dict[Column, Sequence[Tensor | None]],
        moment_dtypes: Sequence[torch.dtype],
        groups: Sequence[int],
    ):
        self.device = like[0].device
        sizes = list(map(Tensor.numel, like))
        dtypes = [
            DTYPE_CODES[tensor.dtype] | DTYPE_CODES[moment] << 8
            for tensor, moment in zip(like, moment_dtypes, strict=True)
        ]
        entries = [[0] * len(like)] * len(Column)
        for column, tensors in columns.items():
            entries[column] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        entries[Column.NUMEL], entries[Column.DTYPES], entries[Column.GROUP] = sizes, dtypes, list(groups)
        chunk_ends, end = [], 0
        for size in sizes:
            end += -(-size // CHUNK)
            chunk_ends.append(end)
        count = len(like)
        rows = array("q", (value for row in zip(*entries, strict=True) for value in row))
        rows.extend(chunk_ends)
        uploaded, self._host = _upload(rows, self.device)
        self.chunks = end
        self.tensors = uploaded[: count * len(Column)].view(count, len(Column))
        self.chunk_ends = uploaded[count * len(Column) :]
        self.scratch = torch.zeros(SCRATCH_WORDS, dtype=torch.int64, device=self.device)
        self.grads: Tensor = self.chunk_ends
        self.hyper: Tensor = self.chunk_ends
        self._pointed: tuple[list[int], list[float]] | None = None
        self._captured: list = []

    def point_at(self, grads: list[int], hyper: list[float]) -> None:
        """Take these addresses of gradients, and these rows of options one after the other, for the next launch.

        They travel in one copy, which does not wait for the device, and only when something changed.  Memory that a
        CUDA graph was captured with is kept, because each replay reads it.
        """
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or self._pointed is None or self._pointed[0] != grads or self._pointed[1] != hyper:
            packed = array("q", grads)
            packed.frombytes(array("d", hyper).tobytes())
            uploaded, host = _upload(packed, self.device)
            self.grads = uploaded[: len(grads)]
            self.hyper = uploaded[len(grads) :].view(torch.float64).view(-1, len(Hyper))
            self._pointed = grads, hyper
            # The allocator of pinned memory keeps a block until it has been copied, but not for a graph's replays.
            if capturing:
                self._captured.append((uploaded, host))

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has been captured that reads these tables."""
        return bool(self._captured)


def pointer_bits(address: int) -> float:
    """The float64 with the bits of an address, as ``Hyper.LR_POINTER`` holds it."""
    return struct.unpack("d", struct.pack("q", address))[0]


def _upload(values: array, device: torch.device) -> tuple[Tensor, Tensor]:
    """The int64 values on the device, and the memory on the host that they are copied from."""
    host = torch.frombuffer(values, dtype=torch.int64) if len(values) else torch.empty(0, dtype=torch.int64)
    if device.type == "cpu":
        return host, host
    host = torch.empty(len(values), dtype=torch.int64, pin_memory=True).copy_(host)
    return host.to(device, non_blocking=True), host


gradient = attrgetter("grad")
