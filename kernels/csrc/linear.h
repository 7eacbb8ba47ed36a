// linear, the operations that it can fuse (rms_norm, glu, add), embed, and dequantize.
#pragma once

#include "tiles.h"

// out [m, n_out] = [residual +] [clip] [cap] scale * [activation] ([rms_norm] x [m, k] W^T [+ bias])
//
// With an activation, W is a gate projection above an up projection, and out is activation(gate) * up. Each has n / 2
// rows, a multiple of BLOCK_N, so that a block of one never reaches into the other.
template <typename T> struct LinearOp {
  const T* x;
  int64_t m;
  Weights w;
  const T *bias, *norm;  // [n], [k], or null
  float eps;
  const T* residual;  // [m, n_out] or null
  int64_t activation;
  float scale, softcap, clip;  // softcap, clip: 0 for none
  T* out;
  float* float32_out;  // if not null, replaces out

  Activations<T> activations() const { return {x, m, w, norm, eps, uses_tiles<T>(w, m)}; }
  size_t shared_bytes() const { return activations().shared_bytes(); }

  // The threads share out the blocks of outputs.
  void execute(char* shared, Barrier& barrier) const {
    const int64_t n_out = activation ? w.n / 2 : w.n;
    PreparedRow rows[MAX_TOKENS];
    activations().prepare(shared, barrier, rows);
    const Share share = my_share((n_out + BLOCK_N - 1) / BLOCK_N);
    Outputs y[2];
    const bool tiled = uses_tiles<T>(w, m);
    std::optional<TileRegisters> tile_registers;
    if (tiled) tile_registers.emplace();
    for (int64_t block = share.begin, n_blocks; block < share.end; block += n_blocks) {
      n_blocks = activation ? 1 : std::min<int64_t>(2, share.end - block);  // of outputs
      const int64_t blocks[] = {block, activation ? block + n_out / BLOCK_N : block + 1};
      if (tiled) dot_tiles(m, w, blocks, activation ? 2 : n_blocks, rows[0], y);
      else dot<T>(m, w, blocks, activation ? 2 : n_blocks, rows, y);
      for (int64_t i = 0; i < m; i++)
        for (int64_t b = 0; b < n_blocks; b++) {
          Vec v = add_bias(y[b][i], bias, blocks[b], w.n);
          if (activation) v = activate(v, add_bias(y[1][i], bias, blocks[1], w.n), activation);
          store(v, i, blocks[b], n_out);
        }
    }
  }

  void store(Vec v, int64_t row, int64_t block, int64_t n_out) const {
    if (scale != 1) v *= scale;
    if (softcap) v = cap(v, softcap);
    if (clip) v = clamp(v, clip);
    if (residual) v += load_partial(residual + row * n_out, block * BLOCK_N, n_out);
    if (float32_out) store_partial(v, float32_out + row * n_out, block * BLOCK_N, n_out);
    else store_partial(v, out + row * n_out, block * BLOCK_N, n_out);
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

  // The threads share out the elements. Whoever has a part of a row sums up its squares, which is cheaper than another
  // barrier.
  void execute(char*, Barrier&) const {
    const int64_t vecs_per_row = (k + LANES - 1) / LANES;
    const Share share = my_share(m * vecs_per_row);
    float scale = 0;  // 1 / rms of the row
    for (int64_t task = share.begin; task < share.end; task++) {
      const int64_t row = task / vecs_per_row, i = task % vecs_per_row * LANES;
      if (i == 0 || task == share.begin) scale = inverse_rms(x + row * k, eps, k);
      Vec v = normed_vec(x + row * k, weight, scale, i, k);
      if (residual) v += load_partial(residual + row * k, i, k);
      store_partial(v, out + row * k, i, k);
    }
  }
};

// out [m, f] = activation(gate) * up, for gate_up [m, 2 f]
template <typename T> struct GluOp {
  const T* gate_up;
  int64_t m, f, activation;
  T* out;

  void execute(char*, Barrier&) const {
    const int64_t vecs_per_row = (f + LANES - 1) / LANES;
    const Share share = my_share(m * vecs_per_row);
    for (int64_t task = share.begin; task < share.end; task++) {
      const int64_t row = task / vecs_per_row, i = task % vecs_per_row * LANES;
      const T *gate = gate_up + row * 2 * f, *up = gate + f;
      store_partial(activate(load_partial(gate, i, f), load_partial(up, i, f), activation), out + row * f, i, f);
    }
  }
};

// out [n] = x [n] + y [n]
template <typename T> struct AddOp {
  const T *x, *y;
  int64_t n;
  T* out;

  void execute(char*, Barrier&) const {
    const Share share = my_share((n + LANES - 1) / LANES);
    for (int64_t i = share.begin * LANES; i < share.end * LANES; i += LANES)
      store_partial(load_partial(x, i, n) + load_partial(y, i, n), out, i, n);
  }
};

// out [m, dim] = the rows of weight [vocab_size, dim] for tokens [m], times scale
template <typename T> struct EmbedOp {
  const int64_t* tokens;
  int64_t m;
  const T* weight;
  int64_t vocab_size, dim;
  float scale;
  T* out;

  const char* error() const {
    for (int64_t i = 0; i < m; i++)
      if (tokens[i] < 0 || tokens[i] >= vocab_size) return "a token is not in the vocabulary";
    return nullptr;
  }
  void execute(char*, Barrier&) const {
    const Share share = my_share(m);
    for (int64_t i = share.begin; i < share.end; i++) {
      const T* from = weight + tokens[i] * dim;
      T* to = out + i * dim;
      for (int64_t j = 0; j < dim; j += LANES) store_partial(load_partial(from, j, dim) * scale, to, j, dim);
    }
  }
};

// out = (q - zero) * scale for n_words words of one row of a block. words: the row's first, in a block's packed layout.
template <bool INT4> void dequantize_words(const char* words, int64_t n_words, float scale, float zero, float* out) {
  for (int64_t word = 0; word < n_words; word++)
#pragma GCC unroll 1  // compiles in a third of the time
    for (int64_t j = 0; j < 4; j++) {
      const uint8_t byte = words[64 * word + j];
      if constexpr (INT4) {
        out[8 * word + j] = ((byte & 15) - zero) * scale;
        out[8 * word + j + 4] = ((byte >> 4) - zero) * scale;
      } else {
        out[4 * word + j] = (byte - zero) * scale;
      }
    }
}

// out [n, k] = the matrix that packed INT8 or INT4 weights stand for. For prefill, so it is not recorded on a tape.
template <typename T> void dequantize_to(const Weights& w, T* out) {
  const bool int4 = w.kind == Weights::INT4;
  const auto dequantize_row = int4 ? dequantize_words<true> : dequantize_words<false>;
  const int64_t per_word = 32 / w.bits;     // elements
  constexpr int64_t LINE = 64 / sizeof(T);  // elements of a cache line; one line of each row is written at a time
#pragma omp parallel for num_threads(torch::stable::get_num_threads())
  for (int64_t b = 0; b < w.n_blocks(); b++) {
    const char* data = w.block_data(b);
    const int64_t n_rows = std::min(BLOCK_N, w.n - b * BLOCK_N);
    int64_t index = b * w.n_groups() * BLOCK_N;  // of the group's scales and zeros
    for (int64_t k = 0; k < w.k; index += BLOCK_N) {
      const Vec scale = int4 ? load_vec(w.scales + index) : row_scales(w, b);
      const Vec zero = int4 ? load_vec(w.zeros + index) * (1 / 16.0f) : Vec{} + 128;
      for (const int64_t end = std::min(w.k, k + w.group_size); k < end;) {
        const int64_t n = std::min(LINE, end - k);
        for (int64_t r = 0; r < n_rows; r++) {
          float values[LINE];
          dequantize_row(data + 4 * r, n / per_word, scale[r], zero[r], values);
          T* row = out + (b * BLOCK_N + r) * w.k + k;
          for (int64_t i = 0; i < n; i += LANES) store_partial(load_vec(values + i), row, i, n);
        }
        data += 64 * (n / per_word), k += n;
      }
    }
  }
}
