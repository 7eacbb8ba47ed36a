// The operations around a matrix: linear, what it fuses on its own (glu, add), embed and dequantize.
#pragma once

#include "dot.h"

// out [m, n] = [residual +] [activation] ([rms_norm] x [m, k] W^T [+ bias])
template <typename T> struct LinearOp {
  const T* x;
  int64_t m;
  Weights w;
  const T *bias, *norm;
  float eps;
  const T* residual;
  int64_t activation;  // with one, W is gate over up, each of n / 2 rows, a multiple of 16
  T* out;
  float* wide_out;  // in place of out

  void execute(char*, Barrier&) const {
    const int64_t n_out = activation ? w.n / 2 : w.n;
    PreparedRow rows[MAX_ROWS];
    prepare_rows(x, m, w, norm, eps, rows);
    const Share share = my_share((n_out + BLOCK_N - 1) / BLOCK_N);
    Vec y[2][MAX_ROWS];
    for (int64_t block = share.begin, step; block < share.end; block += step) {
      step = activation ? 1 : std::min<int64_t>(2, share.end - block);
      const int64_t blocks[] = {block, activation ? block + n_out / BLOCK_N : block + 1};
      dot<T>(m, w, blocks, activation ? 2 : step, rows, y);
      for (int64_t i = 0; i < m; i++) {
        if (activation) {
          const Vec gate = with_bias(y[0][i], blocks[0]), up = with_bias(y[1][i], blocks[1]);
          store(activate(gate, activation) * up, i, block, n_out);
        } else {
          for (int64_t j = 0; j < step; j++) store(with_bias(y[j][i], blocks[j]), i, blocks[j], n_out);
        }
      }
    }
  }

  Vec with_bias(Vec v, int64_t block) const { return bias ? v + load_partial(bias, block * BLOCK_N, w.n) : v; }

  void store(Vec v, int64_t row, int64_t block, int64_t n_out) const {
    if (residual) v += load_partial(residual + row * n_out, block * BLOCK_N, n_out);
    if (wide_out) store_partial(v, wide_out + row * n_out, block * BLOCK_N, n_out);
    else store_partial(v, out + row * n_out, block * BLOCK_N, n_out);
  }
};

// out [m, f] = activation(gate) * up of gate_up [m, 2 f]
template <typename T> struct GluOp {
  const T* gate_up;
  int64_t m, f, activation;
  T* out;

  void execute(char*, Barrier&) const {
    const int64_t n_blocks = (f + LANES - 1) / LANES;
    const Share share = my_share(m * n_blocks);
    for (int64_t i = share.begin; i < share.end; i++) {
      const int64_t row = i / n_blocks, first = i % n_blocks * LANES;
      const T* gate = gate_up + row * 2 * f;
      store_partial(activate(load_partial(gate, first, f), activation) * load_partial(gate + f, first, f), out + row * f, first, f);
    }
  }
};

// out [n] = x + y
template <typename T> struct AddOp {
  const T *x, *y;
  int64_t n;
  T* out;

  void execute(char*, Barrier&) const {
    const Share share = my_share((n + LANES - 1) / LANES);
    for (int64_t i = share.begin * LANES; i < std::min(n, share.end * LANES); i += LANES)
      store_partial(load_partial(x, i, n) + load_partial(y, i, n), out, i, n);
  }
};

// out [m, dim] = the rows of weight [n_rows, dim] that tokens [m] name
template <typename T> struct EmbedOp {
  const int64_t* tokens;
  int64_t m;
  const T* weight;
  int64_t n_rows, dim;
  T* out;

  const char* error() const {
    for (int64_t i = 0; i < m; i++)
      if (tokens[i] < 0 || tokens[i] >= n_rows) return "a token is not in the vocabulary";
    return nullptr;
  }
  void execute(char*, Barrier&) const {
    const Share share = my_share(m);
    for (int64_t i = share.begin; i < share.end; i++) std::memcpy(out + i * dim, weight + tokens[i] * dim, dim * sizeof(T));
  }
};

// out = (q - zero) * scale for the elements of one row in n_words of a block's words
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

// out [n, k] = the matrix that packed weights stand for. For prefill, so it is no operation of a tape.
template <typename T> void dequantize_to(const Weights& w, T* out) {
  const bool int4 = w.kind == Weights::INT4;
  const auto dequantize_row = int4 ? dequantize_words<true> : dequantize_words<false>;
  const int64_t word = int4 ? 8 : 4, group_size = int4 ? w.group_size : w.k;  // in elements
  constexpr int64_t LINE = 64 / sizeof(T);
#pragma omp parallel for num_threads(threads())
  for (int64_t b = 0; b < w.n_blocks(); b++) {
    const char* data = w.data + b * BLOCK_N * w.k / (int4 ? 2 : 1);
    const int64_t n_rows = std::min(BLOCK_N, w.n - b * BLOCK_N);
    int64_t index = b * w.n_groups() * BLOCK_N;  // of the group's scales and zeros
    for (int64_t k = 0; k < w.k; index += BLOCK_N) {
      float scale[BLOCK_N], zero[BLOCK_N], values[LINE];
      for (int64_t r = 0; r < n_rows; r++) {
        scale[r] = int4 ? to_float(bf16{w.scales[index + r]}) : w.row_scales[b * BLOCK_N + r];
        zero[r] = int4 ? w.zeros[index + r] / 16.0f : 128;
      }
      for (const int64_t end = std::min(w.k, k + group_size); k < end;) {
        const int64_t n = std::min(LINE, end - k);  // a cache line of out at a time
        for (int64_t r = 0; r < n_rows; r++) {
          dequantize_row(data + 4 * r, n / word, scale[r], zero[r], values);
          T* row = out + (b * BLOCK_N + r) * w.k + k;
          for (int64_t i = 0; i < n; i += LANES) store_partial(load_vec(values + i), row, i, n);
        }
        data += 64 * (n / word), k += n;
      }
    }
  }
}
