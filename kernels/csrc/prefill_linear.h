// The operation fused_linear for more than MAX_CPU_TOKENS tokens with bf16 activations, as in a prefill. It is for the
// formats that do not quantize activations: unquantized weights and 8-bit floats. FusedLinearOp computes the others.
//
//     task     a block of tokens, and NR outputs
//     panel    PANEL_K inputs of the task's weights, dequantized to bf16 once for all tokens of the task. The prologue
//              cuts norm(x) into panels, too
//
//     for each panel:
//         for MR tokens at a time:  acc [MR, NR] += x [MR, PANEL_K] panel
//     out = epilogue(acc)
//
// A panel stays in the L1 cache for all tokens of the task. PyTorch would first dequantize a whole matrix to memory. It
// would round the weights to bf16, too.
#pragma once

#include "bf16_weights.h"
#include "linear.h"
#include "microkernel.h"

#if defined(__AVX512BF16__)

// Multiplies a tile [n_pairs] of unscaled e4m3 weights with the scales of their groups.
template <typename F> void scale_tile(const Weights& w, int64_t block, int64_t first_input, int64_t n_pairs,
                                      i32x16* tile) {
  for (int64_t i = 0; i < n_pairs; i++) {
    const int64_t group = (first_input + 2 * i) / w.group_size;
    const f32x16 scale = F::scales_and_zeros(w, block * w.n_groups + group).scales;
    const f32x16 even = (f32x16)(tile[i] << 16) * scale, odd = (f32x16)(tile[i] & 0xffff0000) * scale;
    tile[i] = bf16_pairs(add_half_ulp(even), add_half_ulp(odd));
  }
}

struct PrefillLinearOp : FusedLinearOp<bf16> {
  static constexpr int64_t PANEL_K = 256, PANEL_PAIRS = PANEL_K / 2, PANEL_BYTES = PANEL_K * sizeof(bf16);
  // With 96 tokens, dequantization takes a few percent of the time of the matmul. With fewer tokens it takes more.
  static constexpr int64_t MIN_BLOCK_TOKENS = 96, MAX_BLOCK_TOKENS = 516;
  static constexpr int64_t TASKS_PER_THREAD = 8;  // enough that no thread ends much later than the others

  Prologue<bf16> prologue() const { return {x, m, w, norm_weight, eps, PANEL_K, MR}; }
  size_t shared_bytes() const { return prologue().shared_bytes(); }
  // With a gated activation, half of a task's blocks are of the gate projection, and half of the up projection.
  int64_t out_blocks_per_task() const { return activation.gated ? 2 : 4; }

  void execute(char* shared, Barrier& barrier) const {
    const VnniPair* x_pairs = reinterpret_cast<const VnniPair*>(prologue().run_to_panels(shared, barrier));
    const int64_t n_threads = omp_get_num_threads(), n_columns = divide_up(n_out_blocks(), out_blocks_per_task());
    const int64_t n_token_blocks = std::clamp(divide_up(TASKS_PER_THREAD * n_threads, n_columns),
                                              divide_up(m, MAX_BLOCK_TOKENS), divide_up(m, MIN_BLOCK_TOKENS));
    const int64_t block_tokens = round_up(divide_up(m, n_token_blocks), MR);
    for (int64_t i = omp_get_thread_num(); i < n_columns * n_token_blocks; i += n_threads) {
      const int64_t begin = i % n_token_blocks * block_tokens, end = std::min(m, begin + block_tokens);
      if (begin < end) matmul_task(x_pairs, i / n_token_blocks * out_blocks_per_task(), {begin, end});
    }
  }

  // Computes the outputs of out_blocks_per_task() blocks, from first_block on, for the tokens [begin, end).
  void matmul_task(const VnniPair* x_pairs, int64_t first_block, Range tokens) const {
    int64_t blocks[4];  // of W. Beyond the last block, the last block is repeated, and the outputs are not stored
    for (int64_t i = 0; i < 4; i++) {
      const int64_t out_block = first_block + (activation.gated ? i / 2 : i);
      const bool is_up = activation.gated && i % 2;
      blocks[i] = std::min(out_block, n_out_blocks() - 1) + (is_up ? n_out_blocks() : 0);
    }
    static thread_local Scratch panel_scratch, acc_scratch;
    VnniPair* panel = panel_scratch.at_least<VnniPair>(PANEL_PAIRS * NR);
    float* acc = acc_scratch.at_least<float>(round_up(tokens.end - tokens.begin, MR) * NR);
    dispatch_format(w, [&]<typename F>(F) {
      if constexpr (!F::QUANTIZES_ACTIVATIONS) matmul_blocks<F>(x_pairs, blocks, tokens, panel, acc);
    });
    for (int64_t token = tokens.begin; token < tokens.end; token += MR, acc += MR * NR)
      store_outputs(acc, first_block, blocks, {token, std::min(token + MR, tokens.end)});
  }

