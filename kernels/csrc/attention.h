// attend: q/k norm, RoPE, cache write, and softmax([ALiBi] [cap] (scale * q k^T)) v over the keys in the cache.
//
// It is Flash-Decoding, in three phases with a barrier between them. In each the threads share out other tasks:
//   1. RotateOp          a head of a new token: norm and RoPE; q goes to shared memory, k and v into the cache
//   2. attend_to_chunks  some tokens and a chunk of a key/value head: partial outputs, and their softmax's m_i and l_i
//   3. combine_chunks    a query head: combine the partial outputs of all chunks
//
// Every sequence has its own position, which is read at execution. So the time depends on how many keys are in the
// cache, not on how many it has room for.
#pragma once

#include <limits>

#include "activations.h"

constexpr int64_t TOKEN_BLOCK = 8;  // new tokens that read a chunk of keys together
constexpr int64_t KV_CHUNK = 256;   // keys of a chunk, for up to TOKEN_BLOCK tokens
constexpr int64_t MAX_KV_CHUNK = KV_CHUNK * (MAX_TOKENS / TOKEN_BLOCK);
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

// RoPE: rotates the pairs (x[i], x[i + d / 2]) of x [d] by rope [d / 2, 2] (cos, sin). Writes out [d], which may be x.
template <typename T> void apply_rope(const T* x, const float* rope, int64_t d, T* out) {
  for (int64_t i = 0; i < d / 2; i += LANES) {
    const Vec lo = load_partial(rope, 2 * i, d), hi = load_partial(rope, 2 * i + LANES, d);
    const Vec cos = __builtin_shufflevector(lo, hi, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Vec sin = __builtin_shufflevector(lo, hi, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const Vec a = load_partial(x, i, d / 2), b = load_partial(x + d / 2, i, d / 2);
    store_partial(a * cos - b * sin, out, i, d / 2);
    store_partial(b * cos + a * sin, out + d / 2, i, d / 2);
  }
}

// ---- One query against one chunk of keys ----------------------------------------------------------------------------
//
// These loops are compiled for D = 64, 128 and 256, the usual head_dims. D = 0 takes any head_dim, as d, but is slower.

// q [D] . k [D] as 16 partial sums.
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

// Prefetches a key or a value [d].
template <typename T> inline void prefetch_vector(const T* x, int64_t d) {
  for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) prefetch_l2(x + i);
}

// The maximum of each lane. NaN in b stays NaN.
inline Vec larger(Vec a, Vec b) { return (b > a) | (b != b) ? b : a; }

// scores [n] = scale * q [d] . k [n, d], 16 keys at a time. Returns their maximum as a Vec of 16 partial maxima.
// Meanwhile prefetches next [n / stride, d], values, if it is not null: one for every stride keys.
template <int64_t D, typename T>
Vec score_keys(const T* q, const T* k, int64_t n, int64_t d, float scale, float* scores, const T* next,
               int64_t stride) {
  Vec max = Vec{} + NEGATIVE_INFINITY;
  for (int64_t s = 0; s < n; s += LANES) {
    for (int64_t r = (s + stride - 1) / stride; next && r * stride < std::min(s + LANES, n); r++)
      prefetch_vector(next + r * d, d);
    Vec score = {};
    if constexpr (D > 0) {
      Vec sums[LANES];
      for (int64_t r = 0; r < LANES; r++) sums[r] = dot_head<D>(q, k + std::min(s + r, n - 1) * D);
      score = transpose_reduce_add(sums) * scale;
    } else {
      for (int64_t r = 0; r < std::min(LANES, n - s); r++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += to_float(q[i]) * to_float(k[(s + r) * d + i]);
        score[r] = sum * scale;
      }
    }
    score = mask_lanes(score, n - s, NEGATIVE_INFINITY);
    max = larger(max, score);
    store_vec(score, scores + s);
  }
  return max;
}

// Caps scores [n]. Returns their maximum, given the maximum before: cap never changes the order.
inline Vec cap_scores(float* scores, int64_t n, Vec max, float softcap) {
  for (int64_t s = 0; s < n; s += LANES) store_vec(apply_softcap(load_vec(scores + s), softcap), scores + s);
  return apply_softcap(max, softcap);
}

// Adds slope * distance to scores [n] of keys at distances first, first + 1 ... from the query; they are not positive,
// since keys come before the query (ALiBi). Returns the new maximum.
inline Vec add_alibi(float* scores, int64_t n, float slope, int64_t first) {
  Vec max = Vec{} + NEGATIVE_INFINITY;
  for (int64_t s = 0; s < n; s += LANES) {
    const Vec score = load_vec(scores + s) + slope * (LANE + float(first + s));
    max = larger(max, mask_lanes(score, n - s, NEGATIVE_INFINITY));
    store_vec(score, scores + s);
  }
  return max;
}

// A softmax over some keys, in Flash-Attention's names. m_i: the maximum score. l_i: the sum of exp(score - m_i).
struct Softmax { float m_i, l_i; };

// Replaces scores [n] by p = exp(score - m_i), where m_i is the maximum of max's lanes.
inline Softmax exponentiate(float* scores, int64_t n, Vec max) {
  float m_i = NEGATIVE_INFINITY;
  for (int r = 0; r < LANES; r++) m_i = max[r] > m_i || max[r] != max[r] ? max[r] : m_i;
  Vec l_i = {};
  for (int64_t s = 0; s < n; s += LANES) {
    const Vec p = mask_lanes(exp_vec(load_vec(scores + s) - m_i), n - s, 0);
    store_vec(p, scores + s);
    l_i += p;
  }
  return {m_i, sum(l_i)};
}

// out [Q, D] = p [Q, n] . v [n, D] for Q queries, which share the loads of v. The p of a query is stride behind the one
// before. Prefetches next [n, D], keys, if it is not null.
template <int64_t D, int Q, typename T>
void accumulate_pv(const float* p, int64_t stride, const T* v, int64_t n, float* out, const T* next) {
  Vec acc[Q][D / LANES] = {};
  for (int64_t s = 0; s < n; s++) {
    if (next) prefetch_vector(next + s * D, D);
    for (int64_t i = 0; i < D / LANES; i++) {
      const Vec x = load_vec(v + s * D + LANES * i);
      for (int h = 0; h < Q; h++) acc[h][i] += p[h * stride + s] * x;
    }
  }
  std::memcpy(out, acc, sizeof acc);
}

// How many queries accumulate_pv takes at a time: so many that their sums fit in 16 registers. For any d (D = 0): one.
template <int64_t D> constexpr int MAX_Q = D ? 256 / D : 1;

// The same for n_queries, 1 to MAX_Q, and for any d.
template <int64_t D, typename T>
void accumulate_pv(int64_t n_queries, const float* p, int64_t stride, const T* v, int64_t n, int64_t d, float* out,
                  const T* next) {
  if constexpr (D > 0) {
    constexpr int Q = MAX_Q<D>;  // 1, 2 or 4
    static constexpr decltype(&accumulate_pv<D, 1, T>) by_queries[] = {
        accumulate_pv<D, 1, T>, accumulate_pv<D, std::min(2, Q), T>, accumulate_pv<D, std::min(3, Q), T>,
        accumulate_pv<D, Q, T>};
    by_queries[n_queries - 1](p, stride, v, n, out, next);
  } else {
    std::fill_n(out, d, 0.0f);
    for (int64_t s = 0; s < n; s++)
      for (int64_t i = 0; i < d; i++) out[i] += p[s] * to_float(v[s * d + i]);
  }
}

// ---- Norm, RoPE and cache write ---------------------------------------------------------------------------------------

// The first phase of attend. With more tokens than attend takes it is an operation of its own, and PyTorch does the rest.
template <typename T> struct RotateOp {
  const T* qkv;                            // [batch, n_tokens, n_heads + 2 n_kv_heads, head_dim]
  const int64_t* start_pos;                // [batch]: where each sequence's first new token goes
  T *k_cache, *v_cache;                    // [batch, n_kv_heads, capacity, head_dim]
  int64_t batch_stride, head_stride;       // of the caches' first two dimensions
  const float* rope;                       // [capacity or more, head_dim / 2, 2]
  const T *q_norm_weight, *k_norm_weight;  // [head_dim] or null
  bool norms_all_heads;                    // then they are [n_heads, head_dim] and [n_kv_heads, head_dim]
  float eps;
  int64_t batch, n_tokens, n_heads, n_kv_heads, head_dim, capacity;
  T* q;  // [batch, n_tokens, n_heads, head_dim]

  const char* error() const {
    for (int64_t b = 0; b < batch; b++)
      if (start_pos[b] < 0 || start_pos[b] + n_tokens > capacity) return "the cache has no room for these positions";
    return nullptr;
  }

  T* cached(T* cache, int64_t b, int64_t kv_head, int64_t position) const {
    return cache + b * batch_stride + kv_head * head_stride + position * head_dim;
  }

  void execute(char*, Barrier&) const {
    const int64_t d = head_dim, all_heads = n_heads + 2 * n_kv_heads;  // q, k, v
    const Range range = thread_range(batch * n_tokens * all_heads);
    float rms_scale = 0;  // 1 / rms of this head, or of all heads of this token's q or k
    for (int64_t i = range.begin; i < range.end; i++) {
      const int64_t head = i % all_heads, token = i / all_heads, b = token / n_tokens;
      const int64_t position = start_pos[b] + token % n_tokens;
      const T* x = qkv + i * d;
      T* to;
      if (head < n_heads) {
        to = q + (token * n_heads + head) * d;
      } else if (head < n_heads + n_kv_heads) {
        to = cached(k_cache, b, head - n_heads, position);
      } else {
        std::memcpy(cached(v_cache, b, head - n_heads - n_kv_heads, position), x, d * sizeof(T));
        continue;
      }
      if (const T* norm_weight = head < n_heads ? q_norm_weight : k_norm_weight) {
        const int64_t first = head < n_heads ? 0 : n_heads, n = head < n_heads ? n_heads : n_kv_heads;  // of q or k
        if (!norms_all_heads) rms_scale = inverse_rms(x, eps, d);
        else if (head == first || i == range.begin) rms_scale = inverse_rms(x - (head - first) * d, eps, n * d);
        x = apply_norm(x, norm_weight + (norms_all_heads ? (head - first) * d : 0), rms_scale, d, to);
      }
      apply_rope(x, rope + position * d, d, to);
    }
  }
};

// ---- The operation --------------------------------------------------------------------------------------------------

template <typename T> struct AttendOp : RotateOp<T> {
  using RotateOp<T>::batch, RotateOp<T>::n_tokens, RotateOp<T>::n_heads, RotateOp<T>::n_kv_heads;
  using RotateOp<T>::head_dim, RotateOp<T>::capacity, RotateOp<T>::start_pos, RotateOp<T>::cached;

  const T* sinks;             // [n_heads] or null
  const float* alibi_slopes;  // [n_heads] or null
  float scale, softcap;       // softcap: 0 for none
  int64_t window;             // 0 for none
  T* out;                     // [batch, n_tokens, n_heads, head_dim]

  int64_t heads_per_kv() const { return n_heads / n_kv_heads; }
  int64_t first_key(int64_t b) const { return window ? std::max<int64_t>(0, start_pos[b] - window + 1) : 0; }
  // Keys of a chunk. More tokens have larger chunks, so that their partial outputs take no more memory.
  int64_t chunk_size() const { return KV_CHUNK * ((batch * n_tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK); }
  int64_t chunks_of(int64_t n_keys) const { return (n_keys + chunk_size() - 1) / chunk_size(); }
  int64_t n_chunks(int64_t b) const { return chunks_of(start_pos[b] + n_tokens - first_key(b)); }
  int64_t max_chunks() const { return chunks_of(capacity); }
  // A sequence's new tokens are in blocks of up to TOKEN_BLOCK.
  int64_t n_token_blocks() const { return (n_tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK; }

  // The results of queries that look at the same key/value head lie side by side, as [n_tokens, heads_per_kv].
  int64_t queries_per_kv() const { return n_tokens * heads_per_kv(); }
  int64_t query_index(int64_t t, int64_t head) const { return t * heads_per_kv() + head % heads_per_kv(); }

  // What the phases hand on: rotated queries, and the results of the chunks.
  struct Shared {
    float* partial;    // [batch, n_kv_heads, max_chunks, queries_per_kv, head_dim]
    T* q;              // [batch, n_tokens, n_heads, head_dim]
    Softmax* softmax;  // [batch, n_kv_heads, max_chunks, queries_per_kv]
  };
  int64_t n_queries() const { return batch * n_tokens * n_heads; }
  size_t shared_bytes() const {
    return n_queries() * (max_chunks() * (head_dim * sizeof(float) + sizeof(Softmax)) + head_dim * sizeof(T));
  }
  Shared divide(char* memory) const {
    float* partial = reinterpret_cast<float*>(memory);
    T* q = reinterpret_cast<T*>(partial + n_queries() * max_chunks() * head_dim);
    return {partial, q, reinterpret_cast<Softmax*>(q + n_queries() * head_dim)};
  }

  void execute(char* memory, Barrier& barrier) const {
    const Shared shared = divide(memory);
    RotateOp<T> rotate_op = *this;
    rotate_op.q = shared.q;
    rotate_op.execute(nullptr, barrier);
    barrier.wait();
    attend_to_chunks(shared);
    barrier.wait();
    combine_chunks(shared);
  }

  // A block of new tokens and a chunk of keys of a key/value head, of sequence b.
  struct Task { int64_t b, kv_head, chunk, token_block; };

  // The tasks are in this order: [b, kv_head, chunk, token_block].
  void attend_to_chunks(const Shared& shared) const {
    const int64_t n_blocks = n_token_blocks();
    int64_t n_tasks = 0;
    for (int64_t b = 0; b < batch; b++) n_tasks += n_kv_heads * n_chunks(b) * n_blocks;
    const Range range = thread_range(n_tasks);
    for (int64_t b = 0, first = 0; b < batch; b++) {  // first: b's first task
      const int64_t n = n_chunks(b), end = first + n_kv_heads * n * n_blocks;
      for (int64_t i = std::max(range.begin, first) - first; i < std::min(range.end, end) - first; i++)
        attend_to_chunk(shared, {b, i / n_blocks / n, i / n_blocks % n, i % n_blocks});
      first = end;
    }
  }

  void attend_to_chunk(const Shared& shared, const Task& task) const {
    if (head_dim == 64) attend_to_chunk<64>(shared, task);
    else if (head_dim == 128) attend_to_chunk<128>(shared, task);
    else if (head_dim == 256) attend_to_chunk<256>(shared, task);
    else attend_to_chunk<0>(shared, task);
  }

  // Token by token, up to MAX_Q heads at a time. Only the first of these passes reads the chunk from memory, so only that
  // one prefetches: score_keys prefetches the chunk's values, accumulate_pv the next chunk's keys.
  template <int64_t D> void attend_to_chunk(const Shared& shared, const Task& task) const {
    const auto [b, kv_head, chunk, token_block] = task;
    const int64_t d = D ? D : head_dim;
    const int64_t chunk_begin = first_key(b) + chunk * chunk_size();
    const int64_t chunk_end = std::min(start_pos[b] + n_tokens, chunk_begin + chunk_size());
    const int64_t first_token = n_tokens * token_block / n_token_blocks();
    const int64_t end_token = n_tokens * (token_block + 1) / n_token_blocks();
    const T *k = cached(this->k_cache, b, kv_head, 0), *v = cached(this->v_cache, b, kv_head, 0);
    const int64_t first_result =
        ((b * n_kv_heads + kv_head) * max_chunks() + chunk) * queries_per_kv() + query_index(first_token, 0);
    float* partial = shared.partial + first_result * d;
    Softmax* softmax = shared.softmax + first_result;
    alignas(64) float scores[MAX_Q<D> * MAX_KV_CHUNK];  // chunk_size() for each query
    for (int64_t t = first_token; t < end_token; t++) {
      const int64_t position = start_pos[b] + t;
      const T* q = shared.q + ((b * n_tokens + t) * n_heads + kv_head * heads_per_kv()) * d;
      const int64_t begin = window ? std::max(chunk_begin, position - window + 1) : chunk_begin;
      const int64_t n = std::max<int64_t>(0, std::min(chunk_end, position + 1) - begin);  // keys that the token sees
      for (int64_t h = 0, count; h < heads_per_kv(); h += count, q += count * d, partial += count * d) {
        count = std::min<int64_t>(MAX_Q<D>, heads_per_kv() - h);
        const bool first = t == first_token && h == 0;
        for (int64_t i = 0; i < count; i++) {
          float* s = scores + i * chunk_size();
          const T* next = first ? v + (begin + n * i / count) * d : nullptr;  // each query prefetches a part
          Vec max = score_keys<D>(q + i * d, k + begin * d, n, d, scale, s, next, count);
          if (softcap) max = cap_scores(s, n, max, softcap);
          if (alibi_slopes) max = add_alibi(s, n, alibi_slopes[kv_head * heads_per_kv() + h + i], begin - position);
          *softmax++ = exponentiate(s, n, max);
        }
        const T* next = first ? k + (begin + chunk_size()) * d : nullptr;
        accumulate_pv<D>(count, scores, chunk_size(), v + begin * d, n, d, partial, next);
      }
    }
  }

  // With m_i the maximum over all chunks c and alpha_c = exp(m_c - m_i):
  // out = (the sum of alpha_c * partial_c) / (the sum of alpha_c * l_c).
  // A sink is the score of one more key, whose value is zero.
  void combine_chunks(const Shared& shared) const {
    const int64_t d = head_dim;
    std::vector<float> acc(d);
    const Range range = thread_range(n_queries());
    for (int64_t i = range.begin; i < range.end; i++) {
      const int64_t head = i % n_heads, t = i / n_heads % n_tokens, b = i / n_heads / n_tokens;
      const int64_t kv_head = b * n_kv_heads + head / heads_per_kv();
      // The results of chunk c are at first + c * step.
      const int64_t first = kv_head * max_chunks() * queries_per_kv() + query_index(t, head), step = queries_per_kv();
      const float sink = sinks ? to_float(sinks[head]) : NEGATIVE_INFINITY;
      float m_i = sink;
      for (int64_t c = 0; c < n_chunks(b); c++) m_i = std::max(m_i, shared.softmax[first + c * step].m_i);
      float l_i = std::exp(sink - m_i);
      std::fill(acc.begin(), acc.end(), 0.0f);
      for (int64_t c = 0; c < n_chunks(b); c++) {
        const Softmax softmax = shared.softmax[first + c * step];
        if (softmax.l_i == 0) continue;  // the query sees no key of this chunk
        const float alpha = std::exp(softmax.m_i - m_i);
        l_i += alpha * softmax.l_i;
        for (int64_t j = 0; j < d; j++) acc[j] += alpha * shared.partial[(first + c * step) * d + j];
      }
      for (int64_t j = 0; j < d; j += LANES) store_partial(load_partial(acc.data(), j, d) / l_i, out + i * d, j, d);
    }
  }
};
