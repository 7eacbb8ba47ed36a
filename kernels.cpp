// CPU kernels of a decode step, called through kernels.py, which holds the PyTorch reference of each and builds this file.
//
// A decode step multiplies every weight by one row (or a few), so it runs at the speed at which weights arrive from
// memory. The loops below read each weight once, in order, and do everything else (norm, bias, SiLU, residual,
// dequantization) in registers while waiting for the next one. Written with GCC's vector extensions; the two
// instructions that matter, dot products of 8-bit and of 16-bit numbers, have x86 versions, chosen at compile time.

#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
using OptTensor = std::optional<Tensor>;

constexpr int64_t ROWS = 16;      // output rows that one pass of a matrix-vector kernel makes
constexpr int64_t MAX_M = 8;      // rows of activations the kernels take; kernels.py sends more to the matmul library
constexpr int64_t ACT_GROUP = 8;  // activations that share a scale, where they are quantized
constexpr int64_t AHEAD = 1024;   // bytes before their use at which weights are fetched into the second-level cache
constexpr int64_t FAR = 8192;     // the same where more is done with each, or several streams run side by side
constexpr int64_t NEAR = 512;     // the same into the first-level cache, after FAR
constexpr int64_t KV_CHUNK = 256; // cache entries that one attention task looks at

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IntVec __attribute__((vector_size(64)));
typedef uint32_t UIntVec __attribute__((vector_size(64)));
typedef uint16_t ShortVec __attribute__((vector_size(32)));
typedef int8_t ByteVec __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };
using f16 = torch::headeronly::Half;

inline float to_float(float x) { return x; }
inline float to_float(f16 x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
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

// ---- Sixteen numbers at a time -------------------------------------------------------------------------------------

inline Vec as_float(IntVec v) { return __builtin_convertvector(v, Vec); }

template <typename T> inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#if defined(__AVX512F__)  // what GCC 12 does one by one
inline Vec load_bf16(const uint16_t* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
}
inline Vec load_u8(const uint8_t* p) { return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load<__m128i>(p))); }
inline Vec load_vec(const f16* p) { return (Vec)_mm512_cvtph_ps(load<__m256i>(p)); }
#else
template <typename T> inline Vec load_each(const T* p) {
  Vec v;
  for (int i = 0; i < 16; i++) v[i] = to_float(p[i]);
  return v;
}
inline Vec load_bf16(const uint16_t* p) { return load_each(reinterpret_cast<const bf16*>(p)); }
inline Vec load_u8(const uint8_t* p) { return load_each(p); }
inline Vec load_vec(const f16* p) { return load_each(p); }
#endif
inline Vec load_vec(const float* p) { return load<Vec>(p); }
inline void store_vec(Vec v, float* p) { std::memcpy(p, &v, sizeof v); }
inline void store_vec(Vec v, bf16* p) {  // as from_float
  const UIntVec bits = (UIntVec)v;
  const ShortVec s = __builtin_convertvector(v != v ? UIntVec{} + 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, ShortVec);
  std::memcpy(p, &s, sizeof s);
}
inline void store_vec(Vec v, f16* p) {
  for (int i = 0; i < 16; i++) p[i] = f16(v[i]);
}
inline Vec load_vec(const bf16* p) { return load_bf16(reinterpret_cast<const uint16_t*>(p)); }

// Elements at .. at + 15 of p, of which there are n.
template <typename T> inline Vec load_some(const T* p, int64_t at, int64_t n) {
  if (at + ROWS <= n) return load_vec(p + at);
  Vec v = {};
  for (int64_t r = 0; at + r < n; r++) v[r] = to_float(p[at + r]);
  return v;
}
template <typename T> inline void store_some(Vec v, T* p, int64_t at, int64_t n) {
  if (at + ROWS <= n) return store_vec(v, p + at);
  for (int64_t r = 0; at + r < n; r++) from_float(v[r], &p[at + r]);
}

#if defined(__AVX512F__)
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
#else
inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < 16; i++) total += v[i];
  return total;
}
#endif

#if !defined(__clang__) && __GNUC__ < 12
#define __builtin_shufflevector(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

// Every lane's neighbour at a distance of D lanes, within runs of 2 D
template <int D> inline IntVec swap(IntVec v) {
  return __builtin_shufflevector(v, v, 0 ^ D, 1 ^ D, 2 ^ D, 3 ^ D, 4 ^ D, 5 ^ D, 6 ^ D, 7 ^ D, 8 ^ D, 9 ^ D, 10 ^ D, 11 ^ D,
                                 12 ^ D, 13 ^ D, 14 ^ D, 15 ^ D);
}

