// Weights as kernels/formats.py packs them, and activations in the form that the products with them read.
#pragma once

#include <cmath>

#include "tape.h"

constexpr int64_t MAX_TOKENS = 64;  // rows of activations that an operation takes; also in kernels/__init__.py
constexpr int64_t BLOCK_M = 8;               // rows of activations in a block, whose sums are kept in registers
constexpr int64_t BLOCK_N = 16;              // rows of weights in a block; their outputs are the lanes of one Vec
constexpr int64_t ACT_GROUP = 8;             // activations that share a scale, where they are quantized
constexpr int64_t TILE_M = 16, TILE_K = 32;  // rows and columns of a tile of activations (tiles.h)
constexpr int64_t TILE_BYTES = 1024;

// A matrix [n, k], or the first of a stack [n_experts, n, k]. Dense weights are stored row by row. Quantized weights
// are packed block by block, in words of 4 bytes, the 16 rows side by side (n is filled up to a multiple of 16):
//
//                64 bytes, one load
//     word 0     row 0   row 1   row 2   ...   row 15      elements 0-3 (INT8) or 0-7 (INT4) of each row
//     word 1     row 0   row 1   row 2   ...   row 15      the next elements
//
// INT8: byte j is element j, stored as q + 128.
// INT4: byte j holds element j in its low half and element j + 4 in its high half.
struct Weights {
  enum Kind { DENSE, INT8, INT4 } kind;  // Format.format_id in kernels/formats.py
  const char* data;
  int64_t bits;             // of one element
  int64_t n, k;
  int64_t group_size;       // inputs that share a scale: for INT8 all k
  const float* row_scales;  // INT8: [n]
  const bf16* scales;       // INT4: [n / 16, n_groups, 16]
  const uint8_t* zeros;     // INT4: [n / 16, n_groups, 16], the zero point in sixteenths of q

  int64_t n_blocks() const { return (n + BLOCK_N - 1) / BLOCK_N; }
  int64_t n_groups() const { return (k + group_size - 1) / group_size; }
  int64_t padded_k() const { return (k + TILE_K - 1) / TILE_K * TILE_K; }
  int64_t bytes() const { return (kind == DENSE ? n : n_blocks() * BLOCK_N) * k * bits / 8; }
  const char* block_data(int64_t block) const { return data + block * BLOCK_N * k * bits / 8; }
  Weights expert(int64_t e) const {
    Weights w = *this;
    w.data += e * bytes();
    if (row_scales) w.row_scales += e * n;
    if (scales) w.scales += e * n_blocks() * n_groups() * BLOCK_N;
    if (zeros) w.zeros += e * n_blocks() * n_groups() * BLOCK_N;
    return w;
  }
};

// ---- Activations ----------------------------------------------------------------------------------------------------

// 1 / rms(x) of x [k].
template <typename T> float inverse_rms(const T* x, float eps, int64_t k) {
  Vec squares = {};
  for (int64_t i = 0; i < k; i += LANES) {
    const Vec v = load_partial(x, i, k);
    squares += v * v;
  }
  return 1 / std::sqrt(sum(squares) / k + eps);
}

// Elements [i, i + 16) of x [k] * inverse_rms * weight [k]. Rounds to T before the product with weight, as
// kernels/reference.py does.
template <typename T> Vec normed_vec(const T* x, const T* weight, float inverse_rms, int64_t i, int64_t k) {
  T rounded[LANES];
  store_vec(load_partial(x, i, k) * inverse_rms, rounded);
  return load_vec(rounded) * load_partial(weight, i, k);
}

// out [k] = x [k] * inverse_rms * weight [k]. Returns out, which may be x.
template <typename T> const T* apply_norm(const T* x, const T* weight, float inverse_rms, int64_t k, T* out) {
  for (int64_t i = 0; i < k; i += LANES) store_partial(normed_vec(x, weight, inverse_rms, i, k), out, i, k);
  return out;
}

// out [k] = x [k] / rms(x) * weight [k]. Returns out, which may be x.
template <typename T> const T* rms_norm_row(const T* x, const T* weight, float eps, int64_t k, T* out) {
  return apply_norm(x, weight, inverse_rms(x, eps, k), k, out);
}

struct QuantizedGroup {  // ACT_GROUP activations: x = scale * q, |q| <= 127
  float scale;           // NaN if one of x is not finite; then the outputs are NaN, too
  float offset;          // see quantize_row
  int8_t q[ACT_GROUP];
};

