// Vectors of 16 numbers for all kernels, and the types of activations: float, f16 and bf16.
//
// The types are vector extensions of GCC and clang: an f32x16 has 16 lanes of float. It fills one AVX-512 register or
// two AVX2 registers. On other CPUs the compiler chooses. Intrinsics stand only where the compiler would convert one
// element at a time.
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

constexpr int64_t LANES = 16;  // lanes of an f32x16

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

// Whether an f32x16 fits in one register. CPUs with such registers have 32 registers.
#if defined(__AVX512F__)
constexpr bool HAS_WIDE_REGISTERS = true;
#else
constexpr bool HAS_WIDE_REGISTERS = false;
#endif

struct bf16 { uint16_t bits; };
using f16 = torch::headeronly::Half;

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

constexpr float LOG2_E = 1.44269504f;  // log2(e)
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

// load_vec loads 16 elements and converts the elements to float.
#if defined(__AVX512F__)
inline f32x16 load_vec(const bf16* p) { return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16); }
inline f32x16 load_vec(const f16* p) { return (f32x16)_mm512_cvtph_ps(load<__m256i>(p)); }
inline f32x16 load_vec(const uint8_t* p) { return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(p))); }
#else
#if defined(__F16C__)
inline f32x16 load_vec(const f16* p) {
  const __m256 halves[] = {_mm256_cvtph_ps(load<__m128i>(p)), _mm256_cvtph_ps(load<__m128i>(p + 8))};
  return load<f32x16>(halves);
}
#endif
template <typename T> inline f32x16 load_vec(const T* p) {
  f32x16 v;
  for (int i = 0; i < LANES; i++) v[i] = to_float(p[i]);
  return v;
}
#endif
inline f32x16 load_vec(const float* p) { return load<f32x16>(p); }

// store_vec converts 16 floats to the type of p and stores them. Rounds to nearest even; NaN stays NaN.
inline void store_vec(f32x16 v, float* p) { std::memcpy(p, &v, sizeof v); }
inline void store_vec(f32x16 v, bf16* p) {
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u16x16 s = __builtin_convertvector(v != v ? u32x16{} + 0x7fc0 : rounded, u16x16);
  std::memcpy(p, &s, sizeof s);
}
inline void store_vec(f32x16 v, f16* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &halves, sizeof halves);
#else
  for (int i = 0; i < LANES; i++) p[i] = f16(v[i]);
#endif
}

// Load or store elements [first, first + 16) of an array p [n]. Elements beyond the end are zeros, and are not stored.
template <typename T> inline f32x16 load_partial(const T* p, int64_t first, int64_t n) {
  if (first + LANES <= n) return load_vec(p + first);
  T padded[LANES] = {};
  std::memcpy(padded, p + first, std::max<int64_t>(n - first, 0) * sizeof(T));
  return load_vec(padded);
}
template <typename T> inline void store_partial(f32x16 v, T* p, int64_t first, int64_t n) {
  if (first + LANES <= n) return store_vec(v, p + first);
  T padded[LANES];
  store_vec(v, padded);
  std::memcpy(p + first, padded, std::max<int64_t>(n - first, 0) * sizeof(T));
}

// always_inline: GCC may find that a call of a function that only prefetches has no effect, and remove the call.
[[gnu::always_inline]] inline void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
[[gnu::always_inline]] inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// Returns table[byte] for each byte of bytes. table has 16 bytes, and each byte of bytes is 0 to 15.
inline i32x16 lookup_bytes(const uint8_t* table, i32x16 bytes) {
#if defined(__AVX512BW__)
  return (i32x16)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load<__m128i>(table)), (__m512i)bytes);
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
inline f32x16 lookup(f32x16 table, i32x16 indices) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_permutexvar_ps((__m512i)indices, (__m512)table);
#else
  f32x16 v;
  for (int i = 0; i < LANES; i++) v[i] = table[indices[i] & 15];
  return v;
#endif
}

// Returns 2^(e - 127) for exponents e [16]. Shifts e into the exponent field of a float, which has the bias 127. The
// exception is e = 0: 2^-127 is a subnormal number. Its only bit is the highest bit of the mantissa.
inline f32x16 decode_e8m0(const uint8_t* exponents) {
#if defined(__AVX512F__)
  i32x16 bits = (i32x16)_mm512_cvtepu8_epi32(load<__m128i>(exponents));
#else
  i32x16 bits;
  for (int i = 0; i < LANES; i++) bits[i] = exponents[i];
#endif
  bits <<= 23;
  const i32x16 smallest = i32x16{} + (1 << 22);
  return (f32x16)(bits > smallest ? bits : smallest);
}

// ---- Arithmetic -----------------------------------------------------------------------------------------------------

inline f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
inline f32x16 to_float(f32x16 v) { return v; }

const f32x16 IOTA = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Keeps lanes 0 to n - 1 of v. Sets the other lanes to rest.
inline f32x16 mask_lanes(f32x16 v, int64_t n, float rest) { return IOTA < float(n) ? v : f32x16{} + rest; }

// Copies two bf16 into every lane.
inline i32x16 broadcast2(const bf16* x) { return i32x16{} + load<int32_t>(x); }

