// Products of blocks of weights with the bf16 activations of many tokens, on Intel's matrix unit AMX. FusedLinearOp
// (linear.h) calls it in place of dot.h if uses_amx.
//
// A tile register has 16 rows of 64 bytes. One instruction multiplies two tiles of bf16 and adds to a tile of float:
//
//     activations [16 tokens, 32 inputs]  *  weights [32 inputs, 16 outputs]  ->  sums [16 tokens, 16 outputs]
//
// Weights of any format are converted to bf16, once for all tokens. If a group has a scale, the dequantized weight is
// rounded to bf16, as in prefill. Activations are not quantized.
//
//     WordDecoder    packed words of one format to rows of a tile
//     WeightTiles    a block of weights as tiles
//     dot_amx        the product
#pragma once

#include <optional>

#include "dot.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

// Asks Linux for permission to use AMX. A sandbox may refuse.
inline bool has_amx() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool is_permitted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return is_permitted;
}

// Whether AMX computes the product of w with m tokens' activations of type T.
template <typename T> bool uses_amx(const Weights& w, int64_t m) {
  return dispatch_format(w.format, [&]<typename F>(F) {
    // dot_amx scales sums of whole tiles, so no tile may span two groups of inputs.
    const bool has_whole_tiles = !F::SCALE_AFTER_SUM || w.n_groups == 1 || w.group_size % TILE_K == 0;
    return std::is_same_v<T, bf16> && m >= F::MIN_AMX_TOKENS && has_whole_tiles && has_amx();
  });
}

// Configures the tile registers of this thread as tiles of 16 rows of 64 bytes. The destructor releases the registers.
class TileRegisters {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };

 public:
  TileRegisters() {
    const Config config;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
};

// ---- Weights as tiles -----------------------------------------------------------------------------------------------

// Truncates a and b to bf16. Lane i of the result is the pair (a[i], b[i]).
inline IntVec bf16_pairs(Vec a, Vec b) { return (IntVec)(((UIntVec)a >> 16) | ((UIntVec)b & 0xffff0000)); }

// Adds half a unit in the last place of bf16. Truncating the result to bf16 then rounds v to nearest.
inline Vec add_half_ulp(Vec v) { return (Vec)((UIntVec)v + 0x8000); }

// Decodes packed words of format F to rows of a tile of weights.
//
//     set_group(w, i)        loads the scales and zeros of group i, which the next words belong to
//     decode(words, rows)    16 words -> PER_WORD / 2 rows. Row i has elements 2 i and 2 i + 1 of each output, which is
//                            the VNNI layout that AMX reads
//
// dot_amx applies the scales that this struct leaves out: output_scales, and the group's if SCALE_AFTER_SUM.
//
// The template decodes any format. Specializations for single formats follow, which are faster.
template <typename F> struct WordDecoder {
  ScalesAndZeros group = {};

  void set_group(const Weights& w, int64_t i) { group = F::scales_and_zeros(w, i); }
  void decode(IntVec words, IntVec* rows) const {
    const auto weight = [&](int j) {
      return add_half_ulp((as_float(F::element(words, j)) - group.zeros) * group.scales);
    };
    for (int j = 0; j < F::PER_WORD; j += 2) rows[j / 2] = bf16_pairs(weight(j), weight(j + 1));
  }
};

template <> struct WordDecoder<Int8> {
  void set_group(const Weights&, int64_t) {}
  void decode(IntVec words, IntVec* rows) const {
    words ^= 0x80808080;  // q + 128 becomes q
    const auto q = [&](int j) { return as_float(words << (24 - 8 * j) >> 24); };
    rows[0] = bf16_pairs(q(0), q(1)), rows[1] = bf16_pairs(q(2), q(3));
  }
};

// Dequantizes the element q in bits BIT to BIT + SIZE - 1 of each word. To avoid a shift and a conversion, ORs q into
// the mantissa of 1.0f, which gives the float 1 + q / 2^(23 - BIT). set computes scale and offset so that
//
//     (q - zero) * s  =  (1 + q / 2^(23 - BIT)) * scale + offset
template <int BIT, int SIZE> struct ElementAt {
  Vec scale = {}, offset = {};
  void set(const ScalesAndZeros& group) {
    scale = group.scales * float(1 << (23 - BIT)), offset = -group.zeros * group.scales - scale;
  }
  Vec operator()(IntVec words) const {
    const Vec one_and_q = (Vec)((words & (((1 << SIZE) - 1) << BIT)) | 0x3f800000);  // the bits of 1.0f
    return add_half_ulp(one_and_q * scale + offset);
  }
};

