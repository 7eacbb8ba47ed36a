// The matmul of 1 to MAX_CPU_TOKENS tokens with blocks of weights of any format. With one token it is a GEMV.
//
// A matmul with few tokens is memory-bound: it takes as long as reading the weights. So the loops read each weight
// once, prefetch the next ones (prefetch.h), and keep the sums of up to BLOCK_M tokens in registers. More tokens are
// cut into tiles of nearly equal size. Each tile reads the block again, but only the first tile reads it from memory.
//
//     matmul              cuts the tokens into tiles
//     matmul_by_format    one tile: finds the format of the weights, and whether to read a pair of blocks
//     run_loop            calls a loop of dot_quantized.h or dot_unquantized.h
#pragma once

#include <array>
#include <utility>

#include "activation.h"
#include "dot_quantized.h"
#include "dot_unquantized.h"

template <typename F> constexpr bool IS_QUANTIZED = !std::is_same_v<F, Unquantized> && !std::is_same_v<F, PackedBf16>;

using BlockSums = f32x16[MAX_CPU_TOKENS];  // the outputs of a block of weights: [tokens, BLOCK_N]

// For unquantized weights, which have up to four sums for each token. 6 tokens fit in wide registers, 8 spill. Still,
// one pass over 8 tokens beats two over 4. So up to 8 tokens are one tile, and more are cut into tiles of at most 6.
constexpr int UNQUANTIZED_BLOCK_M = 6;

// When a tile reads a pair of blocks in step, instead of one block after the other. A pair shares the loads of the
// activations, but needs registers for twice as many sums. A memory-bound matmul is faster with one block after the
// other, because it then reads memory in order.
//
//     GATED         if the pair is a block of the gate projection and one of the up projection. Each projection, also
//                   its scales, is then read in order. One block after the other would jump between four streams
//     MULTI_TILE    if there are several tiles of tokens: all tiles but the first find the weights in the cache
enum BlockPairing { NEVER, GATED, MULTI_TILE, ALWAYS };

// By the number of tokens in the tile, for wide registers. Several tiles have at least 4 tokens each: 9 tokens are cut
// into 4 and 5. PackedBf16 is memory-bound if there is one tile. Groups with scales become compute-bound first, because
// the scales have to be unpacked. Measured on two cores of a Zen 5 server at 43 to 80 GB/s, November 2026.
using ByTokens = std::array<BlockPairing, BLOCK_M>;
//                                     1 token 2      3       4           5           6           7       8 tokens
constexpr ByTokens PACKED_BF16_PAIRING{NEVER,  NEVER, NEVER,  NEVER,      MULTI_TILE, MULTI_TILE, NEVER,  NEVER};
constexpr ByTokens FLOAT8_PAIRING     {NEVER,  NEVER, NEVER,  NEVER,      MULTI_TILE, ALWAYS,     ALWAYS, ALWAYS};
constexpr ByTokens INT8_PAIRING       {NEVER,  NEVER, NEVER,  MULTI_TILE, MULTI_TILE, ALWAYS,     ALWAYS, ALWAYS};
constexpr ByTokens GROUPED_PAIRING    {GATED,  GATED, ALWAYS, ALWAYS,     ALWAYS,     ALWAYS,     ALWAYS, ALWAYS};

// The line of the table for weights of format F and activations of type X.
template <typename F, typename X> constexpr BlockPairing block_pairing(int m) {
  if (!HAS_WIDE_REGISTERS) return NEVER;
  if (std::is_same_v<X, ActGroup>) return F::HAS_CHANNEL_SCALES ? INT8_PAIRING[m - 1] : GROUPED_PAIRING[m - 1];
  if (!std::is_same_v<X, bf16>) return NEVER;
  if (std::is_same_v<F, Float8>) return FLOAT8_PAIRING[m - 1];
  return std::is_same_v<F, PackedBf16> ? PACKED_BF16_PAIRING[m - 1] : NEVER;
}

// The matmul of M tokens with BLOCKS blocks of weights, by the loop for the format F and the type X of the activations.
template <typename F, int M, int BLOCKS, typename X>
void run_loop(const Weights& w, const int64_t* blocks, const TokenTile& tile, const X* const* tokens,
              f32x16* const* out) {
  if constexpr (std::is_same_v<F, Unquantized>) {
    // With one or two tokens, sharing their loads gains nothing: the loads of the weights are far more.
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

// The matmul of a tile of M tokens, M <= BLOCK_M, with 1 or 2 blocks. Finds the format F of the weights, and casts the
// tokens to the type X of the activations.
template <int M, typename T>
void matmul_by_format(const Weights& w, const int64_t* blocks, int64_t n_blocks, const TokenTile& tile,
                      const TokenPtr* tokens, f32x16* const* out) {
  dispatch_format(w, [&]<typename F>(F) {
    using X = ActElement<F, T>;
    const X* typed[M];
    for (int m = 0; m < M; m++) typed[m] = static_cast<const X*>(tokens[m]);
    constexpr BlockPairing WHEN = block_pairing<F, X>(M);
    if constexpr (WHEN != NEVER) {
      const bool is_gated = tile.n_adjacent == 1;  // gate and up blocks are not adjacent
      if (n_blocks == 2 && (WHEN == ALWAYS || (WHEN == GATED && is_gated) || (WHEN == MULTI_TILE && tile.n_tiles > 1)))
        return run_loop<F, M, 2>(w, blocks, tile, typed, out);
    }
    for (int64_t b = 0; b < n_blocks; b++) run_loop<F, M, 1>(w, blocks + b, tile, typed, out + b);
  });
}

// Returns the addresses of matmul_by_format for 1, 2, ... BLOCK_M tokens.
template <typename T, int... I> constexpr auto functions_by_tokens(std::integer_sequence<int, I...>) {
  return std::array{&matmul_by_format<I + 1, T>...};
}

// Returns how many tokens a tile has at most, if there are m tokens.
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
  const f32x16 up = activation.gated ? add_bias(sums[1][token], bias, blocks[1], n) : f32x16{};
  return activate_vec(v, up, activation);
}
