// The operation attend for more than MAX_CPU_TOKENS new tokens, as in a prefill. The algorithm is FlashAttention-2:
//
//     task     a block of new tokens of a key/value head: its rows are (token, query head) pairs
//     tile     KEY_TILE keys and values; the thread packs them once for all rows of the task
//
//     for each tile:                                            [rows, KEY_TILE]
//         for MR rows at a time:
//             scores  =  q k^T                                  [MR, KEY_TILE]
//             p       =  2^(scores log2(e) - m_i); acc, l_i and m_i are rescaled if the maximum m_i has grown
//             acc    +=  p v                                    [MR, head_dim]
//     out = acc / l_i
//
// The time depends on the number of keys that the tokens see. PyTorch computes the scores of all keys up to the last
// token, and masks those that a token does not see. It skips them only if the sequence begins with the new tokens.
//
// With registers of 64 bytes these loops are 2 to 4 times as fast as PyTorch (docs/measurements.md). On other CPUs,
// PyTorch computes prefill.
#pragma once

#include "attention.h"
#include "microkernel.h"

constexpr int64_t KEY_TILE = 64;
constexpr int64_t TASK_ROWS = 192;  // about the number of rows of a task

// ---- Packing --------------------------------------------------------------------------------------------------------
//
// microkernel.h draws the packed layout.

// Returns pairs i to i + 15 of x [d]. Pairs beyond the end are zeros.
template <typename T> inline u32x16 load_pairs(const T* x, int64_t i, int64_t d) {
  if constexpr (VNNI_SIZE<T> == 1) return (u32x16)load_partial(x, i, d);
  u32x16 pairs = {};
  std::memcpy(&pairs, x + 2 * i, std::clamp<int64_t>(d - 2 * i, 0, 32) * sizeof(T));
  return pairs;
}

// Stores p [16] as pairs.
template <typename T> inline void store_pairs(f32x16 p, VnniPair* out) {
#if defined(__AVX512BF16__)
  if constexpr (VNNI_SIZE<T> == 2) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)p);
    std::memcpy(out, &rounded, sizeof rounded);
    return;
  }
#endif
  store_vec(p, reinterpret_cast<float*>(out));
}

// Packs keys k [n, d], n <= KEY_TILE: out [n_pairs, KEY_TILE]. The other keys become zeros.
template <typename T> void pack_keys(const T* k, int64_t n, int64_t d, int64_t n_pairs, VnniPair* out) {
  for (int64_t key = 0; key < KEY_TILE; key += LANES)
    for (int64_t i = 0; i < n_pairs; i += LANES) {
      u32x16 pairs[LANES] = {};
      for (int64_t r = 0; r < std::min(LANES, n - key); r++) pairs[r] = load_pairs(k + (key + r) * d, i, d);
      transpose(pairs);
      for (int64_t r = 0; r < LANES; r++) std::memcpy(out + (i + r) * KEY_TILE + key, &pairs[r], sizeof pairs[r]);
    }
}

// Packs values v [n, d], n <= KEY_TILE: out [KEY_TILE / VNNI_SIZE, width]. The other values become zeros.
template <typename T> void pack_values(const T* v, int64_t n, int64_t d, int64_t width, VnniPair* out) {
  const auto bits = [&](int64_t key, int64_t column) {
    return key < n ? (u32x16)load_partial(v + key * d, column, d) : u32x16{};
  };
  for (int64_t key = 0; key < KEY_TILE; key += VNNI_SIZE<T>, out += width)
    for (int64_t column = 0; column < width; column += LANES) {
      u32x16 pairs = bits(key, column);
      // A bf16 is the upper half of a float
      if constexpr (VNNI_SIZE<T> == 2) pairs = pairs >> 16 | bits(key + 1, column);
      std::memcpy(out + column, &pairs, sizeof pairs);
    }
}

// ---- The operation --------------------------------------------------------------------------------------------------