// The sums of 16 vectors, v's contents being lost: each step adds halves of two vectors, side by side.
inline Vec sum_each(Vec* v) {
#pragma GCC unroll 4  // into registers
  for (int n = 8; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
      v[i] = __builtin_shufflevector(v[i], v[i + n], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
             __builtin_shufflevector(v[i], v[i + n], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  return v[0];
}

// ---- The activations of a call, prepared by every thread for itself ---------------------------------------------

using Row = const void*;  // T[k], the activations' own type, or Block[]: quantized

struct Block {  // int8: x = scale * q, |q| <= 127. Not finite values make scale NaN, and so the output
  float scale;
  float offset;  // INT8: -128 * the sum of q. INT4: the sum of x / 16 from the start of the weights' group up to here
  int8_t q[ACT_GROUP];
};

struct Weights {  // [n, k], or one expert of [experts, n, k]
  enum Kind { F32, F16, BF16, INT8, INT4 } kind;
  const char* data;
  const float* row_scale;     // INT8: [n]
  const uint16_t* scales;     // INT4: [n / 16, groups, 16] bfloat16
  const uint8_t* zeros;       // INT4: [n / 16, groups, 16], in sixteenths of a step
  int64_t n, k, group;        // group: of weights that share a scale (INT4)

  int64_t blocks() const { return (n + ROWS - 1) / ROWS; }
  int64_t groups() const { return (k + group - 1) / group; }
  int64_t padded_k() const { return (k + 15) / 16 * 16; }
  bool quantized() const { return kind >= INT8; }
  Weights expert(int64_t e) const {
    Weights w = *this;
    const int64_t bytes = kind == F32 ? n * k * 4 : kind <= BF16 ? n * k * 2
                          : blocks() * ROWS * (kind == INT8 ? k : k / 2);
    w.data += e * bytes;
    if (row_scale) w.row_scale += e * n;
    if (scales) w.scales += e * blocks() * groups() * ROWS, w.zeros += e * blocks() * groups() * ROWS;
    return w;
  }
};

template <typename T> T* mutable_ptr(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }
template <typename T> const T* ptr(const Tensor& t) { return mutable_ptr<T>(t); }
template <typename T> const T* ptr(const OptTensor& t) { return t ? ptr<T>(*t) : nullptr; }


Weights weights(const Tensor& w, const OptTensor& scales, const OptTensor& zeros, int64_t n, int64_t k, int64_t group) {
  const ScalarType type = w.scalar_type();
  STD_TORCH_CHECK(w.is_contiguous() && (type == ScalarType::Int) == scales.has_value(), "weights are not as enable() leaves them");
  Weights out{Weights::F32, static_cast<const char*>(w.data_ptr()), nullptr, nullptr, nullptr, n, k, group};
  if (zeros) {
    out.kind = Weights::INT4;
    out.scales = ptr<uint16_t>(scales), out.zeros = ptr<uint8_t>(zeros);
  } else if (scales) {
    out.kind = Weights::INT8;
    out.row_scale = ptr<float>(scales);
  } else {
    out.kind = type == ScalarType::Float ? Weights::F32 : type == ScalarType::Half ? Weights::F16 : Weights::BF16;
  }
  return out;
}

// Memory that grows and is kept from call to call.
struct Scratch {
  std::vector<char> bytes;
  size_t used = 0;
  void reserve(size_t n) { used = 0; if (bytes.size() < n) bytes.resize(n); }
  template <typename T> T* take(size_t n) {
    T* p = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.data()) + used + 63) / 64 * 64);
    used = reinterpret_cast<char*>(p + n) - bytes.data();
    return p;
  }
  static size_t bytes_for(size_t n) { return n * sizeof(float) + 64; }
};
thread_local Scratch scratch;   // of each thread, for what it makes for itself
thread_local Scratch together;  // of the thread that calls, for what all of them share

const Block* quantize_row(const float* f, const Weights& w, Scratch& room) {
  Block* blocks = room.take<Block>(w.padded_k() / ACT_GROUP);
  float offset = 0;
  for (int64_t k = 0; k < w.k; k += 16) {  // two blocks, each in half of a vector
    const Vec x = load_vec(f + k), magic = Vec{} + 12582912.0f;
    IntVec size = (IntVec)x & 0x7fffffff, most = size;  // as integers these order floats, NaN being the greatest
    most = most > (size = swap<4>(most)) ? most : size;
    most = most > (size = swap<2>(most)) ? most : size;
    most = most > (size = swap<1>(most)) ? most : size;
    const Vec peak = (Vec)most, scale = peak * (1 / 127.0f) + peak * 0.0f;
    const IntVec q = (IntVec)(x * (peak > 1e-30f ? 127 / peak : Vec{}) + magic) - (IntVec)magic;  // to nearest
    const ByteVec bytes = __builtin_convertvector(q, ByteVec);
    IntVec sums = q + swap<4>(q);
    sums += swap<2>(sums);
    sums += swap<1>(sums);
    for (int i = 0; i < 16; i += ACT_GROUP) {
      Block& block = blocks[(k + i) / ACT_GROUP];
      if (w.kind == Weights::INT8) offset = -128 * sums[i];
      else offset = ((k + i) % w.group ? offset : 0) + sums[i] * scale[i] / 16;
      block.scale = scale[i], block.offset = offset;
      std::memcpy(block.q, reinterpret_cast<const int8_t*>(&bytes) + i, ACT_GROUP);
    }
  }
  return blocks;
}

template <typename T>
void prepare(const T* x, int64_t m, const Weights& w, const T* norm, float eps, Row* rows, Scratch& room) {
  const int64_t k = w.k, padded = w.padded_k();
  room.reserve((m + 1) * 4 * Scratch::bytes_for(padded));
  float* f = room.take<float>(padded);
  std::fill(f + k, f + padded, 0.0f);
  for (int64_t i = 0; i < m; i++, x += k) {
    float scale = 1;
    if (norm) {
      Vec squares = {};
      for (int64_t j = 0; j < k; j += 16) {
        const Vec v = load_some(x, j, k);
        squares += v * v;
      }
      scale = 1 / std::sqrt(sum(squares) / k + eps);
    }
    if (!norm && !w.quantized()) {
      rows[i] = x;
      continue;
    }
    // Every result is rounded to the activations' type, as the reference's.
    T* out = room.take<T>(padded);
    for (int64_t j = 0; j < k; j += 16) {
      Vec v = load_some(x, j, k);
      if (norm) {
        store_vec(v * scale, out + j);
        v = load_vec(out + j) * load_some(norm, j, k);
      }
      store_vec(v, out + j);
      store_some(load_vec(out + j), f, j, k);
    }
    rows[i] = w.quantized() && !std::is_same_v<T, float> ? static_cast<Row>(quantize_row(f, w, room)) : out;
  }
}

// ---- Sixteen outputs at a time ------------------------------------------------------------------------------------

// Four of the activations' bytes in every lane.
inline IntVec spread(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return IntVec{} + four;
}

// acc[lane] += sum over j < 4 of w[lane][j] (unsigned) * x[lane][j] (signed), exactly.
inline void dot4(IntVec& acc, IntVec w, IntVec x) {
#if defined(__AVX512VNNI__)
  acc = (IntVec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), b = *reinterpret_cast<const __m256i*>(&x);
  __m256i* a = reinterpret_cast<__m256i*>(&acc);
  const __m256i* v = reinterpret_cast<const __m256i*>(&w);
  for (int h = 0; h < 2; h++) {  // halves of a byte, so that no 16-bit sum of two products saturates
    const __m256i lo = _mm256_maddubs_epi16(_mm256_and_si256(v[h], low), b);
    const __m256i hi = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(v[h], 4), low), b);
    a[h] = _mm256_add_epi32(a[h], _mm256_madd_epi16(lo, ones));
    a[h] = _mm256_add_epi32(a[h], _mm256_slli_epi32(_mm256_madd_epi16(hi, ones), 4));
  }
