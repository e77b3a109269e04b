"""Faults that a kernel of ours could really have, as one replacement in a source each; every one must be caught.

Grow this list with every kernel.  A bug that the harness misses is a hole in the harness: mend that, not the list.
"""

from __future__ import annotations

from typing import NamedTuple

# In the order they are tried; the first catch ends a trial.  Random alone misses a missing barrier before reuse.
SCHEDULES = ["forward:1", "reverse:1", "random:1", "random:2", "priority:1", "priority:2", "priority:3", "priority:4"]


class Bug(NamedTuple):
    name: str
    kernel: str
    """tests/planted/<kernel>.cu and the function of that name in trial.py run it."""
    file: str
    old: str
    new: str
    build: str
    """The build that must catch it: plain (wrong values or a protocol error), asan or race."""


TILE = "tests/planted/tile_gemm.cu"
NORM = "csrc/kernels/layer_norm.cuh"
ATTENTION = "csrc/kernels/attention.cuh"

BUGS = [
    Bug(
        "missing barrier after the copies",
        "tile_gemm",
        TILE,
        "    __syncthreads();  // everyone's copies of this tile have landed\n",
        "",
        "race",
    ),
    Bug(
        "missing barrier before a stage is reused",
        "tile_gemm",
        TILE,
        "    __syncthreads();  // everyone is done with this stage before the next copies overwrite it\n",
        "",
        "race",
    ),
    Bug("waits for one copy group too few", "tile_gemm", TILE, "cp_async_wait<1>()", "cp_async_wait<2>()", "plain"),
    Bug("last copies not waited for", "tile_gemm", TILE, "      cp_async_wait<0>();\n", "", "plain"),
    Bug(
        "mask of the tail off by one",
        "tile_gemm",
        TILE,
        "row0 + row < rows && col0 + col < cols",
        "row0 + row <= rows && col0 + col <= cols",
        "asan",
    ),
    Bug(
        "tail left uninitialised instead of zero",
        "tile_gemm",
        TILE,
        "    cp_async16(stage + row * kStride + col, inside ? matrix + offset : matrix, inside);",
        "    if (inside) cp_async16(stage + row * kStride + col, matrix + offset, true);",
        "plain",
    ),
    Bug("loads one tile behind", "tile_gemm", TILE, "      load(tile + 1);", "      load(tile);", "plain"),
    Bug(
        "shared memory of one stage too few",
        "tile_gemm",
        TILE,
        "shared.take<__nv_bfloat16>(2 * kTileK * kTileStrideB)",
        "shared.take<__nv_bfloat16>(kTileK * kTileStrideB)",
        "asan",
    ),
    Bug(
        "copies to a misaligned shared address",
        "tile_gemm",
        TILE,
        "kTileThreads = 128, kTilePad = 8;",
        "kTileThreads = 128, kTilePad = 4;",
        "plain",
    ),
    Bug(
        "ldmatrix by part of the warp",
        "tile_gemm",
        TILE,
        "        ldmatrix_x4(a_frag[i], a",
        "        if (lane < 31) ldmatrix_x4(a_frag[i], a",
        "plain",
    ),
    Bug(
        "barrier by part of the block",
        "tile_gemm",
        TILE,
        "    __syncthreads();  // everyone's copies of this tile have landed\n",
        "    if (warp < 3) __syncthreads();\n",
        "plain",
    ),
    Bug("fragment rows swapped", "tile_gemm", TILE, "lane / 4 + e / 2 * 8", "lane / 4 + e % 2 * 8", "plain"),
    Bug("store past the last row", "tile_gemm", TILE, "if (row < p.m && col < p.n)", "if (col < p.n)", "asan"),
    Bug(
        "row sums read before they are written",
        "layer_norm",
        NORM,
        "    __syncthreads();\n    const int source = warp / kRowWarps",
        "    const int source = warp / kRowWarps",
        "race",
    ),
    Bug(
        "tail of the row loaded one element too far",
        "layer_norm",
        NORM,
        "    if (column < cols) tile[i].set(load_vec_streaming<T, V>(tile_start + column));",
        "    if (column <= cols) tile[i].set(load_vec_streaming<T, V>(tile_start + column));",
        "asan",
    ),
    Bug(
        "int32 row offset",
        "layer_norm",
        NORM,
        "static_cast<const T*>(p.input) + row * p.input_stride + first, lane, cols, tile",
        "static_cast<const T*>(p.input) + static_cast<int>(row * p.input_stride) + first, lane, cols, tile",
        "plain",
    ),
    Bug(
        "rows past the last leave before the warp's shuffles",
        "layer_norm",
        NORM,
        "  const int cols = row < p.rows ? static_cast<int>(p.cols) : 0;\n  Held<T, V> tile[kForwardItems<V>];",
        "  if (row >= p.rows) return;\n  const int cols = p.cols;\n  Held<T, V> tile[kForwardItems<V>];",
        "plain",
    ),
    Bug(
        "row in shared memory one vector short",
        "layer_norm",
        NORM,
        "T* held = shared.take<T>(cols);",
        "T* held = shared.take<T>(cols - V);",
        "asan",
    ),
    Bug(
        "chunks combined without their sizes",
        "layer_norm",
        NORM,
        "sum[0] += (parts[i].x - center) * chunk_cols<kTileCols>(p.cols, i);",
        "sum[0] += (parts[i].x - center) * kTileCols;",
        "plain",
    ),
    Bug(
        "part of a warp sums over the whole warp",
        "layer_norm",
        NORM,
        "group_sum<(kLanes < 32 ? kLanes : 32)>(values[i])",
        "group_sum<32>(values[i])",
        "plain",
    ),
    Bug(
        "row sums overwritten by the next row's",
        "layer_norm",
        NORM,
        "    buffer ^= 1;\n",
        "",
        "race",
    ),
    Bug(
        "parameter sums read before all warps have stored theirs",
        "layer_norm",
        NORM,
        "  __syncthreads();\n  for (int column = threadIdx.x; column < cols; column += kThreads) {\n    float sum",
        "  for (int column = threadIdx.x; column < cols; column += kThreads) {\n    float sum",
        "race",
    ),
    Bug(
        "bias sums stored over weight sums still being read",
        "layer_norm",
        NORM,
        "  __syncthreads();  // an earlier call's readers are done\n",
        "",
        "race",
    ),
    Bug(
        "former keys' sum not brought to the new maximum",
        "attention",
        ATTENTION,
        "            out[m][d][2 * half] *= rescale;\n",
        "",
        "plain",
    ),
    Bug(
        "one key too many in a cut tile",
        "attention",
        ATTENTION,
        "if (key < from || key >= to) scores[m][n][2 * half + e] = -INFINITY;",
        "if (key < from || key > to) scores[m][n][2 * half + e] = -INFINITY;",
        "plain",
    ),
    Bug(
        "values read from the last tile's buffer",
        "attention",
        ATTENTION,
        "    cp_async_wait<0>();\n    __syncthreads();  // the values are there",
        "    __syncthreads();  // the values are there",
        "plain",
    ),
    Bug(
        "keys overwritten while they are read",
        "attention",
        ATTENTION,
        "    __syncthreads();  // the values are there, and everyone is done with the keys\n",
        "",
        "race",
    ),
    Bug(
        "dropout draws another mask in the backward pass",
        "attention",
        ATTENTION,
        "g / 4 * 4 + mine / 2 * 8;",
        "g / 4 * 4 + mine / 2 * 4;",
        "plain",
    ),
    Bug(
        "dS read before it is written",
        "attention",
        ATTENTION,
        "      __syncthreads();  // dS is there, and everyone is done with the rows\n",
        "",
        "race",
    ),
    Bug(
        "rows past the last stored",
        "attention",
        ATTENTION,
        "    if (row >= rows || col >= cols) continue;",
        "    if (col >= cols) continue;",
        "asan",
    ),
]
