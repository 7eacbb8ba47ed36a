// Weights as kernels/formats.py packs them, and activations as their products want them.
#pragma once

#include <cmath>

#include "tape.h"

constexpr int64_t MAX_ROWS = 8;    // rows of activations that an operation takes; kernels/__init__.py sends more to PyTorch
constexpr int64_t BLOCK_N = 16;    // rows of weights that are read side by side: a block, whose outputs are one Vec
constexpr int64_t ACT_GROUP = 8;   // activations that share a scale, where they are quantized

// A matrix [n, k], or the first of [experts, n, k]. Quantized ones are packed in words of four bytes, block by block:
//
//     word of    row 0   row 1  ...  row 15      then the same rows' next words; then the next 16 rows
//     INT8       4 elements along k, each q + 128
//     INT4       8 elements along k: byte j holds element j in its low half and element j + 4 in its high half
struct Weights {
  enum Kind { F32, F16, BF16, INT8, INT4 } kind;
  const char* data;
  const float* row_scales;    // INT8: [n]
  const uint16_t* scales;     // INT4: [n / 16, n_groups, 16] bfloat16
  const uint8_t* zeros;       // INT4: [n / 16, n_groups, 16], in sixteenths of a step
  int64_t n, k, group_size;   // group_size: inputs that share a scale (INT4)

  int64_t n_blocks() const { return (n + BLOCK_N - 1) / BLOCK_N; }
  int64_t n_groups() const { return (k + group_size - 1) / group_size; }
  int64_t padded_k() const { return (k + LANES - 1) / LANES * LANES; }
  bool quantized() const { return kind >= INT8; }
  int64_t bytes() const {
    switch (kind) {
      case F32: return n * k * 4;
      case F16: case BF16: return n * k * 2;
      case INT8: return n_blocks() * BLOCK_N * k;
      default: return n_blocks() * BLOCK_N * k / 2;
    }
  }
  Weights expert(int64_t e) const {
    Weights w = *this;
    w.data += e * bytes();
    if (row_scales) w.row_scales += e * n;
    if (scales) w.scales += e * n_blocks() * n_groups() * BLOCK_N;
    if (zeros) w.zeros += e * n_blocks() * n_groups() * BLOCK_N;
    return w;
  }
};

// ---- Activations, which every thread prepares for itself -------------------------------------------------------------

using PreparedRow = const void*;  // T[k], the activations' own type, or QuantizedGroup[k / 8]

struct QuantizedGroup {  // x = scale * q, |q| <= 127. If one of x is not finite, scale is NaN, and so is the output
  float scale;
  float offset;  // INT8: -128 * the sum of q. INT4: the sum of x / 16 from the start of the weights' group to here
  int8_t q[ACT_GROUP];
};

// x [k] as int8, in groups of 8; two groups at a time, each in half of a Vec. x is padded with zeros to whole Vecs.
inline const QuantizedGroup* quantize_row(const float* x, const Weights& w, Allocator& memory) {
  QuantizedGroup* groups = memory.take<QuantizedGroup>(w.padded_k() / ACT_GROUP);
  float offset = 0;
  for (int64_t k = 0; k < w.k; k += LANES) {
    const Vec v = load_vec(x + k), magic = Vec{} + ROUND_TO_INT;
    // The greatest magnitude of each group. As integers, floats without a sign have the same order, NaN above all.
    IntVec greatest = (IntVec)v & 0x7fffffff;
    greatest = max(greatest, swap_halves<4>(greatest));
    greatest = max(greatest, swap_halves<2>(greatest));
    greatest = max(greatest, swap_halves<1>(greatest));
    const Vec peak = (Vec)greatest;
    const Vec scale = peak * (1 / 127.0f) + peak * 0.0f;  // infinity becomes NaN
    const IntVec q = (IntVec)(v * (peak > 1e-30f ? 127 / peak : Vec{}) + magic) - (IntVec)magic;
    const ByteVec bytes = __builtin_convertvector(q, ByteVec);
    IntVec sums = q + swap_halves<4>(q);
    sums += swap_halves<2>(sums);
    sums += swap_halves<1>(sums);
    for (int i = 0; i < LANES; i += ACT_GROUP) {
      QuantizedGroup& group = groups[(k + i) / ACT_GROUP];
      if (w.kind == Weights::INT8) offset = -128 * sums[i];
      else offset = ((k + i) % w.group_size ? offset : 0) + sums[i] * scale[i] / 16;
      group.scale = scale[i], group.offset = offset;
      std::memcpy(group.q, reinterpret_cast<const int8_t*>(&bytes) + i, ACT_GROUP);
    }
  }
  return groups;
}

// 1 / the root mean square of x [k]
template <typename T> float inverse_rms(const T* x, int64_t k, float eps) {
  Vec squares = {};
  for (int64_t i = 0; i < k; i += LANES) {
    const Vec v = load_partial(x, i, k);
    squares += v * v;
  }
  return 1 / std::sqrt(sum(squares) / k + eps);
}

// Makes rows [m] from x [m, k]: normed if norm is not null, and quantized if w is and T is a 16-bit type.
template <typename T>
void prepare_rows(const T* x, int64_t m, const Weights& w, const T* norm, float eps, PreparedRow* rows) {
  const int64_t k = w.k, padded = w.padded_k();
  const size_t bytes = Allocator::bytes_for<T>(padded) + Allocator::bytes_for<QuantizedGroup>(padded / ACT_GROUP);
  Allocator memory(private_memory.at_least(Allocator::bytes_for<float>(padded) + m * bytes));
  float* wide = memory.take<float>(padded);
  std::fill(wide + k, wide + padded, 0.0f);
  for (int64_t i = 0; i < m; i++, x += k) {
    if (!norm && !w.quantized()) {
      rows[i] = x;
      continue;
    }
    const float scale = norm ? inverse_rms(x, k, eps) : 1;
    T* out = memory.take<T>(padded);
    for (int64_t j = 0; j < k; j += LANES) {
      Vec v = load_partial(x, j, k);
      if (norm) {
        store_vec(v * scale, out + j);  // rounds to T in the same places as the reference
        v = load_vec(out + j) * load_partial(norm, j, k);
      }
      store_vec(v, out + j);
      store_partial(load_vec(out + j), wide, j, k);
    }
    rows[i] = w.quantized() && !std::is_same_v<T, float> ? static_cast<PreparedRow>(quantize_row(wide, w, memory)) : out;
  }
}