#else
  const uint8_t* v = reinterpret_cast<const uint8_t*>(&w);
  const int8_t* y = reinterpret_cast<const int8_t*>(&x);
  for (int i = 0; i < 4 * ROWS; i++) acc[i / 4] += int32_t(v[i]) * y[i];
#endif
}

// e^x to float32's precision (Cephes' polynomial); beyond float32's range the nearest that it holds, NaN stays NaN.
inline Vec exp_vec(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  const Vec magic = Vec{} + 12582912.0f, t = x * 1.44269504f + magic, n = t - magic;  // n: x / ln 2, rounded
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Vec)((IntVec)p + (((IntVec)t - (IntVec)magic) << 23));
}

inline Vec silu(Vec x) { return x / (1 + exp_vec(-x)); }

inline Vec row_scales(const Weights& w, int64_t block) { return load_some(w.row_scale, block * ROWS, w.n); }

// Fetches weights away bytes behind at for the second-level cache and, if near too, those that come soon for the first.
inline void fetch(const char* at, int64_t away, bool near_too) {
  __builtin_prefetch(at + away, 0, 2);
  if (near_too) __builtin_prefetch(at + NEAR);
}

// INT8 with quantized activations: [n / 16, k / 4, 16 rows, 4], each weight as w + 128. R blocks of outputs at a time
// share what is loaded of the activations.
template <int M, int R> void dot_int8(const Weights& w, const int64_t* blocks, const Row* rows, Vec (*out)[MAX_M]) {
  const char* data[R];
  const Block* x[M];
  for (int r = 0; r < R; r++) data[r] = w.data + blocks[r] * ROWS * w.k;
  for (int m = 0; m < M; m++) x[m] = static_cast<const Block*>(rows[m]);
  Vec total[R][M] = {};
  for (int64_t b = 0; b < w.k / ACT_GROUP; b++) {
    IntVec first[R], second[R];
    for (int r = 0; r < R; r++) {
      const char* at = data[r] + b * 128;
      for (int line = 0; line < 128; line += 64) fetch(at + line, M > 1 ? FAR : AHEAD, M > 1);
      first[r] = load<IntVec>(at), second[r] = load<IntVec>(at + 64);
    }
    for (int m = 0; m < M; m++) {
      const IntVec q = spread(x[m][b].q), q4 = spread(x[m][b].q + 4);
      for (int r = 0; r < R; r++) {
        IntVec acc = {};
        dot4(acc, first[r], q), dot4(acc, second[r], q4);
        total[r][m] += (as_float(acc) + x[m][b].offset) * x[m][b].scale;
      }
    }
  }
  for (int r = 0; r < R; r++) {
    const Vec scale = row_scales(w, blocks[r]);
    for (int m = 0; m < M; m++) out[r][m] = total[r][m] * scale;
  }
}

// INT4 with quantized activations: [n / 16, k / 8, 16 rows, 4], byte j of 4 holds elements j (low half) and j + 4.
template <int M, int R> void dot_int4(const Weights& w, const int64_t* blocks, const Row* rows, Vec (*out)[MAX_M]) {
  const char* data[R];
  const Block* x[M];
  for (int r = 0; r < R; r++) data[r] = w.data + blocks[r] * ROWS * w.k / 2;
  for (int m = 0; m < M; m++) x[m] = static_cast<const Block*>(rows[m]);
  const IntVec low = IntVec{} + 0x0f0f0f0f;
  const int64_t groups = w.groups();  // a division
  Vec total[R][M] = {};
  for (int64_t b = 0, end, g = 0; b < w.k / ACT_GROUP; b = end, g++) {
    end = std::min(w.k, b * ACT_GROUP + w.group) / ACT_GROUP;
    Vec part[R][M] = {};
    for (; b < end; b++) {
      IntVec lo[R], hi[R];
      for (int r = 0; r < R; r++) {
        const char* at = data[r] + b * 64;
        fetch(at, FAR, M > 1);
        const IntVec v = load<IntVec>(at);
        lo[r] = v & low, hi[r] = (v >> 4) & low;
      }
      for (int m = 0; m < M; m++) {
        const IntVec q = spread(x[m][b].q), q4 = spread(x[m][b].q + 4);
        for (int r = 0; r < R; r++) {
          IntVec acc = {};
          dot4(acc, lo[r], q), dot4(acc, hi[r], q4);
          part[r][m] += as_float(acc) * x[m][b].scale;
        }
      }
    }
    for (int r = 0; r < R; r++) {
      const int64_t at = (blocks[r] * groups + g) * ROWS;
      const Vec scale = load_bf16(w.scales + at), zero = load_u8(w.zeros + at);
      for (int m = 0; m < M; m++) total[r][m] += (part[r][m] - zero * x[m][end - 1].offset) * scale;
    }
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) out[r][m] = total[r][m];
}

