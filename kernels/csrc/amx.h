// The matmul of the bf16 activations of many tokens with blocks of weights, on Intel's matrix unit AMX. If uses_amx,
// FusedLinearOp (linear.h) calls dot_amx instead of matmul (dot.h).
//
// A tile register has 16 rows of 64 bytes. One instruction multiplies two tiles of bf16 and adds to a tile of float:
//
//     activations [16 tokens, 32 inputs]  *  weights [32 inputs, 16 outputs]  ->  sums [16 tokens, 16 outputs]
//
// Converts weights of any format to bf16, once for all tokens. Rounds dequantized weights whose groups have scales to
// bf16, as in prefill. Does not quantize activations.
//
//     for each tile of 32 inputs of a block:
//         dequantize the weights                                                   1 tile register
//         for each of up to 4 tiles of 16 tokens:  sums += activations * weights   3 tile registers, and 4 of sums
//         at the end of a group, if SCALE_AFTER_SUM:  out += scale * sums; sums = 0
#pragma once

#include <optional>

#include "bf16_weights.h"
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

// Whether AMX computes the matmul of m tokens of type T with w.
template <typename T> bool uses_amx(const Weights& w, int64_t m) {
  return dispatch_format(w, [&]<typename F>(F) {
    // dot_amx scales sums of whole tiles, so no tile may span two groups of inputs.
    const bool has_whole_tiles = !F::SCALE_AFTER_SUM || w.n_groups == 1 || w.group_size % AMX_TILE_K == 0;
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

// ---- The matmul -----------------------------------------------------------------------------------------------------

// Computes out [16 N, BLOCK_N] = activations [16 N, k] * (a block of w)^T. The activations are panels of N tiles. The
// numbers of tile registers are part of the instructions: 0-3 hold sums, 4-6 activations, 7 weights.
template <typename F, int N> void dot_amx(const Weights& w, int64_t block, const char* panels, f32x16* out) {
  WeightTiles<F> weights(w, block);
  i32x16 rows[AMX_TILE_K / 2];  // of a tile of weights
  const auto zero_sums = [] {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  };
  const auto store_sums = [](f32x16* sums) {
    _tile_stored(0, sums, 64);
    if constexpr (N > 1) _tile_stored(1, sums + 16, 64);
    if constexpr (N > 2) _tile_stored(2, sums + 32, 64);
    if constexpr (N > 3) _tile_stored(3, sums + 48, 64);
    asm volatile("" ::: "memory");  // tells the compiler that the instructions above write memory
  };
  zero_sums();
  for (int64_t k = 0; k < w.k; k += AMX_TILE_K, panels += N * AMX_TILE_BYTES) {
    const int64_t end = std::min(w.k, k + AMX_TILE_K);
    if (end < k + AMX_TILE_K) std::fill_n(rows, AMX_TILE_K / 2, i32x16{});
    weights.read(k, end, rows);
    asm volatile("" ::: "memory");  // tells the compiler that the next instruction reads memory
    _tile_loadd(7, rows, 64);
    _tile_loadd(4, panels, 64);
    _tile_dpbf16ps(0, 4, 7);
    if constexpr (N > 1) { _tile_loadd(5, panels + AMX_TILE_BYTES, 64); _tile_dpbf16ps(1, 5, 7); }
    if constexpr (N > 2) { _tile_loadd(6, panels + 2 * AMX_TILE_BYTES, 64); _tile_dpbf16ps(2, 6, 7); }
    if constexpr (N > 3) { _tile_loadd(4, panels + 3 * AMX_TILE_BYTES, 64); _tile_dpbf16ps(3, 4, 7); }
    if constexpr (F::SCALE_AFTER_SUM) {
      if (end < w.k && end % w.group_size) continue;
      f32x16 sums[16 * N];  // of the group of inputs that ends here
      store_sums(sums), zero_sums();
      const int64_t group = (end - 1) / w.group_size;
      const f32x16 scale = F::scales_and_zeros(w, block * w.n_groups + group).scales;
      for (int i = 0; i < 16 * N; i++) out[i] = sums[i] * scale + (group ? out[i] : f32x16{});
    }
  }
  if constexpr (!F::SCALE_AFTER_SUM) store_sums(out);
  if constexpr (F::HAS_CHANNEL_SCALES) {
    const f32x16 scale = F::channel_scales(w, block);
    for (int i = 0; i < 16 * N; i++) out[i] *= scale;
  }
}

// The addresses of dot_amx for 1, 2, 3 and 4 tiles of tokens.
static_assert(MAX_CPU_TOKENS == 4 * AMX_TILE_M);
template <typename F> constexpr decltype(&dot_amx<F, 1>) DOT_AMX[] = {
    dot_amx<F, 1>, dot_amx<F, 2>, dot_amx<F, 3>, dot_amx<F, 4>};

// Computes the results of matmul in dot.h, from activations in panels (prologue.h) of AMX_TILE_K inputs.
inline void dot_amx(int64_t m, const Weights& w, const int64_t* blocks, int64_t n_blocks, const char* panels,
                    BlockSums* out) {
  dispatch_format(w, [&]<typename F>(F) {
    const auto dot_block = DOT_AMX<F>[(m - 1) / AMX_TILE_M];
    for (int64_t b = 0; b < n_blocks; b++) dot_block(w, blocks[b], panels, out[b]);
  });
}

#else
inline bool has_amx() { return false; }
struct TileRegisters {};
template <typename T> bool uses_amx(const Weights&, int64_t) { return false; }
inline void dot_amx(int64_t, const Weights&, const int64_t*, int64_t, const char*, BlockSums*) {}
#endif
