// The GEMM microkernel of prefill, with BLIS's names: c [MR, NR] = a [MR, n] b [n, NR].
//
// An element of a or b is a VnniPair, 32 bits: two bf16 that are neighbours along n. The instruction vdpbf16ps of
// AVX512-BF16 computes the dot product of two pairs in each of 16 lanes. On other CPUs, and for other types, an element
// is a float. prefill_attention.h and prefill_linear.h multiply
//
//     GEMM       a [MR, n]                     b [n, NR]
//     q k^T      queries, pairs of head_dim    packed keys: row i has pair i of each key
//     p v        pairs of keys                 packed values: row j has the pair (v[2j], v[2j + 1]) of each column
//     x W^T      tokens, pairs of inputs       weights: row i has pair i of each output
//
// The layout of b is called VNNI. With bf16, row i has inputs 2 i and 2 i + 1 of the sum, for each column:
//
//               column 0                column 1                      column NR - 1
//     row i     b[2i][0] b[2i+1][0]     b[2i][1] b[2i+1][1]    ...    b[2i][NR-1] b[2i+1][NR-1]
//               32 bits, a lane
#pragma once

#include "simd.h"

using VnniPair = uint32_t;
constexpr int64_t MR = 6;   // rows; their sums, 4 vectors a row, fit in 32 registers
constexpr int64_t NR = 64;  // 4 vectors

// Elements of type T in a VnniPair
#if defined(__AVX512BF16__)
template <typename T> constexpr int64_t VNNI_SIZE = std::is_same_v<T, bf16> ? 2 : 1;
#else
template <typename T> constexpr int64_t VNNI_SIZE = 1;
#endif

// acc[lane] += the dot product of pair a and pair b[lane].
template <typename T> inline void dot_pairs(f32x16& acc, VnniPair a, const VnniPair* b) {
  if constexpr (VNNI_SIZE<T> == 2) dot2(acc, i32x16{} + int32_t(a), load<i32x16>(b));
  else acc += std::bit_cast<float>(a) * load<f32x16>(b);
}

// c [MR, NR] = a [MR, n] b [n, NR], or += if accumulates. a_stride, b_stride and c_stride lead from a row to the next,
// and b_column_stride leads from 16 columns of b to the next 16.
template <typename T, bool accumulates>
inline void microkernel(const VnniPair* a, int64_t a_stride, const VnniPair* b, int64_t b_stride,
                        int64_t b_column_stride, int64_t n, float* c, int64_t c_stride) {
  f32x16 acc[MR][4] = {};
  const auto for_each_vec = [&](auto f) {  // unrolled, to keep acc in registers
#pragma GCC unroll 6
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) f(acc[r][v], r, v);
  };
  if constexpr (accumulates)
    for_each_vec([&](f32x16& sum, int r, int v) { sum = load<f32x16>(c + r * c_stride + v * LANES); });
  for (int64_t i = 0; i < n; i++)
    for_each_vec([&](f32x16& sum, int r, int v) {
      dot_pairs<T>(sum, a[r * a_stride + i], b + i * b_stride + v * b_column_stride);
    });
  for_each_vec([&](f32x16& sum, int r, int v) { store_vec(sum, c + r * c_stride + v * LANES); });
}