template <> struct WordDecoder<Int4> {
  ElementAt<12, 4> low;  // the lower half of a byte in bits 12 to 19
  ElementAt<16, 4> high;

  void set_group(const Weights& w, int64_t i) {
    const ScalesAndZeros group = Int4::scales_and_zeros(w, i);
    low.set(group), high.set(group);
  }
  void decode(IntVec words, IntVec* rows) const {
    const IntVec byte[] = {words << 12, words << 4, words >> 4, words >> 12};  // moves byte j to bits 12 to 19
    for (int i = 0; i < 2; i++) {
      rows[i] = bf16_pairs(low(byte[2 * i]), low(byte[2 * i + 1]));
      rows[i + 2] = bf16_pairs(high(byte[2 * i]), high(byte[2 * i + 1]));
    }
  }
};

template <> struct WordDecoder<GroupedInt8> {
  ElementAt<15, 8> byte;

  void set_group(const Weights& w, int64_t i) { byte.set(GroupedInt8::scales_and_zeros(w, i)); }
  void decode(IntVec words, IntVec* rows) const {
    rows[0] = bf16_pairs(byte(words << 15), byte(words << 7));
    rows[1] = bf16_pairs(byte(words >> 1), byte(words >> 9));
  }
};

template <> struct WordDecoder<Float8> {
  void set_group(const Weights&, int64_t) {}
  void decode(IntVec words, IntVec* rows) const {
    const auto [inputs01, inputs23] = float8_to_bf16(words);
    rows[0] = inputs01, rows[1] = inputs23;
  }
};

template <> struct WordDecoder<MXFP4> {
  Vec scale = {};

  void set_group(const Weights& w, int64_t i) { scale = MXFP4::scales(w, i); }
  void decode(IntVec words, IntVec* rows) const {
    const Vec values = load_vec(MXFP4::VALUES.data());
    const auto element = [&](int shift) { return lookup(values, words >> shift) * scale; };
    for (int i = 0; i < 2; i++) {
      rows[i] = bf16_pairs(element(16 * i), element(16 * i + 8));
      rows[i + 2] = bf16_pairs(element(16 * i + 4), element(16 * i + 12));
    }
  }
};

// Reads a block of weights in order, tile by tile. read(begin, end, rows) writes the next tile, which has the inputs
// [begin, end), to rows [(end - begin) / 2].
template <typename F> class WeightTiles {
  const Weights& w;
  const char* data;
  int64_t next_group, next_group_begin = 0;  // an index of scales, and an index of inputs
  WordDecoder<F> decoder;

 public:
  WeightTiles(const Weights& w, int64_t block) : w(w), data(w.block_data(block)), next_group(block * w.n_groups) {}

  void read(int64_t begin, int64_t end, IntVec* rows) {
    for (int64_t k = begin; k < end; k += F::PER_WORD, rows += F::PER_WORD / 2, data += 64) {
      if (k == next_group_begin) decoder.set_group(w, next_group++), next_group_begin += w.group_size;
      prefetch_l2(data + PREFETCH);  // and not to L1, which holds tiles
      prefetch_l1(data + 512);
      decoder.decode(load<IntVec>(data), rows);
    }
  }
};

template <> class WeightTiles<Unquantized> {
  const int64_t output_bytes, n_outputs;
  const char* data;

 public:
  WeightTiles(const Weights& w, int64_t block)
      : output_bytes(w.k * sizeof(bf16)), n_outputs(std::min(BLOCK_N, w.n - block * BLOCK_N)),
        data(w.block_data(block)) {}

  // Always writes 16 rows. Transposes 16 outputs, each with 16 pairs of inputs, to 16 pairs, each with 16 outputs.
  void read(int64_t begin, int64_t end, IntVec* rows) const {
    const int64_t n_bytes = (end - begin) * sizeof(bf16);
    for (int64_t i = 0; i < BLOCK_N; i++) {
      const char* source = data + std::min(i, n_outputs - 1) * output_bytes + begin * sizeof(bf16);
      prefetch_l2(source + BLOCK_N * output_bytes);  // of the next block
      if (n_bytes == sizeof(IntVec)) rows[i] = load<IntVec>(source);
      else std::memcpy(&rows[i], source, n_bytes);
    }
    transpose(rows);
  }
};

