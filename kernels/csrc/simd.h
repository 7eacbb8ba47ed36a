// Vectors of 16 numbers, which all kernels compute with, and the types of activations: float, f16 and bf16.
//
// A Vec is a type of the vector extensions of GCC and clang. It fills one AVX-512 register or two AVX2 registers; on
// other CPUs the compiler chooses. Intrinsics are used only where the compiler would convert one element at a time.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
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

constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

inline int64_t divide_up(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }
inline int64_t round_up(int64_t n, int64_t multiple) { return divide_up(n, multiple) * multiple; }

// ---- Load, store, prefetch ------------------------------------------------------------------------------------------

// Loads a number or a vector of type T. The address need not be aligned.
template <typename T> inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// load_vec loads 16 elements and converts them to float.
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

// store_vec converts 16 floats to the type of p and stores them. Rounds to nearest even; NaN stays NaN.
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

// Load or store elements [first, first + 16) of an array p [n]. Elements beyond the end are loaded as zeros, and are
// not stored.
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

// always_inline: GCC may find that a call of a function that only prefetches has no effect, and remove the call.
[[gnu::always_inline]] inline void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
[[gnu::always_inline]] inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Returns table[byte] for each byte of bytes. table has 16 bytes, and each byte of bytes is 0 to 15.
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

// Returns table[index & 15] for each index.
inline Vec lookup(Vec table, IntVec indices) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permutexvar_ps((__m512i)indices, (__m512)table);
#else
  Vec v;
  for (int i = 0; i < LANES; i++) v[i] = table[indices[i] & 15];
  return v;
#endif
}

// Returns 2^(e - 127) for exponents e [16]. A float's exponent field has the bias 127, so e is shifted into that field.
// The exception is e = 0: 2^-127 is a subnormal number, whose only bit is the highest bit of the mantissa.
inline Vec decode_e8m0(const uint8_t* exponents) {
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

const Vec LANE_INDEX = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Keeps lanes 0 to n - 1 of v. Sets the other lanes to rest.
inline Vec mask_lanes(Vec v, int64_t n, float rest) { return LANE_INDEX < float(n) ? v : Vec{} + rest; }

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

// Returns a Vec whose lane i is the sum of all lanes of v[i], for v [16]. Overwrites v.
// Each step turns two Vecs into one: interleaves their lower halves, interleaves their upper halves, and adds the two.
inline Vec transpose_reduce_add(Vec* v) {
#pragma GCC unroll 4  // so that v stays in registers
  for (int n = 8; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
      v[i] = __builtin_shufflevector(v[i], v[i + n], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
             __builtin_shufflevector(v[i], v[i + n], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return v[0];
}

// Transposes 16 vectors of 16 words: swaps lane j of v[i] and lane i of v[j].
//
// The address of an element is 8 bits, vvvvllll: the index of the vector, then the lane. Each round interleaves vectors
// 0-7 with vectors 8-15, so the highest bit of the address becomes the lowest. After four rounds it is llllvvvv.
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

// Sets lane i to lane i ^ D. D is a power of two, so neighbouring groups of D lanes swap places.
template <int D> inline IntVec swap_lanes(IntVec v) {
  return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D,
                                 8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
}

// Reduces v with op, such as a maximum or a sum. All lanes get the result.
inline IntVec reduce_lanes(IntVec v, auto op) {
  v = op(v, swap_lanes<8>(v));
  v = op(v, swap_lanes<4>(v));
  v = op(v, swap_lanes<2>(v));
  return op(v, swap_lanes<1>(v));
}

// Whether any lane of the result of a comparison is true.
inline bool any_lane(IntVec is_true) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)is_true, (__m512i)is_true);
#else
  return reduce_lanes(is_true, [](IntVec a, IntVec b) { return a | b; })[0];
#endif
}

// Adding ROUND_TO_INT to x, |x| < 2^22, rounds x to an integer, because the sum has no mantissa bits for a fraction.
// Subtracting ROUND_TO_INT from the sum gives the integer as a float. Subtracting the bits gives the integer as an int.
constexpr float ROUND_TO_INT = 12582912.0f;  // 1.5 * 2^23

// Returns e^x to float's precision. Clamps x to [-87, 88] first. NaN stays NaN.
// x = n ln 2 + r with an integer n, so e^x = 2^n e^r. A polynomial of Cephes gives e^r; adding n to the exponent field
// of e^r multiplies by 2^n.
inline Vec exp_vec(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  const Vec to_int = Vec{} + ROUND_TO_INT, t = x * 1.44269504f + to_int, n = t - to_int;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 is split in two constants, for precision
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Vec)((IntVec)p + (((IntVec)t - (IntVec)to_int) << 23));
}