template <typename T> struct PrefillAttendOp : AttendOp<T> {
  using Base = AttendOp<T>;
  using Base::batch, Base::query_len, Base::n_heads, Base::n_kv_heads, Base::head_dim, Base::start_pos, Base::cached;
  using Base::window, Base::heads_per_kv_head;

  int64_t block_tokens() const { return std::clamp<int64_t>(TASK_ROWS / heads_per_kv_head(), 8, 64); }
  int64_t query_pairs() const { return round_up(divide_up(head_dim, VNNI_SIZE<T>), LANES); }
  int64_t width() const { return round_up(head_dim, NR); }  // of acc and of packed values

  // The memory that all threads share holds q [batch, query_len, n_heads, head_dim].
  size_t shared_bytes() const { return batch * query_len * n_heads * head_dim * sizeof(T); }

  void execute(char* memory, Barrier& barrier) const {
    T* q = reinterpret_cast<T*>(memory);
    this->rope_and_cache(q, barrier);
    // The threads take the tasks in turns, because later blocks of tokens see more keys and take longer.
    const int64_t n_blocks = divide_up(query_len, block_tokens()), n_caches = batch * n_kv_heads;
    for (int64_t i = omp_get_thread_num(); i < n_blocks * n_caches; i += omp_get_num_threads())
      attend_block(q, i % n_caches / n_kv_heads, i % n_kv_heads, i / n_caches);
  }

  // The rows of a task. Row r has token r / heads_per_kv_head of the block, and query head r % heads_per_kv_head of
  // kv_head. Rows from n_rows on, up to a multiple of MR, are padding.
  struct Rows {
    int64_t b, kv_head, first_token, n_rows;
    bool is_scale_only;  // whether the scores of all rows are scale * (q . k)
  };
  // Scratch memory of a thread.
  struct Buffers {
    VnniPair *q, *k, *v;    // [rows, query_pairs], [query_pairs, KEY_TILE], [KEY_TILE / VNNI_SIZE, width]
    float* acc;             // [rows, width]
    SoftmaxState* softmax;  // [rows]
  };

  void attend_block(const T* q, int64_t b, int64_t kv_head, int64_t block) const {
    const int64_t first_token = block * block_tokens(), end_token = std::min(query_len, first_token + block_tokens());
    const Rows rows{b, kv_head, first_token, (end_token - first_token) * heads_per_kv_head(), is_scale_only(kv_head)};
    const Buffers buffers = allocate(round_up(rows.n_rows, MR));
    for (int64_t row = 0; row < round_up(rows.n_rows, MR); row++) {
      for (int64_t i = 0; i < query_pairs(); i += LANES) {
        const u32x16 pairs = row < rows.n_rows ? load_pairs(q + offset(rows, row), i, head_dim) : u32x16{};
        std::memcpy(buffers.q + row * query_pairs() + i, &pairs, sizeof pairs);
      }
      std::fill_n(buffers.acc + row * width(), width(), 0.0f);
      buffers.softmax[row] = {NEGATIVE_INFINITY, 0};
    }
    const int64_t end_key = start_pos[b] + end_token;
    for (int64_t key = this->first_key_of(start_pos[b] + first_token); key < end_key; key += KEY_TILE) {
      const int64_t n = std::min(KEY_TILE, end_key - key);
      pack_keys(cached(this->k_cache, b, kv_head, key), n, head_dim, query_pairs(), buffers.k);
      pack_values(cached(this->v_cache, b, kv_head, key), n, head_dim, width(), buffers.v);
      for (int64_t row = 0; row < rows.n_rows; row += MR) attend_to_tile(rows, row, key, buffers);
    }
    for (int64_t row = 0; row < rows.n_rows; row++) write_output(rows, row, buffers);
  }

  Buffers allocate(int64_t n_rows) const {
    static thread_local Scratch pairs, floats, softmax;
    const int64_t q_size = n_rows * query_pairs(), k_size = query_pairs() * KEY_TILE;
    VnniPair* q = pairs.at_least<VnniPair>(q_size + k_size + KEY_TILE / VNNI_SIZE<T> * width());
    return {q, q + q_size, q + q_size + k_size, floats.at_least<float>(n_rows * width()),
            softmax.at_least<SoftmaxState>(n_rows)};
  }

  int64_t token(const Rows& rows, int64_t row) const { return rows.first_token + row / heads_per_kv_head(); }
  int64_t head(const Rows& rows, int64_t row) const {
    return rows.kv_head * heads_per_kv_head() + row % heads_per_kv_head();
  }
  int64_t position(const Rows& rows, int64_t row) const { return start_pos[rows.b] + token(rows, row); }
  // Returns where the query of row is in q, and the output in out.
  int64_t offset(const Rows& rows, int64_t row) const {
    return ((rows.b * query_len + token(rows, row)) * n_heads + head(rows, row)) * head_dim;
  }

  // The keys of a tile that a row sees, from begin to end. The tile starts at key.
  Range visible_keys(const Rows& rows, int64_t row, int64_t key) const {
    if (row >= rows.n_rows) return {0, 0};
    const int64_t n_seen = position(rows, row) + 1 - key;  // keys from the tile's first to the row's own
    return {window ? std::max<int64_t>(0, n_seen - window) : 0, std::min(KEY_TILE, n_seen)};
  }

  bool is_scale_only(int64_t kv_head) const {
    for (int64_t h = 0; h < heads_per_kv_head(); h++)
      if (!this->score_mod_of(kv_head * heads_per_kv_head() + h).is_scale_only()) return false;
    return true;
  }

  // Attends from MR rows to the tile of keys that starts at key.
  void attend_to_tile(const Rows& rows, int64_t row, int64_t key, const Buffers& buffers) const {
    Range visible[MR];
    bool any_visible = false;
    for (int64_t r = 0; r < MR; r++) {
      visible[r] = visible_keys(rows, row + r, key);
      any_visible |= visible[r].begin < visible[r].end;
    }
    if (!any_visible) return;
    alignas(64) float scores[MR][KEY_TILE];
    alignas(64) VnniPair p[MR][KEY_TILE / VNNI_SIZE<T>];
    microkernel<T, false>(buffers.q + row * query_pairs(), query_pairs(), buffers.k, KEY_TILE, LANES,
                          query_pairs(), scores[0], KEY_TILE);
    for (int64_t r = 0; r < MR; r++) {
      if (!rows.is_scale_only) modify_scores(rows, row + r, key, scores[r]);
      if (visible[r].begin > 0 || visible[r].end < KEY_TILE) mask_row(visible[r], scores[r]);
    }
    // Each step for all rows, because the steps of a single row wait for each other.
    float* const acc = buffers.acc + row * width();
    SoftmaxState* const softmax = buffers.softmax + row;
    const float exponent_scale = this->exponent_scale(rows);
    for (int64_t r = 0; r < MR; r++)
      if (visible[r].begin < visible[r].end) raise_maximum(scores[r], exponent_scale, softmax[r], acc + r * width());
    for (int64_t r = 0; r < MR; r++)
      if (visible[r].begin < visible[r].end)
        softmax[r].l_i += exponentiate(scores[r], KEY_TILE, exponent_scale, softmax[r].m_i, [&](f32x16 x, int64_t i) {
          store_pairs<T>(x, p[r] + i / VNNI_SIZE<T>);
        });
      else std::memset(p[r], 0, sizeof p[r]);
    for (int64_t column = 0; column < width(); column += NR)
      microkernel<T, true>(p[0], KEY_TILE / VNNI_SIZE<T>, buffers.v + column, width(), LANES,
                           KEY_TILE / VNNI_SIZE<T>, acc + column, width());
  }

  // score * exponent_scale is the exponent of a softmax with base 2, and SoftmaxState::m_i is the maximum of these
  // exponents. If is_scale_only, a score is q k^T without the scale. Otherwise modify_scores has applied it.
  float exponent_scale(const Rows& rows) const { return LOG2_E * (rows.is_scale_only ? this->score_mod.scale : 1.0f); }

  void modify_scores(const Rows& rows, int64_t row, int64_t key, float* scores) const {
    const ScoreMod mod = this->score_mod_of(head(rows, std::min(row, rows.n_rows - 1)));
    const float distance = key - position(rows, row);  // of the tile's first key
    for (int64_t i = 0; i < KEY_TILE; i += LANES)
      store_vec(apply_score_mod(load_vec(scores + i), mod, IOTA + (distance + i)), scores + i);
  }

  static void mask_row(Range visible, float* scores) {
    for (int64_t i = 0; i < KEY_TILE; i += LANES) {
      const f32x16 index = IOTA + float(i);
      const auto is_visible = (index >= float(visible.begin)) & (index < float(visible.end));
      store_vec(is_visible ? load_vec(scores + i) : f32x16{} + NEGATIVE_INFINITY, scores + i);
    }
  }

  // If the scores raise the maximum m_i, rescales l_i and acc.
  void raise_maximum(const float* scores, float exponent_scale, SoftmaxState& softmax, float* acc) const {
    const float m_i = largest_score(scores) * exponent_scale;
    if (m_i <= softmax.m_i) return;
    const float alpha = exp2_vec(f32x16{} + (softmax.m_i - m_i))[0];
    softmax = {m_i, softmax.l_i * alpha};
    for (int64_t i = 0; i < width(); i += LANES) store_vec(load_vec(acc + i) * alpha, acc + i);
  }

  static float largest_score(const float* scores) {
    f32x16 max = load_vec(scores);
    for (int64_t i = LANES; i < KEY_TILE; i += LANES) max = max_vec(load_vec(scores + i), max);
    return max_lane(max);
  }

  void write_output(const Rows& rows, int64_t row, const Buffers& buffers) const {
    float scale;
    combine_softmaxes(&buffers.softmax[row], 1, 1, this->sink(head(rows, row)), &scale);
    T* out = this->out + offset(rows, row);
    for (int64_t i = 0; i < head_dim; i += LANES)
      store_partial(load_vec(buffers.acc + row * width() + i) * scale, out, i, head_dim);
  }
};
