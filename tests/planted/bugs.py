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
CONV = "csrc/kernels/conv.cuh"
CONV_GEMM = "csrc/kernels/conv_gemm.cuh"
CONV_EPILOGUE = "csrc/kernels/conv_epilogue.cuh"
CONV_WEIGHT = "csrc/kernels/conv_weight.cuh"
TENSORS = "csrc/kernels/multi_tensor.cuh"
STEP = "csrc/kernels/optimizer_step.cuh"
RNN_GRID, RNN_BLOCK = "csrc/kernels/rnn_grid.cuh", "csrc/kernels/rnn_block.cuh"
RNN_CELLS, RNN_PRODUCT = "csrc/kernels/rnn_cells.cuh", "csrc/kernels/rnn_product.cuh"
ATTENTION = "csrc/kernels/attention.cuh"
ATTENTION_SCORES = "csrc/kernels/attention_scores.cuh"
ATTENTION_HOPPER = "csrc/kernels/attention_hopper.cuh"
ATTENTION_HOPPER_FORWARD = "csrc/kernels/attention_hopper_forward.cuh"
DECODE = "csrc/kernels/attention_decode.cuh"
HOPPER_BACKWARD = "csrc/kernels/attention_hopper_backward.cuh"

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
        "halo of the pooled box one column short",
        "conv",
        CONV,
        "p.box_w = (p.tile_w - 1) * pool.stride_w + pool.kernel_w;",
        "p.box_w = (p.tile_w - 1) * pool.stride_w + pool.kernel_w - 1;",
        "plain",
    ),
    Bug(
        "taps in the padding read from the next row",
        "conv",
        CONV_GEMM,
        "inside && within(starts_[i].h + tap_h, p_.height.operand) && within(starts_[i].w + tap_w, p_.width.operand)",
        "inside && within(starts_[i].h + tap_h, p_.height.operand)",
        "plain",
    ),
    Bug("tail of k not zero", "conv", CONV_GEMM, "return k_ < end_;", "return end_ > 0;", "plain"),
    Bug(
        "argmax counted from the window's first place inside",
        "conv",
        CONV_EPILOGUE,
        "best.take(values, y * p.pool.kernel_w + x);",
        "best.take(values, best.any ? y * p.pool.kernel_w + x : 0);",
        "plain",
    ),
    Bug(
        "residual read at the row of the tile",
        "conv",
        CONV_EPILOGUE,
        "add_some(residual + offset, count, whole, values);",
        "add_some(residual + row * row_filters + first, count, whole, values);",
        "plain",
    ),
    Bug(
        "missing barrier in the ring of stages",
        "conv",
        CONV_GEMM,
        "    __syncthreads();  // this stage has landed for all, and all have left the one before\n",
        "",
        "race",
    ),
    Bug(
        "results over stages still being read",
        "conv",
        CONV_GEMM,
        "  __syncthreads();  // the stages become the tile of results\n",
        "",
        "race",
    ),
    Bug(
        "waits for one stage too few",
        "conv",
        CONV_GEMM,
        "cp_async_wait<kStages - 2>();",
        "cp_async_wait<kStages - 1>();",
        "plain",
    ),
    Bug(
        "places of the weight gradient one step early",
        "conv",
        CONV_WEIGHT,
        "starts[step % kStages][threadIdx.x] = walk.next(p);",
        "starts[(step + kStages - 1) % kStages][threadIdx.x] = walk.next(p);",
        "plain",
    ),
    Bug(
        "tail of the last chunk taken for a whole one",
        "adam",
        TENSORS,
        "const int count = static_cast<int>(min(int64_t{kChunk}, numel - int64_t{chunk} * kChunk));",
        "const int count = kChunk;",
        "asan",
    ),
    Bug(
        "int32 offset of a chunk",
        "adam",
        TENSORS,
        "int64_t{tile_.chunk} * (kChunk * size)",
        "static_cast<int>(uint32_t(tile_.chunk) * uint32_t(kChunk * size))",
        "plain",
    ),
    Bug(
        "gradients' addresses kept from the tensor before",
        "adam",
        STEP,
        "    job.rule = previous->rule;\n",
        "    job.rule = previous->rule;\n    job.grad = previous->grad;\n",
        "plain",
    ),
    Bug(
        "tables published to the last block without a fence",
        "adam",
        TENSORS,
        "    __threadfence();\n    last = atomicAdd(finished, 1u) == gridDim.x - 1;\n    __threadfence();\n",
        "    last = atomicAdd(finished, 1u) == gridDim.x - 1;\n",
        "race",
    ),
    Bug(
        "steps advanced before every block has read them",
        "adam",
        STEP,
        "  if (is_last_block(finished_blocks(params.list))) {",
        "  if (blockIdx.x == 0) {",
        "race",
    ),
    Bug(
        "norm published to the other blocks without a fence",
        "adam",
        "csrc/kernels/grad_norm.cuh",
        "    __threadfence();\n    atomicAdd(arrived, 1u);",
        "    atomicAdd(arrived, 1u);",
        "race",
    ),
    Bug(
        "tensor's scalars read before they are written",
        "adam",
        TENSORS,
        "    __syncthreads();\n    work(turn.job, turn.chunks);",
        "    work(turn.job, turn.chunks);",
        "race",
    ),
    Bug("next tensor's scalars over those still read", "adam", TENSORS, "turns[count % 2]", "turns[0]", "race"),
    Bug(
        "block goes on into its neighbour's chunks",
        "adam",
        TENSORS,
        "min(end_chunk, last) - first_chunk",
        "end_chunk - first_chunk",
        "plain",
    ),
    Bug(
        "vectors in a misaligned tensor",
        "adam",
        STEP,
        "job.aligned = addresses % 16 == 0;",
        "job.aligned = true;",
        "plain",
    ),
    Bug(
        "flag awaited one step too early",
        "rnn",
        RNN_GRID,
        "hidden, hidden, static_cast<unsigned>(step));",
        "hidden, hidden, static_cast<unsigned>(max(step - 1, 0)));",
        "plain",
    ),
    Bug(
        "flag of the gradients awaited one step too early",
        "rnn",
        RNN_GRID,
        "size, hidden, static_cast<unsigned>(iteration));",
        "size, hidden, static_cast<unsigned>(iteration - 1));",
        "plain",
    ),
    Bug(
        "a single exchange buffer",
        "rnn",
        RNN_GRID,
        "    const bool active = step < pair.length;\n    int64_t part = 0;",
        "    const int64_t buffer = 0;\n    const bool active = step < pair.length;\n    int64_t part = 0;",
        "race",
    ),
    Bug(
        "published before all of the slice is written",
        "rnn",
        RNN_GRID,
        "    __syncthreads();  // the slice is written, and the partial sums are read\n",
        "",
        "race",
    ),
    Bug(
        "states of a block overwritten while they are read",
        "rnn",
        RNN_BLOCK,
        "    __syncthreads();  // the new states are there, and the old ones are read\n",
        "",
        "race",
    ),
    Bug(
        "stale state multiplied",
        "rnn",
        RNN_GRID,
        "product.multiply(states + (step & 1) * buffer,",
        "product.multiply(states + (max(step - 1, 0) & 1) * buffer,",
        "plain",
    ),
    Bug(
        "input and forget gates swapped",
        "rnn",
        RNN_CELLS,
        "const float i = sigmoid<T>(x[0] + a[0]), f = sigmoid<T>(x[1] + a[1]);",
        "const float i = sigmoid<T>(x[1] + a[1]), f = sigmoid<T>(x[0] + a[0]);",
        "plain",
    ),
    Bug(
        "reverse direction counted from the longest sequence's end",
        "rnn",
        RNN_CELLS,
        "const int t = reverse ? length - 1 - step : step;",
        "const int t = reverse ? static_cast<int>(shape.steps) - 1 - step : step;",
        "plain",
    ),
    Bug(
        "weights' tail loaded one element too far",
        "rnn",
        RNN_PRODUCT,
        "unit < hidden && k + i < size ? start[i]",
        "unit < hidden && k + i <= size ? start[i]",
        "asan",
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
        ATTENTION_SCORES,
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
    Bug(
        "dS not fenced before wgmma reads it",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "          fence_proxy_async();\n          wgmma_fence();\n",
        "          wgmma_fence();\n",
        "race",
    ),
    Bug(
        "no barrier between the halves of dS",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "          named_barrier(kAll, kConsumerThreads);  // dS is there",
        "          // dS is there",
        "race",
    ),
    Bug(
        "dQ read while wgmma writes it",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "          wgmma_wait<1>(grad_q);\n",
        "",
        "plain",
    ),
    Bug(
        "one tile of dS for all steps",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "ds_tiles + ring.stage * Tile::kScoreBytes",
        "ds_tiles",
        "race",
    ),
    Bug(
        "dQ staged over the sums that are read",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "          if (lane == 0) bulk_wait_read<0>();\n",
        "",
        "plain",
    ),
    Bug(
        "rows handed back while dK reads them",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "          wgmma_wait<1>();\n          if (lane == 0) mbarrier_arrive(&barriers.empty",
        "          if (lane == 0) mbarrier_arrive(&barriers.empty",
        "race",
    ),
    Bug(
        "MN-major steps of a K-major stride",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "right + k * kPanelRowBytes / 16, k > 0);",
        "right + k * 2 / 16, k > 0);",
        "plain",
    ),
    Bug(
        "backward draws dropout by the tile's first query",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "stage.head) * p.seqlen_q + query0;",
        "stage.head) * p.seqlen_q + stage.rows;",
        "plain",
    ),
    Bug(
        "the next sequence's rows left in the tile",
        "attention_hopper_backward",
        HOPPER_BACKWARD,
        "clear_rows<kQueries, kDim>(g_tiles + ring.stage * Tile::kQueryBytes, rows,",
        "clear_rows<kQueries, kDim>(g_tiles + ring.stage * Tile::kQueryBytes, kQueries,",
        "plain",
    ),
    Bug(
        "the first block's part of a slope's gradient left out",
        "attention",
        ATTENTION,
        "for (int i = lane; i < parts; i += 32) sum += source[i];",
        "for (int i = lane + 1; i < parts; i += 32) sum += source[i];",
        "plain",
    ),
    Bug(
        "parts of a sequence overlap by a key",
        "attention_decode",
        DECODE,
        "min(int64_t{from} + part, int64_t{to})",
        "min(int64_t{from} + part + 1, int64_t{to})",
        "plain",
    ),
    Bug(
        "parts added without their shares",
        "attention_decode",
        DECODE,
        "        sum.x += share * x.v[0];",
        "        sum.x += x.v[0];",
        "plain",
    ),
    Bug(
        "new rows written a row too far",
        "attention_decode",
        DECODE,
        "cache + (int64_t{length} + i) * cache_stride;",
        "cache + (int64_t{length} + i + 1) * cache_stride;",
        "plain",
    ),
    Bug(
        "a new row read from the cache that another block writes",
        "attention_decode",
        DECODE,
        "return row < length ?",
        "return row <= length ?",
        "race",
    ),
    Bug(
        "a warp asks for keys over those it reads",
        "attention_decode",
        DECODE,
        "    __syncwarp();  // everyone is done with them\n    ask_keys(later, stage);",
        "    ask_keys(later, stage);",
        "race",
    ),
    Bug(
        "keys loaded over those still multiplied",
        "attention_hopper",
        ATTENTION_HOPPER_FORWARD,
        "        mbarrier_wait(&bars.k_empty[keys.stage], keys.phase ^ 1);\n",
        "",
        "plain",
    ),
    Bug(
        "values loaded over those still multiplied",
        "attention_hopper",
        ATTENTION_HOPPER_FORWARD,
        "        mbarrier_wait(&bars.v_empty[values.stage], values.phase ^ 1);\n",
        "",
        "plain",
    ),
    Bug(
        "queries loaded over those of the tile before",
        "attention_hopper",
        ATTENTION_HOPPER_FORWARD,
        "        mbarrier_wait(&bars.q_empty[w], q_phase ^ 1);\n",
        "",
        "plain",
    ),
    Bug("scores not waited for", "attention_hopper", ATTENTION_HOPPER_FORWARD, "wgmma_wait<1>(scores);", "", "plain"),
    Bug(
        "output scaled while it is added to",
        "attention_hopper",
        ATTENTION_HOPPER_FORWARD,
        "      wgmma_wait<0>(out);\n      if (in_flight)",
        "      if (in_flight)",
        "plain",
    ),
    Bug(
        "output staged over the one still being stored",
        "attention_hopper",
        ATTENTION_HOPPER_FORWARD,
        "  if (Tile::kOwnOutput && leader) bulk_wait_read<0>();\n",
        "",
        "plain",
    ),
    Bug(
        "staged output not fenced for TMA",
        "attention_hopper",
        ATTENTION_HOPPER_FORWARD,
        "  fence_proxy_async();\n  named_barrier(barrier, kWarpgroup);\n",
        "  named_barrier(barrier, kWarpgroup);\n",
        "race",
    ),
    Bug(
        "stride between eight rows wrong in a descriptor",
        "attention_hopper",
        ATTENTION_HOPPER,
        "wgmma_descriptor(b, kDepth * kPanelRowBytes, kAtomBytes, 128)",
        "wgmma_descriptor(b, kDepth * kPanelRowBytes, kAtomBytes / 2, 128)",
        "plain",
    ),
    Bug(
        "next sequence's values multiplied by 0",
        "attention_hopper",
        ATTENTION_HOPPER_FORWARD,
        "        zero_rows<kKeys, kDim>(target, rows);\n",
        "",
        "plain",
    ),
]


