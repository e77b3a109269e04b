// What every optimizer's step does around its own rule: gradient scale, weight decay, fp32 master weights, moving
// average of the weights, rounding, step counters. The rule is a functor (adam.cuh, sgd.cuh).
//
// For each element, in fp32, with the products and sums named here rounded or fused exactly so, by intrinsics: nvcc
// fuses what it may, the emulator's compiler nothing, and both shall give the bits of torch's CPU optimizers:
//     g = grad factor            factor = +-1 / grad_scale * min(1, max_norm / (total_norm + 1e-6)), - to maximize
//     g = fma(l1, sign(p), g)
//     g = fma(weight_decay, p, g)         or, decoupled, p = p (1 - lr weight_decay)
//     p, state = rule(g, p, state)
//     ema = lerp(ema, p, 1 - ema_decay)   of p as it is stored
#pragma once

#include "kernels/adam.h"
#include "kernels/multi_tensor.cuh"

namespace bigkern {
namespace optimizer_step {

using namespace multi_tensor;

// What the threads of a block share about a tensor.
template <class Scalars>
struct Job {
  int64_t grad, param, states[3], master, ema;
  int64_t numel;
  int64_t number;  // the first element's, counted in chunks through the list: names its random bits
  int dtypes;
  int group;
  float step;  // after this one; 0 where there is none
  bool aligned, stochastic;
  float factor, l1, l2, decay;
  float ema_weight;
  Scalars rule;
};

// torch's lerp: start + weight (end - start) for small weights, end - (1 - weight) (end - start) for large ones.
struct Lerp {
  float coefficient;
  bool from_start;

  static __device__ __forceinline__ Lerp of(float weight) {
    const bool small = fabsf(weight) < 0.5f;
    return {small ? weight : __fsub_rn(weight, 1.0f), small};
  }
  __device__ __forceinline__ float operator()(float start, float end) const {
    return __fmaf_rn(coefficient, __fsub_rn(end, start), from_start ? start : end);
  }
};

// What every gradient is multiplied by.
__device__ __forceinline__ float gradient_factor(const StepParams& params) {
  float factor = 1.0f;
  if (params.total_norm != nullptr) factor = clip_coefficient(*params.total_norm, params.max_norm);
  if (params.grad_scale != nullptr) factor = __fdiv_rn(factor, *params.grad_scale);
  return factor;
}

template <class Rule>
__device__ __forceinline__ void open_job(const StepParams& params, Job<typename Rule::Scalars>& job,
                                         const Job<typename Rule::Scalars>* previous, int tensor, int first_chunk) {
  const int64_t* row = params.list.tensors + int64_t{tensor} * kTensorColumns;
  job.grad = params.list.grads[tensor];
  job.param = row[kParamColumn];
  job.states[0] = row[kExpAvgColumn];
  job.states[1] = row[kExpAvgSqColumn];
  job.states[2] = row[kMaxExpAvgSqColumn];
  job.master = row[kMasterColumn];
  job.ema = row[kEmaColumn];
  const int64_t step = row[kStepColumn];
  job.step = step != 0 ? *reinterpret_cast<const float*>(step) + 1.0f : 0.0f;
  job.numel = row[kNumelColumn];
  job.number = int64_t{first_chunk} * kChunk;
  job.dtypes = static_cast<int>(row[kDtypesColumn]);
  job.group = static_cast<int>(row[kGroupColumn]);
  const int64_t addresses = job.grad | job.param | job.states[0] | job.states[1] | job.states[2] | job.master | job.ema;
  job.aligned = addresses % 16 == 0;
  if (previous != nullptr && previous->group == job.group && previous->step == job.step) {
    job.stochastic = previous->stochastic;
    job.factor = previous->factor;
    job.l1 = previous->l1;
    job.l2 = previous->l2;
    job.decay = previous->decay;
    job.ema_weight = previous->ema_weight;
    job.rule = previous->rule;
    return;
  }
  const double* hyper = params.hyper + job.group * kHyperColumns;
  const int64_t lr_address = __double_as_longlong(hyper[kLrPointerColumn]);
  const double lr = lr_address != 0 ? *reinterpret_cast<const float*>(lr_address) : hyper[kLrColumn];
  const double weight_decay = hyper[kWeightDecayColumn];
  const int flags = static_cast<int>(hyper[kFlagsColumn]);
  const bool decoupled = flags & kDecoupled;
  job.stochastic = flags & kStochasticRounding && params.philox != nullptr;
  const float factor = gradient_factor(params);
  job.factor = flags & kMaximize ? -factor : factor;
  job.l1 = static_cast<float>(hyper[kL1Column]);
  job.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
  job.decay = decoupled ? static_cast<float>(1.0 - lr * weight_decay) : 1.0f;
  job.ema_weight = static_cast<float>(1.0 - hyper[kEmaDecayColumn]);
  job.rule = Rule::scalars(hyper, flags, lr, job.step);
}

// Sixteen random bits for each element of a quad. Element n of the list, as counted by Job::number, has the upper half
// of word n % 4 of philox4x32_10(seed, n / 4, offset + (step << 32)): a replayed CUDA graph draws new ones with the
// step.
struct Noise {
  uint32_t low, high;

