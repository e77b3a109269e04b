"""NVIDIA's tables of who holds what, restated as data, independently of the formulas in csrc.

PTX ISA: "Matrix Fragments for mma.m16n8k16 with floating point type", "... for mma.m16n8k8"; "Register Fragments",
"Shared Memory Matrix Layout" and "Strides" of wgmma. CUDA programming guide: the swizzle patterns of the TMA unit.
"""

from __future__ import annotations

import numpy as np

LANES = range(32)


def mma_m16n8k16() -> dict[str, np.ndarray]:
    """(row, column) of each element of each lane: a[32, 8], b[32, 4] (k, n), c[32, 4]."""
    a, b, c = np.empty((32, 8, 2), int), np.empty((32, 4, 2), int), np.empty((32, 4, 2), int)
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            a[lane, i] = row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
        for i in range(4):
            b[lane, i] = thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
            c[lane, i] = group if i < 2 else group + 8, thread * 2 + (i & 1)
    return {"a": a, "b": b, "c": c}


def mma_m16n8k8_tf32() -> dict[str, np.ndarray]:
    """(row, column) of each element of each lane: a[32, 4], b[32, 2] (k, n), c[32, 4]."""
    a, b = np.empty((32, 4, 2), int), np.empty((32, 2, 2), int)
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            a[lane, i] = group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4
        for i in range(2):
            b[lane, i] = thread if i == 0 else thread + 4, group
    return {"a": a, "b": b, "c": mma_m16n8k16()["c"]}


def wgmma_a() -> np.ndarray:
    """(row, column) of each of the 8 elements in the A registers of each of 128 threads."""
    of_warp = mma_m16n8k16()["a"]
    return np.concatenate([of_warp + np.array([16 * warp, 0]) for warp in range(4)])


def wgmma_d(n: int) -> np.ndarray:
    """(row, column) of each of the n / 2 accumulators of each of 128 threads."""
    of_warp = mma_m16n8k16()["c"]
    of_group = np.concatenate([of_warp + np.array([16 * warp, 0]) for warp in range(4)])
    return np.concatenate([of_group + np.array([0, 8 * i]) for i in range(n // 8)], axis=1)


def ldmatrix(tiles: int, trans: bool) -> np.ndarray:
    """(tile, row, column) of the two elements of each register of each lane: [tiles, 32, 2, 3]."""
    table = np.empty((tiles, 32, 2, 3), int)
    for tile in range(tiles):
        for lane in LANES:
            for i in range(2):
                row, column = lane // 4, lane % 4 * 2 + i
                table[tile, lane, i] = (tile, column, row) if trans else (tile, row, column)
    return table


# Of the shared-memory layouts wgmma accepts ("canonical layouts"), in units of 16 bytes, which hold 8 elements of 16
# bits: ((size, stride), ...) of the MN dimension and of the K dimension. A None size takes what is left. "l" and "s"
# are the descriptor's leading and stride byte offsets. The swizzle XORs the address afterwards.
CANONICAL = {
    # K-major: rows of MN, K in units of 16 bytes
    ("k", 0): {"mn": ((8, 1), (None, "s")), "k": ((None, "l"),)},
    ("k", 32): {"mn": ((8, 2), (None, "s")), "k": ((None, 1),)},
    ("k", 64): {"mn": ((8, 4), (None, "s")), "k": ((None, 1),)},
    ("k", 128): {"mn": ((8, 8), (None, "s")), "k": ((None, 1),)},
    # MN-major: MN in units of 16 bytes, rows of K
    ("mn", 0): {"mn": ((None, "s"),), "k": ((8, 1), (None, "l"))},
    ("mn", 32): {"mn": ((2, 1), (None, "l")), "k": ((8, 2), (None, "s"))},
    ("mn", 64): {"mn": ((4, 1), (None, "l")), "k": ((8, 4), (None, "s"))},
    ("mn", 128): {"mn": ((8, 1), (None, "l")), "k": ((8, 8), (None, "s"))},
}
SWIZZLE_BITS = {0: 0, 32: 1, 64: 2, 128: 3}  # Swizzle<bits, 4, 3> of CuTe


def canonical_address(major: str, swizzle: int, start: int, lbo: int, sbo: int, mn: int, k: int) -> int:
    """The byte of element (mn, k) under a descriptor with this start and these byte offsets."""
    units = {"mn": mn, "k": k}
    within = units[major] % 8
    units[major] //= 8
    offset = 0
    for dimension, modes in CANONICAL[major, swizzle].items():
        left = units[dimension]
        for size, stride in modes:
            step = {"l": lbo, "s": sbo}.get(stride, 16 * stride if isinstance(stride, int) else None)
            offset += (left if size is None else left % size) * step
            left = 0 if size is None else left // size
    address = start + offset + 2 * within
    mask = ((1 << SWIZZLE_BITS[swizzle]) - 1) << 4
    return address ^ (address >> 3 & mask)


def operand(matrix: np.ndarray, major: str, swizzle: int) -> tuple[np.ndarray, int, int, list[int]]:
    """Lays a (MN, K) matrix of 16-bit words out for wgmma: (bytes, lbo, sbo, start of each 16 elements of K)."""
    rows, depth = matrix.shape
    if swizzle == 0:
        if major == "k":
            lbo, sbo = 128, 128 * (depth // 8)
        else:
            lbo, sbo = 128 * (rows // 8), 128
        starts = [2 * lbo * step for step in range(depth // 16)]
    elif major == "k":  # panels of `swizzle` bytes of K
        lbo, sbo = 16, 8 * swizzle  # swizzled K-major layouts do not use lbo
        per_panel = swizzle // 2
        starts = [k // per_panel * rows * swizzle + k % per_panel * 2 for k in range(0, depth, 16)]
    else:  # panels of `swizzle` bytes of MN
        lbo, sbo = depth * swizzle, 8 * swizzle
        starts = [k * swizzle for k in range(0, depth, 16)]
    image = np.zeros(1 << 17, np.uint8)
    used = np.zeros(1 << 17, bool)
    for step, start in enumerate(starts):
        for mn in range(rows):
            for k in range(16):
                at = canonical_address(major, swizzle, start, lbo, sbo, mn, k)
                assert not used[at], "two elements on one address"
                used[at : at + 2] = True
                image[at : at + 2] = np.frombuffer(matrix[mn, 16 * step + k].tobytes(), np.uint8)
    last = np.flatnonzero(used)[-1] + 1
    return image[: -(-last // 16) * 16], lbo, sbo, starts


def tma_swizzled(row: int, chunk: int, swizzle: int) -> int:
    """Where in a row of `swizzle` bytes the TMA unit puts the 16-byte chunk `chunk`; row 0 starts the pattern."""
    return {128: chunk ^ (row % 8), 64: chunk ^ (row // 2 % 4), 32: chunk ^ (row // 4 % 2)}[swizzle]