// INT8 and INT4 with float32 activations: no rounding but float32's.
template <int M> void dot_exact(const Weights& w, int64_t block, const Row* rows, Vec* out) {
  const bool int4 = w.kind == Weights::INT4;
  const char* data = w.data + block * ROWS * w.k / (int4 ? 2 : 1);
  Vec total[M] = {}, scale = Vec{} + 1, zero = Vec{} + 128;
  for (int64_t k = 0, g = block * w.groups() * ROWS; k < w.k; data += 64) {
    if (int4 && k % w.group == 0) {
      scale = load_bf16(w.scales + g), zero = load_u8(w.zeros + g) * (1 / 16.0f);
      g += ROWS;
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
template <typename T> inline void multiply(Vec& acc, const T* a, const T* b) {
  for (size_t i = 0; i < 64 / sizeof(T); i += 16) acc += load_vec(a + i) * load_vec(b + i);
}
#if defined(__AVX512BF16__)
inline void multiply(Vec& acc, const bf16* a, const bf16* b) {
  acc = (Vec)_mm512_dpbf16_ps((__m512)acc, load<__m512bh>(a), load<__m512bh>(b));
}
#endif

// Weights as they are: [n, k]. R rows at a time, so that they share what is loaded of the activations, U sums along each.
template <int M, typename T> void dot_native(const Weights& w, int64_t block, const Row* rows, Vec* out) {
  constexpr int R = M <= 2 ? 1 : 4, U = M <= 2 ? 4 : 1;
  constexpr int64_t WIDTH = 64 / sizeof(T);
  const int64_t k = w.k, n = std::min(ROWS, w.n - block * ROWS);
  const T *base = reinterpret_cast<const T*>(w.data) + block * ROWS * k, *x[M];
  for (int m = 0; m < M; m++) x[m] = static_cast<const T*>(rows[m]);
  Vec sums[M][ROWS] = {};
  for (int64_t r = 0; r < n; r += R) {
    const T* row[R];
    for (int j = 0; j < R; j++) row[j] = base + std::min(r + j, n - 1) * k;
    Vec acc[M][R][U] = {};
    const auto step = [&](int64_t at, int u) {
      for (int j = 0; j < R; j++) {
        const auto ahead = [&](int64_t bytes) {  // beyond the row's end that is in the row after these R
          const int64_t to = at + bytes / int64_t(sizeof(T));
          return row[j] + to + (to < k ? 0 : (R - 1) * k);
        };
        __builtin_prefetch(ahead(R == 1 ? AHEAD : FAR), 0, 2);
        if (R > 1) __builtin_prefetch(ahead(NEAR));
        for (int m = 0; m < M; m++) multiply(acc[m][j][u], row[j] + at, x[m] + at);
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
  // What is left of rows that are no multiple of WIDTH; inside the loop above it would cost registers.
  for (int64_t i = k / WIDTH * WIDTH; i < k; i++)
    for (int64_t r = 0; r < n; r++)
      for (int m = 0; m < M; m++) out[m][r] += to_float(base[r * k + i]) * to_float(x[m][i]);
}

// out[i][m][r] = rows[m] . w[16 blocks[i] + r] for n, one or two, blocks; T: the type of the activations
template <int M, typename T>
void dot(const Weights& w, const int64_t* blocks, int64_t n, const Row* rows, Vec (*out)[MAX_M]) {
  if (w.quantized() && !std::is_same_v<T, float> && M > 2 && n == 2)
    return w.kind == Weights::INT8 ? dot_int8<M, 2>(w, blocks, rows, out) : dot_int4<M, 2>(w, blocks, rows, out);
  for (; n > 0; n--, blocks++, out++) {
    if (!w.quantized()) dot_native<M, T>(w, *blocks, rows, *out);
    else if (std::is_same_v<T, float>) dot_exact<M>(w, *blocks, rows, *out);
    else if (w.kind == Weights::INT8) dot_int8<M, 1>(w, blocks, rows, out);
    else dot_int4<M, 1>(w, blocks, rows, out);
  }
}

using Dot = void (*)(const Weights&, const int64_t*, int64_t, const Row*, Vec (*)[MAX_M]);
template <typename T> Dot pick_dot(int64_t m) {
  static constexpr Dot table[] = {dot<1, T>, dot<2, T>, dot<3, T>, dot<4, T>, dot<5, T>, dot<6, T>, dot<7, T>, dot<8, T>};
  return table[m - 1];
}

int threads() { return torch::stable::get_num_threads(); }

// Where the threads of a parallel region wait for each other. Unlike OpenMP's it lets go of the processor soon: on a busy
// machine the thread that it waits for may need it.
class Barrier {
  std::atomic<int> arrived{0}, round{0};

 public:
  void wait() {
    const int now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
      if (spins > 2000) std::this_thread::yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }
};

// This thread's part of n things.
struct Part { int64_t begin, end; };
Part my_part(int64_t n) {
  const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
  return {n * t / threads, n * (t + 1) / threads};
}

template <typename F> void by_type(ScalarType type, F f) {
  if (type == ScalarType::Float) f(float{});
  else if (type == ScalarType::Half) f(f16{});
  else if (type == ScalarType::BFloat16) f(bf16{});
  else STD_TORCH_CHECK(false, "activations must be float32, float16 or bfloat16");
}

// Activations [..., k] that the loops below may take, with weights, norms and caches of their type.
void check(const Tensor& x, int64_t k, std::initializer_list<OptTensor> others) {
  const int64_t m = k ? x.numel() / k : 0;
  STD_TORCH_CHECK(x.is_contiguous() && x.size(-1) == k && m > 0 && m <= MAX_M, "activations must be 1 to 8 whole rows");
  for (const OptTensor& t : others)
    STD_TORCH_CHECK(!t || t->scalar_type() == ScalarType::Int || t->scalar_type() == x.scalar_type(),
                    "weights, norms and caches must be of the activations' type");
}

// ---- linear: y = [residual +] [swiglu] ([rms_norm] x W^T [+ bias]) ----------------------------------------------------

template <typename T> struct Linear {
  Weights w;
  const T* bias;
};

// This thread's part of the outputs; every thread of a parallel region calls it.
template <typename T>
void linear_part(const T* x, int64_t m, const Linear<T>& layer, const T* norm, float eps, const T* residual, bool swiglu,
                 T* out, float* wide = nullptr) {
  const Weights& w = layer.w;
  const T* bias = layer.bias;
  const Dot dot = pick_dot<T>(m);
  const int64_t half = swiglu ? w.n / 2 : 0, n = w.n - half;
  Row rows[MAX_M];
  prepare(x, m, w, norm, eps, rows, scratch);
  Vec y[2][MAX_M];
  const Part part = my_part((n + ROWS - 1) / ROWS);
  for (int64_t b = part.begin, step; b < part.end; b += step) {
    step = swiglu ? 1 : std::min<int64_t>(2, part.end - b);
    const int64_t blocks[] = {b, swiglu ? b + half / ROWS : b + 1};
    dot(w, blocks, swiglu ? 2 : step, rows, y);
    for (int64_t j = 0, at = b * ROWS; j < step; j++, at += ROWS)
      for (int64_t i = 0; i < m; i++) {
        Vec v = bias ? y[j][i] + load_some(bias, at, w.n) : y[j][i];
        if (swiglu) v = silu(v) * (bias ? y[1][i] + load_some(bias, at + half, w.n) : y[1][i]);
        if (residual) v += load_some(residual + i * n, at, n);
        if (wide) store_some(v, wide + i * n, at, n);
        else store_some(v, out + i * n, at, n);
      }
  }
}

Tensor linear(Tensor x, Tensor w, OptTensor scales, OptTensor zeros, OptTensor bias, int64_t n, int64_t group,
              OptTensor norm, double eps, OptTensor residual, bool swiglu, bool wide) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t k = shape.back(), m = x.numel() / k;
  check(x, k, {w, bias, norm, residual});
  shape.back() = swiglu ? n / 2 : n;
  Tensor out = torch::stable::new_empty(x, shape, wide ? ScalarType::Float : x.scalar_type());
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Linear<T> layer{weights(w, scales, zeros, n, k, group), ptr<T>(bias)};
    void* to = out.data_ptr();
#pragma omp parallel num_threads(threads())
    linear_part(ptr<T>(x), m, layer, ptr<T>(norm), eps, ptr<T>(residual), swiglu, static_cast<T*>(to),
                wide ? static_cast<float*>(to) : nullptr);
  });
  return out;
}

// ---- dequantize: the matrix [n, k] that packed weights stand for -----------------------------------------------------

template <typename T> void dequantize_to(const Weights& w, T* out) {
  const bool int4 = w.kind == Weights::INT4;
  const int64_t group = int4 ? w.group : w.k;
#pragma omp parallel for num_threads(threads())
  for (int64_t b = 0; b < w.blocks(); b++) {
    const char* data = w.data + b * ROWS * w.k / (int4 ? 2 : 1);
    const int64_t rows = std::min(ROWS, w.n - b * ROWS);
    for (int64_t k = 0, g = b * w.groups() * ROWS; k < w.k; g += ROWS) {
      float scale[ROWS], zero[ROWS];
      for (int64_t r = 0; r < rows; r++) {
        scale[r] = int4 ? to_float(bf16{w.scales[g + r]}) : w.row_scale[b * ROWS + r];
        zero[r] = int4 ? w.zeros[g + r] / 16.0f : 128;
      }
      for (const int64_t end = std::min(w.k, k + group); k < end; data += 64, k += int4 ? 8 : 4)
        for (int64_t r = 0; r < rows; r++)
          for (int64_t j = 0; j < (int4 ? 8 : 4); j++) {
            const uint8_t byte = data[4 * r + j % 4];
            const int q = !int4 ? byte : j < 4 ? byte & 15 : byte >> 4;
            from_float((q - zero[r]) * scale[r], &out[(b * ROWS + r) * w.k + k + j]);
          }
    }
  }
}

Tensor dequantize(Tensor w, OptTensor scales, OptTensor zeros, int64_t n, int64_t group, ScalarType type) {
  const int64_t k = w.size(1) * (zeros ? 8 : 4);
  Tensor out = torch::stable::new_empty(w, std::vector<int64_t>{n, k}, type);
  by_type(type, [&](auto t) {
    using T = decltype(t);
    dequantize_to<T>(weights(w, scales, zeros, n, k, group), static_cast<T*>(out.data_ptr()));
  });
  return out;
}

// ---- experts: x + sum over each token's chosen experts of weight * w2(swiglu(w13 [rms_norm] x)) ---------------

template <typename T>
void experts_of(const T* x, int64_t m, const int64_t* chosen, const float* share, int64_t slots, const Weights& w13,
                const Weights& w2, const T* norm, float eps, T* out) {
  const int64_t f = w2.k, dim = w2.n;
  struct Use { int64_t expert; std::vector<int64_t> at; };  // at: positions in chosen
  std::vector<Use> uses;
  for (int64_t i = 0; i < m * slots; i++) {
    auto same = std::find_if(uses.begin(), uses.end(), [&](const Use& u) { return u.expert == chosen[i]; });
    if (same == uses.end()) same = uses.insert(uses.end(), Use{chosen[i], {}});
    same->at.push_back(i);
  }
  together.reserve(Scratch::bytes_for(m * slots * f));
  T* hidden = together.take<T>(m * slots * f);
  Barrier barrier;
#pragma omp parallel num_threads(threads())
  {
    Row rows[MAX_M], mine[MAX_M];
    Vec y[2][MAX_M];
    prepare(x, m, w13, norm, eps, rows, scratch);
    const int64_t blocks = f / ROWS;
    const Part part = my_part(blocks * uses.size());
    for (int64_t b = part.begin; b < part.end; b++) {
      const Use& use = uses[b / blocks];
      const int64_t count = use.at.size();
      for (int64_t i = 0; i < count; i++) mine[i] = rows[use.at[i] / slots];
      const int64_t pair[] = {b % blocks, b % blocks + f / ROWS};
      pick_dot<T>(count)(w13.expert(use.expert), pair, 2, mine, y);
      for (int64_t i = 0; i < count; i++)
        store_vec(silu(y[0][i]) * y[1][i], hidden + use.at[i] * f + b % blocks * ROWS);
    }
    barrier.wait();
    std::vector<Row> inner(m * slots);
    prepare<T>(hidden, m * slots, w2, nullptr, 0, inner.data(), scratch);
    const Part part2 = my_part(w2.blocks());
    for (int64_t b = part2.begin; b < part2.end; b++) {
      Vec total[MAX_M] = {};
      for (const Use& use : uses) {
        const int64_t count = use.at.size();
        for (int64_t i = 0; i < count; i++) mine[i] = inner[use.at[i]];
        pick_dot<T>(count)(w2.expert(use.expert), &b, 1, mine, y);
        for (int64_t i = 0; i < count; i++) total[use.at[i] / slots] += share[use.at[i]] * y[0][i];
      }
      for (int64_t i = 0, at = b * ROWS; i < m; i++) {
        store_some(total[i] + load_some(x + i * dim, at, dim), out + i * dim, at, dim);
      }
    }
  }
}

Tensor experts(Tensor x, Tensor norm, double eps, Tensor share, Tensor chosen, Tensor w13, OptTensor s13, OptTensor z13,
               Tensor w2, OptTensor s2, OptTensor z2, int64_t ffn, int64_t group) {
  const int64_t dim = x.size(-1), m = x.numel() / dim;
  check(x, dim, {norm, w13, w2});
  STD_TORCH_CHECK(chosen.scalar_type() == ScalarType::Long && share.scalar_type() == ScalarType::Float,
                  "experts are chosen by int64 and weighted by float32");
  Tensor out = torch::stable::empty_like(x);
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    experts_of<T>(ptr<T>(x), m, ptr<int64_t>(chosen), ptr<float>(share), chosen.size(-1),
                  weights(w13, s13, z13, 2 * ffn, dim, group), weights(w2, s2, z2, dim, ffn, group), ptr<T>(norm), eps,
                  mutable_ptr<T>(out));
  });
  return out;
}

// ---- attention: x + wo(softmax(q k^T) v), q, k, v = wqkv rms_norm(x); RoPE, and the cache's filled part alone ---------

struct Attention {
  int64_t batch, tokens, heads, kv_heads, head_dim, capacity, start, window;
  float eps;
  int64_t first() const { return window ? std::max<int64_t>(0, start - window + 1) : 0; }  // cache entry any token sees
  int64_t chunks() const { return (start + tokens - first() + KV_CHUNK - 1) / KV_CHUNK; }
};

// What attention needs to know, checked: tokens [start, start + T) of x [B, T, dim] fit the cache.
Attention attention_of(const Tensor& x, int64_t heads, const Tensor& k_cache, const Tensor& positions, const Tensor& rope,
                       int64_t window, double eps) {
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Long && positions.numel() == x.size(1) && rope.is_contiguous() &&
                  rope.scalar_type() == ScalarType::Float, "positions must be int64 [T], rope float32 [T, D / 2, 2]");
  const int64_t start = *ptr<int64_t>(positions);
  STD_TORCH_CHECK(x.size(0) == k_cache.size(0) && start >= 0 && start + x.size(1) <= k_cache.size(2) &&
                  k_cache.is_contiguous(), "the cache has no room for these rows and positions");
  return {x.size(0), x.size(1), heads, k_cache.size(1), k_cache.size(3), k_cache.size(2), start, window, float(eps)};
}

