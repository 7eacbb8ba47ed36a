// Weights as formats/cpu_layouts.py packs them (Weights), and a struct for each format of weights.
// formats/__init__.py has a table of the formats in a checkpoint. A struct is called like the class in formats/.
//
//     y [m, n] = x [m, k] W [n, k]^T      m tokens, k inputs, n outputs
//
// In csrc/ a token is a row of x, an output is a row of W, and a sequence is a row of the batch and of the KV cache. W
// has a name at each stage:
//
//     Tensor weight      what PyTorch passes to ops.cpp
//     Weights w          addresses and sizes of the packed W, scales and zeros; all other files get a Weights
//     UnpackedWeights    a few words of a block as bytes in registers (dot_quantized.h)
#pragma once

#include "float8.h"
#include "names.h"
#include "op_list.h"

// Numbers of Python, which kernels/build.py passes to the compiler
constexpr int64_t MAX_CPU_TOKENS = GPTFAST_MAX_CPU_TOKENS;  // of an operation, of all sequences together
constexpr int64_t BLOCK_N = GPTFAST_BLOCK_N;                // the outputs of a block: one for each lane of an f32x16
constexpr int64_t ACT_GROUP_SIZE = GPTFAST_ACT_GROUP_SIZE;  // the activations that share a scale as int8 (prologue.h)

constexpr int64_t BLOCK_M = 8;  // a tile has up to 8 tokens, whose sums fit in registers

// A matrix [n, k], or a stack of matrices [n_experts, n, k] (see expert). A packed matrix is stored in blocks of 16
// outputs. One load then has a word of 4 bytes of each output:
//
//                64 bytes, one load
//     word 0     output 0   output 1   output 2   ...   output 15      elements 0-3 (8 bits) or 0-7 (4 bits) of each
//     word 1     output 0   output 1   output 2   ...   output 15      the next elements
//     ...                                                              then the next block
//
//     format         byte j of a word
//     PackedBf16     half of element j / 2
//     Int8           element j, stored as q + 128
//     GroupedInt8    element j
//     Int4, MXFP4    elements j (lower half) and j + 4 (upper half), as in the checkpoint
//     Float8         float8.h draws the order of the bytes
//
// The last block is padded to 16 outputs, and each output to a multiple of ACT_GROUP_SIZE inputs. Unquantized weights
// that are not packed are stored output by output. layers/packing.py says which are packed.
struct Weights {
  int64_t format;                                          // its index in FORMATS
  bool is_packed;
  const char *data, *scales, *zeros;                       // scales and zeros are null if the format has none
  struct { int64_t data, scales, zeros; } expert_strides;  // bytes from an expert to the next
  int64_t bits;                                            // of an element
  int64_t padded_k;                                        // k, if outputs are not padded
  int64_t n, k;
  int64_t group_size, n_groups;  // group_size inputs of an output share a scale; in Int8, all k inputs do
  bool has_f16_scales;           // whether scales of 16 bits are f16 and not bf16

  int64_t n_blocks() const { return divide_up(n, BLOCK_N); }
  int64_t block_bytes() const { return BLOCK_N * padded_k * bits / 8; }
  const char* block_data(int64_t block) const { return data + block * block_bytes(); }
  Weights expert(int64_t e) const {
    Weights w = *this;
    w.data += e * expert_strides.data;
    if (scales) w.scales += e * expert_strides.scales;
    if (zeros) w.zeros += e * expert_strides.zeros;
    return w;
  }

  // Scales and zeros are [n_blocks, n_groups, 16]. scales_of and zeros_of return the address of 16 of them. Here, group
  // is block * n_groups + the index of the group in the block.
  template <typename T> const T* scales_of(int64_t group) const {
    return reinterpret_cast<const T*>(scales) + group * BLOCK_N;
  }
  const uint8_t* zeros_of(int64_t group) const { return reinterpret_cast<const uint8_t*>(zeros) + group * BLOCK_N; }
  f32x16 load_16_bit_scales(int64_t group) const {
    return has_f16_scales ? load_vec(scales_of<f16>(group)) : load_vec(scales_of<bf16>(group));
  }
};

// ---- Formats --------------------------------------------------------------------------------------------------------
//
// The struct of a format says how its weights are unpacked, for all loops. A new format needs
//
//     ELEMENTS_PER_WORD   elements of a word
//     SCALE_BYTES         bytes of a scale: 4 (float), 2 (f16 or bf16) or 1 (an exponent)
//     element             element j of each of 16 words
//     scales_and_zeros    the scales and zeros of 16 outputs in a group (an index as in scales_of)
//
// and an entry in FORMATS. Then the loops for any format can read it. For speed, add a branch to run_loop (dot.h), a
// specialization of WordDequantizer (bf16_weights.h), or an overload of unpack_words (linear.h).

// The scales and zeros of a block's 16 outputs in one group of inputs:
//
//     weight  =  (q - zero) * scale                     of an element q
//     weight  =  (q - zero) * scale * channel_scale     if HAS_CHANNEL_SCALES
struct ScalesAndZeros { f32x16 scales, zeros; };

// A format derives from these defaults.
struct FormatDefaults {
  static constexpr bool QUANTIZES_ACTIVATIONS = false;    // whether the matmul rounds 16-bit activations to int8
  static constexpr bool BF16_ACTIVATIONS = false;         // whether the matmul takes bf16 activations as they are
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M + 1;  // with fewer tokens dot.h is faster than amx.h
  static constexpr bool HAS_ZEROS = false;                // whether there is a tensor of zero points
  static constexpr bool HAS_CHANNEL_SCALES = false;       // whether each output has a scale, apart from groups
  static constexpr bool SCALE_AFTER_SUM = false;          // whether amx.h scales sums of groups, not weights
  static constexpr int32_t SHARED_ZERO = 0;               // the zero point of all weights, or 0 if zero points differ
  static f32x16 channel_scales(const Weights&, int64_t /* block */) { return f32x16{} + 1; }
};

