// Converts weights that are 8-bit floats, e4m3, to bf16 or float in registers, for the products in dot.h and amx.h.
//
// A line of a block is 64 bytes, 4 inputs of 16 outputs:
//
//     bits       s eeee mmm        (1 + m / 8) * 2^(e - 7), or m / 8 * 2^-6 where e is 0; s is the sign
//     16 bytes   of 4 outputs a, b, c, d: inputs 0 and 1 of each, then inputs 2 and 3
//
//                a0 a1  b0 b1  c0 c1  d0 d1    a2 a3  b2 b3  c2 c3  d2 d3
//
// So the lower and the upper half of each 16 bytes, widened to 16 bits, are registers with a pair of inputs for each of
// the 16 outputs. The instructions for bf16 multiply such pairs.
//
// Every function here gives 1/256 of a weight, so the scales are multiplied by FLOAT8_FACTOR, 256. This spares an
// addition: the bits of e become the exponent of f16 as they are, although f16 has a bias of 15 and e4m3 one of 7.
#pragma once

#include <array>

#include "simd.h"

// Whether bf16 activations are multiplied as bf16, for which and for float8_to_bf16 the CPU has instructions. Otherwise
// they become float.
#if defined(__AVX512BF16__) && defined(__GFNI__) && defined(__AVX512VBMI__)
constexpr bool HAS_FLOAT8_BF16 = true;
#else
constexpr bool HAS_FLOAT8_BF16 = false;
#endif

constexpr float FLOAT8_FACTOR = 256;
constexpr std::array<float, 256> FLOAT8_VALUES = [] {  // 1/256 of what each byte stands for
  std::array<float, 256> values = {};
  for (uint32_t byte = 0; byte < 256; byte++) {
    const uint32_t magnitude = byte & 127;  // of which a float has the exponent and mantissa at bit 20
    const float value = magnitude < 8 ? magnitude * 0x1p-17f : std::bit_cast<float>((magnitude << 20) + (112u << 23));
    values[byte] = byte & 128 ? -value : value;
  }
  return values;
}();

// ---- Conversion -----------------------------------------------------------------------------------------------------

// Holds a line as pairs of bf16: inputs 0 and 1 of 16 outputs, and inputs 2 and 3.
struct Bf16Line { IntVec inputs01, inputs23; };

inline Bf16Line float8_to_bf16(IntVec line) {
#if defined(__GFNI__) && defined(__AVX512VBMI__)
  // The upper and the lower byte of each bf16, of which a matrix of bits makes 64 at a time:
  //     upper   0 0111eee     (the sign comes last)
  //     lower   e mmm0000
  // Where eeee is 0, both come from tables of the numbers m / 8 * 2^-14 instead.
  const __m512i bytes = (__m512i)line;
  const __m512i upper_table = _mm512_set1_epi64(0x3838383837373700);
  const __m512i lower_table = _mm512_set1_epi64(0x60402000c0800000);
  const __mmask64 is_subnormal = _mm512_testn_epi8_mask(bytes, _mm512_set1_epi8(0x78));
  __m512i upper = _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x1020400000000000), 0x38);
  __m512i lower = _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x0000000001020408), 0);
  upper = _mm512_mask_permutexvar_epi8(upper, is_subnormal, bytes, upper_table);  // by the lowest 6 bits of bytes
  lower = _mm512_mask_permutexvar_epi8(lower, is_subnormal, bytes, lower_table);
  upper = _mm512_ternarylogic_epi32(upper, bytes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // upper | (bytes & 0x80)
  return {(IntVec)_mm512_unpacklo_epi8(lower, upper), (IntVec)_mm512_unpackhi_epi8(lower, upper)};
#else
  uint8_t bytes[64];
  uint16_t pairs[2][32];
  std::memcpy(bytes, &line, sizeof bytes);
  for (int i = 0; i < 64; i++)
    pairs[i % 16 / 8][i / 16 * 8 + i % 8] = std::bit_cast<uint32_t>(FLOAT8_VALUES[bytes[i]]) >> 16;
  return {load<IntVec>(pairs[0]), load<IntVec>(pairs[1])};
#endif
}

// Holds a line as floats. Lanes 2 i and 2 i + 1 are a pair of inputs of output i, or 8 + i.
struct FloatLine {
  Vec inputs01[2], inputs23[2];  // of outputs 0-7 and of outputs 8-15
};

// Goes by way of f16, s 0eeee mmm0000000: a weight in the upper byte of 16 bits, shifted right by one.
inline FloatLine float8_to_float(IntVec line) {
#if defined(__AVX512BW__)
  const auto convert = [](__m512i upper_bytes, Vec* out) {
    const __m512i halves = _mm512_and_si512(_mm512_srai_epi16(upper_bytes, 1), _mm512_set1_epi16(int16_t(0xbf80)));
    out[0] = (Vec)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    out[1] = (Vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  };
  const __m512i bytes = (__m512i)line, zero = {};
  FloatLine floats;
  convert(_mm512_unpacklo_epi8(zero, bytes), floats.inputs01);
  convert(_mm512_unpackhi_epi8(zero, bytes), floats.inputs23);
  return floats;
#elif defined(__AVX2__) && defined(__F16C__)
  const auto convert = [](__m256i upper_bytes, Vec& out) {
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(upper_bytes, 1), _mm256_set1_epi16(int16_t(0xbf80)));
    __m256* v = reinterpret_cast<__m256*>(&out);
    v[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves)), v[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  };
  FloatLine floats;
  for (int h = 0; h < 2; h++) {
    const __m256i bytes = reinterpret_cast<const __m256i*>(&line)[h], zero = {};
    convert(_mm256_unpacklo_epi8(zero, bytes), floats.inputs01[h]);
    convert(_mm256_unpackhi_epi8(zero, bytes), floats.inputs23[h]);
  }
  return floats;
#else
  uint8_t bytes[64];
  std::memcpy(bytes, &line, sizeof bytes);
  FloatLine floats;
  for (int i = 0; i < 64; i++)
    (i % 16 < 8 ? floats.inputs01 : floats.inputs23)[i / 32][i % 32 / 16 * 8 + i % 8] = FLOAT8_VALUES[bytes[i]];
  return floats;
#endif
}

// Unpacks a line to 1/256 of the inputs: [4 inputs, 16 outputs].
inline void float8_to_inputs(IntVec line, Vec* out) {
  const FloatLine pairs = float8_to_float(line);
  const Vec* halves[] = {pairs.inputs01, pairs.inputs23};
  for (int i = 0; i < 2; i++) {
    const Vec a = halves[i][0], b = halves[i][1];
    out[2 * i] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    out[2 * i + 1] = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
}