// ---- The product ----------------------------------------------------------------------------------------------------

// Computes out [16 N, BLOCK_N] = activations [16 N, k] * (a block of w)^T. tiles are the activations, [k / TILE_K, N]
// tiles. The numbers of tile registers are part of the instructions: 0-3 hold sums, 4-6 activations, 7 weights.
template <typename F, int N> void dot_amx(const Weights& w, int64_t block, const char* tiles, Vec* out) {
  WeightTiles<F> weights(w, block);
  IntVec rows[TILE_K / 2];  // of a tile of weights
  const auto zero_sums = [] {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  };
  const auto store_sums = [](Vec* sums) {
    _tile_stored(0, sums, 64);
    if constexpr (N > 1) _tile_stored(1, sums + 16, 64);
    if constexpr (N > 2) _tile_stored(2, sums + 32, 64);
    if constexpr (N > 3) _tile_stored(3, sums + 48, 64);
    asm volatile("" ::: "memory");  // tells the compiler that the instructions above write memory
  };
  zero_sums();
  for (int64_t k = 0; k < w.k; k += TILE_K, tiles += N * TILE_BYTES) {
    const int64_t end = std::min(w.k, k + TILE_K);
    if (end < k + TILE_K) std::fill_n(rows, TILE_K / 2, IntVec{});
    weights.read(k, end, rows);
    asm volatile("" ::: "memory");  // tells the compiler that the next instruction reads memory
    _tile_loadd(7, rows, 64);
    _tile_loadd(4, tiles, 64);
    _tile_dpbf16ps(0, 4, 7);
    if constexpr (N > 1) { _tile_loadd(5, tiles + TILE_BYTES, 64); _tile_dpbf16ps(1, 5, 7); }
    if constexpr (N > 2) { _tile_loadd(6, tiles + 2 * TILE_BYTES, 64); _tile_dpbf16ps(2, 6, 7); }
    if constexpr (N > 3) { _tile_loadd(4, tiles + 3 * TILE_BYTES, 64); _tile_dpbf16ps(3, 4, 7); }
    if constexpr (F::SCALE_AFTER_SUM) {
      if (end < w.k && end % w.group_size) continue;
      Vec sums[16 * N];  // of the group of inputs that ends here
      store_sums(sums), zero_sums();
      const int64_t group = (end - 1) / w.group_size;
      const Vec scale = F::scales_and_zeros(w, block * w.n_groups + group).scales;
      for (int i = 0; i < 16 * N; i++) out[i] = sums[i] * scale + (group ? out[i] : Vec{});
    }
  }
  if constexpr (!F::SCALE_AFTER_SUM) store_sums(out);
  if constexpr (F::HAS_OUTPUT_SCALES) {
    const Vec scale = F::output_scales(w, block);
    for (int i = 0; i < 16 * N; i++) out[i] *= scale;
  }
}

// The addresses of dot_amx for 1, 2, 3 and 4 tiles of tokens.
static_assert(MAX_CPU_TOKENS == 4 * TILE_M);
template <typename F> constexpr decltype(&dot_amx<F, 1>) DOT_AMX[] = {
    dot_amx<F, 1>, dot_amx<F, 2>, dot_amx<F, 3>, dot_amx<F, 4>};

// Computes what multiply in dot.h computes, from activations in tiles.
inline void dot_amx(int64_t m, const Weights& w, const int64_t* blocks, int64_t n_blocks, const char* tiles,
                    BlockSums* out) {
  dispatch_format(w.format, [&]<typename F>(F) {
    const auto dot_block = DOT_AMX<F>[(m - 1) / TILE_M];
    for (int64_t b = 0; b < n_blocks; b++) dot_block(w, blocks[b], tiles, out[b]);
  });
}

#else
inline bool has_amx() { return false; }
struct TileRegisters {};
template <typename T> bool uses_amx(const Weights&, int64_t) { return false; }
inline void dot_amx(int64_t, const Weights&, const int64_t*, int64_t, const char*, BlockSums*) {}
#endif