// Returns 2^x to float's precision, for x <= 0. 2^-infinity is 0. NaN stays NaN. x = n + r with an integer n, and a
// polynomial gives 2^r; its coefficients minimize the relative error for |r| <= 1/2.
inline Vec exp2_vec(Vec x) {
#if defined(__AVX512F__)
  x = (Vec)_mm512_max_ps((__m512)(Vec{} - 200.0f), (__m512)x);  // 2^-200 is rounded to 0
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  const Vec r = x - (Vec)n;
  Vec p = Vec{} + 1.534580224e-4f;
  p = p * r + 1.339993090e-3f;
  p = p * r + 9.618489072e-3f;
  p = p * r + 5.550328642e-2f;
  p = p * r + 2.402264625e-1f;
  p = p * r + 6.931471825e-1f;
  p = p * r + 1.0f;
  return (Vec)_mm512_scalef_ps((__m512)p, n);  // p 2^n
#else
  return x == NEGATIVE_INFINITY ? Vec{} : exp_vec(x * 0.693147181f);
#endif
}

// Returns tanh(x) to float's precision. NaN stays NaN. The formula with e^(2x) loses precision near zero, so a
// polynomial of Cephes serves |x| < 0.625.
inline Vec tanh_vec(Vec x) {
  const Vec x2 = x * x, large = 1 - 2 / (1 + exp_vec(2 * x));
  Vec p = Vec{} - 5.70498872745e-3f;
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  return x2 < 0.390625f ? p * x2 * x + x : large;  // 0.625^2
}

// Bounds x smoothly to (-softcap, softcap): softcap * tanh(x / softcap).
inline Vec apply_softcap(Vec x, float softcap) { return softcap * tanh_vec(x / softcap); }

// Clamps x to [-limit, limit]. NaN stays NaN.
inline Vec clamp(Vec x, float limit) {
  x = x > limit ? Vec{} + limit : x;
  return x < -limit ? Vec{} - limit : x;
}

// Returns Phi(x) = (1 + erf(x / sqrt(2))) / 2, the distribution function of the normal distribution. NaN stays NaN.
// Formula 7.1.26 of Abramowitz and Stegun gives erf with an error of at most 1.5e-7:
//     1 - erf(z) = (a1 t + a2 t^2 + ... + a5 t^5) e^(-z^2)  for z >= 0, with t = 1 / (1 + 0.3275911 z)
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

// The activation of a feed-forward. The order is that of ACTIVATIONS in config.py, which build.py checks. COUNT is the
// number of the others.
enum class Activation : int64_t {
  NONE, SWIGLU, GEGLU, GEGLU_TANH, CLAMPED_SWIGLU, GELU_PYTORCH_TANH, RELU2, COUNT
};

// Whether the feed-forward has a gate projection beside its up projection, as config.py: is_gated says.
inline bool is_gated(Activation activation) {
  switch (activation) {
    case Activation::SWIGLU: case Activation::GEGLU: case Activation::GEGLU_TANH: case Activation::CLAMPED_SWIGLU:
      return true;
    case Activation::NONE: case Activation::GELU_PYTORCH_TANH: case Activation::RELU2: case Activation::COUNT: break;
  }
  return false;
}

// x * Phi(x) with the tanh form of Phi: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + ...)
inline Vec gelu_tanh(Vec x) { return x / (1 + exp_vec(-1.59576912f * (x + 0.044715f * x * x * x))); }

// Computes activation(gate) * up, as kernels/torch_ops.py does. If the activation is not gated, computes
// activation(gate): then gate is the product with the up projection, and up is not used.
inline Vec activate_vec(Vec gate, Vec up, Activation activation) {
  switch (activation) {
    case Activation::NONE: return gate;
    case Activation::COUNT: break;
    case Activation::SWIGLU: return gate / (1 + exp_vec(-gate)) * up;
    case Activation::GEGLU: return gate * normal_cdf(gate) * up;
    case Activation::GEGLU_TANH: return gelu_tanh(gate) * up;
    case Activation::CLAMPED_SWIGLU:
      gate = gate > 7.0f ? Vec{} + 7 : gate;
      return gate / (1 + exp_vec(-1.702f * gate)) * (clamp(up, 7) + 1);
    case Activation::GELU_PYTORCH_TANH: return gelu_tanh(gate);
    case Activation::RELU2: return gate < 0.0f ? Vec{} : gate * gate;  // NaN stays NaN
  }
  __builtin_unreachable();  // ops.cpp refuses other ids
}
