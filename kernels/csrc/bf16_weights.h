// Weights of any format as bf16, in tiles of 32 inputs and 16 outputs, for amx.h and prefill_linear.h.
//
//     WordDequantizer    packed words of one format to rows of a tile
//     WeightTiles        a block of weights as tiles
#pragma once

#include "prologue.h"
#include "prefetch.h"

// A tile of activations is [AMX_TILE_M tokens, AMX_TILE_K inputs], and a tile of weights [AMX_TILE_K inputs, BLOCK_N].
constexpr int64_t AMX_TILE_M = 16, AMX_TILE_K = 32, AMX_TILE_BYTES = AMX_TILE_M * AMX_TILE_K * sizeof(bf16);

// Truncates a and b to bf16. Lane i of the result is the pair (a[i], b[i]).
inline i32x16 bf16_pairs(f32x16 a, f32x16 b) { return (i32x16)(((u32x16)a >> 16) | ((u32x16)b & 0xffff0000)); }

// Adds half a unit in the last place of bf16. Truncating the result to bf16 then rounds v to nearest.
inline f32x16 add_half_ulp(f32x16 v) { return (f32x16)((u32x16)v + 0x8000); }

// Dequantizes packed words of format F to rows of a tile of weights.
//
//     set_group(w, i)            loads the scales and zeros of group i, the group of the next words
//     dequantize(words, rows)    16 words -> ELEMENTS_PER_WORD / 2 rows. Row i has elements 2 i and 2 i + 1 of each
//                                output: the VNNI layout that AMX and vdpbf16ps read
//
// WordDequantizer leaves out channel scales, and with SCALE_AFTER_SUM group scales. amx.h and prefill_linear.h apply
// them.
//
// The template dequantizes any format. The specializations below are faster.
template <typename F> struct WordDequantizer {
  ScalesAndZeros group = {};

  void set_group(const Weights& w, int64_t i) { group = F::scales_and_zeros(w, i); }
  void dequantize(i32x16 words, i32x16* rows) const {
    const auto weight = [&](int j) {
      return add_half_ulp((to_float(F::element(words, j)) - group.zeros) * group.scales);
    };
    for (int j = 0; j < F::ELEMENTS_PER_WORD; j += 2) rows[j / 2] = bf16_pairs(weight(j), weight(j + 1));
  }
};

template <> struct WordDequantizer<PackedBf16> {
  void set_group(const Weights&, int64_t) {}
  void dequantize(i32x16 words, i32x16* rows) const { rows[0] = words; }
};

template <> struct WordDequantizer<Int8> {
  void set_group(const Weights&, int64_t) {}
  void dequantize(i32x16 words, i32x16* rows) const {
    words ^= 0x80808080;  // q + 128 becomes q
    const auto q = [&](int j) { return to_float(words << (24 - 8 * j) >> 24); };
    rows[0] = bf16_pairs(q(0), q(1)), rows[1] = bf16_pairs(q(2), q(3));
  }
};

// Dequantizes the element q in bits BIT to BIT + SIZE - 1 of each word. ORs q into the mantissa of 1.0f, to avoid a
// shift and a conversion. The result is the float 1 + q / 2^(23 - BIT). set computes scale and offset of this equation:
//
//     (q - zero) * s  =  (1 + q / 2^(23 - BIT)) * scale + offset
template <int BIT, int SIZE> struct ElementAt {
  f32x16 scale = {}, offset = {};
  void set(const ScalesAndZeros& group) {
    scale = group.scales * float(1 << (23 - BIT)), offset = -group.zeros * group.scales - scale;
  }
  f32x16 operator()(i32x16 words) const {
    const f32x16 one_and_q = (f32x16)((words & (((1 << SIZE) - 1) << BIT)) | 0x3f800000);  // the bits of 1.0f
    return add_half_ulp(one_and_q * scale + offset);
  }
};