// One head's row: [norm], then rotated by rope [D/2, 2] (cos, sin), element i paired with i + D/2.
template <typename T> void rope_row(const T* x, const T* norm, float eps, const float* rope, int64_t d, float* out) {
  float total = 0;
  for (int64_t i = 0; i < d; i++) out[i] = to_float(x[i]), total += out[i] * out[i];
  if (norm) {
    const float scale = 1 / std::sqrt(total / d + eps);
    for (int64_t i = 0; i < d; i++) {
      T rounded;
      from_float(out[i] * scale, &rounded);
      from_float(to_float(rounded) * to_float(norm[i]), &rounded);
      out[i] = to_float(rounded);
    }
  }
  for (int64_t i = 0; i < d / 2; i++) {
    const float a = out[i], b = out[i + d / 2], cos = rope[2 * i], sin = rope[2 * i + 1];
    out[i] = a * cos - b * sin, out[i + d / 2] = b * cos + a * sin;
  }
}

// q . k in sixteen parts, both [D] and of one type
template <int64_t D> inline Vec dot_head(const auto* q, const auto* k) {
  Vec total = {};
  for (int64_t i = 0; i < D; i += 16) total += load_vec(q + i) * load_vec(k + i);
  return total;
}
#if defined(__AVX512BF16__)
template <int64_t D> inline Vec dot_head(const bf16* q, const bf16* k) {
  Vec total = {};
  for (int64_t i = 0; i < D; i += 32)
    total = (Vec)_mm512_dpbf16_ps((__m512)total, load<__m512bh>(q + i), load<__m512bh>(k + i));
  return total;
}
#endif

