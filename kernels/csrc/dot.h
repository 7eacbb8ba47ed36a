// The matmul of 1 to MAX_CPU_TOKENS tokens with blocks of weights of any format. With one token it is a GEMV.
//
// A matmul with few tokens is memory-bound: it takes as long as reading the weights. The loops read each weight once,
// prefetch later weights (prefetch.h), and keep the sums of up to BLOCK_M tokens in registers. For more tokens, the
// loops read a block of weights several times. After the first time the block is in the cache.
//
// Start reading at the end. Each function calls the next one:
//
//     matmul                cuts the tokens into m-blocks of up to BLOCK_M
//     matmul_by_format      finds the format F of the weights
//     run_loop              calls the loop for F and for the type of the activations
//     dot_...               the loops: dot_quantized.h, dot_unquantized.h
#pragma once

#include <array>
#include <utility>

#include "dot_quantized.h"
#include "dot_unquantized.h"

using BlockSums = f32x16[MAX_CPU_TOKENS];  // the outputs of a block of weights: [tokens, BLOCK_N]

// Adds the bias [n] of a block to the outputs v of the block. A null bias adds nothing.
template <typename T> f32x16 add_bias(f32x16 v, const T* bias, int64_t block, int64_t n) {
  return bias ? v + load_partial(bias, block * BLOCK_N, n) : v;
}

// The first steps of an epilogue. Adds the bias [n] to sums[b][token], the outputs of block blocks[b], and applies the
// activation. If it is gated, b is 0, blocks[0] is of the gate projection, and blocks[1] of the up projection.
template <typename T>
f32x16 add_bias_and_activate(const BlockSums* sums, int64_t token, int64_t b, const int64_t* blocks, const T* bias,
                             int64_t n, Activation activation) {
  const f32x16 v = add_bias(sums[b][token], bias, blocks[b], n);
  const f32x16 up = is_gated(activation) ? add_bias(sums[1][token], bias, blocks[1], n) : f32x16{};
  return activate_vec(v, up, activation);
}

// The matmul of M tokens with BLOCKS blocks of weights, by the loop for the format and the type X of the activations.
// The first template is for all packed formats without an overload.
template <int M, int BLOCKS, typename F, typename X>
void run_loop(F, const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  if constexpr (std::is_same_v<X, ActGroup>) dot_grouped<F, M, BLOCKS>(w, blocks, m_block, tokens, out);
  else for (int b = 0; b < BLOCKS; b++) dot_dequantized<F, M>(w, blocks[b], tokens, out[b]);
}
template <int M, int BLOCKS, typename X>
void run_loop(Unquantized, const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  auto dot = dot_unquantized<M, M <= 2 ? 1 : 4, X>;
  if constexpr (M > 2 && M <= MAX_IN_ORDER)
    if (reads_in_order<X>(w.k)) dot = dot_unquantized<M, 1, X>;
  for (int b = 0; b < BLOCKS; b++) dot(w, blocks[b], m_block, tokens, out[b]);
}
template <int M, int BLOCKS, typename X>
void run_loop(Int8, const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  if constexpr (std::is_same_v<X, ActGroup>) dot_int8<M, BLOCKS>(w, blocks, m_block, tokens, out);
  else for (int b = 0; b < BLOCKS; b++) dot_dequantized<Int8, M>(w, blocks[b], tokens, out[b]);
}
template <int M, int BLOCKS, typename X>
void run_loop(Float8, const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  dot_float8<M, BLOCKS>(w, blocks, m_block, tokens, out);
}

// matmul for M tokens, M <= BLOCK_M. T is the type of the activations before the prologue.
template <int M, typename T>
void matmul_by_format(const Weights& w, const int64_t* blocks, int64_t n_blocks, const MBlock& m_block,
                        const TokenPtr* tokens, f32x16* const* out) {
  dispatch_format(w.format, [&]<typename F>(F format) {
    const ActElement<F, T>* typed[M];
    for (int m = 0; m < M; m++) typed[m] = static_cast<const ActElement<F, T>*>(tokens[m]);
    // Two blocks in step share the loads of the activations. With up to 5 tokens, reading memory in order is faster.
    constexpr bool IS_BF16_FLOAT8 = std::is_same_v<F, Float8> && std::is_same_v<ActElement<F, T>, bf16>;
    if constexpr (HAS_WIDE_REGISTERS && ((M > 2 && ROUNDS_TO_INT8<F, T>) || (M > 4 && IS_BF16_FLOAT8)))
      if (n_blocks == 2 && (M > 5 || m_block.n_m_blocks > 1)) return run_loop<M, 2>(format, w, blocks, m_block, typed, out);
    for (int64_t b = 0; b < n_blocks; b++) run_loop<M, 1>(format, w, blocks + b, m_block, typed, out + b);
  });
}

// Returns the addresses of matmul_by_format for 1, 2, ... BLOCK_M tokens.
template <typename T, int... I> constexpr auto functions_by_tokens(std::integer_sequence<int, I...>) {
  return std::array{&matmul_by_format<I + 1, T>...};
}

// Returns how many of m tokens an m-block may have. The sums of four outputs (dot_unquantized) and 8 tokens do not fit
// in registers. Even so, one loop over 8 tokens is faster than two loops over 4.
template <typename T> int64_t most_tokens(const Weights& w, int64_t m) {
  const bool is_unquantized = dispatch_format(w.format, []<typename F>(F) { return std::is_same_v<F, Unquantized>; });
  return is_unquantized && (reads_in_order<T>(w.k) || (HAS_WIDE_REGISTERS && m > BLOCK_M)) ? MAX_IN_ORDER : BLOCK_M;
}

// Computes out[b][i] = tokens[i] * (block blocks[b] of w)^T for tokens [m] and 1 or 2 blocks.
template <typename T>
void matmul(int64_t m, const Weights& w, const int64_t* blocks, int64_t n_blocks, const TokenPtr* tokens,
              BlockSums* out) {
  static constexpr auto by_tokens = functions_by_tokens<T>(std::make_integer_sequence<int, BLOCK_M>());
  const int64_t n_adjacent = n_blocks == 2 && blocks[1] == blocks[0] + 1 ? 2 : 1;
  const int64_t n_m_blocks = divide_up(m, most_tokens<T>(w, m));  // of nearly equal numbers of tokens
  for (int64_t i = 0; i < n_m_blocks; i++) {
    const int64_t first = m * i / n_m_blocks, n_tokens = m * (i + 1) / n_m_blocks - first;
    f32x16* const m_block_out[] = {out[0] + first, out[1] + first};
    by_tokens[n_tokens - 1](w, blocks, n_blocks, {i, n_m_blocks, n_adjacent}, tokens + first, m_block_out);
  }
}