template <> struct WordDequantizer<Int4> {
  ElementAt<12, 4> low;  // the lower half of a byte in bits 12 to 19
  ElementAt<16, 4> high;

  void set_group(const Weights& w, int64_t i) {
    const ScalesAndZeros group = Int4::scales_and_zeros(w, i);
    low.set(group), high.set(group);
  }
  void dequantize(i32x16 words, i32x16* rows) const {
    const i32x16 byte[] = {words << 12, words << 4, words >> 4, words >> 12};  // moves byte j to bits 12 to 19
    for (int i = 0; i < 2; i++) {
      rows[i] = bf16_pairs(low(byte[2 * i]), low(byte[2 * i + 1]));
      rows[i + 2] = bf16_pairs(high(byte[2 * i]), high(byte[2 * i + 1]));
    }
  }
};

template <> struct WordDequantizer<GroupedInt8> {
  ElementAt<15, 8> byte;

  void set_group(const Weights& w, int64_t i) { byte.set(GroupedInt8::scales_and_zeros(w, i)); }
  void dequantize(i32x16 words, i32x16* rows) const {
    rows[0] = bf16_pairs(byte(words << 15), byte(words << 7));
    rows[1] = bf16_pairs(byte(words >> 1), byte(words >> 9));
  }
};

template <> struct WordDequantizer<Float8> {
  void set_group(const Weights&, int64_t) {}
  void dequantize(i32x16 words, i32x16* rows) const {
    const auto [inputs01, inputs23] = float8_to_bf16(words);
    rows[0] = inputs01, rows[1] = inputs23;
  }
};

template <> struct WordDequantizer<MXFP4> {
  f32x16 scale = {};

  void set_group(const Weights& w, int64_t i) { scale = MXFP4::scales(w, i); }
  void dequantize(i32x16 words, i32x16* rows) const {
    const f32x16 values = load_vec(MXFP4::VALUES.data());
    const auto element = [&](int shift) { return lookup(values, words >> shift) * scale; };
    for (int i = 0; i < 2; i++) {
      rows[i] = bf16_pairs(element(16 * i), element(16 * i + 8));
      rows[i + 2] = bf16_pairs(element(16 * i + 4), element(16 * i + 12));
    }
  }
};

// Reads a block of weights in order, tile by tile. read(begin, end, rows) writes the next tile, of inputs [begin, end),
// to rows [(end - begin) / 2].
template <typename F> class WeightTiles {
  const Weights& w;
  const char* data;
  int64_t next_group, next_group_begin = 0;  // an index of scales, and an index of inputs
  WordDequantizer<F> dequantizer;

 public:
  WeightTiles(const Weights& w, int64_t block) : w(w), data(w.block_data(block)), next_group(block * w.n_groups) {}

  void read(int64_t begin, int64_t end, i32x16* rows) {
    for (int64_t k = begin; k < end; k += F::ELEMENTS_PER_WORD, rows += F::ELEMENTS_PER_WORD / 2, data += 64) {
      if (k == next_group_begin) dequantizer.set_group(w, next_group++), next_group_begin += w.group_size;
      prefetch_l2(data + PREFETCH_DISTANCE);  // not to L1: it holds tiles
      prefetch_l1(data + 512);
      dequantizer.dequantize(load<i32x16>(data), rows);
    }
  }
};

template <> class WeightTiles<Unquantized> {
  const int64_t output_bytes, n_outputs, prefetch_distance;
  const char* data;

 public:
  // read prefetches prefetch_distance bytes ahead: by default the next block.
  WeightTiles(const Weights& w, int64_t block, int64_t prefetch_distance = 0)
      : output_bytes(w.k * sizeof(bf16)), n_outputs(std::min(BLOCK_N, w.n - block * BLOCK_N)),
        prefetch_distance(prefetch_distance ? prefetch_distance : BLOCK_N * output_bytes), data(w.block_data(block)) {}

  // Always writes 16 rows. Transposes 16 outputs, each with 16 pairs of inputs, to 16 pairs, each with 16 outputs.
  void read(int64_t begin, int64_t end, i32x16* rows) const {
    const int64_t n_bytes = (end - begin) * sizeof(bf16);
    for (int64_t i = 0; i < BLOCK_N; i++) {
      const char* source = data + std::min(i, n_outputs - 1) * output_bytes + begin * sizeof(bf16);
      prefetch_l2(source + prefetch_distance);
      if (n_bytes == sizeof(i32x16)) rows[i] = load<i32x16>(source);
      else std::memcpy(&rows[i], source, n_bytes);
    }
    transpose(rows);
  }
};
