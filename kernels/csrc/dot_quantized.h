// The loops of dot.h over quantized weights. A loop unpacks a few words at a time to registers, and multiplies them
// with all tokens of a tile. It reads 1 or 2 blocks in step, from the first word to the last (weights.h draws a block):
//
//     for each group of inputs, whose weights share a scale:              (dot_int8: all inputs)
//         for each ACT_GROUP_SIZE inputs:                                 (dot_float8, dot_dequantized: each word)
//             blocks[0] ->, blocks[1] ->                                  read, prefetch and unpack to registers
//             for each of M tokens:  partial [BLOCKS, M] += weights * x
//         total [BLOCKS, M] += scale * partial, less the zero points
//
//     loop               weights                                       activations
//     dot_int8           Int8                                          int8 (ActGroup)
//     dot_grouped        Int4, GroupedInt8, MXFP4: scales of groups    int8 (ActGroup)
//     dot_dequantized    any packed format                             float
//     dot_float8         Float8                                        bf16 or float
//
// Some loops copy the addresses of the tokens to a local array x [M], so that the compiler keeps them in registers.
#pragma once

#include "prologue.h"
#include "prefetch.h"

// ---- Integers and 4-bit floats --------------------------------------------------------------------------------------

// Copies four activations into every lane.
inline i32x16 broadcast4(const int8_t* x) { return i32x16{} + load<int32_t>(x); }

#if defined(__AVX2__)
constexpr bool HAS_FAST_DOT4 = true;
#else
constexpr bool HAS_FAST_DOT4 = false;
#endif

// Multiplies four unsigned bytes of w with four signed bytes of x in each lane. The sum is exact.
//
//     acc[lane] += w[lane][0] * x[lane][0] + ... + w[lane][3] * x[lane][3]
inline void dot4(i32x16& acc, i32x16 w, i32x16 x) {
#if defined(__AVX512VNNI__)
  acc = (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__)
  __m256i* a = reinterpret_cast<__m256i*>(&acc);
  const __m256i *v = reinterpret_cast<const __m256i*>(&w), *b = reinterpret_cast<const __m256i*>(&x);
  for (int h = 0; h < 2; h++) a[h] = _mm256_dpbusd_avx_epi32(a[h], v[h], b[h]);
#elif defined(__AVX2__)
  // maddubs adds w * x of two bytes in 16 bits, and saturates. Multiply the lower and the upper 4 bits of w separately,
  // because the sum of 4-bit products always fits.
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

// The weights of a block for ACT_GROUP_SIZE inputs, unpacked to bytes in the VNNI layout: lane i of quads[j] has
// elements 4 j to 4 j + 3 of output i.
constexpr int N_QUADS = ACT_GROUP_SIZE / 4;
template <typename F> constexpr int64_t PACKED_BYTES = 64 * ACT_GROUP_SIZE / F::ELEMENTS_PER_WORD;  // before unpacking
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

// Returns the dot products of the weights of 16 outputs with x.q, without the scale of x.
inline i32x16 dot_block(const UnpackedWeights& weights, const ActGroup& x) {
  i32x16 acc = {};
  for (int j = 0; j < N_QUADS; j++) dot4(acc, weights.quads[j], broadcast4(x.q + 4 * j));
  return acc;
}

// Multiplies Int8 weights with M tokens.
template <int M, int BLOCKS>
void dot_int8(const Weights& w, const int64_t* blocks, const TokenTile& tile, const ActGroup* const* tokens,
              f32x16* const* out) {
  const char* data[BLOCKS];
  const ActGroup* x[M];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  for (int m = 0; m < M; m++) x[m] = tokens[m];
  const Prefetcher<M, BLOCKS> prefetch(w, tile);
  constexpr int64_t N_BYTES = PACKED_BYTES<Int8>;
  f32x16 total[BLOCKS][M] = {};
  for (int64_t i = 0; i < divide_up(w.k, ACT_GROUP_SIZE); i++) {
    UnpackedWeights weights[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) {
      weights[b] = unpack_weights<Int8>(data[b] + i * N_BYTES);
      for (int64_t j = 0; j < N_BYTES; j += 64) prefetch(data[b], i * N_BYTES + j);
    }
#pragma GCC unroll 8  // so that the sums stay in registers
    for (int m = 0; m < M; m++)
      for (int b = 0; b < BLOCKS; b++)
        total[b][m] += (to_float(dot_block(weights[b], x[m][i])) + x[m][i].zero_correction) * x[m][i].scale;
  }
  for (int b = 0; b < BLOCKS; b++) {
    const f32x16 scale = Int8::channel_scales(w, blocks[b]);
    for (int m = 0; m < M; m++) out[b][m] = total[b][m] * scale;
  }
}

// Multiplies weights whose groups have scales with M tokens. i counts ActGroups: ACT_GROUP_SIZE inputs, whose
// activations share a scale. group counts w.group_size inputs, whose weights share a scale.
template <typename F, int M, int BLOCKS>
void dot_grouped(const Weights& w, const int64_t* blocks, const TokenTile& tile, const ActGroup* const* tokens,
                 f32x16* const* out) {
  constexpr int64_t N_BYTES = PACKED_BYTES<F>;
  const char* data[BLOCKS];
  const ActGroup* x[M];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  for (int m = 0; m < M; m++) x[m] = tokens[m];
  const Prefetcher<M, BLOCKS> prefetch(w, tile);
  f32x16 total[BLOCKS][M] = {};
  for (int64_t i = 0, end, group = 0; i < divide_up(w.k, ACT_GROUP_SIZE); i = end, group++) {
    end = divide_up(std::min(w.k, i * ACT_GROUP_SIZE + w.group_size), ACT_GROUP_SIZE);
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
          partial[b][m] += to_float(dot_block(weights[b], x[m][i])) * x[m][i].scale;
    }
    for (int b = 0; b < BLOCKS; b++) {
      if constexpr (BLOCKS > 1) prefetch.template scales<F>(w, blocks[b], group);
      const auto [scale, zero] = F::scales_and_zeros(w, blocks[b] * w.n_groups + group);
      for (int m = 0; m < M; m++) total[b][m] += (partial[b][m] - zero * x[m][end - 1].zero_correction) * scale;
    }
  }
  for (int b = 0; b < BLOCKS; b++)
    for (int m = 0; m < M; m++) out[b][m] = total[b][m];
}

