// The operation rope_and_cache: norms and rotates the new queries and keys, and writes the new keys and values into the
// cache. It is phase 1 of attend. Where PyTorch computes the attention, it is an operation of its own.
//
//     qkv of a token    [q heads | k heads | v heads]
//                           |         |         |
//                         norm      norm        |         if the model has norms of q and k
//                         RoPE      RoPE        |
//                           |         |         |
//                           q      k_cache   v_cache      at the token's position
#pragma once

#include "prologue.h"

// Applies RoPE: rotates each pair (x[i], x[i + d / 2]) of x [d] by cos_sin [d / 2, 2] (cos, sin). out [d] may be x.
template <typename T> void apply_rope(const T* x, const float* cos_sin, int64_t d, T* out) {
  for (int64_t i = 0; i < d / 2; i += LANES) {
    const f32x16 lo = load_partial(cos_sin, 2 * i, d), hi = load_partial(cos_sin, 2 * i + LANES, d);
    const f32x16 cos = even_lanes(lo, hi), sin = odd_lanes(lo, hi);
    const f32x16 a = load_partial(x, i, d / 2), b = load_partial(x + d / 2, i, d / 2);
    store_partial(a * cos - b * sin, out, i, d / 2);
    store_partial(b * cos + a * sin, out + d / 2, i, d / 2);
  }
}

// A task is a head of a token. The threads share the tasks.
template <typename T> struct RopeAndCacheOp {
  const T* qkv;                            // [batch, query_len, n_heads + 2 n_kv_heads, head_dim]
  const int64_t* start_pos;                // [batch]: the position of each sequence's first new token
  T *k_cache, *v_cache;                    // [batch, n_kv_heads, max_seq_len, head_dim]
  int64_t batch_stride, head_stride;       // of k_cache and v_cache
  const float* cos_sin;                    // [max_seq_len or more, head_dim / 2, 2]
  const T *q_norm_weight, *k_norm_weight;  // [head_dim] or null
  bool norms_all_heads;                    // norm all heads together; weights [n_heads or n_kv_heads, head_dim]
  float eps;
  int64_t batch, query_len, n_heads, n_kv_heads, head_dim;
  int64_t max_seq_len;  // the length of the cache
  T* q;                 // [batch, query_len, n_heads, head_dim]

  const char* validate() const {
    for (int64_t b = 0; b < batch; b++)
      if (start_pos[b] < 0 || start_pos[b] + query_len > max_seq_len)
        return "the cache has no room for these positions";
    return nullptr;
  }

  T* cached(T* cache, int64_t b, int64_t kv_head, int64_t position) const {
    return cache + b * batch_stride + kv_head * head_stride + position * head_dim;
  }

  void execute(char*, Barrier&) const {
    const int64_t d = head_dim, all_heads = n_heads + 2 * n_kv_heads;  // q, k, v
    const Range range = thread_range(batch * query_len * all_heads);
    float rms_scale = 0;  // 1 / rms of this head, or of all heads of the token's q or k
    for (int64_t i = range.begin; i < range.end; i++) {
      const int64_t head = i % all_heads, token = i / all_heads, b = token / query_len;
      const int64_t position = start_pos[b] + token % query_len;
      const T* x = qkv + i * d;
      T* out;
      if (head < n_heads) {
        out = q + (token * n_heads + head) * d;
      } else if (head < n_heads + n_kv_heads) {
        out = cached(k_cache, b, head - n_heads, position);
      } else {
        std::memcpy(cached(v_cache, b, head - n_heads - n_kv_heads, position), x, d * sizeof(T));
        continue;
      }
      if (const T* norm_weight = head < n_heads ? q_norm_weight : k_norm_weight) {
        const int64_t first = head < n_heads ? 0 : n_heads, n = head < n_heads ? n_heads : n_kv_heads;  // of q or k
        if (!norms_all_heads) rms_scale = inverse_rms(x, eps, d);
        else if (head == first || i == range.begin) rms_scale = inverse_rms(x - (head - first) * d, eps, n * d);
        x = apply_norm(x, norm_weight + (norms_all_heads ? (head - first) * d : 0), rms_scale, d, out);
      }
      apply_rope(x, cos_sin + position * d, d, out);
    }
  }
};
