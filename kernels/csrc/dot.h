// The matmul of 1 to MAX_CPU_TOKENS tokens with blocks of weights of any format. With one token it is a GEMV.
//
// A matmul with few tokens is memory-bound: it takes as long as reading the weights. So the loops read each weight
// once, prefetch the next ones (prefetch.h), and keep the sums of up to BLOCK_M tokens in registers. More tokens are
// cut into tiles of nearly equal size. A block is then read once for each tile, after the first time from the cache.
//
//     matmul              cuts the tokens into tiles
//     matmul_by_format    one tile: finds the format of the weights, and how many blocks to read side by side
//     run_loop            calls a loop of dot_quantized.h or dot_unquantized.h
#pragma once

#include <array>
#include <utility>

#include "activation.h"
#include "dot_quantized.h"
#include "dot_unquantized.h"

template <typename F> constexpr bool IS_QUANTIZED = !std::is_same_v<F, Unquantized> && !std::is_same_v<F, PackedBf16>;

using BlockSums = f32x16[MAX_CPU_TOKENS];  // the outputs of a block of weights: [tokens, BLOCK_N]

// Unquantized weights have up to four sums for each token. The sums of 6 tokens fit in wide registers, those of 8 do
// not. Even so, one loop over 8 tokens is faster than two over 4, so the limit holds only if there are more than 8.
constexpr int UNQUANTIZED_BLOCK_M = 6;

// Two blocks of weights side by side share the loads of the activations, but need registers for twice as many sums. As
// long as the matmul is memory-bound, one block after the other is faster, because memory is read in order. So this
// many blocks are read side by side if registers are wide (otherwise always one):
//
//     format               activations     1-2 tokens     3-5 tokens     6-8 tokens     more tokens, in tiles of 4 to 8
//     Unquantized          any             1              1              1              1
//     PackedBf16           bf16            1              1              1              2, in a tile of 4 tokens 1
//     Float8               bf16            1              1              2              2, in a tile of 4 tokens 1
//     Int8                 int8            1              1              2              2
//     other quantized      int8            1, gated 2     2              2              2
//     any packed           float           1              1              1              1
//
// The other quantized formats have scales of groups, whose unpacking makes them compute-bound sooner. "gated": a block of
// the gate projection and one of the up projection. Each projection is read in order, also its scales. One block after
// the other would jump between four streams of memory at each block.
//
// Measured on two cores of a Zen 5 server at 43 to 80 GB/s, November 2026.
constexpr int MAX_MEMORY_BOUND_TOKENS = 5;  // with more, a matmul of quantized weights is compute-bound
constexpr int MAX_MEMORY_BOUND_TOKENS_IN_GROUPS = 2;  // the same for weights whose groups have scales
constexpr int MIN_SHARED_BF16_TOKENS = 5;   // the loads of fewer bf16 tokens are not worth sharing
constexpr int MIN_SHARED_INT8_TOKENS = 4;   // fewer tokens of Int8 are an only tile (9 tokens are tiles of 4 and 5)

// The matmul of M tokens with BLOCKS blocks of weights, by the loop for the format F and the type X of the activations.
template <typename F, int M, int BLOCKS, typename X>
void run_loop(const Weights& w, const int64_t* blocks, const TokenTile& tile, const X* const* tokens,
              f32x16* const* out) {
  if constexpr (std::is_same_v<F, Unquantized>) {
    // The loads of one or two tokens are few beside the loads of the weights, so sharing would gain nothing.
    constexpr int OUTPUTS_IN_STEP = M <= 2 ? 1 : 4;
    for (int b = 0; b < BLOCKS; b++) dot_unquantized<M, OUTPUTS_IN_STEP>(w, blocks[b], tile, tokens, out[b]);
  } else if constexpr (std::is_same_v<F, PackedBf16> && std::is_same_v<X, bf16>) {
    dot_packed_bf16<M, BLOCKS>(w, blocks, tile, tokens, out);
  } else if constexpr (std::is_same_v<F, Float8>) {
    dot_float8<M, BLOCKS>(w, blocks, tile, tokens, out);
  } else if constexpr (!std::is_same_v<X, ActGroup>) {
    for (int b = 0; b < BLOCKS; b++) dot_dequantized<F, M>(w, blocks[b], tokens, out[b]);
  } else if constexpr (std::is_same_v<F, Int8>) {
    dot_int8<M, BLOCKS>(w, blocks, tile, tokens, out);
  } else {
    dot_grouped<F, M, BLOCKS>(w, blocks, tile, tokens, out);
  }
}

