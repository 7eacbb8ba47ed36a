// Sixteen numbers at a time, in GCC's vector extensions, and the types that activations have.
//
// A Vec is one AVX-512 register, two of AVX2, or whatever the compiler makes of it elsewhere. Only where GCC 12 does a
// conversion one by one is there an intrinsic.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int64_t LANES = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t UIntVec __attribute__((vector_size(64)));
typedef uint16_t ShortVec __attribute__((vector_size(32)));
typedef int8_t ByteVec __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };
using f16 = torch::headeronly::Half;

// ---- One number ------------------------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline void from_float(float f, float* out) { *out = f; }
inline void from_float(float f, f16* out) { *out = f16(f); }
inline void from_float(float f, bf16* out) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  out->bits = f != f ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// ---- Load and store --------------------------------------------------------------------------------------------------

template <typename T> inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX512F__)
inline Vec load_bf16(const uint16_t* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
}
inline Vec load_u8(const uint8_t* p) { return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(p))); }
inline Vec load_vec(const f16* p) { return (Vec)_mm512_cvtph_ps(load<__m256i>(p)); }
#else
template <typename T> inline Vec load_each(const T* p) {
  Vec v;
  for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
  return v;
}
inline Vec load_bf16(const uint16_t* p) { return load_each(reinterpret_cast<const bf16*>(p)); }
inline Vec load_u8(const uint8_t* p) { return load_each(p); }
inline Vec load_vec(const f16* p) { return load_each(p); }
#endif
inline Vec load_vec(const float* p) { return load<Vec>(p); }
inline Vec load_vec(const bf16* p) { return load_bf16(reinterpret_cast<const uint16_t*>(p)); }

inline void store_vec(Vec v, float* p) { std::memcpy(p, &v, sizeof v); }
inline void store_vec(Vec v, bf16* p) {  // rounds as from_float does
  const UIntVec bits = (UIntVec)v;
  const UIntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const ShortVec s = __builtin_convertvector(v != v ? UIntVec{} + 0x7fc0 : rounded, ShortVec);
  std::memcpy(p, &s, sizeof s);
}
inline void store_vec(Vec v, f16* p) {
  for (int i = 0; i < LANES; i++) p[i] = f16(v[i]);
}

// Elements first .. first + 15 of p, of which there are n; those beyond the end are zero, or not stored.
template <typename T> inline Vec load_partial(const T* p, int64_t first, int64_t n) {
  if (first + LANES <= n) return load_vec(p + first);
  Vec v = {};
  for (int64_t i = 0; first + i < n; i++) v[i] = to_float(p[first + i]);
  return v;
}
template <typename T> inline void store_partial(Vec v, T* p, int64_t first, int64_t n) {
  if (first + LANES <= n) return store_vec(v, p + first);
  for (int64_t i = 0; first + i < n; i++) from_float(v[i], &p[first + i]);
}

// ---- Arithmetic ------------------------------------------------------------------------------------------------------

inline Vec as_float(IntVec v) { return __builtin_convertvector(v, Vec); }
inline IntVec max(IntVec a, IntVec b) { return a > b ? a : b; }

#if defined(__AVX512F__)
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}
#endif

#if !defined(__clang__) && __GNUC__ < 12
#define __builtin_shufflevector(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

// Each lane gets what the lane at distance D has: within every 2 D lanes, the halves change places.
template <int D> inline IntVec swap_halves(IntVec v) {
  return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D, 8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D,
                                 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
}

// Lane i of the result is the sum of v[i]'s lanes. Overwrites v. Each step puts half-sums of two vectors side by side.
inline Vec sum_each(Vec* v) {
#pragma GCC unroll 4  // so that v stays in registers
  for (int n = 8; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
      v[i] = __builtin_shufflevector(v[i], v[i + n], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
             __builtin_shufflevector(v[i], v[i + n], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return v[0];
}

// Adding this to a float of less than 2^22 and subtracting it again rounds to the nearest integer; in between, the
// integer stands in the lowest bits.
constexpr float ROUND_TO_INT = 12582912.0f;  // 1.5 * 2^23

// e^x to float32's precision (Cephes' polynomial). Beyond float32's range the nearest that it holds; NaN stays NaN.
inline Vec exp_vec(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  const Vec magic = Vec{} + ROUND_TO_INT, t = x * 1.44269504f + magic, n = t - magic;  // n = x / ln 2, rounded
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Vec)((IntVec)p + (((IntVec)t - (IntVec)magic) << 23));  // times 2^n
}

// The functions that a gated feed-forward may have; kernels/schema.py has the same numbers.
enum Activation : int64_t { NONE = 0, SILU = 1 };

inline Vec activate(Vec gate, int64_t activation) {
  return activation == SILU ? gate / (1 + exp_vec(-gate)) : gate;
}
