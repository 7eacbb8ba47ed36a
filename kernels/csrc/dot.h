// Products of blocks of weights with 1 to MAX_TOKENS rows of activations, for every format of weights.
//
// A decode step multiplies every weight with few activations, so it is as fast as weights arrive from memory. These
// loops read each weight once, in order, prefetch the weights ahead, and compute in registers in the meantime. These
// have room for BLOCK_M rows. With more rows, the loops go through a block several times, while it is in the cache.
#pragma once

#include <array>
#include <utility>

#include "weights.h"

// Prefetch distances, in bytes: how far ahead of their use weights are fetched into a cache.
constexpr int64_t PREFETCH_L2 = 1024;
constexpr int64_t PREFETCH_L2_FAR = 8192;  // where a loop reads several streams or computes much for each weight
constexpr int64_t PREFETCH_L1 = 512;

// Whether a Vec is one register, of which there are 32.
#if defined(__AVX512F__)
constexpr bool HAS_WIDE_REGISTERS = true;
#else
constexpr bool HAS_WIDE_REGISTERS = false;
#endif

using Outputs = Vec[MAX_TOKENS];  // of one block, for each row of activations: [MAX_TOKENS, BLOCK_N]

// ---- Quantized weights ----------------------------------------------------------------------------------------------

// Four activations, in every lane.
inline IntVec broadcast4(const int8_t* x) { return IntVec{} + load<int32_t>(x); }

// acc[lane] += the sum over j < 4 of w[lane][j] (unsigned byte) * x[lane][j] (signed byte). Exact.
inline void dot4(IntVec& acc, IntVec w, IntVec x) {
#if defined(__AVX512VNNI__)
  acc = (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  // maddubs adds two products in 16 bits and saturates. With 4 bits of w at a time they always fit.
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), b = *reinterpret_cast<const __m256i*>(&x);
  __m256i* a = reinterpret_cast<__m256i*>(&acc);
  const __m256i* v = reinterpret_cast<const __m256i*>(&w);
  for (int h = 0; h < 2; h++) {
    const __m256i lo = _mm256_maddubs_epi16(_mm256_and_si256(v[h], low), b);
    const __m256i hi = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(v[h], 4), low), b);
    a[h] = _mm256_add_epi32(a[h], _mm256_madd_epi16(lo, ones));
    a[h] = _mm256_add_epi32(a[h], _mm256_slli_epi32(_mm256_madd_epi16(hi, ones), 4));
  }
#else
  const uint8_t* v = reinterpret_cast<const uint8_t*>(&w);
  const int8_t* y = reinterpret_cast<const int8_t*>(&x);
  for (int i = 0; i < 4 * BLOCK_N; i++) acc[i / 4] += int32_t(v[i]) * y[i];
#endif
}

inline Vec row_scales(const Weights& w, int64_t block) { return load_partial(w.row_scales, block * BLOCK_N, w.n); }

// INT8 weights, M rows of quantized activations. BLOCKS blocks at a time share the loads of the activations.
template <int M, int BLOCKS>
void dot_int8(const Weights& w, const int64_t* blocks, const PreparedRow* rows, Vec* const* out) {
  const char* data[BLOCKS];
  const QuantizedGroup* x[M];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  for (int m = 0; m < M; m++) x[m] = static_cast<const QuantizedGroup*>(rows[m]);
  Vec total[BLOCKS][M] = {};
  for (int64_t g = 0; g < w.k / ACT_GROUP; g++) {  // 8 inputs: two words of each of the 16 rows, 128 bytes
    IntVec first[BLOCKS], second[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) {
      const char* words = data[b] + g * 128;
      for (int line = 0; line < 128; line += 64) {
        prefetch_l2(words + line + (M > 1 ? PREFETCH_L2_FAR : PREFETCH_L2));
        if (M > 1) prefetch_l1(words + line + PREFETCH_L1);
      }
      first[b] = load<IntVec>(words), second[b] = load<IntVec>(words + 64);
    }
    for (int m = 0; m < M; m++) {
      const IntVec q0 = broadcast4(x[m][g].q), q4 = broadcast4(x[m][g].q + 4);
      for (int b = 0; b < BLOCKS; b++) {
        IntVec acc = {};
        dot4(acc, first[b], q0), dot4(acc, second[b], q4);
        total[b][m] += (as_float(acc) + x[m][g].offset) * x[m][g].scale;
      }
    }
  }
  for (int b = 0; b < BLOCKS; b++) {
    const Vec scale = row_scales(w, blocks[b]);
    for (int m = 0; m < M; m++) out[b][m] = total[b][m] * scale;
  }
}

