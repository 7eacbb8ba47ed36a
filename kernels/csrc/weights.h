// Weights as kernels/formats/cpu_layouts.py packs them, and what is different from format to format. What is in a
// checkpoint, and what it means, is in the table of kernels/formats/__init__.py.
//
// In y [m, n] = x [m, k] W [n, k]^T a token is a row of x, and an output is a row of W. A sequence is a row of the
// batch, and of the KV cache.
#pragma once

#include "float8.h"
#include "tape.h"

constexpr int64_t MAX_TOKENS = 64;  // the tokens that an operation takes: kernels/ops.py: MAX_CPU_TOKENS
constexpr int64_t BLOCK_M = 8;      // tokens of a block, whose sums are kept in registers
constexpr int64_t BLOCK_N = 16;     // outputs of a block, which are the lanes of one Vec

// A matrix [n, k], or the first of a stack [n_experts, n, k]. Dense weights are stored output by output. Quantized ones
// are packed block by block, in words of 4 bytes. The words of a block's 16 outputs lie side by side:
//
//                64 bytes, one load
//     word 0     output 0   output 1   output 2   ...   output 15      elements 0-3 (8 bits) or 0-7 (4 bits) of each
//     word 1     output 0   output 1   output 2   ...   output 15      the next elements
//     ...                                                              then the next block
//
//     Int8           byte j is element j, stored as q + 128
//     GroupedInt8    byte j is element j
//     Int4, MXFP4    byte j is the checkpoint's, which holds elements j and j + 4
//     Float8         the bytes of 4 outputs' words are in another order, drawn in float8.h
//
// The last block is filled up to 16 outputs.
struct Weights {
  int64_t format;                                    // format_id in kernels/formats/
  const char *data, *scales, *zeros;                 // scales and zeros: as the format reads them, or null
  int64_t data_stride, scales_stride, zeros_stride;  // bytes from a matrix of the stack to the next
  int64_t bits;                                      // of an element
  int64_t n, k;
  int64_t group_size, n_groups;  // how many inputs share a scale, and how many groups an output has. Int8: k and 1
  bool has_f16_scales;           // scales of 16 bits are f16, else bf16

  int64_t n_blocks() const { return (n + BLOCK_N - 1) / BLOCK_N; }
  const char* block_data(int64_t block) const { return data + block * BLOCK_N * k * bits / 8; }
  Weights expert(int64_t e) const {
    Weights w = *this;
    w.data += e * data_stride;
    if (scales) w.scales += e * scales_stride;
    if (zeros) w.zeros += e * zeros_stride;
    return w;
  }

  // Scales and zeros lie in memory as [n_blocks, n_groups, 16]. scales_of and zeros_of return the address of the 16 of
  // a block in one group of inputs. group: block * n_groups + the number of the group in the block.
  template <typename T> const T* scales_of(int64_t group) const {
    return reinterpret_cast<const T*>(scales) + group * BLOCK_N;
  }
  const uint8_t* zeros_of(int64_t group) const { return reinterpret_cast<const uint8_t*>(zeros) + group * BLOCK_N; }
  // Loads scales of 16 bits.
  Vec half_scales(int64_t group) const {
    return has_f16_scales ? load_vec(scales_of<f16>(group)) : load_vec(scales_of<bf16>(group));
  }
};

// ---- Formats --------------------------------------------------------------------------------------------------------
//
// A struct for each format has what the loops must know. A new format needs PER_WORD, SCALE_BYTES, element and
// scales_and_zeros, and a place in Formats. Then the loops that serve any format serve the new one. Loops for one
// format alone are an overload of dot_blocks (dot.h) or a specialization of LineDecoder (amx.h).

// Holds the scales and zeros of the 16 outputs of a block in one group of inputs. An element q of a quantized weight
// stands for (q - zero) * scale. If the format has HAS_OUTPUT_SCALES, this is multiplied by a scale of the output.
struct ScalesAndZeros { Vec scales, zeros; };

// Says what is true of a format, unless the format says otherwise.
struct AnyFormat {
  static constexpr bool INT8_ACTIVATIONS = false;  // whether 16-bit activations are rounded to int8 for the product
  static constexpr bool BF16_ACTIVATIONS = false;  // whether bf16 activations are multiplied as they are, not as float
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M + 1;  // the number of tokens from which amx.h is faster than dot.h
  static constexpr bool HAS_ZEROS = false;                // whether there is a tensor of zero points
  static constexpr bool HAS_OUTPUT_SCALES = false;        // whether sums are multiplied by a scale of their output
  static constexpr bool SCALES_SUMS = false;              // whether amx.h scales the sums of groups, not the weights
  static constexpr int32_t SHARED_ZERO = 0;               // the zero of all weights, if all outputs share one, else 0
  static Vec output_scales(const Weights&, int64_t) { return Vec{} + 1; }  // of a block
};

