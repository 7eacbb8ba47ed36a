// The matmul of 1 to MAX_CPU_TOKENS tokens with blocks of weights of any format. The matmul of one token is a GEMV.
//
// A matmul with few tokens is memory-bound: the matmul takes as long as reading the weights. The loops read each weight
// once, prefetch later weights (prefetch.h), and keep the sums of up to BLOCK_M tokens in registers. For more tokens,
// the loops read a block of weights several times. After the first time the block is in the cache.
//
// matmul calls matmul_by_format, which calls run_loop, which calls a loop of dot_quantized.h or dot_unquantized.h.
#pragma once

#include <array>
#include <utility>

#include "activation.h"
#include "dot_quantized.h"
#include "dot_unquantized.h"

template <typename F> constexpr bool IS_QUANTIZED = !std::is_same_v<F, Unquantized> && !std::is_same_v<F, PackedBf16>;
constexpr int UNQUANTIZED_BLOCK_M = 6;  // the tokens of an m-block of unquantized weights, if there are several

using BlockSums = f32x16[MAX_CPU_TOKENS];  // the outputs of a block of weights: [tokens, BLOCK_N]

template <int M, typename T>
void matmul_by_format(const Weights& w, const int64_t* blocks, int64_t n_blocks, const MBlock& m_block,
                      const TokenPtr* tokens, f32x16* const* out);
template <typename F, int M, int BLOCKS, typename X>
void run_loop(const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out);

// Returns how many of m tokens an m-block may have.
template <typename T> int64_t most_tokens(const Weights& w, int64_t m) {
  const bool is_quantized = dispatch_format(w, []<typename F>(F) { return IS_QUANTIZED<F>; });
  // The loops of dot_unquantized.h have up to four sums for each token. The sums of 6 tokens fit in wide registers, and
  // the sums of 8 tokens do not. Even so, one loop over 8 tokens is faster than two loops over 4.
  const bool fits_one_m_block = m <= BLOCK_M;
  return is_quantized || !HAS_WIDE_REGISTERS || fits_one_m_block ? BLOCK_M : UNQUANTIZED_BLOCK_M;
}

// Returns the addresses of matmul_by_format for 1, 2, ... BLOCK_M tokens.
template <typename T, int... I> constexpr auto functions_by_tokens(std::integer_sequence<int, I...>) {
  return std::array{&matmul_by_format<I + 1, T>...};
}

// Computes out[b][i] = tokens[i] * (block blocks[b] of w)^T for tokens [m] and 1 or 2 blocks, m-block by m-block. T is
// the type of the activations before the prologue.
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

// matmul for M tokens, M <= BLOCK_M: finds the format F of the weights, and gives the tokens their type.
template <int M, typename T>
void matmul_by_format(const Weights& w, const int64_t* blocks, int64_t n_blocks, const MBlock& m_block,
                      const TokenPtr* tokens, f32x16* const* out) {
  dispatch_format(w, [&]<typename F>(F) {
    const ActElement<F, T>* typed[M];
    for (int m = 0; m < M; m++) typed[m] = static_cast<const ActElement<F, T>*>(tokens[m]);
    // Two blocks in step share the loads of the activations, but need registers for twice as many sums. As long as the
    // matmul is memory-bound, one block after the other is faster, which reads memory in order.
    constexpr bool IS_BF16 = F::BF16_ACTIVATIONS && std::is_same_v<ActElement<F, T>, bf16>;
    constexpr bool FITS_REGISTERS = IS_QUANTIZED<F> || M <= UNQUANTIZED_BLOCK_M;
    constexpr bool GAINS_BY_SHARING = ROUNDS_TO_INT8<F, T> ? M > 2 : IS_BF16 && M > 4 && FITS_REGISTERS;
    const bool is_memory_bound = (M <= 5 || !IS_QUANTIZED<F>) && m_block.n_m_blocks == 1;
    if constexpr (HAS_WIDE_REGISTERS && GAINS_BY_SHARING)
      if (n_blocks == 2 && !is_memory_bound) return run_loop<F, M, 2>(w, blocks, m_block, typed, out);
    for (int64_t b = 0; b < n_blocks; b++) run_loop<F, M, 1>(w, blocks + b, m_block, typed, out + b);
  });
}

// The matmul of M tokens with BLOCKS blocks of weights, by the loop for the format F and the type X of the activations.
template <typename F, int M, int BLOCKS, typename X>
void run_loop(const Weights& w, const int64_t* blocks, const MBlock& m_block, const X* const* tokens,
              f32x16* const* out) {
  if constexpr (std::is_same_v<F, Unquantized>) {
    // The loads of one or two tokens are few beside the loads of the weights, so sharing would gain nothing.
    constexpr int OUTPUTS_IN_STEP = M <= 2 ? 1 : 4;
    for (int b = 0; b < BLOCKS; b++) dot_unquantized<M, OUTPUTS_IN_STEP>(w, blocks[b], m_block, tokens, out[b]);
  } else if constexpr (std::is_same_v<F, PackedBf16> && std::is_same_v<X, bf16>) {
    dot_packed_bf16<M, BLOCKS>(w, blocks, m_block, tokens, out);
  } else if constexpr (std::is_same_v<F, Float8>) {
    dot_float8<M, BLOCKS>(w, blocks, m_block, tokens, out);
  } else if constexpr (!std::is_same_v<X, ActGroup>) {
    for (int b = 0; b < BLOCKS; b++) dot_dequantized<F, M>(w, blocks[b], tokens, out[b]);
  } else if constexpr (std::is_same_v<F, Int8>) {
    dot_int8<M, BLOCKS>(w, blocks, m_block, tokens, out);
  } else {
    dot_grouped<F, M, BLOCKS>(w, blocks, m_block, tokens, out);
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