// The matmul of a tile of M tokens, M <= BLOCK_M, with 1 or 2 blocks. Finds the format F of the weights, and gives the
// tokens their type.
template <int M, typename T>
void matmul_by_format(const Weights& w, const int64_t* blocks, int64_t n_blocks, const TokenTile& tile,
                      const TokenPtr* tokens, f32x16* const* out) {
  dispatch_format(w, [&]<typename F>(F) {
    using X = ActElement<F, T>;
    const X* typed[M];
    for (int m = 0; m < M; m++) typed[m] = static_cast<const X*>(tokens[m]);
    constexpr bool IS_INT8 = std::is_same_v<X, ActGroup>, IS_BF16 = F::BF16_ACTIVATIONS && std::is_same_v<X, bf16>;
    constexpr bool FITS_REGISTERS = IS_QUANTIZED<F> || M <= UNQUANTIZED_BLOCK_M;
    constexpr bool HAS_GROUPS = IS_INT8 && !F::HAS_CHANNEL_SCALES;
    constexpr bool GAINS_BY_SHARING = HAS_GROUPS || (IS_INT8 && M >= MIN_SHARED_INT8_TOKENS) ||
                                      (IS_BF16 && M >= MIN_SHARED_BF16_TOKENS && FITS_REGISTERS);
    constexpr int MAX_TOKENS = HAS_GROUPS ? MAX_MEMORY_BOUND_TOKENS_IN_GROUPS : MAX_MEMORY_BOUND_TOKENS;
    const bool is_memory_bound = tile.n_tiles == 1 && (M <= MAX_TOKENS || !IS_QUANTIZED<F>);
    const bool is_gated = tile.n_adjacent == 1;  // for two blocks
    if constexpr (HAS_WIDE_REGISTERS && GAINS_BY_SHARING)
      if (n_blocks == 2 && (!is_memory_bound || (HAS_GROUPS && is_gated)))
        return run_loop<F, M, 2>(w, blocks, tile, typed, out);
    for (int64_t b = 0; b < n_blocks; b++) run_loop<F, M, 1>(w, blocks + b, tile, typed, out + b);
  });
}

// Returns the addresses of matmul_by_format for 1, 2, ... BLOCK_M tokens.
template <typename T, int... I> constexpr auto functions_by_tokens(std::integer_sequence<int, I...>) {
  return std::array{&matmul_by_format<I + 1, T>...};
}

// Returns the most tokens of a tile, if there are m tokens.
inline int64_t max_tile_tokens(const Weights& w, int64_t m) {
  const bool is_quantized = dispatch_format(w, []<typename F>(F) { return IS_QUANTIZED<F>; });
  return is_quantized || !HAS_WIDE_REGISTERS || m <= BLOCK_M ? BLOCK_M : UNQUANTIZED_BLOCK_M;
}

// Computes out[b][i] = tokens[i] * (block blocks[b] of w)^T for tokens [m] and 1 or 2 blocks. T is the type of the
// activations before the prologue.
template <typename T>
void matmul(int64_t m, const Weights& w, const int64_t* blocks, int64_t n_blocks, const TokenPtr* tokens,
            BlockSums* out) {
  static constexpr auto by_tokens = functions_by_tokens<T>(std::make_integer_sequence<int, BLOCK_M>());
  const int64_t n_adjacent = n_blocks == 2 && blocks[1] == blocks[0] + 1 ? 2 : 1;
  const int64_t n_tiles = divide_up(m, max_tile_tokens(w, m));
  for (int64_t i = 0; i < n_tiles; i++) {
    const Range range = split_range(i, n_tiles, m);
    f32x16* const tile_out[] = {out[0] + range.begin, out[1] + range.begin};
    by_tokens[range.end - range.begin - 1](w, blocks, n_blocks, {i, n_tiles, n_adjacent}, tokens + range.begin,
                                           tile_out);
  }
}

// ---- The first steps of an epilogue ---------------------------------------------------------------------------------

// Adds the bias [n] of a block to the outputs v of the block. A null bias adds nothing.
template <typename T> f32x16 add_bias(f32x16 v, const T* bias, int64_t block, int64_t n) {
  return bias ? v + load_partial(bias, block * BLOCK_N, n) : v;
}

// Adds the bias [n] to sums[b][token], the outputs of block blocks[b], and applies the activation. If the activation is
// gated, b is 0, blocks[0] is of the gate projection, and blocks[1] of the up projection.
template <typename T>
f32x16 add_bias_and_activate(const BlockSums* sums, int64_t token, int64_t b, const int64_t* blocks, const T* bias,
                             int64_t n, Activation activation) {
  const f32x16 v = add_bias(sums[b][token], bias, blocks[b], n);
  const f32x16 up = is_gated(activation) ? add_bias(sums[1][token], bias, blocks[1], n) : f32x16{};
  return activate_vec(v, up, activation);
}