struct Dense : AnyFormat {
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M / 2 + 1;
};

struct Int8 : AnyFormat {
  static constexpr bool INT8_ACTIVATIONS = true, HAS_OUTPUT_SCALES = true;
  static constexpr int32_t SHARED_ZERO = 128;
  static constexpr int PER_WORD = 4;     // elements of a word
  static constexpr int SCALE_BYTES = 4;  // of a scale: 4 for float, 2 for f16 or bf16, 1 for an exponent
  // Element j of each of 16 words.
  static IntVec element(IntVec words, int j) { return (words >> (8 * j)) & 255; }
  static ScalesAndZeros scales_and_zeros(const Weights&, int64_t) { return {Vec{} + 1, Vec{} + float(SHARED_ZERO)}; }
  static Vec output_scales(const Weights& w, int64_t block) {
    return load_partial(reinterpret_cast<const float*>(w.scales), block * BLOCK_N, w.n);
  }
};

struct Int4 : AnyFormat {
  static constexpr bool INT8_ACTIVATIONS = true, HAS_ZEROS = true;
  static constexpr int PER_WORD = 8, SCALE_BYTES = 2;
  static IntVec element(IntVec words, int j) { return (words >> (8 * (j % 4) + 4 * (j / 4))) & 15; }
  // What is multiplied for each byte 0 to 15 of nibbles.
  static IntVec unsigned_bytes(IntVec nibbles) { return nibbles; }
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {w.half_scales(group), load_vec(w.zeros_of(group)) * (1 / 16.0f)};
  }
};

struct GroupedInt8 : AnyFormat {
  static constexpr bool INT8_ACTIVATIONS = true, HAS_ZEROS = true;
  static constexpr int PER_WORD = 4, SCALE_BYTES = 2;
  static IntVec element(IntVec words, int j) { return Int8::element(words, j); }
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {w.half_scales(group), load_vec(w.zeros_of(group))};
  }
};

// 8-bit floats: float8.h.
struct Float8 : AnyFormat {
  static constexpr bool BF16_ACTIVATIONS = HAS_FLOAT8_BF16, SCALES_SUMS = true;
  static constexpr int64_t MIN_AMX_TOKENS = 3;
  static constexpr int PER_WORD = 4, SCALE_BYTES = 4;
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {load_vec(w.scales_of<float>(group)) * FLOAT8_FACTOR, Vec{}};
  }
};

// 4-bit floats, e2m1. Twice such a number is an integer from -12 to 12. So it is multiplied as an integer from 0 to 24
// with a zero point of 12, and with half the scale.
struct MXFP4 : AnyFormat {
  static constexpr bool INT8_ACTIVATIONS = true;
  static constexpr int PER_WORD = 8, SCALE_BYTES = 1;
  // 12 + 2 e2m1, by the four bits of e2m1.
  alignas(16) static constexpr uint8_t TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  alignas(64) static constexpr std::array<float, 16> VALUES = [] {  // e2m1
    std::array<float, 16> values = {};
    for (int i = 0; i < 16; i++) values[i] = (TABLE[i] - 12) * 0.5f;
    return values;
  }();
  static IntVec element(IntVec words, int j) { return unsigned_bytes(Int4::element(words, j)) & 255; }
  static IntVec unsigned_bytes(IntVec nibbles) { return lookup_bytes(TABLE, nibbles); }
  static Vec scales(const Weights& w, int64_t group) { return exp2_vec(w.scales_of<uint8_t>(group)); }
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {scales(w, group) * 0.5f, Vec{} + 12};
  }
};

template <typename... F> struct FormatList { static constexpr int64_t SIZE = sizeof...(F); };
using Formats = FormatList<Dense, Int8, Int4, GroupedInt8, Float8, MXFP4>;  // by format_id, as in kernels/formats/

// Calls function with an object of the struct at index in the list.
template <typename First, typename... Others, typename Function>
auto dispatch(FormatList<First, Others...>, int64_t index, Function function) {
  if constexpr (sizeof...(Others) > 0)
    if (index > 0) return dispatch(FormatList<Others...>{}, index - 1, function);
  return function(First{});
}
template <typename Function> auto dispatch_format(int64_t format_id, Function function) {
  return dispatch(Formats{}, format_id, function);
}