  // Computes acc [tokens, NR], the sums of four blocks.
  template <typename F>
  void matmul_blocks(const VnniPair* x_pairs, const int64_t* blocks, Range tokens, VnniPair* panel, float* acc) const {
    const auto tiles_of = [&](int64_t i) {
      if constexpr (std::is_same_v<F, Unquantized>) return WeightTiles<F>(w, blocks[i], PANEL_BYTES);
      else return WeightTiles<F>(w, blocks[i]);
    };
    WeightTiles<F> tiles[] = {tiles_of(0), tiles_of(1), tiles_of(2), tiles_of(3)};
    for (int64_t begin = 0; begin < w.k; begin += PANEL_K) {
      const int64_t end = std::min(w.k, begin + PANEL_K);
      for (int64_t i = 0; i < 4; i++)
        dequantize_panel<F>(tiles[i], blocks[i], begin, end,
                            reinterpret_cast<i32x16*>(panel + i * PANEL_PAIRS * BLOCK_N));
      const VnniPair* x = x_pairs + (begin / PANEL_K * prologue().padded_m() + tokens.begin) * PANEL_PAIRS;
      matmul_panel(x, panel, round_up(end - begin, AMX_TILE_K) / 2, begin > 0, tokens.end - tokens.begin, acc);
    }
  }

  // Dequantizes the inputs [begin, end) of a block to panel [pairs, 16].
  template <typename F>
  void dequantize_panel(WeightTiles<F>& tiles, int64_t block, int64_t begin, int64_t end, i32x16* panel) const {
    for (int64_t k = begin; k < end; k += AMX_TILE_K, panel += AMX_TILE_K / 2) {
      const int64_t tile_end = std::min(end, k + AMX_TILE_K);
      if (tile_end < k + AMX_TILE_K) std::fill_n(panel, AMX_TILE_K / 2, i32x16{});
      tiles.read(k, tile_end, panel);
      if constexpr (F::SCALE_AFTER_SUM) scale_tile<F>(w, block, k, divide_up(tile_end - k, 2), panel);
    }
  }

  static void matmul_panel(const VnniPair* x, const VnniPair* panel, int64_t n_pairs, bool accumulates,
                           int64_t num_tokens, float* acc) {
    for (int64_t token = 0; token < num_tokens; token += MR, x += MR * PANEL_PAIRS, acc += MR * NR) {
      const auto gemm = accumulates ? microkernel<bf16, true> : microkernel<bf16, false>;
      gemm(x, PANEL_PAIRS, panel, BLOCK_N, PANEL_PAIRS * BLOCK_N, n_pairs, acc, NR);
    }
  }

  // Applies the epilogue to acc [MR, NR], the sums of tokens [begin, end), and stores the outputs.
  void store_outputs(const float* acc, int64_t first_block, const int64_t* blocks, Range tokens) const {
    BlockSums sums[4];
    for (int64_t i = 0; i < 4; i++)
      for (int64_t r = 0; r < tokens.end - tokens.begin; r++) sums[i][r] = load_vec(acc + r * NR + i * LANES);
    const int64_t blocks_per_output = 4 / out_blocks_per_task();
    const int64_t n_blocks = std::min(out_blocks_per_task(), n_out_blocks() - first_block);
    for (int64_t r = 0; r < tokens.end - tokens.begin; r++)
      for (int64_t b = 0; b < n_blocks; b++)
        epilogue(sums + b * blocks_per_output, r, tokens.begin + r, 0, blocks + b * blocks_per_output);
  }
};

constexpr bool HAS_PREFILL_LINEAR = true;
#else
constexpr bool HAS_PREFILL_LINEAR = false;
#endif
