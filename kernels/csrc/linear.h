// The operations fused_linear, rms_norm, permute_inputs, activate, add, embed and dequantize. ops.cpp submits them.
#pragma once

#include "amx.h"

// Computes out [m, n_out] = epilogue(norm(x [m, k]) W^T). layers/linear.py: Linear has the steps in order.
//
// With a gated activation, W is a gate projection above an up projection, and out is activation(gate) * up. Each
// projection has n / 2 outputs, a multiple of BLOCK_N. So no block has outputs of both projections.
//
// Formats that quantize activations take this path for a prompt, too. The prompt is then rounded like the steps after
// it, and takes 0.65 to 0.85 of the time of prefill_linear.h in bf16 (two cores of a Zen 5 server, November 2026).
template <typename T> struct FusedLinearOp {
  const T* x;
  int64_t m;
  Weights w;
  const T *bias, *norm_weight;  // [n], [k], or null
  float eps;
  const T* residual;  // [m, n_out] or null
  Activation activation;
  float out_scale, softcap, clip;  // a softcap or clip of 0 changes nothing
  T* out;
  float* float_out;  // if not null, replaces out

  int64_t n_out() const { return activation.gated ? w.n / 2 : w.n; }
  int64_t n_out_blocks() const { return divide_up(n_out(), BLOCK_N); }
  bool is_on_amx() const { return m <= MAX_CPU_TOKENS && uses_amx<T>(w, m); }
  Prologue<T> prologue() const { return {x, m, w, norm_weight, eps, is_on_amx() ? AMX_TILE_K : 0, AMX_TILE_M}; }
  size_t shared_bytes() const { return prologue().shared_bytes(); }

  // The loops, from the outermost:
  //
  //     slice     up to MAX_SLICE_TOKENS tokens
  //     blocks    a pair of neighbours in W; with a gated activation, one of the gate and one of the up projection
  //     batch     up to MAX_CPU_TOKENS tokens of the slice, because matmul takes no more
  //
  // A task is a block of outputs for a slice. The tasks of a slice are neighbours:
  //
  //     task      0  1  2  ...  n_out_blocks() - 1     n_out_blocks()  ...
  //     slice     0  0  0  ...  0                      1  ...
  //     block     0  1  2  ...  n_out_blocks() - 1     0  ...
  //
  // A thread reads the activations of a slice again for each block. So they must fit in the last-level cache.
  static constexpr int64_t MAX_SLICE_TOKENS = 512;

  void execute(char* shared, Barrier& barrier) const {
    static thread_local Scratch scratch;
    TokenPtr* const tokens = scratch.at_least<TokenPtr>(m);
    const char* panels = nullptr;
    std::optional<TileRegisters> tile_registers;
    if (is_on_amx()) panels = prologue().run_to_panels(shared, barrier), tile_registers.emplace();
    else prologue().run(shared, barrier, tokens);
    const int64_t n_slices = divide_up(m, MAX_SLICE_TOKENS);
    const Range range = thread_range(n_slices * n_out_blocks());
    for (int64_t task = range.begin, n_tasks; task < range.end; task += n_tasks) {
      const int64_t block = task % n_out_blocks();
      n_tasks = activation.gated ? 1 : std::min({int64_t{2}, range.end - task, n_out_blocks() - block});
      matmul_slice(split_range(task / n_out_blocks(), n_slices, m), block, n_tasks, tokens, panels);
    }
  }

  // The inner loop of execute: n_tasks blocks of outputs, from block on, for the tokens of a slice. Reads tokens if
  // panels are null.
  [[gnu::always_inline]]
  void matmul_slice(Range slice, int64_t block, int64_t n_tasks, const TokenPtr* tokens, const char* panels) const {
    const bool gated = activation.gated;
    const int64_t blocks[] = {block, block + (gated ? n_out_blocks() : 1)}, n_blocks = gated ? 2 : n_tasks;
    BlockSums sums[2];
    for (int64_t first = slice.begin; first < slice.end; first += MAX_CPU_TOKENS) {
      const int64_t num_tokens = std::min(MAX_CPU_TOKENS, slice.end - first);
      if (panels) dot_amx(num_tokens, w, blocks, n_blocks, panels, sums);
      else matmul<T>(num_tokens, w, blocks, n_blocks, tokens + first, sums);
      for (int64_t i = 0; i < num_tokens; i++)
        for (int64_t b = 0; b < n_tasks; b++) epilogue(sums, i, first + i, b, blocks);
    }
  }

  // Computes and stores the outputs of a token in block blocks[b], from its sums sums[b][i].
  void epilogue(const BlockSums* sums, int64_t i, int64_t token, int64_t b, const int64_t* blocks) const {
    const int64_t block = blocks[b], n_out = this->n_out();
    f32x16 v = add_bias_and_activate(sums, i, b, blocks, bias, w.n, activation);
    if (out_scale != 1) v *= out_scale;
    if (softcap) v = apply_softcap(v, softcap);
    if (clip) v = clamp(v, clip);
    if (residual) v += load_partial(residual + token * n_out, block * BLOCK_N, n_out);
    if (float_out) store_partial(v, float_out + token * n_out, block * BLOCK_N, n_out);
    else store_partial(v, out + token * n_out, block * BLOCK_N, n_out);
  }
};