// Quantizes x [k] to groups [padded k / ACT_GROUP], for a product with w. Two groups at a time, each in half of a Vec.
//
// offset is for the zero point of the weights: sum((q - zero) * x) = sum(q * x) - zero * sum(x). sum(x) is the same for
// all outputs, so it is computed once, here.
//     INT8: q + 128 is stored. offset = -128 * (the sum of this group's quantized x).
//     INT4: a weight is (q - zero / 16) * scale. Several groups of x lie in one group of weights, which share a zero.
//           offset = (the sum of x from the first of them to this one) / 16, so the last of them has the whole sum.
template <typename T> const QuantizedGroup* quantize_row(const T* x, const Weights& w, QuantizedGroup* groups) {
  const auto maximum = [](IntVec a, IntVec b) { return a > b ? a : b; };
  const auto add = [](IntVec a, IntVec b) { return a + b; };
  const Vec magic = Vec{} + ROUND_TO_INT;
  float offset = 0;
  for (int64_t k = 0; k < w.k; k += LANES) {
    const Vec v = load_partial(x, k, w.k);
    // The largest magnitude of each group. Without their sign, floats compare like their bits, and NaN is the largest.
    const Vec peak = (Vec)reduce_eights((IntVec)v & 0x7fffffff, maximum);
    const Vec scale = peak * (1 / 127.0f) + peak * 0.0f;  // infinity becomes NaN
    const IntVec q = (IntVec)(v * (peak > 1e-30f ? 127 / peak : Vec{}) + magic) - (IntVec)magic;
    const ByteVec bytes = __builtin_convertvector(q, ByteVec);
    const IntVec sums = reduce_eights(q, add);
    for (int i = 0; i < LANES; i += ACT_GROUP) {
      if (w.kind == Weights::INT8) offset = -128 * sums[i];
      else offset = ((k + i) % w.group_size ? offset : 0) + sums[i] * scale[i] / 16;
      QuantizedGroup& group = groups[(k + i) / ACT_GROUP];
      group.scale = scale[i], group.offset = offset;
      std::memcpy(group.q, reinterpret_cast<const int8_t*>(&bytes) + i, ACT_GROUP);
    }
  }
  return groups;
}

// A row of activations, ready for a product: QuantizedGroup [k / ACT_GROUP] if quantizes_rows, else T [k].
using PreparedRow = const void*;

// With float32 activations (--precision float32) nothing is quantized.
template <typename T> bool quantizes_rows(const Weights& w) {
  return w.kind != Weights::DENSE && !std::is_same_v<T, float>;
}

// The activations x [m, k] of a product with w. They are normed first if norm [k] is not null.
template <typename T> struct Activations {
  const T* x;
  int64_t m;
  const Weights& w;
  const T* norm;
  float eps;
  bool tiled = false;  // they become tiles [k / TILE_K, m / TILE_M, TILE_M, TILE_K], filled up with zeros

  bool is_quantized() const { return quantizes_rows<T>(w) && !tiled; }

  // The size of a prepared row; 0 if that is the row of x itself.
  int64_t row_bytes() const {
    if (is_quantized()) return w.padded_k() / ACT_GROUP * sizeof(QuantizedGroup);
    return norm || tiled ? w.padded_k() * sizeof(T) : 0;
  }
  int64_t bytes() const { return (tiled ? (m + TILE_M - 1) / TILE_M * TILE_M : m) * row_bytes(); }

  // Few rows are prepared by every thread for itself, which is cheaper than a barrier. Many are shared out.
  bool is_shared() const { return m > BLOCK_M && row_bytes() > 0; }
  size_t shared_bytes() const { return is_shared() ? bytes() : 0; }

  // Fills rows [m]; of tiles only the first, with their address. They are valid until this thread's next call or, if
  // they are shared, until the operation ends.
  void prepare(char* shared, Barrier& barrier, PreparedRow* rows) const {
    static thread_local Scratch scratch;
    char* memory = is_shared() ? shared : scratch.at_least<char>(bytes());
    const Share share = is_shared() ? my_share(m) : Share{0, m};
    for (int64_t i = share.begin; i < share.end; i++) prepare_row(i, memory);
    for (int64_t i = 0; i < m; i++)
      rows[i] = row_bytes() ? static_cast<PreparedRow>(memory + i * row_bytes()) : x + i * w.k;
    if (is_shared()) barrier.wait();
  }

  void prepare_row(int64_t i, char* memory) const {
    static thread_local Scratch scratch;
    char* out = memory + i * row_bytes();
    const T* row = x + i * w.k;
    if (norm) {
      const bool is_last_step = !is_quantized() && !tiled;
      T* normed = is_last_step ? reinterpret_cast<T*>(out) : scratch.at_least<T>(w.padded_k());
      row = rms_norm_row(row, norm, eps, w.k, normed);
    }
    if (is_quantized()) quantize_row(row, w, reinterpret_cast<QuantizedGroup*>(out));
    if (tiled) copy_to_tiles(row, i, memory);
  }

  void copy_to_tiles(const T* row, int64_t i, char* tiles) const {
    const int64_t n_tiles = (m + TILE_M - 1) / TILE_M;
    for (int64_t k = 0; k < w.k; k += TILE_K, tiles += n_tiles * TILE_BYTES) {
      T line[TILE_K] = {};
      std::memcpy(line, row + k, std::min(TILE_K, w.k - k) * sizeof(T));
      std::memcpy(tiles + i * sizeof line, line, sizeof line);
    }
  }
};
