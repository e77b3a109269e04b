"""The tables that describe a list of tensors to the kernels; csrc/kernels/multi_tensor.h reads them.

``tensors`` (n x len(Column), int64) holds addresses, 0 for what is absent; ``chunk_ends`` (n, int64) the running count
of chunks, by which blocks find their share; ``grads`` (n, int64) the gradients' addresses, apart because they alone
change from step to step; ``hyper`` (groups x len(Hyper), float64) the options of the parameter groups.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import torch

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