// out [m, k] = [residual +] x [m, k] / rms(x) * weight [k]
template <typename T> struct RMSNormOp {
  const T* x;
  int64_t m, k;
  const T* weight;
  float eps;
  const T* residual;  // [m, k] or null
  T* out;

  // The threads share the elements. Each thread computes the rms of every token of which it has elements. That is
  // cheaper than a barrier.
  void execute(char*, Barrier&) const {
    const int64_t vecs_per_token = divide_up(k, LANES);
    const Range range = thread_range(m * vecs_per_token);
    float inverse_rms = 0;  // of the current token
    for (int64_t task = range.begin; task < range.end; task++) {
      const int64_t token = task / vecs_per_token, i = task % vecs_per_token * LANES;
      if (i == 0 || task == range.begin) inverse_rms = ::inverse_rms(x + token * k, eps, k);
      f32x16 v = normed_vec(x + token * k, weight, inverse_rms, i, k);
      if (residual) v += load_partial(residual + token * k, i, k);
      store_partial(v, out + token * k, i, k);
    }
  }
};

// Computes out [m, n] from x [m, k]: out[token, i] = x[token, input_order[i]].
template <typename T> struct PermuteInputsOp {
  const T* x;
  int64_t m, k;
  const int32_t* input_order;  // [n]
  int64_t n;
  T* out;

  // The threads share the columns of out, in pieces of LANES columns.
  void execute(char*, Barrier&) const {
    const Range range = thread_range(divide_up(n, LANES));
    const int64_t begin = range.begin * LANES, end = std::min(n, range.end * LANES);
    for (int64_t token = 0; token < m; token++)
      for (int64_t i = begin; i < end; i++) out[token * n + i] = x[token * k + input_order[i]];
  }
};

// out [m, f] = activation(gate) * up, where a row of x [m, 2 f] is f gates and f ups. If the activation is not gated,
// out [m, f] = activation(x [m, f]).
template <typename T> struct ActivateOp {
  const T* x;
  int64_t m, f;
  Activation activation;
  T* out;

  void execute(char*, Barrier&) const {
    const int64_t vecs_per_token = divide_up(f, LANES);
    const Range range = thread_range(m * vecs_per_token);
    for (int64_t task = range.begin; task < range.end; task++) {
      const int64_t token = task / vecs_per_token, i = task % vecs_per_token * LANES;
      const T* row = x + token * (activation.gated ? 2 * f : f);
      const f32x16 up = activation.gated ? load_partial(row + f, i, f) : f32x16{};
      store_partial(activate_vec(load_partial(row, i, f), up, activation), out + token * f, i, f);
    }
  }
};

// out [n] = x [n] + y [n]
template <typename T> struct AddOp {
  const T *x, *y;
  int64_t n;
  T* out;

  void execute(char*, Barrier&) const {
    const Range range = thread_range(divide_up(n, LANES));
    for (int64_t i = range.begin * LANES; i < range.end * LANES; i += LANES)
      store_partial(load_partial(x, i, n) + load_partial(y, i, n), out, i, n);
  }
};

