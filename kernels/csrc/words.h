// Products whose factors are words of 32 bits: a float, or two bf16 that a CPU multiplies in one instruction. Prefill
// computes its products with them: the attention of many tokens, and linear layers.
//
//     product    a [ROWS, n words]              b [n, COLUMNS words]
//     q k^T      queries, words of head_dim     packed keys: word i of each key in row i
//     p v        words of keys                  packed values: the words (v[2j], v[2j + 1]) of each column in row j
//     x W^T      tokens, words of inputs        weights: word i of each output in row i
#pragma once

#include "simd.h"

using Word = uint32_t;
constexpr int64_t ROWS = 6;      // with 4 Vecs in a row, so many sums fit in 32 registers
constexpr int64_t COLUMNS = 64;  // 4 Vecs

#if defined(__AVX512BF16__)
template <typename T> constexpr int64_t PER_WORD = std::is_same_v<T, bf16> ? 2 : 1;
#else
template <typename T> constexpr int64_t PER_WORD = 1;
#endif

inline int64_t divide_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
inline int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

// acc[lane] += the product of word a and word b[lane].
template <typename T> inline void add_product(Vec& acc, Word a, const Word* b) {
#if defined(__AVX512BF16__)
  if constexpr (PER_WORD<T> == 2) {
    acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a), load<__m512bh>(b));
    return;
  }
#endif
  acc += std::bit_cast<float>(a) * load<Vec>(b);
}

// c [ROWS, COLUMNS] = a [ROWS, n] b [n, COLUMNS], or += if accumulates. The strides are in words: from a row of a, b
// or c to the next one, and from 16 columns of b to the next 16.
template <typename T, bool accumulates>
inline void multiply_words(const Word* a, int64_t a_stride, const Word* b, int64_t b_stride, int64_t b_column_stride,
                           int64_t n, float* c, int64_t c_stride) {
  Vec acc[ROWS][4] = {};
  const auto for_each_vec = [&](auto f) {  // unrolled, so that acc stays in registers
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) f(acc[r][v], r, v);
  };
  if constexpr (accumulates)
    for_each_vec([&](Vec& sum, int r, int v) { sum = load<Vec>(c + r * c_stride + v * LANES); });
  for (int64_t i = 0; i < n; i++)
    for_each_vec([&](Vec& sum, int r, int v) {
      add_product<T>(sum, a[r * a_stride + i], b + i * b_stride + v * b_column_stride);
    });
  for_each_vec([&](Vec& sum, int r, int v) { store_vec(sum, c + r * c_stride + v * LANES); });
}