// Fetches a row [d], which will be used soon, into the second-level cache.
template <typename T> inline void fetch_row(const T* row, int64_t d) {
  for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

struct Softmax { float peak, sum; };

// exp(q . k / sqrt(d) - peak) for n keys [n, d] of the cache. D: d where it is known when this is compiled, or 0.
// Fetches next [n / share, d], unless it is null.
template <int64_t D, typename T>
Softmax weigh_keys(const T* q, const T* k, int64_t n, int64_t d, float* weights, const T* next, int64_t share) {
  const float none = -std::numeric_limits<float>::infinity(), scale = 1 / std::sqrt(float(d));
  const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec most = Vec{} + none, total = {};
  for (int64_t s = 0; s < n; s += 16) {
    for (int64_t r = (s + share - 1) / share; next && r * share < std::min(s + 16, n); r++) fetch_row(next + r * d, d);
    Vec w = {};
    if constexpr (D > 0) {
      Vec parts[16];
      for (int64_t r = 0; r < 16; r++) parts[r] = dot_head<D>(q, k + std::min(s + r, n - 1) * D);
      w = sum_each(parts) * scale;
    } else {
      for (int64_t r = 0; r < std::min<int64_t>(16, n - s); r++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += to_float(q[i]) * to_float(k[(s + r) * d + i]);
        w[r] = sum * scale;
      }
    }
    w = lane < float(n - s) ? w : Vec{} + none;
    most = (w > most) | (w != w) ? w : most;  // NaN stays
    store_vec(w, weights + s);
  }
  float peak = none;
  for (int r = 0; r < 16; r++) peak = most[r] > peak || most[r] != most[r] ? most[r] : peak;
  for (int64_t s = 0; s < n; s += 16) {
    const Vec w = lane < float(n - s) ? exp_vec(load_vec(weights + s) - peak) : Vec{};
    store_vec(w, weights + s);
    total += w;
  }
  return {peak, sum(total)};
}

using KeyWeights = float[KV_CHUNK];

// out [Q, D] = weights [Q, n] . v [n, D]; next as above
template <int64_t D, int Q, typename T>
void add_values(const KeyWeights* weights, const T* v, int64_t n, float* out, const T* next) {
  Vec sums[Q][D / 16] = {};
  for (int64_t s = 0; s < n; s++) {
    if (next) fetch_row(next + s * D, D);
    for (int64_t i = 0; i < D / 16; i++) {
      const Vec x = load_vec(v + s * D + 16 * i);
      for (int h = 0; h < Q; h++) sums[h][i] += weights[h][s] * x;
    }
  }
  std::memcpy(out, sums, sizeof sums);
}

// The queries [T, H / G, D] of one key/value head against one chunk of the cache: unnormalized output, greatest score,
// sum of weights. Two or four heads at a time share what is loaded of the values.
template <typename T, int64_t D>
void attend(const Attention& a, const T* q, const T* k, const T* v, int64_t first, int64_t last, float* out,
            float* peaks, float* sums) {
  const int64_t d = D ? D : a.head_dim, shared = a.heads / a.kv_heads;
  constexpr int TILE = D ? 256 / D : 1;
  alignas(64) KeyWeights weights[TILE];
  for (int64_t t = 0; t < a.tokens; t++) {
    const int64_t position = a.start + t;
    const int64_t from = a.window ? std::max(first, position - a.window + 1) : first, to = std::min(last, position + 1);
    const int64_t n = std::max<int64_t>(0, to - from);
    for (int64_t h = 0, count; h < shared; h += count, q += count * d, out += count * d) {
      count = std::min<int64_t>(TILE, shared - h);
      for (int64_t i = 0; i < count; i++) {
        const T* next = t + h ? nullptr : v + (from + n * i / count) * d;
        const Softmax softmax = weigh_keys<D>(q + i * d, k + from * d, n, d, weights[i], next, count);
        *peaks++ = softmax.peak, *sums++ = softmax.sum;
      }
      if constexpr (D > 0) {
        static constexpr decltype(&add_values<D, 1, T>) add[] = {add_values<D, 1, T>, add_values<D, 2, T>,
                                                                 add_values<D, std::min(3, TILE), T>, add_values<D, TILE, T>};
        add[count - 1](weights, v + from * d, n, out, t + h ? nullptr : k + (from + KV_CHUNK) * d);  // its next chunk
      } else {
        std::fill_n(out, d, 0.0f);
        for (int64_t s = 0; s < n; s++)
          for (int64_t i = 0; i < d; i++) out[i] += weights[0][s] * to_float(v[(from + s) * d + i]);
      }
    }
  }
}

// From qkv [B, T, (H + 2 G) D] to out [B, T, H D]; every thread of a parallel region calls it.
template <typename T>
void attention_part(const Attention& a, const T* qkv, T* k_cache, T* v_cache, const float* rope, const T* q_norm,
                    const T* k_norm, T* q, float* parts, float* peaks, float* sums, T* out, Barrier& barrier) {
  const int64_t d = a.head_dim, h = a.heads, g = a.kv_heads, shared = h / g, width = (h + 2 * g) * d;
  const int64_t first = a.first(), length = a.start + a.tokens, chunks = a.chunks(), per_group = a.tokens * shared;
  const Part rows = my_part(a.batch * a.tokens * (h + 2 * g));
  scratch.reserve(Scratch::bytes_for(d));
  float* row = scratch.take<float>(d);
  for (int64_t i = rows.begin; i < rows.end; i++) {
    const int64_t bt = i / (h + 2 * g), b = bt / a.tokens, t = bt % a.tokens, head = i % (h + 2 * g);
    const T* x = qkv + bt * width + head * d;
    T* to;
    if (head < h) to = &q[(((b * g + head / shared) * a.tokens + t) * shared + head % shared) * d];  // [B, G, T, H/G, D]
    else to = (head < h + g ? k_cache : v_cache) + ((b * g + (head - h) % g) * a.capacity + a.start + t) * d;
    if (head < h + g) {
      rope_row(x, head < h ? q_norm : k_norm, a.eps, rope + t * d, d, row);
      for (int64_t j = 0; j < d; j++) from_float(row[j], &to[j]);
    } else {
      std::memcpy(to, x, d * sizeof(T));
    }
  }
  barrier.wait();
  const auto attend_d = d == 64 ? attend<T, 64> : d == 128 ? attend<T, 128> : attend<T, 0>;
  const Part tasks = my_part(a.batch * g * chunks);
  for (int64_t i = tasks.begin; i < tasks.end; i++) {
    const int64_t bg = i / chunks, from = first + i % chunks * KV_CHUNK;
    attend_d(a, &q[bg * per_group * d], k_cache + bg * a.capacity * d, v_cache + bg * a.capacity * d, from,
             std::min(length, from + KV_CHUNK), &parts[i * per_group * d], &peaks[i * per_group], &sums[i * per_group]);
  }
  barrier.wait();
  const Part outs = my_part(a.batch * a.tokens * h);
  for (int64_t i = outs.begin; i < outs.end; i++) {
    const int64_t head = i % h, bt = i / h, b = bt / a.tokens, t = bt % a.tokens;
    const int64_t at = (b * g + head / shared) * chunks * per_group + t * shared + head % shared;
    float peak = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t c = 0; c < chunks; c++) peak = std::max(peak, peaks[at + c * per_group]);
    std::fill_n(row, d, 0.0f);
    for (int64_t c = 0; c < chunks; c++) {
      if (sums[at + c * per_group] == 0) continue;
      const float weight = std::exp(peaks[at + c * per_group] - peak);
      sum += weight * sums[at + c * per_group];
      for (int64_t j = 0; j < d; j++) row[j] += weight * parts[(at + c * per_group) * d + j];
    }
    for (int64_t j = 0; j < d; j++) from_float(row[j] / sum, &out[bt * h * d + head * d + j]);
  }
}

