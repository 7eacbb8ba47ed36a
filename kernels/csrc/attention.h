// The operation attend: q/k norm, RoPE, cache write, and attention over the keys in the cache,
//
//     softmax(softcap(scale * q k^T) + ALiBi) v        softcap and ALiBi are optional
//
// The algorithm is Flash-Decoding: the keys of a sequence are cut into splits, and threads attend to the splits in
// parallel. Three phases are separated by barriers. In each phase the threads share the tasks:
//
//     phase                one task
//     1 RopeAndCacheOp     a head of a new token: norm and RoPE; q goes to shared memory, k and v into the cache
//     2 attend_to_splits   a block of new tokens and a split of a key/value head: a partial output, m_i and l_i
//     3 combine_splits     a query head of a new token: the output, from the partial outputs of all splits
//
// If all keys of a sequence are one split, phase 2 computes the outputs, too. If all sequences are so short, phase 3 is
// left out.
//
// Every sequence has a position, start_pos, which is read at execution. So the time depends on the number of keys in
// the cache, and not on the length of the cache.
#pragma once

#include "activations.h"

constexpr int64_t TOKEN_BLOCK = 8;  // the most new tokens of a task, which reads a split once for all of them
constexpr int64_t SPLIT_LEN = 256;  // the keys of a split, for up to TOKEN_BLOCK tokens
constexpr int64_t MAX_SPLIT_LEN = SPLIT_LEN * (MAX_CPU_TOKENS / TOKEN_BLOCK);