// Multiplies weights of packed format F with M tokens in float32.
template <typename F, int M>
void dot_dequantized(const Weights& w, int64_t block, const float* const* tokens, f32x16* out) {
  const char* data = w.block_data(block);
  f32x16 total[M] = {};
  for (int64_t k = 0, group = block * w.n_groups; k < w.k; group++) {
    const auto [scale, zero] = F::scales_and_zeros(w, group);
    for (const int64_t end = std::min(w.k, k + w.group_size); k < end; data += 64) {
      const i32x16 words = load<i32x16>(data);
      for (int j = 0; j < F::ELEMENTS_PER_WORD; j++, k++) {
        const f32x16 weight = (to_float(F::element(words, j)) - zero) * scale;
        for (int m = 0; m < M; m++) total[m] += weight * tokens[m][k];
      }
    }
  }
  for (int m = 0; m < M; m++) out[m] = total[m] * F::channel_scales(w, block);
}

// ---- 8-bit floats ---------------------------------------------------------------------------------------------------

// Copies two floats into every pair of lanes.
inline f32x16 broadcast2(const float* x) { return (f32x16)(i64x8{} + load<int64_t>(x)); }

// Returns the sum of each pair of lanes: of a in lanes 0-7, of b in lanes 8-15.
inline f32x16 add_pairs(f32x16 a, f32x16 b) {
  return even_lanes(a, b) + odd_lanes(a, b);
}

// Multiplies Float8 weights with M tokens. X is bf16 or float. Scales the sum of each group of inputs.
//
// Each token has UNROLL * SUMS sums along k. They are independent, and so hide the latency of additions. Floats need
// two sums for the two lanes of a pair. With many tokens of bf16, one sum for each token suffices.
template <int M, int BLOCKS, typename X>
void dot_float8(const Weights& w, const int64_t* blocks, const TokenTile& tile, const X* const* tokens,
                f32x16* const* out) {
  constexpr bool IS_BF16 = std::is_same_v<X, bf16>;
  constexpr int UNROLL = M <= (IS_BF16 ? 4 : 2) ? 2 : 1, SUMS = IS_BF16 && M > 5 ? 1 : 2;
  const char* data[BLOCKS];
  for (int b = 0; b < BLOCKS; b++) data[b] = w.block_data(blocks[b]);
  const Prefetcher<M, BLOCKS> prefetch(w, tile);
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
              dot2(acc[b][m][u][0], weights[b].inputs01, x01);
              dot2(acc[b][m][u][SUMS - 1], weights[b].inputs23, x23);
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