Tensor attention(Tensor x, Tensor norm, double eps, Tensor wqkv, OptTensor sqkv, OptTensor zqkv, OptTensor bqkv, Tensor wo,
                 OptTensor so, OptTensor zo, OptTensor bo, int64_t heads, int64_t group, Tensor k_cache, Tensor v_cache,
                 Tensor positions, Tensor rope, OptTensor q_norm, OptTensor k_norm, int64_t window) {
  const int64_t dim = x.size(-1), d = k_cache.size(3), g = k_cache.size(1), width = (heads + 2 * g) * d;
  check(x, dim, {norm, wqkv, bqkv, wo, bo, q_norm, k_norm, k_cache, v_cache});
  const Attention a = attention_of(x, heads, k_cache, positions, rope, window, eps);
  const int64_t m = a.batch * a.tokens, n_parts = m * heads * a.chunks();
  Tensor out = torch::stable::empty_like(x);
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Linear<T> first{weights(wqkv, sqkv, zqkv, width, dim, group), ptr<T>(bqkv)};
    const Linear<T> last{weights(wo, so, zo, dim, heads * d, group), ptr<T>(bo)};
    const int64_t n = m * heads * d;
    together.reserve(Scratch::bytes_for(m * width) + 2 * Scratch::bytes_for(n) + Scratch::bytes_for(n_parts * (d + 2)));
    T *qkv = together.take<T>(m * width), *y = together.take<T>(n), *q = together.take<T>(n);
    float* parts = together.take<float>(n_parts * (d + 2));
    Barrier barrier;
#pragma omp parallel num_threads(threads())
    {
      linear_part<T>(ptr<T>(x), m, first, ptr<T>(norm), eps, nullptr, false, qkv);
      barrier.wait();
      attention_part<T>(a, qkv, mutable_ptr<T>(k_cache), mutable_ptr<T>(v_cache), ptr<float>(rope), ptr<T>(q_norm),
                        ptr<T>(k_norm), q, parts, parts + n_parts * d, parts + n_parts * (d + 1), y, barrier);
      barrier.wait();
      linear_part<T>(y, m, last, nullptr, 0, ptr<T>(x), false, mutable_ptr<T>(out));
    }
  });
  return out;
}

