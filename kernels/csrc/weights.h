// Weights as kernels/formats/ packs them, and what is different from format to format.
//
// In y [m, n] = x [m, k] W [n, k]^T a token is a row of x, and an output is a row of W. A sequence is a row of the
// batch, and of the KV cache.
#pragma once

#include "float8.h"
#include "tape.h"

constexpr int64_t MAX_TOKENS = 64;  // that an operation takes; also in kernels/__init__.py
constexpr int64_t BLOCK_M = 8;      // tokens of a block, whose sums are kept in registers
constexpr int64_t BLOCK_N = 16;     // outputs of a block, which are the lanes of one Vec

// format_id in kernels/formats/
enum class Format : int64_t { DENSE = 0, INT8 = 1, INT4 = 2, GROUPED_INT8 = 3, FLOAT8 = 4, MXFP4 = 5 };

// A matrix [n, k], or the first of a stack [n_experts, n, k]. Dense weights are stored output by output. Quantized ones
// are packed block by block, in words of 4 bytes. The words of a block's 16 outputs lie side by side:
//
//                64 bytes, one load
//     word 0     output 0   output 1   output 2   ...   output 15      elements 0-3 (8 bits) or 0-7 (4 bits) of each
//     word 1     output 0   output 1   output 2   ...   output 15      the next elements
//     ...                                                              then the next block
//
//     INT8            byte j is element j, stored as q + 128
//     GROUPED_INT8    byte j is element j
//     INT4, MXFP4     byte j holds element j in its low half and element j + 4 in its high half
//     FLOAT8          the bytes of 4 outputs' words are in another order, drawn in float8.h
//
// The last block is filled up to 16 outputs.
struct Weights {
  Format format;
  const char* data;
  int64_t bits;          // of an element
  int64_t expert_bytes;  // of a matrix of the stack, with its padding
  int64_t n, k;
  int64_t group_size, n_groups;  // how many inputs share a scale, and how many groups an output has. INT8: k and 1
  const float* channel_scales;   // INT8: [n]
  const uint16_t* scales;        // INT4, GROUPED_INT8: [n / 16, n_groups, 16]
  bool has_f16_scales;           // else they are bf16
  const uint8_t* zeros;          // INT4, GROUPED_INT8: [n / 16, n_groups, 16]; INT4's in sixteenths of a step of q
  const float* float_scales;     // FLOAT8: [n / 16, n_groups, 16]
  const uint8_t* exponents;      // MXFP4: [n / 16, n_groups, 16], a scale is 2^(exponent - 127)

  int64_t n_blocks() const { return (n + BLOCK_N - 1) / BLOCK_N; }
  const char* block_data(int64_t block) const { return data + block * BLOCK_N * k * bits / 8; }
  // The scales of a block's 16 outputs, or ones.
  Vec channel_scale(int64_t block) const {
    return channel_scales ? load_partial(channel_scales, block * BLOCK_N, n) : Vec{} + 1;
  }
  // The scales and zeros of a block's 16 outputs in a group of inputs: block * n_groups + its number in the block.
  Vec group_scales(int64_t group) const {
    const uint16_t* first = scales + group * BLOCK_N;
    if (has_f16_scales) return load_vec(reinterpret_cast<const f16*>(first));
    return load_vec(reinterpret_cast<const bf16*>(first));
  }
  Vec group_zeros(int64_t group) const { return load_vec(zeros + group * BLOCK_N); }
  Weights expert(int64_t e) const {
    Weights w = *this;
    w.data += e * expert_bytes;
    if (channel_scales) w.channel_scales += e * n;
    if (scales) w.scales += e * n_blocks() * n_groups * BLOCK_N;
    if (zeros) w.zeros += e * n_blocks() * n_groups * BLOCK_N;
    if (float_scales) w.float_scales += e * n_blocks() * n_groups * BLOCK_N;
    if (exponents) w.exponents += e * n_blocks() * n_groups * BLOCK_N;
    return w;
  }
};

// ---- Formats --------------------------------------------------------------------------------------------------------
//
// A struct for each format has what the loops must know of it, and dispatch_format turns a format's number into its
// struct. Its own loops are an overload for this struct (dot_blocks in dot.h) or a specialization (amx.h: WeightTiles).
// A format that lacks one of these does not compile.

// An element q of a quantized weight stands for (q - zero) * scale, and that times its output's scale if the format has
// channel_scales. These are the scales and zeros of a block's 16 outputs in one group of inputs.
struct ScalesAndZeros { Vec scales, zeros; };

struct Dense {
  static constexpr bool INT8_ACTIVATIONS = false;  // whether 16-bit activations are rounded to int8 for the product
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M / 2 + 1;  // from so many tokens on, amx.h is faster than dot.h
};

