"""What the attention kernels ask of a GPU, beside the floor, case by case, without one.

    python -m benchmarks.attention_counters            the table
    python -m benchmarks.attention_counters --write    also rewrite benchmarks/results/attention_counters.md

The kernels run in the emulator's race build, which counts every byte that an instruction loads or stores;
attention_counters.cu counts the tensor-core products that the warps issue.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests import emulated

TABLE = Path(__file__).parent / "results" / "attention_counters.md"

_SOURCE = Path(__file__).with_suffix(".cu")
_PRODUCT_FLOP = 2 * 16 * 8 * 16
_BF16 = 2


class Case(NamedTuple):
    """One head_dim and what hides keys; window sides below 0 have no limit."""

    name: str
    head_dim: int
    heads: int = 1
    kv_heads: int = 1
    queries: int = 512
    keys: int = 512
    window: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0

    def pairs(self) -> int:
        """Of a query and a key that it may see, in all heads."""
        left, right = (side if side >= 0 else max(self.queries, self.keys) for side in self.window)
        return self.heads * sum(max(0, min(self.keys, i + right + 1) - max(0, i - left)) for i in range(self.queries))

    def useful_flops(self, backward: bool) -> int:
        return (10 if backward else 4) * self.pairs() * self.head_dim

    def floor_bytes(self, backward: bool) -> int:
        """Every operand read once, every result written once."""
        row = self.head_dim * _BF16
        queries, keys = self.heads * self.queries, 2 * self.kv_heads * self.keys
        if backward:
            return 4 * queries * row + 2 * keys * row + 4 * queries
        return 2 * queries * row + keys * row + 4 * queries


CASES = (
    *(Case("full", dim) for dim in (64, 128, 256)),
    *(Case("causal", dim, window=(-1, 0)) for dim in (64, 128, 256)),
    *(Case("window 128, causal", dim, window=(128, 0)) for dim in (64, 128)),
    *(Case("dropout", dim, dropout_p=0.1) for dim in (64, 128)),
    Case("8 heads of one key head, 8 queries", 128, 8, 1, 8, 512),
    Case("a query a head, decoding", 128, 8, 1, 1, 512),
)


# Of the Hopper forward kernel, which loads by TMA.
HOPPER_CASES = (
    Case("8 heads of one key head, 16 queries", 128, 8, 1, 16),
    Case("8 heads of one key head, 72 queries", 128, 8, 1, 72),
    Case("3 heads of one key head, 72 queries", 64, 3, 1, 72),
    Case("4 heads of one key head, 256 queries", 128, 4, 1, 256),
)


class Count(NamedTuple):
    """Of one call: products of 16 x 8 x 16, bytes of global memory (atomics apart), bank conflicts."""

    products: int
    loads: int
    stores: int
    atomics: int
    conflicts: int


@cache
def library() -> emulated.Library:
    return emulated.open_library(emulated.build_library([_SOURCE], "race", "attention_counters"), "race")


def count(case: Case, backward: bool) -> Count:
    """On one multiprocessor, where keys are not split."""
    control = library().control
    control.set_options(multiprocessors=1, bank_conflicts=True)
    control.reset_counters()
    counted = ctypes.c_int64()
    sizes = (1, case.heads, case.kv_heads, case.queries, case.keys, case.head_dim, *case.window)
    code = library().functions.attention_counters(
        *sizes, ctypes.c_float(case.dropout_p), backward, ctypes.byref(counted)
    )
    if code:
        raise RuntimeError(f"launch failed with code {code}")
    seen = control.counters()
    conflicts = seen["shared_load_conflicts"] + seen["shared_store_conflicts"]
    moved = (seen[f"global_{kind}_bytes"] for kind in ("load", "store", "atomic"))
    return Count(counted.value, *moved, conflicts)


def row(case: Case) -> str:
    directions = (False,) if case.queries < 64 else (False, True)
    counts = [count(case, backward) for backward in directions]
    floors = [case.floor_bytes(backward) for backward in directions]
    useful = [case.useful_flops(backward) for backward in directions]
    cells = [
        [f"{found.products * _PRODUCT_FLOP / flops:.2f}" for found, flops in zip(counts, useful, strict=True)],
        *(
            [f"{getattr(found, kind) / floor:.2f}" for found, floor in zip(counts, floors, strict=True)]
            for kind in ("loads", "stores", "atomics")
        ),
        [f"{found.conflicts}" for found in counts],
    ]
    return f"| {case.name} | {case.head_dim} | {' | '.join(', '.join(cell) for cell in cells)} |"


def hopper_loads(case: Case) -> int:
    """Bytes that the Hopper forward kernel loads; 0 where another kernel serves the case."""
    import torch

    from bigkern.ops.attention import _cuda

    control = emulated.load("plain")
    before = control.options()
    control.set_options(compute_capability=90, multiprocessors=1)
    control.reset_counters()
    shapes = [(case.heads, case.queries), (case.kv_heads, case.keys), (case.kv_heads, case.keys)]
    tensors = [torch.zeros(1, *shape, case.head_dim, dtype=torch.bfloat16) for shape in shapes]
    sizes = (case.queries, case.keys, *case.window)
    _cuda.forward(*tensors, None, None, None, None, *sizes, False, 0.0, 1.0, case.dropout_p, None, False)
    control.set_options(**before)
    return control.counters()["tma_load_bytes"]


def hopper_row(case: Case) -> str:
    floor = case.floor_bytes(False)
    shared, apart = (hopper_loads(case._replace(kv_heads=heads)) for heads in (case.kv_heads, case.heads))
    return f"| {case.name} | {case.head_dim} | {shared / floor:.2f} | {f'{apart / floor:.2f}' if apart else '-'} |"


def markdown() -> str:
    lines = [
        "# What the attention kernels ask of a GPU",
        "",
        "Written by `python -m benchmarks.attention_counters --write`: bf16, one head and 512 queries and keys unless",
        "named, counted in the emulator. Nothing was timed. Forward, then backward:",
        "",
        "- **FLOP**: tensor-core FLOP issued over those of the pairs that are seen. Tiles that a window cuts are",
        "  whole; their share falls with the length.",
        "- **loaded**, **stored**, **added**: bytes by the kernels' loads, stores and atomic additions over the floor",
        "  (each operand read once and each result written once, together). Keys and values are loaded once for each",
        "  tile of queries, mostly from L2; the backward adds up the query's gradient in fp32.",
        "- **conflicts**: accesses of shared memory beyond one a bank.",
        "",
        "| case | head_dim | FLOP | loaded | stored | added | conflicts |",
        "|---|---|---|---|---|---|---|",
        *map(row, CASES),
        "",
        "On Hopper, forward: bytes that TMA loads over the same floor, where heads share tiles; and beside it with",
        "keys and values for each head, when none do. A dash: another kernel takes so few queries.",
        "",
        "| case | head_dim | loaded | heads apart |",
        "|---|---|---|---|",
        *map(hopper_row, HOPPER_CASES),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_counters", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    args = parser.parse_args(argv)
    table = markdown()
    print(table)
    if args.write:
        TABLE.write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
