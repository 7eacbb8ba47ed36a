// Products of a block of 16 weights' rows with up to MAX_ROWS rows of activations, for every format of the weights.
//
// A decode step multiplies every weight by one row, or a few, so it runs at the speed at which weights arrive from memory.
// The loops read each weight once and in order, fetch what comes next, and do everything else in registers meanwhile.
#pragma once

#include "weights.h"

constexpr int64_t PREFETCH_L2 = 1024;      // bytes before their use at which weights are fetched into the L2 cache,
constexpr int64_t PREFETCH_L2_FAR = 8192;  // where more is done with each, or several streams run side by side,
constexpr int64_t PREFETCH_L1 = 512;       // and then into the L1 cache

inline void prefetch_l2(const char* p, int64_t distance) { __builtin_prefetch(p + distance, 0, 2); }
inline void prefetch_l1(const char* p) { __builtin_prefetch(p + PREFETCH_L1); }

// Four of the activations' bytes in every lane
inline IntVec broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return IntVec{} + four;
}

// acc[lane] += sum over j < 4 of w[lane][j] (unsigned) * x[lane][j] (signed), exactly
inline void dot4(IntVec& acc, IntVec w, IntVec x) {
#if defined(__AVX512VNNI__)
  acc = (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  // In halves of a byte, so that no 16-bit sum of two products saturates
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

// INT8 weights, quantized activations. R blocks at a time share what is loaded of the activations.
template <int M, int R> void dot_int8(const Weights& w, const int64_t* blocks, const PreparedRow* rows, Vec (*out)[MAX_ROWS]) {
  const char* data[R];
  const QuantizedGroup* x[M];
  for (int r = 0; r < R; r++) data[r] = w.data + blocks[r] * BLOCK_N * w.k;
  for (int m = 0; m < M; m++) x[m] = static_cast<const QuantizedGroup*>(rows[m]);
  Vec total[R][M] = {};
  for (int64_t g = 0; g < w.k / ACT_GROUP; g++) {  // two words of each of the 16 rows: 128 bytes
    IntVec first[R], second[R];
    for (int r = 0; r < R; r++) {
      const char* words = data[r] + g * 128;
      for (int line = 0; line < 128; line += 64) {
        prefetch_l2(words + line, M > 1 ? PREFETCH_L2_FAR : PREFETCH_L2);
        if (M > 1) prefetch_l1(words + line);
      }
      first[r] = load<IntVec>(words), second[r] = load<IntVec>(words + 64);
    }
    for (int m = 0; m < M; m++) {
      const IntVec q0 = broadcast4(x[m][g].q), q4 = broadcast4(x[m][g].q + 4);
      for (int r = 0; r < R; r++) {
        IntVec acc = {};
        dot4(acc, first[r], q0), dot4(acc, second[r], q4);
        total[r][m] += (as_float(acc) + x[m][g].offset) * x[m][g].scale;
      }
    }
  }
  for (int r = 0; r < R; r++) {
    const Vec scale = row_scales(w, blocks[r]);
    for (int m = 0; m < M; m++) out[r][m] = total[r][m] * scale;
  }
}

// INT4 weights, quantized activations
template <int M, int R> void dot_int4(const Weights& w, const int64_t* blocks, const PreparedRow* rows, Vec (*out)[MAX_ROWS]) {
  const char* data[R];
  const QuantizedGroup* x[M];
  for (int r = 0; r < R; r++) data[r] = w.data + blocks[r] * BLOCK_N * w.k / 2;
  for (int m = 0; m < M; m++) x[m] = static_cast<const QuantizedGroup*>(rows[m]);
  const IntVec low = IntVec{} + 0x0f0f0f0f;
  const int64_t n_groups = w.n_groups();  // a division, so not in the loop
  Vec total[R][M] = {};
  for (int64_t g = 0, end, group = 0; g < w.k / ACT_GROUP; g = end, group++) {  // a group of the weights
    end = std::min(w.k, g * ACT_GROUP + w.group_size) / ACT_GROUP;
    Vec partial[R][M] = {};
    for (; g < end; g++) {  // a group of the activations: one word of each of the 16 rows
      IntVec lo[R], hi[R];
      for (int r = 0; r < R; r++) {
        const char* words = data[r] + g * 64;
        prefetch_l2(words, PREFETCH_L2_FAR);
        if (M > 1) prefetch_l1(words);
        const IntVec v = load<IntVec>(words);
        lo[r] = v & low, hi[r] = (v >> 4) & low;
      }
      for (int m = 0; m < M; m++) {
        const IntVec q0 = broadcast4(x[m][g].q), q4 = broadcast4(x[m][g].q + 4);
        for (int r = 0; r < R; r++) {
          IntVec acc = {};
          dot4(acc, lo[r], q0), dot4(acc, hi[r], q4);
          partial[r][m] += as_float(acc) * x[m][g].scale;
        }
      }
    }
    for (int r = 0; r < R; r++) {
      const int64_t index = (blocks[r] * n_groups + group) * BLOCK_N;
      const Vec scale = load_bf16(w.scales + index), zero = load_u8(w.zeros + index);
      for (int m = 0; m < M; m++) total[r][m] += (partial[r][m] - zero * x[m][end - 1].offset) * scale;
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) out[r][m] = total[r][m];
}

// INT8 and INT4 weights, float32 activations: no rounding but float32's.
template <int M> void dot_exact(const Weights& w, int64_t block, const PreparedRow* rows, Vec* out) {
  const bool int4 = w.kind == Weights::INT4;
  const char* data = w.data + block * BLOCK_N * w.k / (int4 ? 2 : 1);
  Vec total[M] = {}, scale = Vec{} + 1, zero = Vec{} + 128;
  int64_t index = block * w.n_groups() * BLOCK_N;  // of the group's scales and zeros
  for (int64_t k = 0; k < w.k; data += 64) {
    if (int4 && k % w.group_size == 0) {
      scale = load_bf16(w.scales + index), zero = load_u8(w.zeros + index) * (1 / 16.0f);
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

// acc += 64 bytes of a times b, element by element
template <typename T> inline void multiply_add(Vec& acc, const T* a, const T* b) {
  for (size_t i = 0; i < 64 / sizeof(T); i += LANES) acc += load_vec(a + i) * load_vec(b + i);
}
#if defined(__AVX512BF16__)
inline void multiply_add(Vec& acc, const bf16* a, const bf16* b) {
  acc = (Vec)_mm512_dpbf16_ps((__m512)acc, load<__m512bh>(a), load<__m512bh>(b));
}
#endif

// Weights of the activations' own type, as they are: [n, k]. R rows at a time share what is loaded of the activations; U
// sums run side by side along each.
template <int M, typename T> void dot_native(const Weights& w, int64_t block, const PreparedRow* rows, Vec* out) {
  constexpr int R = M <= 2 ? 1 : 4, U = M <= 2 ? 4 : 1;
  constexpr int64_t WIDTH = 64 / sizeof(T);
  const int64_t k = w.k, n = std::min(BLOCK_N, w.n - block * BLOCK_N);
  const T *first = reinterpret_cast<const T*>(w.data) + block * BLOCK_N * k, *x[M];
  for (int m = 0; m < M; m++) x[m] = static_cast<const T*>(rows[m]);
  Vec sums[M][BLOCK_N] = {};
  for (int64_t r = 0; r < n; r += R) {
    const T* row[R];
    for (int j = 0; j < R; j++) row[j] = first + std::min(r + j, n - 1) * k;
    Vec acc[M][R][U] = {};
    const auto step = [&](int64_t i, int u) {
      for (int j = 0; j < R; j++) {
        const auto ahead = [&](int64_t bytes) {  // past the end of this row: the row that comes R rows later
          const int64_t to = i + bytes / int64_t(sizeof(T));
          return row[j] + to + (to < k ? 0 : (R - 1) * k);
        };
        __builtin_prefetch(ahead(R == 1 ? PREFETCH_L2 : PREFETCH_L2_FAR), 0, 2);
        if (R > 1) __builtin_prefetch(ahead(PREFETCH_L1));
        for (int m = 0; m < M; m++) multiply_add(acc[m][j][u], row[j] + i, x[m] + i);
      }
    };
    int64_t i = 0;
    for (; i + WIDTH * U <= k; i += WIDTH * U)
      for (int u = 0; u < U; u++) step(i + WIDTH * u, u);
    for (; i + WIDTH <= k; i += WIDTH) step(i, 0);
    for (int j = 0; j < R; j++)
      for (int m = 0; m < M; m++) {
        for (int u = 1; u < U; u++) acc[m][j][0] += acc[m][j][u];
        if constexpr (R == 1) out[m][r] = sum(acc[m][0][0]);
        else sums[m][r + j] = acc[m][j][0];
      }
  }
  if constexpr (R > 1)
    for (int m = 0; m < M; m++) out[m] = sum_each(sums[m]);
  // The rest of rows that are no multiple of WIDTH; inside the loop above it would cost registers
  for (int64_t i = k / WIDTH * WIDTH; i < k; i++)
    for (int64_t r = 0; r < n; r++)
      for (int m = 0; m < M; m++) out[m][r] += to_float(first[r * k + i]) * to_float(x[m][i]);
}

// out[i][m] = rows[m] . block blocks[i] of w, for one or two blocks. T: the activations' type
template <int M, typename T>
void dot_rows(const Weights& w, const int64_t* blocks, int64_t n_blocks, const PreparedRow* rows, Vec (*out)[MAX_ROWS]) {
  const bool quantized_rows = w.quantized() && !std::is_same_v<T, float>;
  if (quantized_rows && M > 2 && n_blocks == 2)
    return w.kind == Weights::INT8 ? dot_int8<M, 2>(w, blocks, rows, out) : dot_int4<M, 2>(w, blocks, rows, out);
  for (; n_blocks > 0; n_blocks--, blocks++, out++) {
    if (!w.quantized()) dot_native<M, T>(w, *blocks, rows, *out);
    else if (!quantized_rows) dot_exact<M>(w, *blocks, rows, *out);
    else if (w.kind == Weights::INT8) dot_int8<M, 1>(w, blocks, rows, out);
    else dot_int4<M, 1>(w, blocks, rows, out);
  }
}

// dot_rows for m rows, a number that is known when it runs
template <typename T>
void dot(int64_t m, const Weights& w, const int64_t* blocks, int64_t n_blocks, const PreparedRow* rows, Vec (*out)[MAX_ROWS]) {
  using Dot = void (*)(const Weights&, const int64_t*, int64_t, const PreparedRow*, Vec(*)[MAX_ROWS]);
  static constexpr Dot by_rows[] = {dot_rows<1, T>, dot_rows<2, T>, dot_rows<3, T>, dot_rows<4, T>,
                                    dot_rows<5, T>, dot_rows<6, T>, dot_rows<7, T>, dot_rows<8, T>};
  by_rows[m - 1](w, blocks, n_blocks, rows, out);
}