// Computes out [F::ELEMENTS_PER_WORD inputs, 16 outputs] from the 16 words at data. The elements are not scaled yet.
template <typename F> void unpack_words(F, const char* data, f32x16* out) {
  const i32x16 words = load<i32x16>(data);
  for (int j = 0; j < F::ELEMENTS_PER_WORD; j++) out[j] = to_float(F::element(words, j));
}
inline void unpack_words(Float8, const char* data, f32x16* out) { unpack_float8(load<i32x16>(data), out); }

// Unpacks a block of w, up to 16 inputs of a group at a time. Calls visit(tile, group, begin, end):
//
//     tile     [16 inputs, 16 outputs], elements that are not scaled yet, from input begin on; zeros from input end on
//     group    the scales and zeros of these elements
//     end      the end of the group's inputs
template <typename F, typename Visit> void for_each_tile(const Weights& w, int64_t block, Visit visit) {
  const char* data = w.block_data(block);
  for (int64_t begin = 0, end, group = block * w.n_groups; begin < w.k; begin = end, group++) {
    end = std::min(w.k, begin + w.group_size);
    const auto [group_scales, zeros] = F::scales_and_zeros(w, group);
    const ScalesAndZeros scales_and_zeros{group_scales * F::channel_scales(w, block), zeros};
    for (int64_t k = begin; k < end; k += LANES) {
      f32x16 tile[LANES] = {};
      for (int64_t i = 0; i < LANES && k + i < end; i += F::ELEMENTS_PER_WORD, data += 64)
        unpack_words(F{}, data, tile + i);
      visit(tile, scales_and_zeros, k, end);
    }
  }
}

// Computes out [k] = row `row` of w. The row is one lane of a block, because the words of 16 rows are adjacent.
template <typename F, typename T> void dequantize_row(const Weights& w, int64_t row, T* out) {
  const int64_t lane = row % BLOCK_N;
  for_each_tile<F>(w, row / BLOCK_N, [&](const f32x16* tile, const ScalesAndZeros& group, int64_t begin, int64_t end) {
    f32x16 values;
    for (int64_t i = 0; i < LANES; i++) values[i] = tile[i][lane];
    store_partial((values - group.zeros[lane]) * group.scales[lane], out, begin, end);
  });
}

// out [m, dim] = rows tokens [m] of W [vocab_size, dim], times scale
template <typename T> struct EmbedOp {
  const int64_t* tokens;
  int64_t m;
  Weights w;
  float scale;
  T* out;

  const char* validate() const {
    for (int64_t i = 0; i < m; i++)
      if (tokens[i] < 0 || tokens[i] >= w.n) return "a token is not in the vocabulary";
    return nullptr;
  }
  void execute(char*, Barrier&) const {
    const Range range = thread_range(m);
    for (int64_t i = range.begin; i < range.end; i++) {
      T* to = out + i * w.k;
      const T* from = to;
      dispatch_format(w, [&]<typename F>(F) {
        if constexpr (std::is_same_v<F, Unquantized>) from = reinterpret_cast<const T*>(w.data) + tokens[i] * w.k;
        else dequantize_row<F>(w, tokens[i], to);
      });
      if (from == to && scale == 1) continue;
      for (int64_t j = 0; j < w.k; j += LANES) store_partial(load_partial(from, j, w.k) * scale, to, j, w.k);
    }
  }
};

// Computes out [n, k] = the dequantized weights of packed format F. Only prefill calls it, and prefill is never
// captured.
//
// An unpacked vector holds one input of 16 outputs. Transposing 16 such vectors gives vectors of 16 inputs of one
// output: pieces of a row of out.
template <typename F, typename T> void dequantize_to(const Weights& w, T* out) {
#pragma omp parallel for num_threads(torch::stable::get_num_threads())
  for (int64_t b = 0; b < w.n_blocks(); b++) {
    const int64_t n_outputs = std::min(BLOCK_N, w.n - b * BLOCK_N);
    for_each_tile<F>(w, b, [&](f32x16* tile, const ScalesAndZeros& group, int64_t begin, int64_t end) {
      for (int64_t i = 0; i < LANES; i++) tile[i] = (tile[i] - group.zeros) * group.scales;
      transpose(tile);
      for (int64_t r = 0; r < n_outputs; r++) store_partial(tile[r], out + (b * BLOCK_N + r) * w.k, begin, end);
    });
  }
}
