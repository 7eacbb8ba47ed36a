// fused_linear, the operations that it can fuse (rms_norm, glu, add), permute_inputs, dequantize, and embed.
#pragma once

#include "amx.h"

// Computes out [m, n_out] = epilogue(norm(x [m, k]) W^T), in the order that kernels/ops.py gives for fused_linear.
//
// With an activation, W is a gate projection above an up projection, and out is activation(gate) * up. Each projection
// has n / 2 outputs, a multiple of BLOCK_N, so that a block of one never reaches into the other.
template <typename T> struct FusedLinearOp {
  const T* x;
  int64_t m;
  Weights w;
  const T *bias, *norm_weight;  // [n], [k], or null
  float eps;
  const T* residual;  // [m, n_out] or null
  Glu activation;
  float out_scale, softcap, clip;  // softcap, clip: 0 for none
  T* out;
  float* float32_out;  // if not null, replaces out

  bool is_on_amx() const { return uses_amx<T>(w, m); }
  ProductInput<T> input() const { return {x, m, w, norm_weight, eps, is_on_amx()}; }
  size_t shared_bytes() const { return input().shared_bytes(); }

  // The threads share out the blocks of outputs.
  void execute(char* shared, Barrier& barrier) const {
    const bool gated = is_gated(activation), on_amx = is_on_amx();
    const int64_t n_out = gated ? w.n / 2 : w.n;
    PreparedInput tokens[MAX_TOKENS];
    const char* tiles = input().prepare(shared, barrier, tokens);
    const Range range = thread_range((n_out + BLOCK_N - 1) / BLOCK_N);
    Outputs y[2];
    std::optional<TileRegisters> tile_registers;
    if (on_amx) tile_registers.emplace();
    for (int64_t block = range.begin, n_blocks; block < range.end; block += n_blocks) {
      n_blocks = gated ? 1 : std::min<int64_t>(2, range.end - block);  // of outputs
      const int64_t blocks[] = {block, gated ? block + n_out / BLOCK_N : block + 1};
      if (on_amx) dot_amx(m, w, blocks, gated ? 2 : n_blocks, tiles, y);
      else dot<T>(m, w, blocks, gated ? 2 : n_blocks, tokens, y);
      for (int64_t i = 0; i < m; i++)
        for (int64_t b = 0; b < n_blocks; b++)
          epilogue(finish_product(y, i, b, blocks, bias, w.n, activation), i, blocks[b], n_out);
    }
  }

  void epilogue(Vec v, int64_t token, int64_t block, int64_t n_out) const {
    if (out_scale != 1) v *= out_scale;
    if (softcap) v = apply_softcap(v, softcap);
    if (clip) v = clamp(v, clip);
    if (residual) v += load_partial(residual + token * n_out, block * BLOCK_N, n_out);
    if (float32_out) store_partial(v, float32_out + token * n_out, block * BLOCK_N, n_out);
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

  // The threads share out the elements. A thread that has some elements of a token sums up the squares of all of the
  // token, which is cheaper than another barrier.
  void execute(char*, Barrier&) const {
    const int64_t vecs_per_token = (k + LANES - 1) / LANES;
    const Range range = thread_range(m * vecs_per_token);
    float inverse_rms = 0;  // of the token
    for (int64_t task = range.begin; task < range.end; task++) {
      const int64_t token = task / vecs_per_token, i = task % vecs_per_token * LANES;
      if (i == 0 || task == range.begin) inverse_rms = ::inverse_rms(x + token * k, eps, k);
      Vec v = normed_vec(x + token * k, weight, inverse_rms, i, k);
      if (residual) v += load_partial(residual + token * k, i, k);
      store_partial(v, out + token * k, i, k);
    }
  }
};

// Computes out [m, n] from x [m, k]: element i of a token becomes element order[i] of the same token.
template <typename T> struct PermuteInputsOp {
  const T* x;
  int64_t m, k;
  const int32_t* order;  // [n]
  int64_t n;
  T* out;

  // The threads share out the elements, in pieces of LANES, so that no two threads write to one piece.
  void execute(char*, Barrier&) const {
    const Range range = thread_range((n + LANES - 1) / LANES);
    const int64_t begin = range.begin * LANES, end = std::min(n, range.end * LANES);
    for (int64_t token = 0; token < m; token++)
      for (int64_t i = begin; i < end; i++) out[token * n + i] = x[token * k + order[i]];
  }
};

// out [m, f] = activation(gate) * up, for gate_up [m, 2 f]
template <typename T> struct GluOp {
  const T* gate_up;
  int64_t m, f;
  Glu activation;
  T* out;

  void execute(char*, Barrier&) const {
    const int64_t vecs_per_token = (f + LANES - 1) / LANES;
    const Range range = thread_range(m * vecs_per_token);
    for (int64_t task = range.begin; task < range.end; task++) {
      const int64_t token = task / vecs_per_token, i = task % vecs_per_token * LANES;
      const T *gate = gate_up + token * 2 * f, *up = gate + f;
      store_partial(activate(load_partial(gate, i, f), load_partial(up, i, f), activation), out + token * f, i, f);
    }
  }
};

// out [n] = x [n] + y [n]
template <typename T> struct AddOp {
  const T *x, *y;
  int64_t n;
  T* out;

  void execute(char*, Barrier&) const {
    const Range range = thread_range((n + LANES - 1) / LANES);
    for (int64_t i = range.begin * LANES; i < range.end * LANES; i += LANES)
      store_partial(load_partial(x, i, n) + load_partial(y, i, n), out, i, n);
  }
};

// Unpacks a line of a block to inputs [F::PER_WORD, 16 outputs].
template <typename F> void line_to_inputs(F, const char* line, Vec* out) {
  const IntVec words = load<IntVec>(line);
  for (int j = 0; j < F::PER_WORD; j++) out[j] = as_float(F::element(words, j));
}
inline void line_to_inputs(Float8, const char* line, Vec* out) { float8_to_inputs(load<IntVec>(line), out); }

// Computes out [k] = one row of the matrix. The words of 16 rows, one of them this, lie side by side in the lines.
template <typename F, typename T> void dequantize_row(const Weights& w, int64_t row, T* out) {
  const int64_t block = row / BLOCK_N, lane = row % BLOCK_N;
  const char* line = w.block_data(block);
  for (int64_t begin = 0, end, group = block * w.n_groups; begin < w.k; begin = end, group++) {
    end = std::min(w.k, begin + w.group_size);
    const auto [group_scale, zero] = F::scales_and_zeros(w, group);
    const Vec scale = group_scale * F::output_scales(w, block);
    for (int64_t k = begin; k < end; k += LANES) {
      Vec values = {};
      for (int64_t i = 0; i < LANES && k + i < end; i += F::PER_WORD, line += 64) {
        Vec inputs[F::PER_WORD];
        line_to_inputs(F{}, line, inputs);
        for (int64_t j = 0; j < F::PER_WORD; j++) values[i + j] = inputs[j][lane];
      }
      store_partial((values - zero[lane]) * scale[lane], out, k, end);
    }
  }
}

// out [m, w.k] = the rows of W [vocab_size, dim] at tokens [m], times scale
template <typename T> struct EmbedOp {
  const int64_t* tokens;
  int64_t m;
  Weights w;
  float scale;
  T* out;

  const char* error() const {
    for (int64_t i = 0; i < m; i++)
      if (tokens[i] < 0 || tokens[i] >= w.n) return "a token is not in the vocabulary";
    return nullptr;
  }
  void execute(char*, Barrier&) const {
    const Range range = thread_range(m);
    for (int64_t i = range.begin; i < range.end; i++) {
      T* to = out + i * w.k;
      const T* from = to;
      dispatch_format(w.format, [&]<typename F>(F) {
        if constexpr (std::is_same_v<F, Dense>) from = reinterpret_cast<const T*>(w.data) + tokens[i] * w.k;
        else dequantize_row<F>(w, tokens[i], to);
      });
      if (from == to && scale == 1) continue;
      for (int64_t j = 0; j < w.k; j += LANES) store_partial(load_partial(from, j, w.k) * scale, to, j, w.k);
    }
  }
};

// Computes out [n, k] = the matrix that weights of packed format F stand for. Serves prefill, so no tape records it.
//
// A line holds a few inputs of 16 outputs, but a row of out is one output. So 16 inputs at a time, a Vec each, are
// transposed: then each Vec is a piece of a row.
template <typename F, typename T> void dequantize_to(const Weights& w, T* out) {
#pragma omp parallel for num_threads(torch::stable::get_num_threads())
  for (int64_t b = 0; b < w.n_blocks(); b++) {
    const char* line = w.block_data(b);
    const int64_t n_outputs = std::min(BLOCK_N, w.n - b * BLOCK_N);
    for (int64_t begin = 0, end, group = b * w.n_groups; begin < w.k; begin = end, group++) {
      end = std::min(w.k, begin + w.group_size);
      const auto [group_scale, zero] = F::scales_and_zeros(w, group);
      const Vec scale = group_scale * F::output_scales(w, b);
      for (int64_t k = begin; k < end; k += LANES) {
        Vec tile[LANES] = {};
        for (int64_t i = 0; i < LANES && k + i < end; i += F::PER_WORD, line += 64) line_to_inputs(F{}, line, tile + i);
        for (Vec& inputs : tile) inputs = (inputs - zero) * scale;
        transpose(tile);
        for (int64_t r = 0; r < n_outputs; r++) store_partial(tile[r], out + (b * BLOCK_N + r) * w.k, k, end);
      }
    }
  }
}