// Applies RoPE: rotates each pair (x[i], x[i + d / 2]) of x [d] by cos_sin [d / 2, 2] (cos, sin). out [d] may be x.
template <typename T> void apply_rope(const T* x, const float* cos_sin, int64_t d, T* out) {
  for (int64_t i = 0; i < d / 2; i += LANES) {
    const f32x16 lo = load_partial(cos_sin, 2 * i, d), hi = load_partial(cos_sin, 2 * i + LANES, d);
    const f32x16 cos = __builtin_shufflevector(lo, hi, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const f32x16 sin = __builtin_shufflevector(lo, hi, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const f32x16 a = load_partial(x, i, d / 2), b = load_partial(x + d / 2, i, d / 2);
    store_partial(a * cos - b * sin, out, i, d / 2);
    store_partial(b * cos + a * sin, out + d / 2, i, d / 2);
  }
}

// ---- One query against one split of keys ----------------------------------------------------------------------------
//
// The loops are compiled for D = 64, 128 and 256, the usual head_dims. D = 0 is slower and reads head_dim from d.

// Returns q [D] . k [D] as 16 partial sums.
template <int64_t D> inline f32x16 dot_head(const auto* q, const auto* k) {
  f32x16 total = {};
  for (int64_t i = 0; i < D; i += LANES) total += load_vec(q + i) * load_vec(k + i);
  return total;
}
#if defined(__AVX512BF16__)
template <int64_t D> inline f32x16 dot_head(const bf16* q, const bf16* k) {
  f32x16 total = {};
  for (int64_t i = 0; i < D; i += 32)
    total = (f32x16)_mm512_dpbf16_ps((__m512)total, load<__m512bh>(q + i), load<__m512bh>(k + i));
  return total;
}
#endif

// Prefetches x [d], a key or a value.
template <typename T> inline void prefetch_vector(const T* x, int64_t d) {
  for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) prefetch_l2(x + i);
}

// Returns the larger of a and b in each lane. NaN in b stays NaN.
inline f32x16 larger(f32x16 a, f32x16 b) { return (b > a) | (b != b) ? b : a; }

// Returns the largest lane of v, or NaN if any lane is NaN.
inline float largest_lane(f32x16 v) {
  v = larger(v, (f32x16)swap_lanes<8>((i32x16)v));
  v = larger(v, (f32x16)swap_lanes<4>((i32x16)v));
  v = larger(v, (f32x16)swap_lanes<2>((i32x16)v));
  v = larger(v, (f32x16)swap_lanes<1>((i32x16)v));
  return v[0];
}

// How a product q . k becomes a score: softcap(scale * product) + slope * distance. The slope is ALiBi's. The distance
// is the position of the key minus that of the query. Every option but scale has a default that changes nothing.
struct ScoreOptions {
  float scale, softcap = 0, slope = 0;
  bool operator==(const ScoreOptions&) const = default;
  // Whether a score is scale * product. == compares all members, so a new option needs no line here.
  bool is_scale_only() const { return *this == ScoreOptions{scale}; }
};
inline f32x16 finish_scores(f32x16 products, const ScoreOptions& options, f32x16 distance) {
  f32x16 scores = products * options.scale;
  if (options.softcap) scores = apply_softcap(scores, options.softcap);
  return scores + options.slope * distance;
}

// Computes the scores [n] of q [d] and k [n, d], 16 keys at a time. Returns 16 partial maxima of the scores.
// distance is that of the first key. If next is not null, also prefetches the values next [n / stride, d]: one value
// for every stride keys.
template <int64_t D, typename T>
f32x16 score_keys(const T* q, const T* k, int64_t n, int64_t d, const ScoreOptions& options, int64_t distance,
                  float* scores, const T* next, int64_t stride) {
  f32x16 max = f32x16{} + NEGATIVE_INFINITY;
  for (int64_t s = 0; s < n; s += LANES) {
    for (int64_t r = divide_up(s, stride); next && r * stride < std::min(s + LANES, n); r++)
      prefetch_vector(next + r * d, d);
    f32x16 products = {};
    if constexpr (D > 0) {
      f32x16 sums[LANES];
      for (int64_t r = 0; r < LANES; r++) sums[r] = dot_head<D>(q, k + std::min(s + r, n - 1) * D);
      products = transpose_reduce_add(sums);
    } else {
      for (int64_t r = 0; r < std::min(LANES, n - s); r++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += to_float(q[i]) * to_float(k[(s + r) * d + i]);
        products[r] = sum;
      }
    }
    f32x16 score = finish_scores(products, options, IOTA + float(distance + s));
    score = mask_lanes(score, n - s, NEGATIVE_INFINITY);
    max = larger(max, score);
    store_vec(score, scores + s);
  }
  return max;
}

// The state of a softmax over some keys, with FlashAttention's names: m_i is the maximum score, and l_i is the sum of
// exp(score - m_i).
struct Softmax { float m_i, l_i; };

// Replaces scores [n] with p = exp(score - m_i). m_i is the maximum of the lanes of max, or NaN if any lane is NaN.
inline Softmax exponentiate(float* scores, int64_t n, f32x16 max) {
  const float m_i = largest_lane(max);
  f32x16 l_i = {};
  for (int64_t s = 0; s < n; s += LANES) {
    const f32x16 p = mask_lanes(exp_vec(load_vec(scores + s) - m_i), n - s, 0);
    store_vec(p, scores + s);
    l_i += p;
  }
  return {m_i, sum(l_i)};
}

// Computes out [Q, D] = p [Q, n] v [n, D]. The Q queries share the loads of v. stride is the stride of p between two
// queries. If next is not null, prefetches the keys next [n, D].
template <int64_t D, int Q, typename T>
void accumulate_pv(const float* p, int64_t stride, const T* v, int64_t n, float* out, const T* next) {
  f32x16 acc[Q][D / LANES] = {};
  for (int64_t s = 0; s < n; s++) {
    if (next) prefetch_vector(next + s * D, D);
    for (int64_t i = 0; i < D / LANES; i++) {
      const f32x16 x = load_vec(v + s * D + LANES * i);
      for (int h = 0; h < Q; h++) acc[h][i] += p[h * stride + s] * x;
    }
  }
  std::memcpy(out, acc, sizeof acc);
}

// The most queries per call of accumulate_pv: their sums fit in 16 registers. D = 0 takes one query.
template <int64_t D> constexpr int MAX_Q = D ? 256 / D : 1;

// Calls accumulate_pv<D, Q, T> with Q = n_queries, which is 1 to MAX_Q.
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

// ---- Norm, RoPE and cache write -------------------------------------------------------------------------------------

// Norms and rotates the new queries and keys, and writes the new keys and values into the cache. This is phase 1 of
// attend. For steps in which PyTorch computes the attention, phase 1 is an operation of its own, rope_and_cache.
template <typename T> struct RopeAndCacheOp {
  const T* qkv;                            // [batch, n_tokens, n_heads + 2 n_kv_heads, head_dim]
  const int64_t* start_pos;                // [batch]: the position of each sequence's first new token
  T *k_cache, *v_cache;                    // [batch, n_kv_heads, max_seq_len, head_dim]
  int64_t batch_stride, head_stride;       // of k_cache and v_cache
  const float* cos_sin;                    // [max_seq_len or more, head_dim / 2, 2]
  const T *q_norm_weight, *k_norm_weight;  // [head_dim] or null
  bool norms_all_heads;                    // norm all heads together; weights [n_heads or n_kv_heads, head_dim]
  float eps;
  int64_t batch, n_tokens, n_heads, n_kv_heads, head_dim;
  int64_t max_seq_len;  // the length of the cache
  T* q;                 // [batch, n_tokens, n_heads, head_dim]

  const char* validate() const {
    for (int64_t b = 0; b < batch; b++)
      if (start_pos[b] < 0 || start_pos[b] + n_tokens > max_seq_len) return "the cache has no room for these positions";
    return nullptr;
  }

  T* cached(T* cache, int64_t b, int64_t kv_head, int64_t position) const {
    return cache + b * batch_stride + kv_head * head_stride + position * head_dim;
  }

  void execute(char*, Barrier&) const {
    const int64_t d = head_dim, all_heads = n_heads + 2 * n_kv_heads;  // q, k, v
    const Range range = thread_range(batch * n_tokens * all_heads);
    float rms_scale = 0;  // 1 / rms of this head, or of all heads of the token's q or k
    for (int64_t i = range.begin; i < range.end; i++) {
      const int64_t head = i % all_heads, token = i / all_heads, b = token / n_tokens;
      const int64_t position = start_pos[b] + token % n_tokens;
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

// ---- The operation --------------------------------------------------------------------------------------------------

template <typename T> struct AttendOp : RopeAndCacheOp<T> {
  using Base = RopeAndCacheOp<T>;
  using Base::batch, Base::n_tokens, Base::n_heads, Base::n_kv_heads, Base::head_dim, Base::max_seq_len;
  using Base::start_pos, Base::cached;

  const T* sinks;             // [n_heads] or null
  const float* alibi_slopes;  // [n_heads] or null
  float scale, softcap;       // a softcap of 0 changes nothing
  int64_t window;             // how many keys a token sees, its own included; 0 means all
  T* out;                     // [batch, n_tokens, n_heads, head_dim]

  int64_t heads_per_kv() const { return n_heads / n_kv_heads; }
  ScoreOptions score_options(int64_t head) const { return {scale, softcap, alibi_slopes ? alibi_slopes[head] : 0}; }
  // The first key that a new token of sequence b sees.
  int64_t first_key(int64_t b) const { return window ? std::max<int64_t>(0, start_pos[b] - window + 1) : 0; }
  // The keys of a split. Partial outputs take tokens x splits, so with more tokens the splits are longer and fewer.
  int64_t split_len() const { return SPLIT_LEN * divide_up(batch * n_tokens, TOKEN_BLOCK); }
  int64_t count_splits(int64_t n_keys) const { return divide_up(n_keys, split_len()); }
  int64_t n_splits(int64_t b) const { return count_splits(start_pos[b] + n_tokens - first_key(b)); }
  int64_t max_splits() const { return count_splits(max_seq_len); }
  int64_t n_token_blocks() const { return divide_up(n_tokens, TOKEN_BLOCK); }  // of a sequence

  // The queries of a key/value head are [n_tokens, heads_per_kv]. query_index is the index in this order, flattened.
  int64_t queries_per_kv() const { return n_tokens * heads_per_kv(); }
  int64_t query_index(int64_t t, int64_t head) const { return t * heads_per_kv() + head % heads_per_kv(); }

  // The memory that all threads share. Phase 1 writes q; phase 2 writes partial outputs and the state of their softmax.
  struct Shared {
    float* partial;    // [batch, n_kv_heads, max_splits, queries_per_kv, head_dim]
    T* q;              // [batch, n_tokens, n_heads, head_dim]
    Softmax* softmax;  // [batch, n_kv_heads, max_splits, queries_per_kv]
  };
  int64_t n_queries() const { return batch * n_tokens * n_heads; }
  size_t shared_bytes() const {
    return n_queries() * (max_splits() * (head_dim * sizeof(float) + sizeof(Softmax)) + head_dim * sizeof(T));
  }
  Shared partition(char* memory) const {
    float* partial = reinterpret_cast<float*>(memory);
    T* q = reinterpret_cast<T*>(partial + n_queries() * max_splits() * head_dim);
    return {partial, q, reinterpret_cast<Softmax*>(q + n_queries() * head_dim)};
  }

  void execute(char* memory, Barrier& barrier) const {
    const Shared shared = partition(memory);
    RopeAndCacheOp<T> rope_and_cache = *this;
    rope_and_cache.q = shared.q;
    rope_and_cache.execute(nullptr, barrier);
    barrier.wait();
    attend_to_splits(shared);
    if (!any_sequence_is_split()) return;
    barrier.wait();
    combine_splits(shared);
  }

  bool any_sequence_is_split() const {
    for (int64_t b = 0; b < batch; b++)
      if (n_splits(b) > 1) return true;
    return false;
  }

  // A block of new tokens of sequence b, and a split of the keys of a key/value head. The members are in the order of
  // the tasks: token_block changes from each task to the next.
  struct Task { int64_t b, kv_head, split, token_block; };

  int64_t n_tasks(int64_t b) const { return n_kv_heads * n_splits(b) * n_token_blocks(); }  // of sequence b
  int64_t first_key(const Task& task) const { return first_key(task.b) + task.split * split_len(); }

  void attend_to_splits(const Shared& shared) const {
    int64_t total = 0;
    for (int64_t b = 0; b < batch; b++) total += n_tasks(b);
    const Range range = thread_range(total);
    if (range.begin == range.end) return;
    Task task = task_at(range.begin);
    for (int64_t i = range.begin + 1; i < range.end; i++) {
      const Task next = next_task(task);
      const T* next_keys = cached(this->k_cache, next.b, next.kv_head, first_key(next));
      attend_to_split(shared, task, next.token_block == 0 ? next_keys : nullptr);
      task = next;
    }
    attend_to_split(shared, task, nullptr);
  }

  Task task_at(int64_t i) const {
    int64_t b = 0;
    for (; i >= n_tasks(b); b++) i -= n_tasks(b);
    const int64_t n_blocks = n_token_blocks(), n = n_splits(b);
    return {b, i / n_blocks / n, i / n_blocks % n, i % n_blocks};
  }

  Task next_task(Task task) const {
    if (++task.token_block < n_token_blocks()) return task;
    task.token_block = 0;
    if (++task.split < n_splits(task.b)) return task;
    task.split = 0;
    if (++task.kv_head < n_kv_heads) return task;
    return {task.b + 1, 0, 0, 0};
  }

  // next_keys: the keys of the thread's next task, or null if it has the same keys.
  void attend_to_split(const Shared& shared, const Task& task, const T* next_keys) const {
    if (head_dim == 64) attend_to_split<64>(shared, task, next_keys);
    else if (head_dim == 128) attend_to_split<128>(shared, task, next_keys);
    else if (head_dim == 256) attend_to_split<256>(shared, task, next_keys);
    else attend_to_split<0>(shared, task, next_keys);
  }

  // For each new token, and for up to MAX_Q query heads at a time: scores, softmax, p v. Only the first iteration reads
  // K and V from memory, so only the first iteration prefetches: the values of this split while it scores keys, and
  // next_keys while it sums values.
  template <int64_t D> void attend_to_split(const Shared& shared, const Task& task, const T* next_keys) const {
    const auto [b, kv_head, split, token_block] = task;
    const int64_t d = D ? D : head_dim;
    const int64_t split_begin = first_key(task);
    const int64_t split_end = std::min(start_pos[b] + n_tokens, split_begin + split_len());
    const int64_t first_token = n_tokens * token_block / n_token_blocks();
    const int64_t end_token = n_tokens * (token_block + 1) / n_token_blocks();
    const T *k = cached(this->k_cache, b, kv_head, 0), *v = cached(this->v_cache, b, kv_head, 0);
    const int64_t first_query =  // an index of [batch, n_kv_heads, max_splits, queries_per_kv]
        ((b * n_kv_heads + kv_head) * max_splits() + split) * queries_per_kv() + query_index(first_token, 0);
    const int64_t heads_per_kv = this->heads_per_kv(), first_head = kv_head * heads_per_kv;
    float* partial = shared.partial + first_query * d;
    Softmax* softmax = shared.softmax + first_query;
    alignas(64) float scores[MAX_Q<D> * MAX_SPLIT_LEN];  // [count, split_len()]
    for (int64_t t = first_token; t < end_token; t++) {
      const int64_t position = start_pos[b] + t;
      const T* q = shared.q + ((b * n_tokens + t) * n_heads + first_head) * d;
      const int64_t begin = window ? std::max(split_begin, position - window + 1) : split_begin;
      const int64_t n = std::max<int64_t>(0, std::min(split_end, position + 1) - begin);  // keys that the token sees
      for (int64_t h = 0, count; h < heads_per_kv; h += count, q += count * d, partial += count * d) {
        count = std::min<int64_t>(MAX_Q<D>, heads_per_kv - h);
        const bool prefetches = t == first_token && h == 0;
        for (int64_t i = 0; i < count; i++) {
          float* s = scores + i * split_len();
          const T* next = prefetches ? v + (begin + n * i / count) * d : nullptr;  // each query prefetches n / count
          const ScoreOptions options = score_options(first_head + h + i);
          const f32x16 max = score_keys<D>(q + i * d, k + begin * d, n, d, options, begin - position, s, next, count);
          *softmax++ = exponentiate(s, n, max);
        }
        accumulate_pv<D>(count, scores, split_len(), v + begin * d, n, d, partial, prefetches ? next_keys : nullptr);
      }
    }
    if (n_splits(b) > 1) return;
    for (int64_t t = first_token, i = first_query; t < end_token; t++)
      for (int64_t h = 0; h < heads_per_kv; h++, i++) combine(shared, i, 1, b * n_tokens + t, first_head + h);
  }

  // Combines the splits of the queries that attend_to_split has not combined.
  void combine_splits(const Shared& shared) const {
    const Range range = thread_range(n_queries());
    for (int64_t i = range.begin; i < range.end; i++) {
      const int64_t head = i % n_heads, token = i / n_heads, b = token / n_tokens, n = n_splits(b);
      const int64_t kv_head = b * n_kv_heads + head / heads_per_kv();
      const int64_t first = kv_head * max_splits() * queries_per_kv() + query_index(token % n_tokens, head);
      if (n > 1) combine(shared, first, n, token, head);
    }
  }

  // Combines the n splits s of a query: a head of a token, an index of [batch, n_tokens]. The partial output and the
  // softmax of the first split are at index `first`. m_s and l_s are the state of the softmax of split s.
  //
  //     m_i      =  the maximum of all m_s
  //     alpha_s  =  exp(m_s - m_i)
  //     out      =  (the sum of alpha_s * partial_s) / (the sum of alpha_s * l_s)
  //
  // A sink is the score of one more key, whose value is zero.
  void combine(const Shared& shared, int64_t first, int64_t n, int64_t token, int64_t head) const {
    const int64_t d = head_dim, step = queries_per_kv();
    Softmax* softmax = shared.softmax + first;
    const float sink = sinks ? to_float(sinks[head]) : NEGATIVE_INFINITY;
    float m_i = sink;
    for (int64_t s = 0; s < n; s++) m_i = std::max(m_i, softmax[s * step].m_i);
    float l_i = std::exp(sink - m_i);
    for (int64_t s = 0; s < n; s++) {
      auto& [m_s, l_s] = softmax[s * step];
      const float alpha = l_s == 0 ? 0 : std::exp(m_s - m_i);  // l_s is 0 if the query sees no key of this split
      l_i += alpha * l_s;
      m_s = alpha;  // the memory of m_s holds alpha_s from here on
    }
    for (int64_t i = 0; i < d; i += LANES) {
      f32x16 acc = {};
      for (int64_t s = 0; s < n; s++)
        acc += softmax[s * step].m_i * load_partial(shared.partial + (first + s * step) * d, i, d);
      store_partial(acc / l_i, out + (token * n_heads + head) * d, i, d);
    }
  }
};
