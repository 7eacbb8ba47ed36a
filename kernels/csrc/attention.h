// attend: q/k norm, RoPE, cache write, and softmax(q k^T / sqrt(D)) v over what is in the cache.
//
// Three phases with a barrier between them. The threads share out
//   1. the new tokens' heads: rotate q into shared memory, k and v into the cache;
//   2. the cache, in chunks of KV_CHUNK keys of one key/value head: partial outputs, with their softmax's maximum and sum;
//   3. the query heads: put the chunks' partial outputs together.
// Every row of the batch has its own position, read when this is executed: a step costs what is in the cache, not what
// would fit.
#pragma once

#include <limits>

#include "weights.h"

constexpr int64_t KV_CHUNK = 256;
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

// One head's vector x [d] -> out: [normed,] then rotated by rope [d / 2, 2] (cos, sin), element i paired with i + d / 2.
template <typename T> void norm_and_rotate(const T* x, const T* norm, float eps, const float* rope, int64_t d, float* out) {
  float total = 0;
  for (int64_t i = 0; i < d; i++) out[i] = to_float(x[i]), total += out[i] * out[i];
  if (norm) {
    const float scale = 1 / std::sqrt(total / d + eps);
    for (int64_t i = 0; i < d; i++) {
      T rounded;  // in the same places as the reference
      from_float(out[i] * scale, &rounded);
      from_float(to_float(rounded) * to_float(norm[i]), &rounded);
      out[i] = to_float(rounded);
    }
  }
  for (int64_t i = 0; i < d / 2; i++) {
    const float a = out[i], b = out[i + d / 2], cos = rope[2 * i], sin = rope[2 * i + 1];
    out[i] = a * cos - b * sin, out[i + d / 2] = b * cos + a * sin;
  }
}

// ---- One query against a chunk of keys -------------------------------------------------------------------------------

// q . k, both [D] and of one type, in sixteen partial sums
template <int64_t D> inline Vec dot_head(const auto* q, const auto* k) {
  Vec total = {};
  for (int64_t i = 0; i < D; i += LANES) total += load_vec(q + i) * load_vec(k + i);
  return total;
}
#if defined(__AVX512BF16__)
template <int64_t D> inline Vec dot_head(const bf16* q, const bf16* k) {
  Vec total = {};
  for (int64_t i = 0; i < D; i += 32)
    total = (Vec)_mm512_dpbf16_ps((__m512)total, load<__m512bh>(q + i), load<__m512bh>(k + i));
  return total;
}
#endif