// acc[lane] += w[lane][0] * x[lane][0] + w[lane][1] * x[lane][1]. Each lane of w and x holds two bf16.
inline void dot2(f32x16& acc, i32x16 w, i32x16 x) {
#if defined(__AVX512BF16__)
  acc = (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
  const i32x16 upper = i32x16{} + int32_t(0xffff0000);
  acc += (f32x16)(w << 16) * (f32x16)(x << 16) + (f32x16)(w & upper) * (f32x16)(x & upper);
#endif
}

// Returns the sum of all lanes.
inline float sum(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
#endif
}

// Returns the larger of a and b in each lane. If a is NaN, returns b.
inline f32x16 max_vec(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// Returns the largest lane of v. v must not have NaN.
inline float max_lane(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float max = v[0];
  for (int i = 1; i < LANES; i++) max = std::max(max, v[i]);
  return max;
#endif
}

#if !defined(__clang__) && __GNUC__ < 12
#define __builtin_shufflevector(a, b, ...) __builtin_shuffle(a, b, i32x16{__VA_ARGS__})
#endif

// Returns a vector whose lane i is the sum of all lanes of v[i], for v [16]. Overwrites v.
//
// Each step turns two vectors into one: it interleaves the lower halves and the upper halves, and adds the results.
inline f32x16 transpose_reduce_add(f32x16* v) {
#pragma GCC unroll 4  // so that v stays in registers
  for (int n = 8; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
      v[i] = __builtin_shufflevector(v[i], v[i + n], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
             __builtin_shufflevector(v[i], v[i + n], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return v[0];
}

// Return the lanes of even or odd index: a's lanes in lanes 0-7, b's lanes in lanes 8-15.
inline f32x16 even_lanes(f32x16 a, f32x16 b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline f32x16 odd_lanes(f32x16 a, f32x16 b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// Transposes 16 vectors of 16 words: swaps lane j of v[i] and lane i of v[j].
//
// The address of an element is 8 bits, vvvvllll: the index of the vector, then the lane. Each round interleaves vectors
// 0-7 with vectors 8-15, so the highest bit of the address becomes the lowest. After four rounds the address is
// llllvvvv.
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
template <int D> inline i32x16 swap_lanes(i32x16 v) {
  return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D,
                                 8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D, 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
}

// Reduces v with op, such as a maximum or a sum. All lanes get the result.
inline i32x16 reduce_lanes(i32x16 v, auto op) {
  v = op(v, swap_lanes<8>(v));
  v = op(v, swap_lanes<4>(v));
  v = op(v, swap_lanes<2>(v));
  return op(v, swap_lanes<1>(v));
}

// Whether any lane of the result of a comparison is true.
inline bool any_lane(i32x16 is_true) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)is_true, (__m512i)is_true);
#else
  return reduce_lanes(is_true, [](i32x16 a, i32x16 b) { return a | b; })[0];
#endif
}

// Add ROUND_TO_INT to x, |x| < 2^22, to round x to an integer: the sum has no mantissa bits for a fraction. Subtract
// ROUND_TO_INT for the integer as a float. Subtract its bits from the bits of the sum for the integer as an int.
constexpr float ROUND_TO_INT = 12582912.0f;  // 1.5 * 2^23

// Returns e^x to float's precision. Clamps x to [-87, 88] first. NaN stays NaN.
//
// x = n ln 2 + r with an integer n, so e^x = 2^n e^r. e^r is a polynomial of Cephes. Adding n to its exponent field
// multiplies by 2^n.
inline f32x16 exp_vec(f32x16 x) {
  x = x < -87.0f ? f32x16{} - 87.0f : x;
  x = x > 88.0f ? f32x16{} + 88.0f : x;
  const f32x16 to_int = f32x16{} + ROUND_TO_INT, t = x * LOG2_E + to_int, n = t - to_int;
  const f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 is split in two constants, for precision
  f32x16 p = f32x16{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (f32x16)((i32x16)p + (((i32x16)t - (i32x16)to_int) << 23));
}

// Returns 2^x to float's precision, for x <= 0. Powers below 2^-126 may become 0, and 2^-infinity is 0. NaN stays NaN.
//
// x = n + r with an integer n. 2^r is a polynomial whose coefficients minimize the relative error for |r| <= 1/2.
inline f32x16 exp2_vec(f32x16 x) {
#if defined(__AVX512F__)
  x = max_vec(f32x16{} - 200.0f, x);  // 2^-200 is rounded to 0
  const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const f32x16 to_int = f32x16{} + ROUND_TO_INT, t = x + to_int, n = t - to_int;
#endif
  const f32x16 r = x - n;
  f32x16 p = f32x16{} + 1.534580224e-4f;
  p = p * r + 1.339993090e-3f;
  p = p * r + 9.618489072e-3f;
  p = p * r + 5.550328642e-2f;
  p = p * r + 2.402264625e-1f;
  p = p * r + 6.931471825e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);  // p 2^n
#else
  const f32x16 scaled = (f32x16)((i32x16)p + (((i32x16)t - (i32x16)to_int) << 23));  // adds n to the exponent of p
  return x < -126.0f ? f32x16{} : scaled;
#endif
}

// Returns tanh(x) to float's precision. NaN stays NaN. For |x| < 0.625 it is a polynomial of Cephes, because the
// formula with e^(2x) loses precision near zero.
inline f32x16 tanh_vec(f32x16 x) {
  const f32x16 x2 = x * x, large = 1 - 2 / (1 + exp_vec(2 * x));
  f32x16 p = f32x16{} - 5.70498872745e-3f;
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  return x2 < 0.390625f ? p * x2 * x + x : large;  // 0.625^2
}

// Bounds x smoothly to (-softcap, softcap): softcap * tanh(x / softcap).
inline f32x16 apply_softcap(f32x16 x, float softcap) { return softcap * tanh_vec(x / softcap); }

// Clamps x to [-limit, limit]. NaN stays NaN.
inline f32x16 clamp(f32x16 x, float limit) {
  x = x > limit ? f32x16{} + limit : x;
  return x < -limit ? f32x16{} - limit : x;
}