// INT4 weights, M rows of quantized activations.
template <int M, int BLOCKS>
void dot_int4(const Weights& w, const int64_t* blocks, const PreparedRow* rows, Vec* const* out) {
  const char* data[BLOCKS];
  const QuantizedGroup* x[M];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  for (int m = 0; m < M; m++) x[m] = static_cast<const QuantizedGroup*>(rows[m]);
  const IntVec low = IntVec{} + 0x0f0f0f0f;
  const int64_t n_groups = w.n_groups();  // a division, so not in the loop
  Vec total[BLOCKS][M] = {};
  for (int64_t g = 0, end, group = 0; g < w.k / ACT_GROUP; g = end, group++) {  // a group of the weights
    end = std::min(w.k, g * ACT_GROUP + w.group_size) / ACT_GROUP;
    Vec partial[BLOCKS][M] = {};
    for (; g < end; g++) {  // 8 inputs: one word of each of the 16 rows, 64 bytes
      IntVec lo[BLOCKS], hi[BLOCKS];
      for (int b = 0; b < BLOCKS; b++) {
        const char* words = data[b] + g * 64;
        prefetch_l2(words + PREFETCH_L2_FAR);
        if (M > 1) prefetch_l1(words + PREFETCH_L1);
        const IntVec v = load<IntVec>(words);
        lo[b] = v & low, hi[b] = (v >> 4) & low;
      }
      for (int m = 0; m < M; m++) {
        const IntVec q0 = broadcast4(x[m][g].q), q4 = broadcast4(x[m][g].q + 4);
        for (int b = 0; b < BLOCKS; b++) {
          IntVec acc = {};
          dot4(acc, lo[b], q0), dot4(acc, hi[b], q4);
          partial[b][m] += as_float(acc) * x[m][g].scale;
        }
      }
    }
    for (int b = 0; b < BLOCKS; b++) {
      const int64_t index = (blocks[b] * n_groups + group) * BLOCK_N;
      const Vec scale = load_vec(w.scales + index), zero = load_vec(w.zeros + index);
      for (int m = 0; m < M; m++) total[b][m] += (partial[b][m] - zero * x[m][end - 1].offset) * scale;
    }
  }
  for (int b = 0; b < BLOCKS; b++)
    for (int m = 0; m < M; m++) out[b][m] = total[b][m];
}

// INT8 or INT4 weights, M rows of float32 activations. Nothing is rounded but in float32.
template <int M> void dot_exact(const Weights& w, int64_t block, const PreparedRow* rows, Vec* out) {
  const bool int4 = w.kind == Weights::INT4;
  const char* data = w.block_data(block);
  Vec total[M] = {}, scale = Vec{} + 1, zero = Vec{} + 128;
  int64_t index = block * w.n_groups() * BLOCK_N;  // of the group's scales and zeros
  for (int64_t k = 0; k < w.k; data += 64) {
    if (int4 && k % w.group_size == 0) {
      scale = load_vec(w.scales + index), zero = load_vec(w.zeros + index) * (1 / 16.0f);
      index += BLOCK_N;
    }
    const IntVec v = load<IntVec>(data);
    for (int half = 0; half < (int4 ? 2 : 1); half++)
      for (int j = 0; j < 4; j++, k++) {
        const Vec weight = (as_float((v >> (8 * j + 4 * half)) & (int4 ? 15 : 255)) - zero) * scale;
        for (int m = 0; m < M; m++) total[m] += weight * static_cast<const float*>(rows[m])[k];
      }
  }
  for (int m = 0; m < M; m++) out[m] = int4 ? total[m] : total[m] * row_scales(w, block);
}

// ---- Dense weights --------------------------------------------------------------------------------------------------

// Adds the products of 64 bytes of a and of b to acc, to any of its lanes: the caller uses only the sum of all lanes.
template <typename T> inline void multiply_add(Vec& acc, const T* a, const T* b) {
  for (size_t i = 0; i < 64 / sizeof(T); i += LANES) acc += load_vec(a + i) * load_vec(b + i);
}
#if defined(__AVX512BF16__)
inline void multiply_add(Vec& acc, const bf16* a, const bf16* b) {
  acc = (Vec)_mm512_dpbf16_ps((__m512)acc, load<__m512bh>(a), load<__m512bh>(b));
}
#endif

// out [m, BLOCK_N] += the rows [m] times w [n, k], but only inputs begin to k, which are fewer than 64 bytes.
// Not inlined into dot_native, so that its loop has more registers.
template <typename T>
[[gnu::noinline]]
void add_remainder(const T* w, int64_t n, int64_t k, int64_t begin, const PreparedRow* rows, int64_t m, Vec* out) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = begin; j < k; j++)
        out[i][r] += to_float(w[r * k + j]) * to_float(static_cast<const T*>(rows[i])[j]);
}