  __device__ __forceinline__ uint32_t operator[](int j) const {
    return (j < 2 ? low : high) >> (16 * (j % 2)) & 0xffffu;
  }
};

template <class Tile>
__device__ __forceinline__ Noise draw_noise(const int64_t* philox, int64_t number, float step, const Tile& tile,
                                            int quad) {
  const uint64_t seed = philox[0], offset = philox[1] + (static_cast<uint64_t>(step) << 32);
  if constexpr (Tile::kIsVector) {
    const uint4 words = philox4x32_10(seed, (number + tile.element(4 * quad)) / 4, offset);
    return {words.x >> 16 | (words.y & 0xffff0000u), words.z >> 16 | (words.w & 0xffff0000u)};
  } else {
    Noise noise{};
    // Unrolled, the rounds of four Philox would double the kernel's registers.
#pragma unroll 1
    for (int j = 0; j < 4; j++) {
      const uint64_t n = number + tile.element(4 * quad + j);
      const uint4 words = philox4x32_10(seed, n / 4, offset);
      const uint32_t word = n % 4 == 0 ? words.x : n % 4 == 1 ? words.y : n % 4 == 2 ? words.z : words.w;
      noise = {noise.low >> 16 | noise.high << 16, noise.high >> 16 | (word & 0xffff0000u)};
    }
    return noise;
  }
}

// The float rounded to bfloat16, up with the probability of its distance from the one below; infinities and NaN as they
// are.
__device__ __forceinline__ float round_stochastically(float x, uint32_t noise) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return __uint_as_float((bits + noise) & 0xffff0000u);
}

template <class Tile>
__device__ __forceinline__ void store_zeros(Quads<Kind::kParam, Tile>& grad, int quad) {
  const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  grad.store(quad, zeros);
}

template <class Rule, class Tile>
__device__ __forceinline__ void update_tile(const StepParams& params, const Job<typename Rule::Scalars>& job,
                                            const Tile& tile) {
  Quads<Kind::kParam, Tile> grad(job.grad, job.dtypes, tile), param(job.param, job.dtypes, tile);
  Quads<Kind::kFloat, Tile> master(job.master, job.dtypes, tile), ema(job.ema, job.dtypes, tile);
  typename Rule::template State<Tile> state(job.states, job.dtypes, tile);
#pragma unroll
  for (int quad = 0; quad < 2; quad++) {
    grad.fetch(quad);
    state.fetch(quad);
    float g[4], p[4];
    if (master.present()) {
      master.fetch(quad);
      master.get(p);
    } else {
      param.fetch(quad);
      param.get(p);
    }
    grad.get(g);

    const float factor = reload(job.factor), l1 = reload(job.l1), l2 = reload(job.l2), decay = reload(job.decay);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      g[j] = __fmul_rn(g[j], factor);
      if (l1 != 0.0f) g[j] = __fmaf_rn(l1, static_cast<float>((p[j] > 0.0f) - (p[j] < 0.0f)), g[j]);
      if (l2 != 0.0f) g[j] = __fmaf_rn(l2, p[j], g[j]);
      p[j] = __fmul_rn(p[j], decay);
    }
    state.update(quad, job.rule, g, p);

    if (params.zero_grads) store_zeros(grad, quad);
    const int code = reload(job.dtypes) & 0xff;
    if (reload(job.stochastic) && code == kBFloat16Code && !master.present()) {
      const Noise noise = draw_noise(params.philox, reload(job.number), reload(job.step), tile, quad);
#pragma unroll
      for (int j = 0; j < 4; j++) p[j] = round_stochastically(p[j], noise[j]);
    }
    param.store(quad, p);
    if (master.present()) master.store(quad, p);
    if (ema.present()) {
      const Lerp lerp = Lerp::of(job.ema_weight);
      const int stored = master.present() ? int{kFloatCode} : code;
      float average[4];
      ema.fetch(quad);
      ema.get(average);
#pragma unroll
      for (int j = 0; j < 4; j++) average[j] = lerp(average[j], round_to(stored, p[j]));
      ema.store(quad, average);
    }
  }
}

// Adds 1 to every step, several in flight a thread: each lies in memory of its own.
__device__ __forceinline__ void advance_steps(const MultiTensor& list) {
  constexpr int kAtOnce = 4;
  for (int64_t first = threadIdx.x; first < list.count; first += kAtOnce * kThreads) {
    float* steps[kAtOnce];
    float values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int64_t tensor = first + i * kThreads;
      steps[i] =
          tensor < list.count ? reinterpret_cast<float*>(list.tensors[tensor * kTensorColumns + kStepColumn]) : nullptr;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) values[i] = steps[i] != nullptr ? *steps[i] : 0.0f;
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      if (steps[i] != nullptr) *steps[i] = values[i] + 1.0f;
    }
  }
}

template <class Rule>
__device__ __forceinline__ void step(const StepParams& params) {
  using StepJob = Job<typename Rule::Scalars>;
  const bool skip = params.found_inf != nullptr && *params.found_inf != 0.0f;
  const auto open = [&](StepJob& job, const StepJob* previous, int tensor, int first_chunk) {
    open_job<Rule>(params, job, previous, tensor, first_chunk);
  };
  if (!skip) {
    for_each_tensor<StepJob>(params.list, open, [&](const StepJob& job, const Chunks& chunks) {
      for_each_tile(chunks, job.numel, job.aligned, [&](const auto& tile) { update_tile<Rule>(params, job, tile); });
    });
  } else if (params.zero_grads) {
    for_each_tensor<StepJob>(params.list, open, [&](const StepJob& job, const Chunks& chunks) {
      for_each_tile(chunks, job.numel, job.aligned, [&](const auto& tile) {
        Quads<Kind::kParam, std::decay_t<decltype(tile)>> grad(job.grad, job.dtypes, tile);
        store_zeros(grad, 0);
        store_zeros(grad, 1);
      });
    });
  }
  // The last block alone may change the steps: every other has read its own.
  if (is_last_block(finished_blocks(params.list))) {
    if (!skip) advance_steps(params.list);
    if (threadIdx.x == 0) *finished_blocks(params.list) = 0;
  }
}

}  // namespace optimizer_step
}  // namespace bigkern