// ---- layers: all blocks of a dense model, one after the other, in one parallel region -----------------------------------

struct Tensors {  // of one layer, in kernels.py's order; an empty one stands for none
  const Tensor* t;
  OptTensor operator[](int i) const { return t[i].numel() ? OptTensor(t[i]) : std::nullopt; }
  template <typename T> Linear<T> linear(int i, int64_t n, int64_t k, int64_t group) const {
    const auto& self = *this;
    return {weights(t[i], self[i + 1], self[i + 2], n, k, group), ptr<T>(self[i + 3])};
  }
};
constexpr int TENSORS = 20;

Tensor layers(Tensor x, std::vector<Tensor> tensors, std::vector<Tensor> k_caches, std::vector<Tensor> v_caches,
              double eps, int64_t heads, int64_t ffn, int64_t group, Tensor positions, Tensor rope, int64_t window) {
  const int64_t dim = x.size(-1), d = k_caches[0].size(3), g = k_caches[0].size(1), width = (heads + 2 * g) * d;
  check(x, dim, {tensors[0], tensors[1], k_caches[0], v_caches[0]});
  const Attention a = attention_of(x, heads, k_caches[0], positions, rope, window, eps);
  const int64_t m = a.batch * a.tokens, n_parts = m * heads * a.chunks(), n_layers = k_caches.size();
  Tensor out = torch::stable::empty_like(x);
  by_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t n = m * heads * d;
    together.reserve(Scratch::bytes_for(m * width) + 2 * Scratch::bytes_for(n) + Scratch::bytes_for(n_parts * (d + 2)) +
                     Scratch::bytes_for(m * ffn) + Scratch::bytes_for(m * dim));
    T *qkv = together.take<T>(m * width), *y = together.take<T>(n), *q = together.take<T>(n);
    T *hidden = together.take<T>(m * ffn), *middle = together.take<T>(m * dim), *to = mutable_ptr<T>(out);
    float* parts = together.take<float>(n_parts * (d + 2));
    std::memcpy(to, x.data_ptr(), m * dim * sizeof(T));
    Barrier barrier;
#pragma omp parallel num_threads(threads())
    for (int64_t i = 0; i < n_layers; i++) {
      const Tensors t{&tensors[i * TENSORS]};
      linear_part<T>(to, m, t.linear<T>(1, width, dim, group), ptr<T>(t[0]), eps, nullptr, false, qkv);
      barrier.wait();
      attention_part<T>(a, qkv, mutable_ptr<T>(k_caches[i]), mutable_ptr<T>(v_caches[i]), ptr<float>(rope), ptr<T>(t[9]),
                        ptr<T>(t[10]), q, parts, parts + n_parts * d, parts + n_parts * (d + 1), y, barrier);
      barrier.wait();
      linear_part<T>(y, m, t.linear<T>(5, dim, heads * d, group), nullptr, 0, to, false, middle);
      barrier.wait();
      linear_part<T>(middle, m, t.linear<T>(12, 2 * ffn, dim, group), ptr<T>(t[11]), eps, nullptr, true, hidden);
      barrier.wait();
      linear_part<T>(hidden, m, t.linear<T>(16, dim, ffn, group), nullptr, 0, middle, false, to);
      barrier.wait();
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY(gptfast, m) {
  m.def("linear(Tensor x, Tensor w, Tensor? scales, Tensor? zeros, Tensor? bias, int n, int group, Tensor? norm, "
        "float eps, Tensor? residual, bool swiglu, bool wide) -> Tensor");
  m.def("attention(Tensor x, Tensor norm, float eps, Tensor wqkv, Tensor? sqkv, Tensor? zqkv, Tensor? bqkv, Tensor wo, "
        "Tensor? so, Tensor? zo, Tensor? bo, int heads, int group, Tensor(a!) k_cache, Tensor(b!) v_cache, "
        "Tensor positions, Tensor rope, Tensor? q_norm, Tensor? k_norm, int window) -> Tensor");
  m.def("experts(Tensor x, Tensor norm, float eps, Tensor share, Tensor chosen, Tensor w13, Tensor? s13, Tensor? z13, "
        "Tensor w2, Tensor? s2, Tensor? z2, int ffn, int group) -> Tensor");
  m.def("layers(Tensor x, Tensor[] tensors, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, float eps, int heads, int ffn, "
        "int group, Tensor positions, Tensor rope, int window) -> Tensor");
  m.def("dequantize(Tensor w, Tensor? scales, Tensor? zeros, int n, int group, ScalarType dtype) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("experts", TORCH_BOX(&experts));
  m.impl("layers", TORCH_BOX(&layers));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}