// Weights of the activations' type T, row by row: [n, k]. M rows of activations.
template <int M, typename T> void dot_native(const Weights& w, int64_t block, const PreparedRow* rows, Vec* out) {
  constexpr int R = M <= 2 ? 1 : 4;       // rows of weights that share the loads of the activations
  constexpr int UNROLL = M <= 2 ? 4 : 1;  // independent sums along a row, so that no addition waits for the one before
  constexpr int64_t WIDTH = 64 / sizeof(T);
  const int64_t k = w.k, n = std::min(BLOCK_N, w.n - block * BLOCK_N);
  const T *first = reinterpret_cast<const T*>(w.block_data(block)), *x[M];
  for (int m = 0; m < M; m++) x[m] = static_cast<const T*>(rows[m]);
  Vec sums[M][BLOCK_N] = {};
  for (int64_t r = 0; r < n; r += R) {
    const T* row[R];
    for (int j = 0; j < R; j++) row[j] = first + std::min(r + j, n - 1) * k;
    Vec acc[M][R][UNROLL] = {};
    const auto step = [&](int64_t i, int u) {
      for (int j = 0; j < R; j++) {
        const auto ahead = [&](int64_t bytes) {  // past the end of the row, in the row that is read next: R rows on
          const int64_t to = i + bytes / int64_t(sizeof(T));
          return row[j] + to + (to < k ? 0 : (R - 1) * k);
        };
        prefetch_l2(ahead(R == 1 ? PREFETCH_L2 : PREFETCH_L2_FAR));
        if (R > 1) prefetch_l1(ahead(PREFETCH_L1));
        for (int m = 0; m < M; m++) multiply_add(acc[m][j][u], row[j] + i, x[m] + i);
      }
    };
    int64_t i = 0;
    for (; i + WIDTH * UNROLL <= k; i += WIDTH * UNROLL)
      for (int u = 0; u < UNROLL; u++) step(i + WIDTH * u, u);
    for (; i + WIDTH <= k; i += WIDTH) step(i, 0);
    for (int j = 0; j < R; j++)
      for (int m = 0; m < M; m++) {
        for (int u = 1; u < UNROLL; u++) acc[m][j][0] += acc[m][j][u];
        if constexpr (R == 1) out[m][r] = sum(acc[m][0][0]);
        else sums[m][r + j] = acc[m][j][0];
      }
  }
  if constexpr (R > 1)
    for (int m = 0; m < M; m++) out[m] = sum_each(sums[m]);
  if (k % WIDTH) add_remainder(first, n, k, k / WIDTH * WIDTH, rows, M, out);
}

// ---- Any weights ----------------------------------------------------------------------------------------------------

// A block's outputs v and its part of bias [n], if bias is not null.
template <typename T> Vec add_bias(Vec v, const T* bias, int64_t block, int64_t n) {
  return bias ? v + load_partial(bias, block * BLOCK_N, n) : v;
}

// The product of M rows with n_blocks blocks, 1 or 2, of weights of any format. T: the activations' type.
template <int M, typename T>
void dot_rows(const Weights& w, const int64_t* blocks, int64_t n_blocks, const PreparedRow* rows, Vec* const* out) {
  const bool quantized_rows = quantizes_rows<T>(w);
  if constexpr (M > 2 && HAS_WIDE_REGISTERS)  // two blocks at a time, which share the loads of these many activations
    if (quantized_rows && n_blocks == 2)
      return w.kind == Weights::INT8 ? dot_int8<M, 2>(w, blocks, rows, out) : dot_int4<M, 2>(w, blocks, rows, out);
  for (; n_blocks > 0; n_blocks--, blocks++, out++) {
    if (w.kind == Weights::DENSE) dot_native<M, T>(w, *blocks, rows, *out);
    else if (!quantized_rows) dot_exact<M>(w, *blocks, rows, *out);
    else if (w.kind == Weights::INT8) dot_int8<M, 1>(w, blocks, rows, out);
    else dot_int4<M, 1>(w, blocks, rows, out);
  }
}

// dot_rows for 1, 2, ... BLOCK_M rows.
template <typename T, int... I> constexpr auto dot_by_rows(std::integer_sequence<int, I...>) {
  return std::array{&dot_rows<I + 1, T>...};
}

// out[b][i] = block blocks[b] of w . rows[i], for m rows [m] and n_blocks blocks, 1 or 2.
template <typename T>
void dot(int64_t m, const Weights& w, const int64_t* blocks, int64_t n_blocks, const PreparedRow* rows, Outputs* out) {
  static constexpr auto by_rows = dot_by_rows<T>(std::make_integer_sequence<int, BLOCK_M>());
  const int64_t n_parts = (m + BLOCK_M - 1) / BLOCK_M;  // of about the same number of rows
  for (int64_t i = 0; i < n_parts; i++) {
    const int64_t first = m * i / n_parts, n_rows = m * (i + 1) / n_parts - first;
    Vec* const part[] = {out[0] + first, out[1] + first};
    by_rows[n_rows - 1](w, blocks, n_blocks, rows + first, part);
  }
}
