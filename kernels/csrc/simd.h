// Vectors of 16 numbers, and the types that activations have: float, f16 and bf16.
//
// A Vec is written with GCC's vector extensions, which clang has too. It becomes one AVX-512 register, two of AVX2, or
// whatever another CPU has. There are intrinsics only where the compiler would convert one element at a time.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

constexpr int64_t LANES = 16;  // floats in a Vec

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t UIntVec __attribute__((vector_size(64)));
typedef int64_t LongVec __attribute__((vector_size(64)));
typedef uint16_t ShortVec __attribute__((vector_size(32)));
typedef int8_t ByteVec __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };
using f16 = torch::headeronly::Half;

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

// ---- Load, store, prefetch ------------------------------------------------------------------------------------------

// Loads a value of type T, a number or a vector, from any address.
template <typename T> inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// load_vec converts 16 elements of any type to float.
#if defined(__AVX512F__)
inline Vec load_vec(const bf16* p) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16); }
inline Vec load_vec(const f16* p) { return (Vec)_mm512_cvtph_ps(load<__m256i>(p)); }
inline Vec load_vec(const uint8_t* p) { return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(p))); }
#else
#if defined(__F16C__)
inline Vec load_vec(const f16* p) {
  const __m256 halves[] = {_mm256_cvtph_ps(load<__m128i>(p)), _mm256_cvtph_ps(load<__m128i>(p + 8))};
  return load<Vec>(halves);
}
#endif
template <typename T> inline Vec load_vec(const T* p) {
  Vec v;
  for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
  return v;
}
#endif
inline Vec load_vec(const float* p) { return load<Vec>(p); }

// store_vec rounds to the nearest number of the type, ties to even. NaN stays NaN.
inline void store_vec(Vec v, float* p) { std::memcpy(p, &v, sizeof v); }
inline void store_vec(Vec v, bf16* p) {
  const UIntVec bits = (UIntVec)v;
  const UIntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const ShortVec s = __builtin_convertvector(v != v ? UIntVec{} + 0x7fc0 : rounded, ShortVec);
  std::memcpy(p, &s, sizeof s);
}
inline void store_vec(Vec v, f16* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &halves, sizeof halves);
#else
  for (int i = 0; i < LANES; i++) p[i] = f16(v[i]);
#endif
}

// Load or store elements [first, first + 16) of an array p [n]. Beyond the end, load gives zeros and store does
// nothing.
template <typename T> inline Vec load_partial(const T* p, int64_t first, int64_t n) {
  if (first + LANES <= n) return load_vec(p + first);
  T padded[LANES] = {};
  std::memcpy(padded, p + first, std::max<int64_t>(n - first, 0) * sizeof(T));
  return load_vec(padded);
}
template <typename T> inline void store_partial(Vec v, T* p, int64_t first, int64_t n) {
  if (first + LANES <= n) return store_vec(v, p + first);
  T padded[LANES];
  store_vec(v, padded);
  std::memcpy(p + first, padded, std::max<int64_t>(n - first, 0) * sizeof(T));
}

// Prefetch distances, in bytes: how far ahead of use weights are fetched into a cache. A core that takes 20 GB/s
// from memory with a latency of 250 ns has 5,000 bytes on the way.
constexpr int64_t PREFETCH_L2 = 8192;
constexpr int64_t PREFETCH_L1 = 512;

inline void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Returns table[byte] for every byte of bytes, which are 0 to 15.
inline IntVec lookup_bytes(const uint8_t* table, IntVec bytes) {
#if defined(__AVX512BW__)
  return (IntVec)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load<__m128i>(table)), (__m512i)bytes);
#elif defined(__AVX2__)
  const __m256i table_twice = _mm256_broadcastsi128_si256(load<__m128i>(table));
  __m256i* v = reinterpret_cast<__m256i*>(&bytes);
  for (int h = 0; h < 2; h++) v[h] = _mm256_shuffle_epi8(table_twice, v[h]);
  return bytes;
#else
  uint8_t* v = reinterpret_cast<uint8_t*>(&bytes);
  for (size_t i = 0; i < sizeof bytes; i++) v[i] = table[v[i]];
  return bytes;
#endif
}

// Returns table[index], where the lowest four bits of each index count.
inline Vec lookup(Vec table, IntVec indices) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)indices, (__m512)table);
#else
  Vec v;
  for (int i = 0; i < LANES; i++) v[i] = table[indices[i] & 15];
  return v;
#endif
}

// Returns 2^(exponent - 127) of 16 exponents: the exponent field of a float. 2^-127 is a subnormal number, one bit set.
inline Vec exp2_vec(const uint8_t* exponents) {
#if defined(__AVX512F__)
  IntVec bits = (IntVec)_mm512_cvtepu8_epi32(load<__m128i>(exponents));
#else
  IntVec bits;
  for (int i = 0; i < LANES; i++) bits[i] = exponents[i];
#endif
  bits <<= 23;
  const IntVec smallest = IntVec{} + (1 << 22);
  return (Vec)(bits > smallest ? bits : smallest);
}

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

inline Vec as_float(IntVec v) { return __builtin_convertvector(v, Vec); }
inline Vec as_float(Vec v) { return v; }

const Vec LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Replaces lanes n to 15 of v by rest.
inline Vec mask_lanes(Vec v, int64_t n, float rest) { return LANE < float(n) ? v : Vec{} + rest; }