template <typename T> inline void prefetch_row(const T* row, int64_t d) {
  for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

struct Softmax { float m, l; };  // the greatest score and the sum of exp(score - m), as Flash-Attention calls them

// scores = q . k / sqrt(d) for n keys [n, d], 16 at a time. D: d where it is known at compile time, or 0. Meanwhile
// prefetches one of every stride rows of next [n / stride, d], if it is not null.
template <int64_t D, typename T>
Vec score_keys(const T* q, const T* k, int64_t n, int64_t d, float* scores, const T* next, int64_t stride) {
  const float scale = 1 / std::sqrt(float(d));
  const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vec greatest = Vec{} + NEGATIVE_INFINITY;
  for (int64_t s = 0; s < n; s += LANES) {
    for (int64_t r = (s + stride - 1) / stride; next && r * stride < std::min(s + LANES, n); r++)
      prefetch_row(next + r * d, d);
    Vec score = {};
    if constexpr (D > 0) {
      Vec sums[LANES];
      for (int64_t r = 0; r < LANES; r++) sums[r] = dot_head<D>(q, k + std::min(s + r, n - 1) * D);
      score = sum_each(sums) * scale;
    } else {
      for (int64_t r = 0; r < std::min(LANES, n - s); r++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += to_float(q[i]) * to_float(k[(s + r) * d + i]);
        score[r] = sum * scale;
      }
    }
    score = lane < float(n - s) ? score : Vec{} + NEGATIVE_INFINITY;
    greatest = (score > greatest) | (score != score) ? score : greatest;  // NaN stays
    store_vec(score, scores + s);
  }
  return greatest;
}

// exp(score - the greatest) for n keys, in place of their scores
inline Softmax exponentiate(float* scores, int64_t n, Vec greatest) {
  const Vec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float m = NEGATIVE_INFINITY;
  for (int r = 0; r < LANES; r++) m = greatest[r] > m || greatest[r] != greatest[r] ? greatest[r] : m;
  Vec l = {};
  for (int64_t s = 0; s < n; s += LANES) {
    const Vec p = lane < float(n - s) ? exp_vec(load_vec(scores + s) - m) : Vec{};
    store_vec(p, scores + s);
    l += p;
  }
  return {m, sum(l)};
}

using Scores = float[KV_CHUNK];

// out [Q, D] = p [Q, n] . v [n, D]; prefetches next [n, D] if it is not null
template <int64_t D, int Q, typename T> void add_values(const Scores* p, const T* v, int64_t n, float* out, const T* next) {
  Vec sums[Q][D / LANES] = {};
  for (int64_t s = 0; s < n; s++) {
    if (next) prefetch_row(next + s * D, D);
    for (int64_t i = 0; i < D / LANES; i++) {
      const Vec x = load_vec(v + s * D + LANES * i);
      for (int h = 0; h < Q; h++) sums[h][i] += p[h][s] * x;
    }
  }
  std::memcpy(out, sums, sizeof sums);
}

// The same for up to four queries, a number known when it runs, or for any D
template <int64_t D, int MAX_Q, typename T>
void weigh_values(int64_t n_queries, const Scores* p, const T* v, int64_t n, int64_t d, float* out, const T* next) {
  if constexpr (D > 0) {
    static constexpr decltype(&add_values<D, 1, T>) by_queries[] = {
        add_values<D, 1, T>, add_values<D, 2, T>, add_values<D, std::min(3, MAX_Q), T>, add_values<D, MAX_Q, T>};
    by_queries[n_queries - 1](p, v, n, out, next);
  } else {
    std::fill_n(out, d, 0.0f);
    for (int64_t s = 0; s < n; s++)
      for (int64_t i = 0; i < d; i++) out[i] += p[0][s] * to_float(v[s * d + i]);
  }
}

// ---- The operation ---------------------------------------------------------------------------------------------------

template <typename T> struct AttendOp {
  const T* qkv;  // [B, T, (H + 2 G) D]
  T *k_cache, *v_cache;  // [B, G, S, D], with strides
  int64_t batch_stride, head_stride;
  const int64_t* positions;  // [B]: of the first new token
  const float* rope;  // [S, D / 2, 2]
  const T *q_norm, *k_norm;
  float eps;
  int64_t n_rows, n_tokens, n_heads, n_kv_heads, head_dim, capacity, window;
  T* out;  // [B, T, H D]

  int64_t heads_per_kv() const { return n_heads / n_kv_heads; }
  int64_t queries() const { return n_tokens * heads_per_kv(); }  // that look at the same keys: [T, H / G]
  int64_t first_key(int64_t b) const { return window ? std::max<int64_t>(0, positions[b] - window + 1) : 0; }
  int64_t n_chunks(int64_t b) const { return (positions[b] + n_tokens - first_key(b) + KV_CHUNK - 1) / KV_CHUNK; }
  int64_t max_chunks() const { return (capacity + KV_CHUNK - 1) / KV_CHUNK; }

  struct Shared {
    T* q;            // [B, G, T, H / G, D]
    float* partial;  // [B, G, max_chunks, T, H / G, D]
    Softmax* softmax;  // [B, G, max_chunks, T, H / G]
  };
  int64_t n_partial() const { return n_rows * n_kv_heads * max_chunks() * queries(); }
  size_t shared_bytes() const {
    return Allocator::bytes_for<T>(n_rows * n_tokens * n_heads * head_dim) + Allocator::bytes_for<Softmax>(n_partial()) +
           Allocator::bytes_for<float>(n_partial() * head_dim);
  }
  Shared allocate(char* memory) const {
    Allocator allocator(memory);
    T* q = allocator.take<T>(n_rows * n_tokens * n_heads * head_dim);
    float* partial = allocator.take<float>(n_partial() * head_dim);
    return {q, partial, allocator.take<Softmax>(n_partial())};
  }

  const char* error() const {
    for (int64_t b = 0; b < n_rows; b++)
      if (positions[b] < 0 || positions[b] + n_tokens > capacity) return "the cache has no room for these positions";
    return nullptr;
  }

  void execute(char* memory, Barrier& barrier) const {
    const Shared shared = allocate(memory);
    rotate_heads(shared);
    barrier.wait();
    attend_to_chunks(shared);
    barrier.wait();
    combine_chunks(shared);
  }

  T* key(T* cache, int64_t b, int64_t kv_head, int64_t position) const {
    return cache + b * batch_stride + kv_head * head_stride + position * head_dim;
  }

  void rotate_heads(const Shared& shared) const {
    const int64_t d = head_dim, heads = n_heads + 2 * n_kv_heads;
    float* rotated = Allocator(private_memory.at_least(Allocator::bytes_for<float>(d))).template take<float>(d);
    const Share share = my_share(n_rows * n_tokens * heads);
    for (int64_t i = share.begin; i < share.end; i++) {
      const int64_t head = i % heads, t = i / heads % n_tokens, b = i / heads / n_tokens;
      const T* x = qkv + i * d;
      const int64_t position = positions[b] + t;
      if (head >= n_heads + n_kv_heads) {
        std::memcpy(key(v_cache, b, head - n_heads - n_kv_heads, position), x, d * sizeof(T));
        continue;
      }
      const bool is_query = head < n_heads;
      norm_and_rotate(x, is_query ? q_norm : k_norm, eps, rope + position * d, d, rotated);
      const int64_t kv_head = head / heads_per_kv();
      T* to = is_query ? shared.q + ((b * n_kv_heads + kv_head) * queries() + t * heads_per_kv() + head % heads_per_kv()) * d
                       : key(k_cache, b, head - n_heads, position);
      for (int64_t j = 0; j < d; j++) from_float(rotated[j], &to[j]);
    }
  }

  void attend_to_chunks(const Shared& shared) const {
    int64_t n_tasks = 0;
    for (int64_t b = 0; b < n_rows; b++) n_tasks += n_kv_heads * n_chunks(b);
    const Share share = my_share(n_tasks);
    int64_t first_task = 0;  // of row b
    for (int64_t b = 0; b < n_rows; first_task += n_kv_heads * n_chunks(b), b++) {
      const int64_t begin = std::max(share.begin - first_task, int64_t(0));
      const int64_t end = std::min(share.end - first_task, n_kv_heads * n_chunks(b));
      for (int64_t task = begin; task < end; task++) attend_to_chunk(shared, b, task / n_chunks(b), task % n_chunks(b));
    }
  }

  void attend_to_chunk(const Shared& shared, int64_t b, int64_t kv_head, int64_t chunk) const {
    if (head_dim == 64) attend_to_chunk<64>(shared, b, kv_head, chunk);
    else if (head_dim == 128) attend_to_chunk<128>(shared, b, kv_head, chunk);
    else attend_to_chunk<0>(shared, b, kv_head, chunk);
  }

  // Up to four queries at a time share what is loaded of the values. The first ones prefetch: the keys' loop the values,
  // the values' loop the next chunk's keys.
  template <int64_t D> void attend_to_chunk(const Shared& shared, int64_t b, int64_t kv_head, int64_t chunk) const {
    constexpr int MAX_Q = D ? 256 / D : 1;
    const int64_t d = D ? D : head_dim;
    const int64_t chunk_begin = first_key(b) + chunk * KV_CHUNK;
    const int64_t chunk_end = std::min(positions[b] + n_tokens, chunk_begin + KV_CHUNK);
    const T *k = key(k_cache, b, kv_head, 0), *v = key(v_cache, b, kv_head, 0);
    const int64_t head = b * n_kv_heads + kv_head;
    const T* q = shared.q + head * queries() * d;
    float* partial = shared.partial + (head * max_chunks() + chunk) * queries() * d;
    Softmax* softmax = shared.softmax + (head * max_chunks() + chunk) * queries();
    alignas(64) Scores scores[MAX_Q];
    for (int64_t t = 0; t < n_tokens; t++) {
      const int64_t position = positions[b] + t;
      const int64_t begin = window ? std::max(chunk_begin, position - window + 1) : chunk_begin;
      const int64_t n = std::max<int64_t>(0, std::min(chunk_end, position + 1) - begin);
      for (int64_t h = 0, count; h < heads_per_kv(); h += count, q += count * d, partial += count * d) {
        count = std::min<int64_t>(MAX_Q, heads_per_kv() - h);
        const bool first = t == 0 && h == 0;
        for (int64_t i = 0; i < count; i++) {
          const T* next = first ? v + (begin + n * i / count) * d : nullptr;
          const Vec greatest = score_keys<D>(q + i * d, k + begin * d, n, d, scores[i], next, count);
          *softmax++ = exponentiate(scores[i], n, greatest);
        }
        const T* next = first ? k + (begin + KV_CHUNK) * d : nullptr;
        weigh_values<D, MAX_Q>(count, scores, v + begin * d, n, d, partial, next);
      }
    }
  }

  void combine_chunks(const Shared& shared) const {
    const int64_t d = head_dim;
    float* acc = Allocator(private_memory.at_least(Allocator::bytes_for<float>(d))).template take<float>(d);
    const Share share = my_share(n_rows * n_tokens * n_heads);
    for (int64_t i = share.begin; i < share.end; i++) {
      const int64_t head = i % n_heads, t = i / n_heads % n_tokens, b = i / n_heads / n_tokens;
      const int64_t kv_head = b * n_kv_heads + head / heads_per_kv();
      const int64_t query = t * heads_per_kv() + head % heads_per_kv();
      const int64_t first = kv_head * max_chunks() * queries() + query, step = queries();  // of the chunks' results
      float m = NEGATIVE_INFINITY, l = 0;
      for (int64_t c = 0; c < n_chunks(b); c++) m = std::max(m, shared.softmax[first + c * step].m);
      std::fill_n(acc, d, 0.0f);
      for (int64_t c = 0; c < n_chunks(b); c++) {
        const Softmax softmax = shared.softmax[first + c * step];
        if (softmax.l == 0) continue;  // a chunk that this query does not see
        const float alpha = std::exp(softmax.m - m);
        l += alpha * softmax.l;
        for (int64_t j = 0; j < d; j++) acc[j] += alpha * shared.partial[(first + c * step) * d + j];
      }
      for (int64_t j = 0; j < d; j++) from_float(acc[j] / l, &out[i * d + j]);
    }
  }
};
