// Products of blocks of weights with the activations of 1 to MAX_CPU_TOKENS tokens, for every format of weights.
//
// A decode step multiplies every weight with few activations, so memory bandwidth limits its speed. The loops here read
// each weight once, prefetch later weights (prefetch.h), and keep the sums of up to BLOCK_M tokens in registers. For
// more tokens, the loops read a block of weights several times. After the first time the block is in the cache.
//
//     loop               weights                                       activations
//     dot_w8a8           Int8                                          int8 (ActGroup)
//     dot_grouped        Int4, GroupedInt8, MXFP4: scales of groups    int8 (ActGroup)
//     dot_weight_only    any packed format                             float
//     dot_float8         Float8                                        bf16 or float
//     dot_unquantized    Unquantized                                   the type of the weights
//
// Start reading at the end. Each function calls the next one:
//
//     multiply              cuts the tokens into m-blocks of up to BLOCK_M
//     multiply_by_format    finds the format F of the weights
//     run_loop              calls the loop for F and for the type of the activations
//
// Some loops copy the addresses of the tokens to x [M], a local array, which the compiler can keep in registers.
#pragma once

#include <array>
#include <utility>

#include "activations.h"
#include "prefetch.h"

// Whether an f32x16 fits in one register. CPUs with such registers have 32 of them.
#if defined(__AVX512F__)
constexpr bool HAS_WIDE_REGISTERS = true;
#else
constexpr bool HAS_WIDE_REGISTERS = false;
#endif

using BlockSums = f32x16[MAX_CPU_TOKENS];  // the products of a block of weights with each token: [tokens, BLOCK_N]

// ---- Quantized weights ----------------------------------------------------------------------------------------------

// Copies four activations into every lane.
inline i32x16 broadcast4(const int8_t* x) { return i32x16{} + load<int32_t>(x); }

