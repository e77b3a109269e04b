"""Every wrapper of the device layer, one small kernel each, against index formulas in numpy.

The same kernels run on the emulator always and, under ``--device cuda``, on the GPU: they are what ties the emulator to
the hardware. Moves are compared bit for bit; products to 1e-5, because the tensor cores add in an order of their own.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.device import layouts
from tests.device.libraries import KernelError, Kernels, emulated_kernels, gpu_kernels

ROOT = Path(__file__).resolve().parent.parent.parent
SM80, HOPPER = "conformance.cu", "conformance_hopper.cu"

# Schedules under which the emulator runs each case.
SCHEDULES = [
    dict(order="forward", async_mode="wait"),
    dict(order="reverse", async_mode="issue"),
    *(dict(order=order, async_mode="drawn", seed=seed) for order in ("random", "priority") for seed in (1, 2)),
]


@dataclass
class Case:
    """A kernel, its input, and what it must make of `out`."""

    kernel: str
    given: np.ndarray
    expected: np.ndarray
    out: np.ndarray | None = None  # before the kernel; default 0xff bytes
    rtol: float = 0.0  # 0: bit for bit
    of_largest: bool = True  # rtol is of the largest value, as for sums of products, not of each
    note: str = ""
    schedules: list[dict] = field(default_factory=lambda: SCHEDULES)

    def __str__(self) -> str:
        return f"{self.kernel}-{self.note}" if self.note else self.kernel

    def check(self, kernels: Kernels) -> None:
        out = (
            self.out
            if self.out is not None
            else np.full(self.expected.nbytes, 0xFF, np.uint8).view(self.expected.dtype)
        )
        result = kernels.run(self.kernel, self.given, out.reshape(self.expected.shape))
        if self.rtol == 0:
            same = result.view(np.uint8) == self.expected.view(np.uint8)
            assert same.all(), f"{(~same).sum()} bytes differ, the first at {np.flatnonzero(~same.ravel())[0]}"
        else:
            atol = self.rtol * np.abs(self.expected).max() if self.of_largest else 0
            np.testing.assert_allclose(result, self.expected, rtol=self.rtol, atol=atol)


@pytest.fixture
def target(request, pytestconfig) -> Callable[[str], Kernels]:
    """Opens a source's kernels on the emulator or on the GPU."""
    if request.param == "emulated":
        build = pytestconfig.getoption("--emulated-build")
        return lambda source: emulated_kernels(source, build)
    import torch

    major, minor = torch.cuda.get_device_capability()

    def on_gpu(source: str) -> Kernels:
        if source == HOPPER and (major, minor) != (9, 0):
            pytest.skip(f"needs compute capability 9.0; this is {major}.{minor}")
        return gpu_kernels(source, "90a" if (major, minor) == (9, 0) else f"{major}{minor}")

    return on_gpu


on_every_target = pytest.mark.parametrize(
    "target",
    [pytest.param("emulated", marks=pytest.mark.sanitized), pytest.param("gpu", marks=pytest.mark.cuda)],
    indirect=True,
)


def check(case: Case, kernels: Kernels) -> None:
    if kernels.control is None:
        case.check(kernels)
        return
    before = kernels.control.options()
    kernels.control.set_options(compute_capability=90)
    for schedule in case.schedules:
        kernels.control.set_options(**schedule)
        case.check(kernels)
    kernels.control.set_options(**before)


# ---- inputs and conversions

rng = np.random.default_rng(20240607)


def words(count: int, dtype=np.uint32) -> np.ndarray:
    return rng.integers(0, np.iinfo(dtype).max, count, dtype=dtype, endpoint=True)


