// The loop of dot.h over blocks of unquantized weights: dot_unquantized. A block is 16 rows of W, output by output.
#pragma once

#include "activations.h"
#include "prefetch.h"

// Adds the dot product of 64 bytes of a and b to acc. The dot product is the sum of all lanes: dot_unquantized adds up
// the lanes of acc after the loop.
template <typename T> inline void dot64(f32x16& acc, const T* a, const T* b) {
  for (size_t i = 0; i < 64 / sizeof(T); i += LANES) acc += load_vec(a + i) * load_vec(b + i);
}
#if defined(__AVX512BF16__)
inline void dot64(f32x16& acc, const bf16* a, const bf16* b) {
  acc = (f32x16)_mm512_dpbf16_ps((__m512)acc, load<__m512bh>(a), load<__m512bh>(b));
}
#endif

// Adds tokens [m, k] * w [n, k]^T to out [m, BLOCK_N], but only inputs begin to k - 1, which are less than 64 bytes.
// noinline leaves more registers to the loop in dot_unquantized.
template <typename T>
[[gnu::noinline]]
void add_remainder(const T* w, int64_t n, int64_t k, int64_t begin, const T* const* tokens, int64_t m, f32x16* out) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = begin; j < k; j++) out[i][r] += to_float(w[r * k + j]) * to_float(tokens[i][j]);
}

// Whether to multiply one output at a time. Then memory is read in order, which can be 1.5 times as fast as reading
// four outputs in step. But each output reads the activations again, so activations must fit in L1 and need no
// conversion.
constexpr int MAX_IN_ORDER = 6;               // the most tokens of such a loop
constexpr int64_t IN_ORDER_BYTES = 24 << 10;  // the most bytes of their activations
template <typename T> bool reads_in_order(int64_t k) {
#if defined(__AVX512BF16__)
  constexpr bool CONVERTS = std::is_same_v<T, f16>;
#else
  constexpr bool CONVERTS = !std::is_same_v<T, float>;
#endif
  return !CONVERTS && int64_t(MAX_IN_ORDER * sizeof(T)) * k <= IN_ORDER_BYTES;
}

// Multiplies Unquantized weights with M tokens, R outputs at a time. T is the type of weights and activations.
//
//     R = 1: in the order of memory      R = 4: four outputs share the loads of the activations
//
//     output 0  ------------------>      output 0  -------->  output 4  -------->
//     output 1  ------------------>      output 1  -------->  output 5  -------->
//     ...                                output 2  -------->  output 6  -------->
//                                        output 3  -------->  output 7  -------->
template <int M, int R, typename T>
void dot_unquantized(const Weights& w, int64_t block, const MBlock& m_block, const T* const* tokens, f32x16* out) {
  constexpr int UNROLL = R > 1 ? 1 : M <= 4 ? 4 : 2;  // independent sums along k hide the latency of the additions
  constexpr int64_t WIDTH = 64 / sizeof(T), AHEAD = PREFETCH / sizeof(T) / R;
  const int64_t k = w.k, n = std::min(BLOCK_N, w.n - block * BLOCK_N);
  const T *first = reinterpret_cast<const T*>(w.block_data(block)), *x[M];
  for (int m = 0; m < M; m++) x[m] = tokens[m];
  // Every output reads all activations again. If these take half of L1, weights prefetched far ahead would evict them:
  // verifying 5 tokens of a model with k = 2048 took 1.23 steps with PREFETCH and 1.13 with half of it (50 GB/s).
  const bool fills_l1 = M * k * int64_t(sizeof(T)) > IN_ORDER_BYTES / 2;
  const Prefetcher<M, 1> prefetch(w, m_block, fills_l1 ? PREFETCH / 2 : PREFETCH);
  f32x16 sums[M][BLOCK_N] = {};
  for (int64_t r = 0; r < n; r += R) {
    const T* weight[R];
    for (int j = 0; j < R; j++) weight[j] = first + std::min(r + j, n - 1) * k;
    f32x16 acc[M][R][UNROLL] = {};
    const auto step = [&](int64_t i, int u) {
      // R rows are read side by side. After row r + j comes row r + j + R, so the address jumps over the R - 1 between
      const int64_t ahead = i + AHEAD + (i + AHEAD < k ? 0 : (R - 1) * k);
      for (int j = 0; j < R; j++) {
        if constexpr (R == 1) prefetch(w.block_data(block), (r * k + i) * sizeof(T));
        else prefetch_l1(weight[j] + ahead);
        for (int m = 0; m < M; m++) dot64(acc[m][j][u], weight[j] + i, x[m] + i);
      }
    };
    int64_t i = 0;
    for (; i + WIDTH * UNROLL <= k; i += WIDTH * UNROLL)
      for (int u = 0; u < UNROLL; u++) step(i + WIDTH * u, u);
    for (; i + WIDTH <= k; i += WIDTH) step(i, 0);
    for (int j = 0; j < R; j++)
      for (int m = 0; m < M; m++) {
        for (int u = 1; u < UNROLL; u++) acc[m][j][0] += acc[m][j][u];
        sums[m][r + j] = acc[m][j][0];
      }
  }
  for (int m = 0; m < M; m++) out[m] = transpose_reduce_add(sums[m]);
  if (k % WIDTH) add_remainder(first, n, k, k / WIDTH * WIDTH, tokens, M, out);
}