// acc[lane] += the sum over j < 4 of w[lane][j] * x[lane][j]. Bytes of w are unsigned, bytes of x signed. Exact.
inline void dot4(i32x16& acc, i32x16 w, i32x16 x) {
#if defined(__AVX512VNNI__)
  acc = (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
  __m256i* a = reinterpret_cast<__m256i*>(&acc);
  const __m256i *v = reinterpret_cast<const __m256i*>(&w), *b = reinterpret_cast<const __m256i*>(&x);
  for (int h = 0; h < 2; h++) a[h] = _mm256_dpbusd_avx_epi32(a[h], v[h], b[h]);
#elif defined(__AVX2__)
  // maddubs adds two products in 16 bits and saturates. With 4 bits of w the sum always fits, so the lower and the
  // upper 4 bits are multiplied separately.
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

// The weights of a block for ACT_GROUP inputs, unpacked to bytes in the VNNI layout: lane i of quads[j] has elements
// 4 j to 4 j + 3 of output i.
constexpr int N_QUADS = ACT_GROUP / 4;
template <typename F> constexpr int64_t PACKED_BYTES = 64 * ACT_GROUP / F::ELEMENTS_PER_WORD;  // before unpacking
struct UnpackedWeights { i32x16 quads[N_QUADS]; };
template <typename F> UnpackedWeights unpack_weights(const char* words) {
  UnpackedWeights unpacked;
  if constexpr (F::ELEMENTS_PER_WORD == 4) {
    for (int j = 0; j < N_QUADS; j++) unpacked.quads[j] = load<i32x16>(words + 64 * j);
  } else {
    const i32x16 low = i32x16{} + 0x0f0f0f0f;
    for (int j = 0; j < N_QUADS; j += 2) {
      const i32x16 v = load<i32x16>(words + 32 * j);
      unpacked.quads[j] = F::unsigned_bytes(v & low), unpacked.quads[j + 1] = F::unsigned_bytes((v >> 4) & low);
    }
  }
  return unpacked;
}

// Returns the products of the weights of 16 outputs with a ActGroup, without its scale.
inline i32x16 dot_block(const UnpackedWeights& weights, const ActGroup& x) {
  i32x16 acc = {};
  for (int j = 0; j < N_QUADS; j++) dot4(acc, weights.quads[j], broadcast4(x.q + 4 * j));
  return acc;
}

// Multiplies Int8 weights with M tokens. Computes BLOCKS blocks at a time, which share the loads of the activations.
template <int M, int BLOCKS>
void dot_w8a8(const Weights& w, const int64_t* blocks, const MBlock& m_block, const ActGroup* const* tokens,
              f32x16* const* out) {
  const char* data[BLOCKS];
  const ActGroup* x[M];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  for (int m = 0; m < M; m++) x[m] = tokens[m];
  const Prefetcher<M, BLOCKS> prefetch(w, m_block);
  constexpr int64_t N_BYTES = PACKED_BYTES<Int8>;
  f32x16 total[BLOCKS][M] = {};
  for (int64_t i = 0; i < divide_up(w.k, ACT_GROUP); i++) {
    UnpackedWeights weights[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) {
      weights[b] = unpack_weights<Int8>(data[b] + i * N_BYTES);
      for (int64_t j = 0; j < N_BYTES; j += 64) prefetch(data[b], i * N_BYTES + j);
    }
#pragma GCC unroll 8  // so that the sums stay in registers
    for (int m = 0; m < M; m++)
      for (int b = 0; b < BLOCKS; b++)
        total[b][m] += (as_float(dot_block(weights[b], x[m][i])) + x[m][i].compensation) * x[m][i].scale;
  }
  for (int b = 0; b < BLOCKS; b++) {
    const f32x16 scale = Int8::output_scales(w, blocks[b]);
    for (int m = 0; m < M; m++) out[b][m] = total[b][m] * scale;
  }
}

// Multiplies weights of format F, Int4, MXFP4 or GroupedInt8, with M tokens. i counts groups of ACT_GROUP inputs,
// whose activations share a scale. group counts runs of w.group_size inputs, whose weights share a scale.
template <typename F, int M, int BLOCKS>
void dot_grouped(const Weights& w, const int64_t* blocks, const MBlock& m_block, const ActGroup* const* tokens,
                 f32x16* const* out) {
  constexpr int64_t N_BYTES = PACKED_BYTES<F>;
  const char* data[BLOCKS];
  const ActGroup* x[M];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  for (int m = 0; m < M; m++) x[m] = tokens[m];
  const Prefetcher<M, BLOCKS> prefetch(w, m_block);
  f32x16 total[BLOCKS][M] = {};
  for (int64_t i = 0, end, group = 0; i < divide_up(w.k, ACT_GROUP); i = end, group++) {
    end = divide_up(std::min(w.k, i * ACT_GROUP + w.group_size), ACT_GROUP);
    f32x16 partial[BLOCKS][M] = {};
    for (; i < end; i++) {
      UnpackedWeights weights[BLOCKS];
      for (int b = 0; b < BLOCKS; b++) {
        weights[b] = unpack_weights<F>(data[b] + i * N_BYTES);
        for (int64_t j = 0; j < N_BYTES; j += 64) prefetch(data[b], i * N_BYTES + j);
      }
#pragma GCC unroll 8  // so that the sums stay in registers
      for (int m = 0; m < M; m++)
        for (int b = 0; b < BLOCKS; b++)
          partial[b][m] += as_float(dot_block(weights[b], x[m][i])) * x[m][i].scale;
    }
    for (int b = 0; b < BLOCKS; b++) {
      const auto [scale, zero] = F::scales_and_zeros(w, blocks[b] * w.n_groups + group);
      for (int m = 0; m < M; m++) total[b][m] += (partial[b][m] - zero * x[m][end - 1].compensation) * scale;
    }
  }
  for (int b = 0; b < BLOCKS; b++)
    for (int m = 0; m < M; m++) out[b][m] = total[b][m];
}

// Multiplies weights of packed format F with M tokens in float32.
template <typename F, int M>
void dot_weight_only(const Weights& w, int64_t block, const float* const* tokens, f32x16* out) {
  const char* data = w.block_data(block);
  f32x16 total[M] = {};
  for (int64_t k = 0, group = block * w.n_groups; k < w.k; group++) {
    const auto [scale, zero] = F::scales_and_zeros(w, group);
    for (const int64_t end = std::min(w.k, k + w.group_size); k < end; data += 64) {
      const i32x16 words = load<i32x16>(data);
      for (int j = 0; j < F::ELEMENTS_PER_WORD; j++, k++) {
        const f32x16 weight = (as_float(F::element(words, j)) - zero) * scale;
        for (int m = 0; m < M; m++) total[m] += weight * tokens[m][k];
      }
    }
  }
  for (int m = 0; m < M; m++) out[m] = total[m] * F::output_scales(w, block);
}

// ---- 8-bit floats ---------------------------------------------------------------------------------------------------

// Copies two bf16 into every lane, or two floats into every pair of lanes.
inline i32x16 broadcast2(const bf16* x) { return i32x16{} + load<int32_t>(x); }
inline f32x16 broadcast2(const float* x) { return (f32x16)(i64x8{} + load<int64_t>(x)); }

// acc[lane] += w[lane][0] * x[lane][0] + w[lane][1] * x[lane][1]. Each lane of w and x holds two bf16.
inline void add_bf16_products(f32x16& acc, i32x16 w, i32x16 x) {
#if defined(__AVX512BF16__)
  acc = (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  const i32x16 upper = i32x16{} + int32_t(0xffff0000);
  acc += (f32x16)(w << 16) * (f32x16)(x << 16) + (f32x16)(w & upper) * (f32x16)(x & upper);
#endif
}

// Returns the sum of each pair of lanes: of a in lanes 0-7, of b in lanes 8-15.
inline f32x16 add_pairs(f32x16 a, f32x16 b) {
  return even_lanes(a, b) + odd_lanes(a, b);
}

// Multiplies Float8 weights with M tokens. X is bf16 or float. Scales the sum of each group of inputs.
//
// Independent sums along k, UNROLL * SUMS for each token, hide the latency of the additions. Floats need two for the
// two lanes of a pair. With many tokens, one sum of bf16 products is enough.
template <int M, int BLOCKS, typename X>
void dot_float8(const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
                f32x16* const* out) {
  constexpr bool IS_BF16 = std::is_same_v<X, bf16>;
  constexpr int UNROLL = M <= (IS_BF16 ? 4 : 2) ? 2 : 1, SUMS = IS_BF16 && M > 5 ? 1 : 2;
  const char* data[BLOCKS];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  const Prefetcher<M, BLOCKS> prefetch(w, m_block);
  f32x16 total[BLOCKS][M] = {};
  for (int64_t k = 0, group = 0; k < w.k; group++) {
    f32x16 acc[BLOCKS][M][UNROLL][SUMS] = {};
    for (const int64_t end = std::min(w.k, k + w.group_size); k < end; k += 4 * UNROLL)
#pragma GCC unroll 2
      for (int u = 0; u < UNROLL; u++) {
        const int64_t i = k + 4 * u, offset = i * BLOCK_N;
        std::conditional_t<IS_BF16, Bf16Pairs, FloatPairs> weights[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) {
          prefetch(data[b], offset);
          if constexpr (IS_BF16) weights[b] = float8_to_bf16(load<i32x16>(data[b] + offset));
          else weights[b] = float8_to_float(load<i32x16>(data[b] + offset));
        }
#pragma GCC unroll 8  // so that the sums stay in registers
        for (int m = 0; m < M; m++) {
          const auto x01 = broadcast2(tokens[m] + i), x23 = broadcast2(tokens[m] + i + 2);
          for (int b = 0; b < BLOCKS; b++) {
            if constexpr (IS_BF16) {
              add_bf16_products(acc[b][m][u][0], weights[b].inputs01, x01);
              add_bf16_products(acc[b][m][u][SUMS - 1], weights[b].inputs23, x23);
            } else {
              for (int h = 0; h < 2; h++) {
                acc[b][m][u][h] += weights[b].inputs01[h] * x01;
                acc[b][m][u][h] += weights[b].inputs23[h] * x23;
              }
            }
          }
        }
      }
    for (int b = 0; b < BLOCKS; b++) {
      const f32x16 scale = Float8::scales_and_zeros(w, blocks[b] * w.n_groups + group).scales;
      for (int m = 0; m < M; m++) {
        f32x16 sums[2] = {acc[b][m][0][0], acc[b][m][0][SUMS - 1]};
        for (int u = 1; u < UNROLL; u++) sums[0] += acc[b][m][u][0], sums[1] += acc[b][m][u][1];
        total[b][m] += scale * (!IS_BF16 ? add_pairs(sums[0], sums[1]) : SUMS == 2 ? sums[0] + sums[1] : sums[0]);
      }
    }
  }
  for (int b = 0; b < BLOCKS; b++)
    for (int m = 0; m < M; m++) out[b][m] = total[b][m];
}

// ---- Unquantized weights --------------------------------------------------------------------------------------------

// Multiplies 64 bytes of a and b element by element, and adds the products to acc. The caller sums all lanes of acc, so
// a product may go to any lane.
template <typename T> inline void multiply_add(f32x16& acc, const T* a, const T* b) {
  for (size_t i = 0; i < 64 / sizeof(T); i += LANES) acc += load_vec(a + i) * load_vec(b + i);
}
#if defined(__AVX512BF16__)
inline void multiply_add(f32x16& acc, const bf16* a, const bf16* b) {
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
// four outputs in step. But each output reads the activations again, so they must fit in L1 and need no conversion.
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
template <int M, int R, typename T>
void dot_unquantized(const Weights& w, int64_t block, const MBlock& m_block, const T* const* tokens, f32x16* out) {
  constexpr int UNROLL = R > 1 ? 1 : M <= 4 ? 4 : 2;  // independent sums along k, as above
  constexpr int64_t WIDTH = 64 / sizeof(T), AHEAD = PREFETCH / sizeof(T) / R;
  const int64_t k = w.k, n = std::min(BLOCK_N, w.n - block * BLOCK_N);
  const T *first = reinterpret_cast<const T*>(w.block_data(block)), *x[M];
  for (int m = 0; m < M; m++) x[m] = tokens[m];
  const Prefetcher<M, 1> prefetch(w, m_block);
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
        for (int m = 0; m < M; m++) multiply_add(acc[m][j][u], weight[j] + i, x[m] + i);
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

// ---- Any weights ----------------------------------------------------------------------------------------------------

// Adds the bias [n] of a block to the outputs v of the block. A null bias adds nothing.
template <typename T> f32x16 add_bias(f32x16 v, const T* bias, int64_t block, int64_t n) {
  return bias ? v + load_partial(bias, block * BLOCK_N, n) : v;
}

// The first steps of an epilogue. Adds the bias [n] to sums[b][token], the products with block blocks[b], and applies
// the activation. If it is gated, b is 0, blocks[0] is of the gate projection, and blocks[1] of the up projection.
template <typename T>
f32x16 add_bias_and_activate(const BlockSums* sums, int64_t token, int64_t b, const int64_t* blocks, const T* bias,
                             int64_t n, Activation activation) {
  const f32x16 v = add_bias(sums[b][token], bias, blocks[b], n);
  const f32x16 up = is_gated(activation) ? add_bias(sums[1][token], bias, blocks[1], n) : f32x16{};
  return activate_vec(v, up, activation);
}

// Multiplies M tokens with BLOCKS blocks of weights, by the loop for the format and the type X of the activations. The
// first template is for all packed formats without an overload.
template <int M, int BLOCKS, typename F, typename X>
void run_loop(F, const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  if constexpr (std::is_same_v<X, ActGroup>) dot_grouped<F, M, BLOCKS>(w, blocks, m_block, tokens, out);
  else for (int b = 0; b < BLOCKS; b++) dot_weight_only<F, M>(w, blocks[b], tokens, out[b]);
}
template <int M, int BLOCKS, typename X>
void run_loop(Unquantized, const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  auto dot = dot_unquantized<M, M <= 2 ? 1 : 4, X>;
  if constexpr (M > 2 && M <= MAX_IN_ORDER)
    if (reads_in_order<X>(w.k)) dot = dot_unquantized<M, 1, X>;
  for (int b = 0; b < BLOCKS; b++) dot(w, blocks[b], m_block, tokens, out[b]);
}
template <int M, int BLOCKS, typename X>
void run_loop(Int8, const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  if constexpr (std::is_same_v<X, ActGroup>) dot_w8a8<M, BLOCKS>(w, blocks, m_block, tokens, out);
  else for (int b = 0; b < BLOCKS; b++) dot_weight_only<Int8, M>(w, blocks[b], tokens, out[b]);
}
template <int M, int BLOCKS, typename X>
void run_loop(Float8, const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  dot_float8<M, BLOCKS>(w, blocks, m_block, tokens, out);
}

// multiply for M tokens, M <= BLOCK_M. T is the type that the activations had before preparation.
template <int M, typename T>
void multiply_by_format(const Weights& w, const int64_t* blocks, int64_t n_blocks, const MBlock& m_block,
                        const PreparedToken* tokens, f32x16* const* out) {
  dispatch_format(w.format, [&]<typename F>(F format) {
    const Prepared<F, T>* typed[M];
    for (int m = 0; m < M; m++) typed[m] = static_cast<const Prepared<F, T>*>(tokens[m]);
    // Two blocks in step share the loads of the activations. With up to 5 tokens, reading memory in order is faster.
    constexpr bool IS_BF16_FLOAT8 = std::is_same_v<F, Float8> && std::is_same_v<Prepared<F, T>, bf16>;
    if constexpr (HAS_WIDE_REGISTERS && ((M > 2 && ROUNDS_TO_INT8<F, T>) || (M > 4 && IS_BF16_FLOAT8)))
      if (n_blocks == 2 && (M > 5 || m_block.count > 1)) return run_loop<M, 2>(format, w, blocks, m_block, typed, out);
    for (int64_t b = 0; b < n_blocks; b++) run_loop<M, 1>(format, w, blocks + b, m_block, typed, out + b);
  });
}

// Returns the addresses of multiply_by_format for 1, 2, ... BLOCK_M tokens.
template <typename T, int... I> constexpr auto functions_by_tokens(std::integer_sequence<int, I...>) {
  return std::array{&multiply_by_format<I + 1, T>...};
}

// Returns how many of m tokens an m-block may have. Of 8 tokens, the sums with 4 outputs do not fit in registers.
// Still one loop over 8 tokens is faster than two loops.
template <typename T> int64_t most_tokens(const Weights& w, int64_t m) {
  const bool is_unquantized = dispatch_format(w.format, []<typename F>(F) { return std::is_same_v<F, Unquantized>; });
  return is_unquantized && (reads_in_order<T>(w.k) || (HAS_WIDE_REGISTERS && m > BLOCK_M)) ? MAX_IN_ORDER : BLOCK_M;
}

// Computes out[b][i] = tokens[i] * (block blocks[b] of w)^T for tokens [m] and 1 or 2 blocks.
template <typename T>
void multiply(int64_t m, const Weights& w, const int64_t* blocks, int64_t n_blocks, const PreparedToken* tokens,
              BlockSums* out) {
  static constexpr auto by_tokens = functions_by_tokens<T>(std::make_integer_sequence<int, BLOCK_M>());
  const int64_t n_in_step = n_blocks == 2 && blocks[1] == blocks[0] + 1 ? 2 : 1;
  const int64_t n_m_blocks = divide_up(m, most_tokens<T>(w, m));  // of nearly equal numbers of tokens
  for (int64_t i = 0; i < n_m_blocks; i++) {
    const int64_t first = m * i / n_m_blocks, n_tokens = m * (i + 1) / n_m_blocks - first;
    f32x16* const m_block_out[] = {out[0] + first, out[1] + first};
    by_tokens[n_tokens - 1](w, blocks, n_blocks, {i, n_m_blocks, n_in_step}, tokens + first, m_block_out);
  }
}
