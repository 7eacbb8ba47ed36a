// The loops of dot.h over blocks of unquantized weights.
//
//     dot_packed_bf16    packed bf16: a load has two inputs of each of 16 outputs (weights.h draws a block)
//     dot_unquantized    weights of any type that are not packed: a block is 16 rows of W, one after the other
//
// Packed weights are faster with several tokens. Memory is read in order, and the activations of a token are loaded
// once for 16 outputs. Weights that are not packed need the activations once for each output. The alternative is to
// read several rows in step, but that is not the order of memory. With k = 2048 a step of 5 tokens takes as long as 1.0
// steps of one token if weights are packed, and 1.4 steps if they are not (Zen 5, 80 GB/s).
#pragma once

#include "prefetch.h"
#include "prologue.h"

// Multiplies packed bf16 weights with M tokens.
template <int M, int BLOCKS>
void dot_packed_bf16(const Weights& w, const int64_t* blocks, const TokenTile& tile, const bf16* const* tokens,
                     f32x16* const* out) {
  // Two independent sums hide a part of the additions' latency. Keep two for any number of tokens: otherwise a sequence
  // would depend on the other sequences of the batch.
  constexpr int UNROLL = 2;
  const char* data[BLOCKS];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  const Prefetcher<M, BLOCKS> prefetch(w, tile);
  f32x16 acc[BLOCKS][M][UNROLL] = {};
  const auto step = [&](int64_t word, int u) {
    i32x16 words[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) {
      // Only every second word of a pair of blocks prefetches. A pair means at least two tiles of tokens, and each tile
      // prefetches at most half of the next weights: 64 bytes for two words.
      if (BLOCKS == 1 || u == 0) prefetch(data[b], 64 * word);
      words[b] = load<i32x16>(data[b] + 64 * word);
    }
#pragma GCC unroll 8  // so that the sums stay in registers
    for (int m = 0; m < M; m++) {
      const i32x16 x = broadcast2(tokens[m] + 2 * word);
      for (int b = 0; b < BLOCKS; b++) dot2(acc[b][m][u], words[b], x);
    }
  };
  int64_t word = 0;
  for (; word + UNROLL <= w.k / 2; word += UNROLL)
#pragma GCC unroll 2
    for (int u = 0; u < UNROLL; u++) step(word + u, u);
  if (word < w.k / 2) step(word, 0);
  for (int b = 0; b < BLOCKS; b++)
    for (int m = 0; m < M; m++) out[b][m] = acc[b][m][0] + acc[b][m][1];
}

// ---- Weights that are not packed ------------------------------------------------------------------------------------

// Adds the products of 64 bytes of a and b to acc. dot_unquantized adds up the lanes of acc after the loop.
template <typename T> inline void dot64(f32x16& acc, const T* a, const T* b) {
  for (size_t i = 0; i < 64 / sizeof(T); i += LANES) acc += load_vec(a + i) * load_vec(b + i);
}
#if defined(__AVX512BF16__)
inline void dot64(f32x16& acc, const bf16* a, const bf16* b) {
  acc = (f32x16)_mm512_dpbf16_ps((__m512)acc, load<__m512bh>(a), load<__m512bh>(b));
}
#endif

// Adds tokens [m, k] * w [n, k]^T to out [m, BLOCK_N], but only inputs begin to k - 1: less than 64 bytes. noinline
// leaves more registers to the loop in dot_unquantized.
template <typename T>
[[gnu::noinline]]
void add_remainder(const T* w, int64_t n, int64_t k, int64_t begin, const T* const* tokens, int64_t m, f32x16* out) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = begin; j < k; j++) out[i][r] += to_float(w[r * k + j]) * to_float(tokens[i][j]);
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
void dot_unquantized(const Weights& w, int64_t block, const TokenTile& tile, const T* const* tokens, f32x16* out) {
  constexpr int UNROLL = R > 1 ? 1 : 4;  // independent sums along k hide the latency of the additions
  constexpr int64_t WIDTH = 64 / sizeof(T), AHEAD = PREFETCH_DISTANCE / sizeof(T) / R;
  const int64_t k = w.k, n = std::min(BLOCK_N, w.n - block * BLOCK_N);
  const T *first = reinterpret_cast<const T*>(w.block_data(block)), *x[M];
  for (int m = 0; m < M; m++) x[m] = tokens[m];
  const Prefetcher<M, 1> prefetch(w, tile);
  f32x16 sums[M][BLOCK_N] = {};
  for (int64_t r = 0; r < n; r += R) {
    const T* weight[R];
    for (int j = 0; j < R; j++) weight[j] = first + std::min(r + j, n - 1) * k;
    f32x16 acc[M][R][UNROLL] = {};
    const auto step = [&](int64_t i, int u) {
      // R rows are read in step. Row r + j + R follows row r + j, so the address jumps over the R - 1 rows between
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
