// Converts e4m3 weights, 8-bit floats, to bf16 or float in registers.
//
// An e4m3 number has the bits s eeee mmm: sign, exponent and mantissa. Its magnitude is
//
//     (1 + m / 8) * 2^(e - 7)    if e > 0
//     m / 8 * 2^-6               if e = 0 (a subnormal number)
//
// 64 bytes of a block hold 4 inputs of 16 outputs. In each 16 bytes are 4 outputs a, b, c, d: first inputs 0 and 1 of
// each output, then inputs 2 and 3.
//
//     a0 a1  b0 b1  c0 c1  d0 d1    a2 a3  b2 b3  c2 c3  d2 d3
//
// The bf16 instructions multiply pairs of inputs. Unpack instructions take the lower or the upper half of each 16 bytes
// and widen each byte to 16 bits. The result is a register with one pair of inputs for each of the 16 outputs.
//
// The functions here return 1/256 of the weights. They leave the bits of a weight unchanged in an f16. That saves an
// addition for each weight, but an f16's exponent has the bias 15, and not 7:
//
//     e4m3    0  0111 100              1.5 * 2^(7 - 7)   =  1.5
//     f16     0 00111 1000000000       1.5 * 2^(7 - 15)  =  1.5 / 256
//
// So Float8::scales_and_zeros multiplies the scales by 256, FLOAT8_FACTOR.
#pragma once

#include <array>

#include "simd.h"

// Whether a matmul of Float8 weights takes bf16 activations as they are: if the CPU has the instructions of dot2
// (simd.h) and of float8_to_bf16. Otherwise activations become float.
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
constexpr bool HAS_FLOAT8_BF16 = true;
#else
constexpr bool HAS_FLOAT8_BF16 = false;
#endif

constexpr float FLOAT8_FACTOR = 256;
constexpr std::array<float, 256> FLOAT8_VALUES = [] {  // 1/256 of the number that each byte encodes
  std::array<float, 256> values = {};
  for (uint32_t byte = 0; byte < 256; byte++) {
    const uint32_t magnitude = byte & 127;  // eeee mmm. A float has exponent and mantissa in this order from bit 20 on
    const float value = magnitude < 8 ? magnitude * 0x1p-17f : std::bit_cast<float>((magnitude << 20) + (112u << 23));
    values[byte] = byte & 128 ? -value : value;
  }
  return values;
}();

// The upper bytes of the magnitudes as bf16, and then the lower bytes.
alignas(64) constexpr std::array<uint8_t, 256> FLOAT8_BF16_BYTES = [] {
  std::array<uint8_t, 256> bytes = {};
  for (int magnitude = 0; magnitude < 128; magnitude++) {
    const uint32_t bits = std::bit_cast<uint32_t>(FLOAT8_VALUES[magnitude]);
    bytes[magnitude] = bits >> 24, bytes[128 + magnitude] = bits >> 16;
  }
  return bytes;
}();

// ---- Conversion -----------------------------------------------------------------------------------------------------

// 4 inputs of 16 outputs, as pairs of bf16: lane i has a pair of output i.
struct Bf16Pairs { i32x16 inputs01, inputs23; };

inline Bf16Pairs float8_to_bf16(i32x16 words) {
#if defined(__AVX512VBMI__)
  // Tables of 128 bytes, indexed by the lowest 7 bits of a byte, have the upper and the lower byte of the bf16.
  const __m512i bytes = (__m512i)words;
  const __m512i* tables = reinterpret_cast<const __m512i*>(FLOAT8_BF16_BYTES.data());
  __m512i upper = _mm512_permutex2var_epi8(tables[0], bytes, tables[1]);
  const __m512i lower = _mm512_permutex2var_epi8(tables[2], bytes, tables[3]);
  upper = _mm512_ternarylogic_epi32(upper, bytes, _mm512_set1_epi8(int8_t(0x80)), 0xf8);  // upper | (bytes & 0x80)
  return {(i32x16)_mm512_unpacklo_epi8(lower, upper), (i32x16)_mm512_unpackhi_epi8(lower, upper)};
#else
  uint8_t bytes[64];
  uint16_t pairs[2][32];
  std::memcpy(bytes, &words, sizeof bytes);
  for (int i = 0; i < 64; i++)
    pairs[i % 16 / 8][i / 16 * 8 + i % 8] = std::bit_cast<uint32_t>(FLOAT8_VALUES[bytes[i]]) >> 16;
  return {load<i32x16>(pairs[0]), load<i32x16>(pairs[1])};
#endif
}

// 4 inputs of 16 outputs, as pairs of floats. Lanes 2 i and 2 i + 1 of vector h have a pair of output 8 h + i.
struct FloatPairs { f32x16 inputs01[2], inputs23[2]; };

// Converts e4m3 to f16 and then to float. The f16 has the bits s 0eeee mmm0000000. To make these bits, puts the byte
// into the upper half of 16 bits, shifts right by one, and clears the second copy of the sign.
inline FloatPairs float8_to_float(i32x16 words) {
#if defined(__AVX512BW__)
  const auto convert = [](__m512i upper_bytes, f32x16* out) {
    const __m512i halves = _mm512_and_si512(_mm512_srai_epi16(upper_bytes, 1), _mm512_set1_epi16(int16_t(0xbf80)));
    out[0] = (f32x16)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    out[1] = (f32x16)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  };
  const __m512i bytes = (__m512i)words, zero = {};
  FloatPairs floats;
  convert(_mm512_unpacklo_epi8(zero, bytes), floats.inputs01);
  convert(_mm512_unpackhi_epi8(zero, bytes), floats.inputs23);
  return floats;
#elif defined(__AVX2__) && defined(__F16C__)
  const auto convert = [](__m256i upper_bytes, f32x16& out) {
    const __m256i halves = _mm256_and_si256(_mm256_srai_epi16(upper_bytes, 1), _mm256_set1_epi16(int16_t(0xbf80)));
    __m256* v = reinterpret_cast<__m256*>(&out);
    v[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves)), v[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  };
  FloatPairs floats;
  for (int h = 0; h < 2; h++) {
    const __m256i bytes = reinterpret_cast<const __m256i*>(&words)[h], zero = {};
    convert(_mm256_unpacklo_epi8(zero, bytes), floats.inputs01[h]);
    convert(_mm256_unpackhi_epi8(zero, bytes), floats.inputs23[h]);
  }
  return floats;
#else
  uint8_t bytes[64];
  std::memcpy(bytes, &words, sizeof bytes);
  FloatPairs floats;
  for (int i = 0; i < 64; i++)
    (i % 16 < 8 ? floats.inputs01 : floats.inputs23)[i / 32][i % 32 / 16 * 8 + i % 8] = FLOAT8_VALUES[bytes[i]];
  return floats;
#endif
}

// Computes out [4 inputs, 16 outputs] = 1/256 of the weights in words.
inline void unpack_float8(i32x16 words, f32x16* out) {
  const FloatPairs floats = float8_to_float(words);
  const f32x16* pairs[] = {floats.inputs01, floats.inputs23};
  for (int i = 0; i < 2; i++) {
    out[2 * i] = even_lanes(pairs[i][0], pairs[i][1]);
    out[2 * i + 1] = odd_lanes(pairs[i][0], pairs[i][1]);
  }
}