class TritonBug(NamedTuple):
    """tests/triton/test_planted_bugs.py runs the kernels of the changed file in the interpreter."""

    name: str
    file: str
    old: str
    new: str


TRITON_ATTENTION = "bigkern/ops/attention/_triton_kernels.py"

TRITON_BUGS = [
    TritonBug("missing rescale of the accumulator", TRITON_ATTENTION, "v, acc * rescale[:, None],", "v, acc,"),
    TritonBug(
        "keys beyond the last one are seen",
        TRITON_ATTENTION,
        "(distance <= window_right) & (key < keys)",
        "(distance <= window_right)",
    ),
    TritonBug(
        "tiles that the window cuts count as whole",
        TRITON_ATTENTION,
        "whole_end = tl.minimum(keys, tl.maximum(row0 + shift + window_right + 1, 0)) // KEYS",
        "whole_end = tl.minimum(keys, tl.maximum(last + shift + window_right + 1, 0)) // KEYS",
    ),
    TritonBug(
        "dropout draws another mask in the backward pass",
        TRITON_ATTENTION,
        "_kept(philox, batch, head, heads, col, key0,",
        "_kept(philox, batch, head, heads, col, key0 + 4,",
    ),
    TritonBug("only one head of a group adds to its key", TRITON_ATTENTION, "steps * group, num", "steps, num"),
    TritonBug("the gradient of lse is forgotten", TRITON_ATTENTION, "if grad_lse is not None:", "if False:"),
]