// Returns the sum of all lanes.
inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
#endif
}

#if !defined(__clang__) && __GNUC__ < 12
#define __builtin_shufflevector(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

// Transposes and adds: lane i of the result is the sum of all lanes of v[i], for 16 Vecs, which are overwritten.
// Each step halves the number of Vecs: the sum of the halves of two Vecs, interleaved, becomes one Vec.
inline Vec transpose_reduce_add(Vec* v) {
#pragma GCC unroll 4  // so that v stays in registers
  for (int n = 8; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
      v[i] = __builtin_shufflevector(v[i], v[i + n], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
             __builtin_shufflevector(v[i], v[i + n], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return v[0];
}

// Transposes 16 vectors of 16 words: lane j of v[i] and lane i of v[j] change places. The place of an element is 8
// bits: 4 of the number of the vector and 4 of the number of the lane. Each round interleaves the first half of the
// vectors with the second, which rotates these 8 bits by one.
template <typename V> inline void transpose(V* v) {
  V from[16];
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    std::memcpy(from, v, sizeof from);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const V a = from[i], b = from[i + 8];
      v[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      v[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  }
}

// Gives lane i the value of lane i ^ D, for a power of two D: neighbouring groups of D lanes change places.
template <int D> inline IntVec swap_lanes(IntVec v) {
  return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D,
                                 8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
}

// Reduces lanes 0-7 and lanes 8-15 with op (maximum, sum). All eight lanes get the result.
inline IntVec reduce_halves(IntVec v, auto op) {
  v = op(v, swap_lanes<4>(v));
  v = op(v, swap_lanes<2>(v));
  return op(v, swap_lanes<1>(v));
}

// Adding this to a float x, |x| < 2^22, rounds x to an integer, because the sum has no bits left for a fraction.
// Subtracting it again, as a float or as bits, gives the integer as a float or as an int.
constexpr float ROUND_TO_INT = 12582912.0f;  // 1.5 * 2^23

// Returns e^x to float's precision. x is first clamped to [-87, 88], and NaN stays NaN.
// x = n ln 2 + r with an integer n, so e^x = 2^n e^r. e^r is Cephes' polynomial; n is added to its exponent.
inline Vec exp_vec(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  const Vec to_int = Vec{} + ROUND_TO_INT, t = x * 1.44269504f + to_int, n = t - to_int;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, for precision
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Vec)((IntVec)p + (((IntVec)t - (IntVec)to_int) << 23));
}

// Returns tanh(x) to float's precision, also close to zero, where Cephes' polynomial serves. NaN stays NaN.
inline Vec tanh_vec(Vec x) {
  const Vec x2 = x * x, large = 1 - 2 / (1 + exp_vec(2 * x));
  Vec p = Vec{} - 5.70498872745e-3f;
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  return x2 < 0.390625f ? p * x2 * x + x : large;  // |x| < 0.625
}

// Returns softcap * tanh(x / softcap), which stays between -softcap and softcap.
inline Vec apply_softcap(Vec x, float softcap) { return softcap * tanh_vec(x / softcap); }

// Clamps x to [-limit, limit]. NaN stays NaN.
inline Vec clamp(Vec x, float limit) {
  x = x > limit ? Vec{} + limit : x;
  return x < -limit ? Vec{} - limit : x;
}

// Returns Phi(x) = (1 + erf(x / sqrt(2))) / 2 of the normal distribution. NaN stays NaN.
// Abramowitz and Stegun 7.1.26, where erf is off by 1.5e-7 at most. For z >= 0 and t = 1 / (1 + 0.3275911 z):
//     1 - erf(z) = (a1 t + a2 t^2 + ... + a5 t^5) e^(-z^2)
inline Vec normal_cdf(Vec x) {
  const Vec z = 0.70710678f * (x < 0.0f ? -x : x), t = 1 / (1 + 0.3275911f * z);
  Vec p = Vec{} + 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec tail = 0.5f * t * p * exp_vec(-z * z);  // Phi(-|x|)
  return x < 0.0f ? tail : 1 - tail;
}

// The activation of a gated feed-forward (a gated linear unit), or none. In the order of config.py: ACTIVATIONS.
enum class Glu : int64_t { NONE, SWIGLU, GEGLU, GEGLU_TANH, CLAMPED_SWIGLU, COUNT };

// Returns whether the activation applies to a gate and, beside it, an up projection.
inline bool is_gated(Glu activation) { return activation != Glu::NONE; }

// Computes activation(gate) * up, as in kernels/reference.py. activation is gated.
inline Vec activate(Vec gate, Vec up, Glu activation) {
  switch (activation) {
    case Glu::NONE: case Glu::COUNT: break;
    case Glu::SWIGLU: return gate / (1 + exp_vec(-gate)) * up;
    case Glu::GEGLU: return gate * normal_cdf(gate) * up;
    case Glu::GEGLU_TANH:  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) * (gate + ...)
      return gate / (1 + exp_vec(-1.59576912f * (gate + 0.044715f * gate * gate * gate))) * up;
    case Glu::CLAMPED_SWIGLU:
      gate = gate > 7.0f ? Vec{} + 7 : gate;
      return gate / (1 + exp_vec(-1.702f * gate)) * (clamp(up, 7) + 1);
  }
  __builtin_unreachable();  // ops.cpp refuses other numbers
}