struct Unquantized : FormatDefaults {
  static constexpr int64_t MIN_AMX_TOKENS = BLOCK_M / 2 + 1;
};

// Unquantized weights of type bf16 that are packed: a word has two inputs of an output.
struct PackedBf16 : FormatDefaults {
  static constexpr bool BF16_ACTIVATIONS = true;
  static constexpr int ELEMENTS_PER_WORD = 2;
  static f32x16 element(i32x16 words, int j) { return (f32x16)(j ? words & int32_t(0xffff0000) : words << 16); }
  static ScalesAndZeros scales_and_zeros(const Weights&, int64_t) { return {f32x16{} + 1, f32x16{}}; }
};

struct Int8 : FormatDefaults {
  static constexpr bool QUANTIZES_ACTIVATIONS = true, HAS_CHANNEL_SCALES = true;
  static constexpr int32_t SHARED_ZERO = 128;
  static constexpr int ELEMENTS_PER_WORD = 4, SCALE_BYTES = 4;
  static i32x16 element(i32x16 words, int j) { return (words >> (8 * j)) & 255; }
  static ScalesAndZeros scales_and_zeros(const Weights&, int64_t) {
    return {f32x16{} + 1, f32x16{} + float(SHARED_ZERO)};
  }
  static f32x16 channel_scales(const Weights& w, int64_t block) {
    return load_partial(reinterpret_cast<const float*>(w.scales), block * BLOCK_N, w.n);
  }
};

struct Int4 : FormatDefaults {
  static constexpr bool QUANTIZES_ACTIVATIONS = true, HAS_ZEROS = true;
  static constexpr int ELEMENTS_PER_WORD = 8, SCALE_BYTES = 2;
  static i32x16 element(i32x16 words, int j) { return (words >> (8 * (j % 4) + 4 * (j / 4))) & 15; }
  // Maps each byte of nibbles, 0 to 15, to the unsigned byte that dot_grouped multiplies.
  static i32x16 unsigned_bytes(i32x16 nibbles) { return nibbles; }
  // A zero point is stored in sixteenths.
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {w.load_16_bit_scales(group), load_vec(w.zeros_of(group)) * (1 / 16.0f)};
  }
};

struct GroupedInt8 : FormatDefaults {
  static constexpr bool QUANTIZES_ACTIVATIONS = true, HAS_ZEROS = true;
  static constexpr int ELEMENTS_PER_WORD = 4, SCALE_BYTES = 2;
  static i32x16 element(i32x16 words, int j) { return Int8::element(words, j); }
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {w.load_16_bit_scales(group), load_vec(w.zeros_of(group))};
  }
};

// 8-bit floats, e4m3. float8.h converts them.
struct Float8 : FormatDefaults {
  static constexpr bool BF16_ACTIVATIONS = HAS_FLOAT8_BF16, SCALE_AFTER_SUM = true;
  static constexpr int64_t MIN_AMX_TOKENS = 3;
  static constexpr int ELEMENTS_PER_WORD = 4, SCALE_BYTES = 4;
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {load_vec(w.scales_of<float>(group)) * FLOAT8_FACTOR, f32x16{}};
  }
};

// 4-bit floats, e2m1. The matmul takes a float as an integer q from 0 to 24, with the zero point 12 and half the scale:
//
//     q  =  12 + 2 * e2m1        2 * e2m1 is an integer from -12 to 12
struct MXFP4 : FormatDefaults {
  static constexpr bool QUANTIZES_ACTIVATIONS = true;
  static constexpr int ELEMENTS_PER_WORD = 8, SCALE_BYTES = 1;
  // For the four bits of a number, TABLE has q, and VALUES has the number.
  alignas(16) static constexpr uint8_t TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  alignas(64) static constexpr std::array<float, 16> VALUES = [] {
    std::array<float, 16> values = {};
    for (int i = 0; i < 16; i++) values[i] = (TABLE[i] - 12) * 0.5f;
    return values;
  }();
  static i32x16 element(i32x16 words, int j) { return unsigned_bytes(Int4::element(words, j)) & 255; }
  static i32x16 unsigned_bytes(i32x16 nibbles) { return lookup_bytes(TABLE, nibbles); }
  static f32x16 scales(const Weights& w, int64_t group) { return decode_e8m0(w.scales_of<uint8_t>(group)); }
  static ScalesAndZeros scales_and_zeros(const Weights& w, int64_t group) {
    return {scales(w, group) * 0.5f, f32x16{} + 12};
  }
};

template <typename... F> struct FormatList {};
#define FORMATS Unquantized, Int8, Int4, GroupedInt8, Float8, MXFP4
using Formats = FormatList<FORMATS>;

// Calls function(F{}) with the list's struct F at index.
template <typename First, typename... Others, typename Function>
auto dispatch(FormatList<First, Others...>, int64_t index, Function function) {
  if constexpr (sizeof...(Others) > 0)
    if (index > 0) return dispatch(FormatList<Others...>{}, index - 1, function);
  return function(First{});
}
template <typename Function> auto dispatch_format(const Weights& w, Function function) {
  if (w.is_packed && w.format == 0) return function(PackedBf16{});
  return dispatch(Formats{}, w.format, function);
}
