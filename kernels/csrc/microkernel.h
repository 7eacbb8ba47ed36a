// The microkernel of prefill's products, with BLIS's names: attention of many tokens, and linear layers. A Factor is 32
// bits, a float or two bf16, since AVX512-BF16 multiplies pairs of bf16 in one instruction and adds up both products.
//
//     product    a [MR, n factors]               b [n, NR factors]
//     q k^T      queries, factors of head_dim    packed keys: factor i of each key in row i
//     p v        factors of keys                 packed values: the factor (v[2j], v[2j + 1]) of each column in row j
//     x W^T      tokens, factors of inputs       weights: factor i of each output in row i
#pragma once

#include "simd.h"

using Factor = uint32_t;
constexpr int64_t MR = 6;   // rows; their sums, 4 vectors a row, fit in 32 registers
constexpr int64_t NR = 64;  // 4 vectors

// Elements of type T in a factor
#if defined(__AVX512BF16__)
template <typename T> constexpr int64_t PER_FACTOR = std::is_same_v<T, bf16> ? 2 : 1;
#else
template <typename T> constexpr int64_t PER_FACTOR = 1;
#endif

// acc[lane] += the product of factor a and factor b[lane].
template <typename T> inline void add_product(f32x16& acc, Factor a, const Factor* b) {
#if defined(__AVX512BF16__)
  if constexpr (PER_FACTOR<T> == 2) {
    acc = (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a), load<__m512bh>(b));
    return;
  }
#endif
  acc += std::bit_cast<float>(a) * load<f32x16>(b);
}

// c [MR, NR] = a [MR, n] b [n, NR], or += if accumulates. The strides are in factors: from a row of a, b or c to the
// next one, and from 16 columns of b to the next 16.
template <typename T, bool accumulates>
inline void microkernel(const Factor* a, int64_t a_stride, const Factor* b, int64_t b_stride, int64_t b_column_stride,
                        int64_t n, float* c, int64_t c_stride) {
  f32x16 acc[MR][4] = {};
  const auto for_each_vec = [&](auto f) {  // unrolled, so that acc stays in registers
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) f(acc[r][v], r, v);
  };
  if constexpr (accumulates)
    for_each_vec([&](f32x16& sum, int r, int v) { sum = load<f32x16>(c + r * c_stride + v * LANES); });
  for (int64_t i = 0; i < n; i++)
    for_each_vec([&](f32x16& sum, int r, int v) {
      add_product<T>(sum, a[r * a_stride + i], b + i * b_stride + v * b_column_stride);
    });
  for_each_vec([&](f32x16& sum, int r, int v) { store_vec(sum, c + r * c_stride + v * LANES); });
}
