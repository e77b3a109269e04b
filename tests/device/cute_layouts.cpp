// Prints CuTe's layouts, the oracle of test_layouts.py: one line each, a name, its parameters, then the values.
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <cstdio>

using namespace cute;

// The index into a column-major matrix of every value of every thread.
template <class Layout>
void print_fragment(const char* name, int rows, Layout layout, int threads, int values) {
  std::printf("fragment %s %d %d %d", name, rows, threads, values);
  for (int thread = 0; thread < threads; thread++) {
    for (int value = 0; value < values; value++) std::printf(" %d", static_cast<int>(layout(thread, value)));
  }
  std::printf("\n");
}

// A (kMn, kK) operand as tile_to_shape lays it out: the descriptor's byte offsets and, for every 16 elements of K,
// where the descriptor starts and the byte of each element.
template <class Atom, GMMA::Major kMajor, int kMn, int kK>
void print_operand(int swizzle) {
  constexpr bool kByMn = kMajor == GMMA::Major::MN;
  using Order = conditional_t<kByMn, Step<_2, _1>, Step<_1, _2>>;
  const auto layout = tile_to_shape(Atom{}, make_shape(Int<kMn>{}, Int<kK>{}), Order{});
  const auto flat = get_nonswizzle_portion(layout);
  const auto swizzled = get_swizzle_portion(Atom{});
  const auto tensor = make_tensor(make_smem_ptr(static_cast<bfloat16_t*>(nullptr)), layout);
  const auto first = local_tile(tensor, make_shape(Int<kMn>{}, Int<16>{}), make_coord(0, 0));
  const auto descriptor = GMMA::make_gmma_desc<kMajor>(first);
  std::printf("operand %s %d %d %d %d %d", kByMn ? "mn" : "k", swizzle, kMn, kK,
              static_cast<int>(descriptor.bitfield.leading_byte_offset_) * 16,
              static_cast<int>(descriptor.bitfield.stride_byte_offset_) * 16);
  for (int k = 0; k < kK; k += 16) std::printf(" %d", static_cast<int>(flat(0, k)) * 2);
  for (int mn = 0; mn < kMn; mn++) {
    for (int k = 0; k < kK; k++) std::printf(" %d", static_cast<int>(swizzled(static_cast<int>(flat(mn, k)) * 2)));
  }
  std::printf("\n");
}

int main() {
  using Mma = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  print_fragment("mma_a", 16, typename Mma::ALayout{}, 32, 8);
  print_fragment("mma_b", 8, typename Mma::BLayout{}, 32, 4);
  print_fragment("mma_c", 16, typename Mma::CLayout{}, 32, 4);
  using Tf32 = MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>;
  print_fragment("tf32_a", 16, typename Tf32::ALayout{}, 32, 4);
  print_fragment("tf32_b", 8, typename Tf32::BLayout{}, 32, 2);
  print_fragment("tf32_c", 16, typename Tf32::CLayout{}, 32, 4);
  constexpr auto kK = GMMA::Major::K, kMn = GMMA::Major::MN;
  using Wgmma = MMA_Traits<SM90::GMMA::MMA_64x96x16_F32BF16BF16_RS<kK, kK>>;
  print_fragment("wgmma_a", 64, typename Wgmma::ALayout{}, 128, 8);
  print_fragment("wgmma_d", 64, typename Wgmma::CLayout{}, 128, 48);

  using T = bfloat16_t;
  print_operand<GMMA::Layout_K_SW128_Atom<T>, kK, 128, 128>(128);
  print_operand<GMMA::Layout_K_SW64_Atom<T>, kK, 128, 64>(64);
  print_operand<GMMA::Layout_K_SW32_Atom<T>, kK, 64, 64>(32);
  print_operand<GMMA::Layout_K_INTER_Atom<T>, kK, 64, 64>(0);
  print_operand<GMMA::Layout_MN_SW128_Atom<T>, kMn, 64, 128>(128);
  print_operand<GMMA::Layout_MN_SW128_Atom<T>, kMn, 128, 176>(128);
  print_operand<GMMA::Layout_MN_SW64_Atom<T>, kMn, 128, 64>(64);
  print_operand<GMMA::Layout_MN_SW32_Atom<T>, kMn, 128, 64>(32);
  print_operand<GMMA::Layout_MN_INTER_Atom<T>, kMn, 64, 64>(0);
}