def floats(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits of float32 rounded to bfloat16, nearest even; no NaN."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(x: np.ndarray, kind: str) -> np.ndarray:
    return to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def from_bits(bits: np.ndarray, kind: str) -> np.ndarray:
    return from_bf16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


# ---- sm_80


def vector_cases():
    for bytes_ in (1, 2, 4, 8, 16):
        data = words(32 * bytes_, np.uint8)
        yield Case(f"copy_vec_{bytes_}", data, data)
        if bytes_ > 1:
            yield Case(f"copy_vec_streaming_{bytes_}", data, data)
    # Halfway values, both ways of the tie; overflow; subnormals; infinity.
    special = [0.0, -0.0, 1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65504.0, 65519.9, 65520.0]
    special += [1e30, 3.4e38, -3.4e38, np.inf, -np.inf, 2.0**-24, 2.0**-25, 3 * 2.0**-26, 1e-40]
    values = np.concatenate([np.array(special, np.float32), floats(256 - len(special)) * 10])
    yield Case("round_trip_float", values, values)
    yield Case("round_trip_bf16", values, from_bf16(to_bf16(values)))
    with np.errstate(over="ignore"):
        yield Case("round_trip_f16", values, values.astype(np.float16).astype(np.float32))


def tree_sum(x: np.ndarray, lanes: int) -> np.ndarray:
    """The sum over aligned groups of lanes in the butterfly's order: partners 1/2, 1/4, ... of the group apart."""
    x = x.astype(np.float32).copy()
    index = np.arange(len(x))
    offset = lanes // 2
    while offset:
        x = x + x[index ^ offset]
        offset //= 2
    return x


def block_tree_sum(x: np.ndarray) -> np.float32:
    partial = tree_sum(x, 32)[::32]
    group = 1 << (len(partial) - 1).bit_length()
    return tree_sum(np.concatenate([partial, np.zeros(group - len(partial), np.float32)]), group)[0]


def reduction_cases():
    x = floats(64)
    for lanes in (1, 4):
        yield Case(f"group_sum_{lanes}", x, tree_sum(x, lanes))
    yield Case("group_max_8", x, np.repeat(x.reshape(8, 8).max(1), 8))
    yield Case("warp_sum", x, tree_sum(x, 32))
    yield Case("warp_max", x, np.repeat(x.reshape(2, 32).max(1), 32))
    with_nan = x.copy()
    with_nan[5] = np.nan
    yield Case("warp_max", with_nan, np.repeat([np.nan, x[32:].max()], 32).astype(np.float32), note="nan")
    for threads in (32, 96, 1024):
        x = floats(threads)
        first = block_tree_sum(x)
        second = block_tree_sum(x - first)
        yield Case(f"block_sum_{threads}", x, np.repeat([first, second], threads).astype(np.float32))
    x = floats(256)
    yield Case("block_max_256", x, np.repeat([x.max(), (x - x.max()).max()], 256).astype(np.float32))
    pairs = floats(160, 2)
    expected = np.array([block_tree_sum(pairs[:, 0]), block_tree_sum(pairs[:, 1])], np.float32)
    yield Case("block_sum_pair_160", pairs, np.tile(expected, (160, 1)))


def philox(seed: int, subsequence: int, offset: int) -> list[int]:
    """Philox4x32-10 as the paper writes it: two products of 64 bits a round, keys bumped by the Weyl constants."""
    mask = 0xFFFFFFFF
    c = [offset & mask, offset >> 32, subsequence & mask, subsequence >> 32]
    key = [seed & mask, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [high >> 32 ^ c[1] ^ key[0], high & mask, low >> 32 ^ c[3] ^ key[1], low & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c


# Random123's kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_cases():
    arguments = [(k[0] | k[1] << 32, c[2] | c[3] << 32, c[0] | c[1] << 32) for c, k, _ in KNOWN]
    results = [result for _, _, result in KNOWN]
    for given, result in zip(arguments, results, strict=True):
        assert philox(*given) == result
    while len(arguments) < 32:
        arguments.append(tuple(int(x) for x in words(3, np.uint64)))
        results.append(philox(*arguments[-1]))
    expected = np.empty((32, 2, 4), np.uint32)
    expected[:, 0] = results
    uniform = (np.array(results, np.uint32).astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(
        np.float32
    )
    expected[:, 1] = uniform.view(np.uint32)
    assert uniform.min() > 0 and uniform.max() <= 1
    yield Case("philox", np.array(arguments, np.uint64), expected)


def memory_cases():
    x = floats(128)
    expected = np.concatenate(
        [x[::-1].view(np.uint32), x[::-1].view(np.uint32), np.array([0, 0, 400, 1, 3], np.uint32)]
    )
    yield Case("shared_memory", x, expected)

    data = words(64 * 4).reshape(64, 4)
    expected = data.copy()
    expected[:32][np.arange(32) % 3 == 0] = 0
    expected[32:] = np.roll(data[32:][::-1], -1, axis=0)
    yield Case("cp_async", data, expected)

    data = words(64)
    before = np.zeros(16 + 128, np.uint32)
    expected = np.concatenate([[1], np.zeros(15), data, data[::-1]]).astype(np.uint32)
    yield Case("acquire_release", data, expected, out=before)
    yield Case("relaxed_and_fence", data, expected, out=before)

    for bytes_, dtype in ((2, np.uint16), (4, np.uint32), (8, np.uint64)):
        data = words(32, dtype)
        yield Case(f"relaxed_{bytes_}", data, data[::-1].copy())
    data = words(32 * 4).reshape(32, 4)
    yield Case("relaxed_16", data, data[::-1].copy())

    data = words(96)
    yield Case("named_barrier", data, data[::-1].copy())


def matrix_cases():
    for tiles, trans in itertools.product((1, 2, 4), (False, True)):
        rows = words(32 * 8, np.uint16).reshape(32, 8)
        table = layouts.ldmatrix(tiles, trans)
        elements = rows[31 - (8 * table[..., 0] + table[..., 1]), table[..., 2]]  # lane l names row 31 - l
        yield Case(f"ldmatrix_x{tiles}{'_trans' if trans else ''}", rows, elements.astype(np.uint16).reshape(tiles, 64))

    for kind in ("bf16", "f16"):
        table = layouts.mma_m16n8k16()
        a, b, c = to_bits(floats(16, 16), kind), to_bits(floats(16, 8), kind), floats(16, 8)
        given = np.concatenate([gather(a, table["a"]), gather(b, table["b"]), gather(c, table["c"])], axis=1)
        product = c + from_bits(a, kind).astype(np.float64) @ from_bits(b, kind)
        yield Case(f"mma_m16n8k16_{kind}", given, take(product.astype(np.float32), table["c"]), rtol=1e-5)

    table = layouts.mma_m16n8k8_tf32()
    a, b, c = tf32(floats(16, 8)), tf32(floats(8, 8)), floats(16, 8)
    given = np.concatenate([gather(a, table["a"]), gather(b, table["b"]), gather(c, table["c"])], axis=1)
    product = c + a.astype(np.float64) @ b
    yield Case("mma_m16n8k8_tf32", given, take(product.astype(np.float32), table["c"]), rtol=1e-5)

    values = np.concatenate(
        [np.array([0, -0.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, np.inf], np.float32), floats(250)]
    )
    yield Case("to_tf32", values, tf32(values).view(np.uint32))


def take(matrix: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(matrix[table[..., 0], table[..., 1]])


def gather(matrix: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each lane's registers, as 32-bit words."""
    return take(matrix, table).view(np.uint32)


def tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, halves away from zero."""
    return ((x.astype(np.float32).view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def host_cases():
    yield Case("host", np.zeros(1, np.uint8), np.ones(7, np.uint32))


SM80_CASES = [
    *vector_cases(),
    *reduction_cases(),
    *philox_cases(),
    *memory_cases(),
    *matrix_cases(),
    *host_cases(),
]


@on_every_target
@pytest.mark.parametrize("case", SM80_CASES, ids=str)
def test_sm80(case, target):
    check(case, target(SM80))


# ---- sm_90a


def small_hopper_cases():
    registers = words(128).view(np.uint16).reshape(4, 64)
    rows = np.empty((32, 8), np.uint16)
    table = layouts.ldmatrix(4, False).reshape(4, 64, 3)
    rows[31 - (8 * table[..., 0] + table[..., 1]), table[..., 2]] = registers
    yield Case("stmatrix_x4", registers, rows)

    x = np.concatenate([np.linspace(-126, 127, 250), [-np.inf, 0, -140, 128, 1e-42, np.inf]]).astype(np.float32)
    y = np.where(x < -126, 0, np.exp2(np.minimum(x.astype(np.float64), 200)))
    y = np.where(x >= 128, np.inf, y).astype(np.float32)
    yield Case("exp2_approx", x, y, rtol=2.0**-21, of_largest=False)

    # All exponents, and what a softmax lives on; then integers, subnormal results, and what is 0 or stays NaN.
    special = [0, -0.0, -1e-9, 1e-42, -1, -126, 127, -126.25, -126.499, -126.51, -140, -1e30, -np.inf, np.nan]
    spread = np.concatenate([np.linspace(-126, 127, 6144), np.linspace(-20, 0, 2048 - len(special))])
    x = np.concatenate([spread, special]).astype(np.float32)
    y = np.where(x < -126.5, 0, np.exp2(x.astype(np.float64))).astype(np.float32)
    yield Case("exp2_polynomial", x, y, rtol=2.0**-22, of_largest=False)

    data = words(160).reshape(5, 32)
    yield Case("mbarrier_wait", data, data[:, ::-1].copy())
    yield Case("mbarrier_try_wait", data, data[:, ::-1].copy())

    data = words(256).reshape(64, 4)
    yield Case("bulk_load", data, data[::-1].copy())
    yield Case("bulk_load_try_wait", data, data[::-1].copy())
    yield Case("bulk_store", data, np.concatenate([data, data[::-1]]))
    for kind, dtype in (("float", np.float32), ("f16", np.float16)):
        old, new = (floats(1024 // np.dtype(dtype).itemsize).astype(dtype) for _ in range(2))
        yield Case(f"bulk_reduce_add_{kind}", new, old + new, out=old)
    old, new = floats(256), floats(256)
    yield Case("reduce_add", new, old + new, out=old)
    old, new = to_bf16(floats(512)), to_bf16(floats(512))
    yield Case("bulk_reduce_add_bf16", new, to_bf16(from_bf16(old) + from_bf16(new)), out=old)


def cluster_cases():
    ranks = np.stack([np.arange(8) % 4, np.full(8, 4)], axis=1).astype(np.uint32)
    yield Case("cluster_rank", np.zeros(1, np.uint8), ranks)
    yield Case("cluster_host", np.zeros(1, np.uint8), ranks)
    block, lane = np.arange(8)[:, None], np.arange(32)
    first = block // 4 * 4  # of the cluster
    for words_each in (1, 2, 4):
        size = 4 * words_each
        data = words(8 * 32 * 2 * words_each).reshape(8, 32, 2, words_each)
        yield Case(f"ld_cluster_{size}", data, data[first + (block + lane) % 4, 31 - lane])
        data = words(8 * 32 * words_each).reshape(8, 32, words_each)
        handed = data[first + (block - 1) % 4, 31 - lane]
        yield Case(f"st_cluster_{size}", data, handed)
        yield Case(f"st_async_{size}", data, handed)
    data = words(5 * 8 * 32).reshape(5, 8, 32)
    yield Case("mbarrier_arrive_cluster", data, np.ascontiguousarray(data[:, first + (block - 1) % 4, 31 - lane]))


@dataclass
class Transfer:
    """A box of a tensor, dimension 0 innermost."""

    kind: str  # float, f16, bf16
    dims: tuple[int, ...]
    box: tuple[int, ...]
    start: tuple[int, ...]
    swizzle: int = 0
    element_strides: tuple[int, ...] = ()
    padding: int = 0  # bytes beyond each innermost row, a multiple of 16
    tile_offset: int = 0

    @property
    def item(self) -> int:
        return 4 if self.kind == "float" else 2

    @property
    def strides(self) -> list[int]:
        """Bytes, of dimensions 1 onwards."""
        strides, pitch = [], -(-self.dims[0] * self.item // 16) * 16 + self.padding
        for size in self.dims[1:]:
            strides.append(pitch)
            pitch *= size
        return strides

    @property
    def tensor_bytes(self) -> int:
        return self.strides[-1] * self.dims[-1] if len(self.dims) > 1 else self.dims[0] * self.item

    @property
    def steps(self) -> tuple[int, ...]:
        return self.element_strides or (1,) * len(self.dims)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(-(-size // step) for size, step in zip(self.box, self.steps, strict=True))

    @property
    def bytes(self) -> int:
        return int(np.prod(self.counts)) * self.item

    def header(self) -> bytes:
        def five(values, code, fill):
            return struct.pack(f"<5{code}", *(list(values) + [fill] * 5)[:5])

        element = {"float": 0, "f16": 1, "bf16": 2}[self.kind]
        head = struct.pack("<4i", element, len(self.dims), self.swizzle, self.bytes)
        head += five(self.dims, "Q", 1) + five(self.strides, "Q", 0) + five(self.box, "I", 1) + five(self.steps, "I", 1)
        return (head + five(self.start, "i", 0) + struct.pack("<i", self.tile_offset)).ljust(256, b"\0")

    def pairs(self):
        """(offset in the tensor or None outside it, offset in the tile) of every element of the box."""
        for position, index in enumerate(itertools.product(*(range(count) for count in reversed(self.counts)))):
            at = [s + i * step for s, i, step in zip(self.start, reversed(index), self.steps, strict=True)]
            inside = all(0 <= x < size for x, size in zip(at, self.dims, strict=True))
            offset = at[0] * self.item + sum(x * stride for x, stride in zip(at[1:], self.strides, strict=True))
            byte = position * self.item
            if self.swizzle:
                row, column = divmod(byte + self.tile_offset, self.swizzle)
                chunk = layouts.tma_swizzled(row, column // 16, self.swizzle)
                byte = row * self.swizzle + chunk * 16 + column % 16 - self.tile_offset
            yield (offset if inside else None), byte


TRANSFERS = [
    Transfer("float", (100,), (32,), (0,)),
    Transfer("float", (100,), (32,), (-5,)),
    Transfer("bf16", (100,), (64,), (77,)),
    Transfer("f16", (40, 30), (32, 8), (8, 5)),
    Transfer("f16", (40, 30), (64, 12), (-3, 25), swizzle=128),
    Transfer("bf16", (40, 30), (32, 16), (17, -7), swizzle=64, padding=16),
    Transfer("bf16", (33, 20), (16, 32), (30, -4), swizzle=32),
    Transfer("float", (50, 9), (32, 9), (20, 0), swizzle=128),
    Transfer("bf16", (64, 20), (64, 4), (0, 3), swizzle=128, tile_offset=384),
    Transfer("f16", (24, 7, 5), (8, 3, 2), (9, 5, -1)),
    Transfer("bf16", (64, 11, 6, 3), (64, 4, 2, 2), (0, 9, -1, 2), swizzle=128),
    Transfer("bf16", (64, 12, 2, 3, 2), (64, 5, 2, 1, 1), (0, 10, 0, 1, 1), swizzle=128),
    Transfer("f16", (8, 12, 11), (8, 6, 9), (0, -1, -1), element_strides=(1, 2, 3)),
    Transfer("f16", (16, 12, 11, 4), (16, 7, 8, 1), (0, 4, -2, 3), element_strides=(1, 3, 2, 1), swizzle=32),
    Transfer("float", (4, 5, 6, 7, 8), (4, 8, 6, 2, 16), (0, 0, 1, 6, -8), element_strides=(1, 1, 2, 1, 8)),
]


def transfer_note(transfer: Transfer) -> str:
    return (
        f"{transfer.kind}-{'x'.join(map(str, transfer.box))}-w{transfer.swizzle}"
        + (f"-s{''.join(map(str, transfer.element_strides))}" if transfer.element_strides else "")
        + (f"-at{transfer.tile_offset}" if transfer.tile_offset else "")
    )


def tma_load_case(transfer: Transfer) -> Case:
    tensor = words(transfer.tensor_bytes, np.uint8)
    tile = np.full(transfer.bytes, 0xEE, np.uint8)
    for source, target in transfer.pairs():
        tile[target : target + transfer.item] = 0 if source is None else tensor[source : source + transfer.item]
    given = np.concatenate([np.frombuffer(transfer.header(), np.uint8), tensor])
    return Case("tma_load", given, tile, note=transfer_note(transfer))


def tma_load_multicast_case(transfer: Transfer) -> Case:
    """Four blocks' tiles; the first is left as it was filled."""
    case = tma_load_case(transfer)
    tiles = np.stack([np.full_like(case.expected, 0xEE), *[case.expected] * 3])
    return Case("tma_load_multicast", case.given, tiles, note=case.note, schedules=SCHEDULES[::2])


def tma_store_case(transfer: Transfer) -> Case:
    before, tile = words(transfer.tensor_bytes, np.uint8), words(transfer.bytes, np.uint8)
    tensor = before.copy()
    for target, source in transfer.pairs():
        if target is not None:
            tensor[target : target + transfer.item] = tile[source : source + transfer.item]
    given = np.concatenate([np.frombuffer(transfer.header(), np.uint8), tile])
    return Case("tma_store", given, tensor, out=before, note=transfer_note(transfer))


def tma_reduce_add_case(transfer: Transfer) -> Case:
    def values(count):
        x = floats(count)
        return x if transfer.kind == "float" else to_bits(x, transfer.kind)

    def add(a, b):
        return (
            a + b
            if transfer.kind == "float"
            else to_bits(from_bits(a, transfer.kind) + from_bits(b, transfer.kind), transfer.kind)
        )

    before, tile = values(transfer.tensor_bytes // transfer.item), values(transfer.bytes // transfer.item)
    tensor = before.copy()
    for target, source in transfer.pairs():
        if target is not None:
            i = target // transfer.item
            tensor[i : i + 1] = add(before[i : i + 1], tile[source // transfer.item : source // transfer.item + 1])
    given = np.concatenate([np.frombuffer(transfer.header(), np.uint8), tile.view(np.uint8)])
    return Case("tma_reduce_add", given, tensor, out=before, note=transfer_note(transfer))


def wgmma_case(
    kernel: str, kind: str, n: int, a_major: str | None, b_major: str, swizzle: int, accumulate: bool
) -> Case:
    """a_major None: A in registers."""
    depth = 64
    a, b = to_bits(floats(64, depth), kind), to_bits(floats(n, depth), kind)
    before = take(floats(64, n), layouts.wgmma_d(n))
    d = (before if accumulate else np.zeros_like(before)).astype(np.float64)
    d += take((from_bits(a, kind).astype(np.float64) @ from_bits(b, kind).T), layouts.wgmma_d(n))
    b_bytes, b_lbo, b_sbo, b_starts = layouts.operand(b, b_major, swizzle)
    if a_major is None:
        fragments = [gather(a[:, k : k + 16], layouts.wgmma_a()) for k in range(0, depth, 16)]
        a_bytes, a_lbo, a_sbo, a_starts = np.concatenate(fragments).view(np.uint8).ravel(), 0, 0, [0] * len(fragments)
    else:
        a_bytes, a_lbo, a_sbo, a_starts = layouts.operand(a, a_major, swizzle)
    steps = depth // 16
    header = struct.pack("<5i4I", steps, accumulate, a_bytes.size, b_bytes.size, swizzle, a_lbo, a_sbo, b_lbo, b_sbo)
    header += struct.pack("<8i", *a_starts, *[0] * (8 - steps)) + struct.pack("<8i", *b_starts, *[0] * (8 - steps))
    header = header.ljust(252, b"\0") + struct.pack("<i", n)
    given = np.concatenate([np.frombuffer(header, np.uint8), a_bytes, b_bytes])
    major = f"{a_major or 'registers'}-{b_major}"
    note = f"{n}-{kind}-{major}-w{swizzle}" + ("-accumulate" if accumulate else "")
    return Case(kernel, given, d.astype(np.float32), out=before, rtol=1e-5, note=note, schedules=SCHEDULES[::2])


def wgmma_cases():
    for n in range(8, 257, 8):  # every shape once; the kernels alternate between the two kinds
        if n // 8 % 2 == 1:
            yield wgmma_case("wgmma_shape", "bf16", n, "k", "k", 128, n % 3 == 0)
        else:  # MN-major panels of 8 columns: N need not be a multiple of a swizzle's width
            yield wgmma_case("wgmma_shape", "f16", n, None, "mn", 0, n % 3 == 0)
    for swizzle in layouts.SWIZZLE_BITS:
        yield wgmma_case("wgmma_ss_bf16_64", "bf16", 64, "k", "k", swizzle, True)
        yield wgmma_case("wgmma_ss_bf16_64_a", "bf16", 64, "mn", "k", swizzle, False)
        yield wgmma_case("wgmma_ss_bf16_64_b", "bf16", 64, "k", "mn", swizzle, False)
        yield wgmma_case("wgmma_ss_bf16_64_ab", "bf16", 64, "mn", "mn", swizzle, True)
        yield wgmma_case("wgmma_rs_bf16_64", "bf16", 64, None, "k", swizzle, True)
        yield wgmma_case("wgmma_rs_bf16_64_b", "bf16", 64, None, "mn", swizzle, False)
        yield wgmma_case("wgmma_ss_f16_128", "f16", 128, "k", "k", swizzle, False)
        yield wgmma_case("wgmma_ss_f16_128_ab", "f16", 128, "mn", "mn", swizzle, False)
        yield wgmma_case("wgmma_rs_f16_128", "f16", 128, None, "k", swizzle, False)
        yield wgmma_case("wgmma_rs_f16_128_b", "f16", 128, None, "mn", swizzle, True)


def pipelined_case() -> Case:
    a, b = to_bf16(floats(64, 64)), to_bf16(floats(64, 64))
    given = np.concatenate([layouts.operand(matrix, "k", 128)[0] for matrix in (a, b)])
    products = [from_bf16(a[:, k : k + 16]).astype(np.float64) @ from_bf16(b[:, k : k + 16]).T for k in (0, 16)]
    one = np.stack([take(product, layouts.wgmma_d(64)) for product in products])
    return Case("pipelined", given, np.stack([one, one]).astype(np.float32), rtol=1e-5)


HOPPER_CASES = [
    *small_hopper_cases(),
    *cluster_cases(),
    *map(tma_load_case, TRANSFERS),
    *map(tma_load_multicast_case, [t for t in TRANSFERS if not t.element_strides]),
    *map(tma_store_case, TRANSFERS),
    *map(tma_reduce_add_case, [t for t in TRANSFERS if not t.element_strides]),
    *wgmma_cases(),
    pipelined_case(),
]


@on_every_target
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper(case, target):
    check(case, target(HOPPER))


GOOD = dict(kind="bf16", dims=(64, 20), box=(64, 4), start=(0, 0), swizzle=128)


@on_every_target
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dims=(64, 20, 1, 1, 1, 1), box=(64, 4, 1, 1, 1, 1), start=(0,) * 6), "rank 6"),
        (dict(box=(64, 257)), r"box\[1\] = 257"),
        (dict(box=(64, 0)), r"box\[1\] = 0"),
        (dict(box=(36, 4), swizzle=0), "inner box of 72 bytes is not a multiple of 16"),
        (dict(box=(72, 4)), "inner box of 144 bytes is not the swizzle's 128"),
        (dict(box=(32, 4)), "inner box of 64 bytes is not the swizzle's 128"),
        (dict(swizzle=96), "swizzle 96"),
        (dict(element_strides=(1, 9)), r"element_strides\[1\] = 9"),
        (dict(element_strides=(2, 1)), r"element_strides\[0\]"),
        (dict(padding=8), r"strides\[1\] = 136"),
        (dict(dims=(0, 20)), r"dims\[0\] = 0"),
    ],
)
def test_tensor_maps_outside_the_drivers_limits_are_refused(change, message, target):
    transfer = Transfer(**{**GOOD, **change})
    given = np.concatenate([np.frombuffer(transfer.header(), np.uint8), np.zeros(8192, np.uint8)])
    with pytest.raises(KernelError, match=message):
        target(HOPPER).run("tma_load", given, np.zeros(1 << 16, np.uint8))


@pytest.mark.parametrize(("word", "value"), [(4, 64), (6, 512), (8, 2048), (17, 2048)])
def test_wrong_descriptors_show(word, value):
    """The swizzle, A's sbo, B's sbo, and where B starts: each matters, so the cases above tell."""
    case = wgmma_case("wgmma_ss_bf16_64_b", "bf16", 64, "k", "mn", 128, False)
    case.check(emulated_kernels(HOPPER))
    header = case.given[:256].view(np.int32)
    assert header[word] != value
    header[word] = value
    with pytest.raises(AssertionError):
        case.check(emulated_kernels(HOPPER))


# ---- completeness


def public_names(path: Path) -> set[str]:
    """Functions and classes a header of csrc/device/cuda defines for kernels and launchers."""
    text = re.sub(r"namespace detail \{.*?\}  // namespace detail", "", path.read_text(), flags=re.S)
    functions = re.findall(r"^(?:__device__ __forceinline__|inline)\s+[\w:*& ]*?(\w+)\(", text, flags=re.M)
    functions += re.findall(r"^(?:int|TensorMap) (\w+)\(", text, flags=re.M)
    types = re.findall(r"^(?:class|struct) (\w+) \{|^using (\w+) =", text, flags=re.M)
    return {*functions, *(name for pair in types for name in pair if name)}


def test_every_wrapper_has_a_case():
    headers = sorted((ROOT / "csrc/device/cuda").glob("*.cuh"))
    names = {name: header.name for header in headers for name in public_names(header)}
    assert {
        "ldmatrix_x4_trans",
        "st_relaxed",
        "SharedMemory",
        "tma_reduce_add",
        "wgmma_rs",
        "occupancy",
    } <= names.keys()
    assert len(names) > 50
    sources = "".join((Path(__file__).parent / name).read_text() for name in ("harness.cuh", SM80, HOPPER))
    unused = {name: header for name, header in names.items() if not re.search(rf"\b{name}\b", sources)}
    assert not unused, f"no kernel in tests/device calls {unused}"


@pytest.mark.parametrize(("source", "cases"), [(SM80, SM80_CASES), (HOPPER, HOPPER_CASES)])
def test_every_kernel_has_a_case(source, cases):
    assert set(emulated_kernels(source).names()) == {case.kernel for case in cases}