struct Int8 {
  static constexpr bool INT8_ACTIVATIONS = true;
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M + 1;
  static constexpr int PER_WORD = 4;  // elements of a word
  // Where in a line of 16 words the byte is that holds element j of an output.
  static int64_t byte_offset(int64_t output, int64_t j) { return 4 * output + j; }
  // Element j of a word, or of each of 16 words.
  static auto element(auto words, int j) { return (words >> (8 * j)) & 255; }
  static ScalesAndZeros scales_and_zeros(const Weights&, int64_t) { return {Vec{} + 1, Vec{} + 128}; }
  // See QuantizedGroup in activations.h.
  static float compensation(int32_t sum_q, float, float) { return -128 * sum_q; }
};

struct Int4 {
  static constexpr bool INT8_ACTIVATIONS = true;
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M + 1;
  static constexpr int PER_WORD = 8;
  static int64_t byte_offset(int64_t output, int64_t j) { return 4 * output + j; }
  static auto element(auto words, int j) { return (words >> (8 * (j % 4) + 4 * (j / 4))) & 15; }
  // What is multiplied for each byte 0 to 15 of nibbles.
  static IntVec unsigned_bytes(IntVec nibbles) { return nibbles; }
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {w.group_scales(group), w.group_zeros(group) * (1 / 16.0f)};
  }
  static float compensation(int32_t sum_q, float scale, float before) { return before + sum_q * scale; }
};

struct GroupedInt8 {
  static constexpr bool INT8_ACTIVATIONS = true;
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M + 1;
  static constexpr int PER_WORD = 4;
  static int64_t byte_offset(int64_t output, int64_t j) { return 4 * output + j; }
  static auto element(auto words, int j) { return Int8::element(words, j); }
  // Int8's elements lie in the same places, so both share dot_weight_only, which compiles slowly.
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    if (w.format == Format::INT8) return Int8::scales_and_zeros(w, group);
    return {w.group_scales(group), w.group_zeros(group)};
  }
  static float compensation(int32_t sum_q, float scale, float before) {
    return Int4::compensation(sum_q, scale, before);
  }
};

// 8-bit floats: float8.h.
struct Float8 {
  static constexpr bool INT8_ACTIVATIONS = false;
  static constexpr int64_t MIN_AMX_TOKENS = 3;
  static constexpr int PER_WORD = 4;
  static int64_t byte_offset(int64_t output, int64_t j) {
    return output / 4 * 16 + j / 2 * 8 + output % 4 * 2 + j % 2;
  }
  static float element(uint8_t byte, int) { return FLOAT8_VALUES[byte]; }
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {load_vec(w.float_scales + group * BLOCK_N) * FLOAT8_FACTOR, Vec{}};
  }
};

// 4-bit floats, e2m1. Twice such a number is an integer from -12 to 12. So it is multiplied as an integer from 0 to 24
// with a zero point of 12, and with half the scale.
struct MXFP4 {
  static constexpr bool INT8_ACTIVATIONS = true;
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M + 1;
  static constexpr int PER_WORD = 8;
  static int64_t byte_offset(int64_t output, int64_t j) { return 4 * output + j; }
  // 12 + 2 e2m1. The constant holds twice the eight magnitudes, 0 1 2 3 4 6 8 12, in four bits each.
  static auto element(auto words, int j) {
    const auto nibble = Int4::element(words, j), sign = nibble >> 3;
    const auto magnitude = ((nibble * 0 + int32_t(0xc8643210)) >> (4 * (nibble & 7))) & 15;
    return 12 + (magnitude ^ -sign) + sign;
  }
  // The same for every byte of nibbles.
  static IntVec unsigned_bytes(IntVec nibbles) {
    alignas(16) static constexpr uint8_t TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    return lookup_bytes(TABLE, nibbles);
  }
  static Vec scales(const Weights& w, int64_t group) { return exp2_vec(w.exponents + group * BLOCK_N); }
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {scales(w, group) * 0.5f, Vec{} + 12};
  }
  static float compensation(int32_t sum_q, float scale, float before) {
    return Int4::compensation(sum_q, scale, before);
  }
};

// Calls function with an object of the format's struct.
template <typename Function> auto dispatch_format(Format format, Function function) {
  switch (format) {
    case Format::DENSE: return function(Dense{});
    case Format::INT8: return function(Int8{});
    case Format::INT4: return function(Int4{});
    case Format::GROUPED_INT8: return function(GroupedInt8{});
    case Format::FLOAT8: return function(Float8{});
    case Format::MXFP4: return function(MXFP4{});
  }
  __builtin_unreachable();  // ops.cpp refuses other numbers
}
