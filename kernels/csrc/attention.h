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
// If all keys of a sequence are one split, phase 2 also computes the outputs. If all sequences are so short, phase 3 is
// left out.
//
// Each execution reads the position start_pos of every sequence. So the time depends on the number of keys in the
// cache, and not on the length of the cache.
#pragma once

#include "rope_and_cache.h"
#include "softmax.h"

constexpr int64_t TOKEN_BLOCK = 8;  // a task has up to 8 new tokens, and reads a split once for all of them
constexpr int64_t SPLIT_LEN = 256;  // the keys of a split, for up to TOKEN_BLOCK tokens
constexpr int64_t MAX_SPLIT_LEN = SPLIT_LEN * (MAX_CPU_TOKENS / TOKEN_BLOCK);

// ---- Queries against one split of keys ------------------------------------------------------------------------------
//
// The loops are compiled for the usual head_dims, D = 64, 128 and 256. D = 0 is slower and reads head_dim from d.

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

// The score_mod of FlexAttention. Every member but scale has a default that changes nothing.
//
//     score     =  softcap(scale * (q . k)) + slope * distance        slope: ALiBi's
//     distance  =  the position of the key - the position of the query
struct ScoreMod {
  float scale, softcap = 0, slope = 0;
  bool operator==(const ScoreMod&) const = default;
  // Whether a score is scale * (q . k). == compares all members, so a new member needs no line here.
  bool is_scale_only() const { return *this == ScoreMod{scale}; }
};
inline f32x16 apply_score_mod(f32x16 qk, const ScoreMod& mod, f32x16 distance) {
  f32x16 scores = qk * mod.scale;
  if (mod.softcap) scores = apply_softcap(scores, mod.softcap);
  return scores + mod.slope * distance;
}

// Computes the scores [n] of q [d] and k [n, d], 16 keys at a time, and returns the largest score. Scores beyond n, up
// to a multiple of 16, become -infinity. distance (see ScoreMod) is the distance of the first key.
//
// next, if not null: the values [n / stride, d] that this call also prefetches, one for every stride keys. The first
// `stride` queries of a task share the prefetch of its n values in this way.
template <int64_t D, typename T>
float score_keys(const T* q, const T* k, int64_t n, int64_t d, const ScoreMod& mod, int64_t distance,
                 float* scores, const T* next, int64_t stride) {
  f32x16 max = f32x16{} + NEGATIVE_INFINITY;
  for (int64_t s = 0; s < n; s += LANES) {
    for (int64_t r = divide_up(s, stride); next && r * stride < std::min(s + LANES, n); r++)
      prefetch_vector(next + r * d, d);
    f32x16 qk = {};
    if constexpr (D > 0) {
      f32x16 sums[LANES];
      for (int64_t r = 0; r < LANES; r++) sums[r] = dot_head<D>(q, k + std::min(s + r, n - 1) * D);
      qk = transpose_reduce_add(sums);
    } else {
      for (int64_t r = 0; r < std::min(LANES, n - s); r++) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += to_float(q[i]) * to_float(k[(s + r) * d + i]);
        qk[r] = sum;
      }
    }
    f32x16 score = apply_score_mod(qk, mod, IOTA + float(distance + s));
    score = mask_lanes(score, n - s, NEGATIVE_INFINITY);
    max = max_vec(score, max);
    store_vec(score, scores + s);
  }
  return max_lane(max);
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

// How many queries a call of accumulate_pv takes at most: their sums fit in 16 registers. D = 0 takes one query.
template <int64_t D> constexpr int MAX_Q = D ? 256 / D : 1;

// Calls accumulate_pv<D, Q, T> with Q = n_queries, from 1 to MAX_Q.
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

// ---- The operation --------------------------------------------------------------------------------------------------

template <typename T> struct AttendOp : RopeAndCacheOp<T> {
  using Base = RopeAndCacheOp<T>;
  using Base::batch, Base::query_len, Base::n_heads, Base::n_kv_heads, Base::head_dim, Base::max_seq_len;
  using Base::start_pos, Base::cached;

  const T* sinks;             // [n_heads] or null
  const float* alibi_slopes;  // [n_heads] or null
  ScoreMod score_mod;         // of all heads, without their slopes
  int64_t window;             // how many keys a token sees, including its own; 0 means all
  T* out;                     // [batch, query_len, n_heads, head_dim]

  // Scratch memory that all threads share. Phase 1 writes q; phase 2 writes partial outputs and softmax states.
  struct Shared {
    float* partial;         // [batch, n_kv_heads, max_splits, queries_per_kv_head, head_dim]
    T* q;                   // [batch, query_len, n_heads, head_dim]
    SoftmaxState* softmax;  // [batch, n_kv_heads, max_splits, queries_per_kv_head]
  };
  size_t shared_bytes() const {
    return n_queries() * (max_splits() * (head_dim * sizeof(float) + sizeof(SoftmaxState)) + head_dim * sizeof(T));
  }
  Shared partition(char* memory) const {
    float* partial = reinterpret_cast<float*>(memory);
    T* q = reinterpret_cast<T*>(partial + n_queries() * max_splits() * head_dim);
    return {partial, q, reinterpret_cast<SoftmaxState*>(q + n_queries() * head_dim)};
  }

  // A block of new tokens of sequence b, and a split of the keys of a key/value head. The order of the members is the
  // order of the tasks: token_block changes with each task.
  struct Task { int64_t b, kv_head, split, token_block; };

  // The queries of one new token t with the key/value head of a task: query heads first_head to first_head + count - 1,
  // count <= MAX_Q. index is the index of the first query in partial and softmax (see Shared).
  struct Queries { int64_t t, first_head, count, index; };

  void execute(char* memory, Barrier& barrier) const {
    const Shared shared = partition(memory);
    rope_and_cache(shared.q, barrier);
    attend_to_splits(shared);
    if (!any_sequence_is_split()) return;
    barrier.wait();
    combine_splits(shared);
  }

  // Phase 1, and the barrier after it. Prefill has the same phase.
  void rope_and_cache(T* q, Barrier& barrier) const {
    RopeAndCacheOp<T> op = *this;
    op.q = q;
    op.execute(nullptr, barrier);
    barrier.wait();
  }

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

  // next_keys: the keys of the thread's next task, or null if the next task has the same keys.
  void attend_to_split(const Shared& shared, const Task& task, const T* next_keys) const {
    if (head_dim == 64) attend_to_split<64>(shared, task, next_keys);
    else if (head_dim == 128) attend_to_split<128>(shared, task, next_keys);
    else if (head_dim == 256) attend_to_split<256>(shared, task, next_keys);
    else attend_to_split<0>(shared, task, next_keys);
  }

  // Only the first queries of a task read keys and values from memory. The other queries find both in the cache.
  //
  //     for each new token t of the block:
  //         for up to MAX_Q query heads at a time:       reads            the first queries prefetch
  //             scores = q k^T        [count, keys]      the keys         the values
  //             p, m_i, l_i = softmax [count, keys]
  //             partial = p v         [count, D]         the values       next_keys
  template <int64_t D> void attend_to_split(const Shared& shared, const Task& task, const T* next_keys) const {
    const int64_t first_head = task.kv_head * heads_per_kv_head(), end_head = first_head + heads_per_kv_head();
    const Range tokens = split_range(task.token_block, n_token_blocks(), query_len);
    const int64_t first = first_index(task, tokens.begin);
    int64_t index = first;
    for (int64_t t = tokens.begin; t < tokens.end; t++)
      for (int64_t head = first_head, count; head < end_head; head += count, index += count) {
        count = std::min<int64_t>(MAX_Q<D>, end_head - head);
        attend_queries<D>(shared, task, {t, head, count, index}, index == first, next_keys);
      }
    if (n_splits(task.b) > 1) return;
    index = first;
    for (int64_t t = tokens.begin; t < tokens.end; t++)
      for (int64_t head = first_head; head < end_head; head++)
        combine_query(shared, index++, 1, task.b * query_len + t, head);
  }

  template <int64_t D>
  void attend_queries(const Shared& shared, const Task& task, const Queries& queries, bool is_first,
                      const T* next_keys) const {
    const int64_t b = task.b, d = D ? D : head_dim, position = start_pos[b] + queries.t, split_begin = first_key(task);
    const int64_t begin = std::max(split_begin, first_key_of(position));
    const int64_t end = std::min(split_begin + split_len(), position + 1), n = std::max<int64_t>(0, end - begin);
    const T *k = cached(this->k_cache, b, task.kv_head, begin), *v = cached(this->v_cache, b, task.kv_head, begin);
    const T* q = shared.q + ((b * query_len + queries.t) * n_heads + queries.first_head) * d;
    alignas(64) float scores[MAX_Q<D> * MAX_SPLIT_LEN];  // [count, split_len()]
    for (int64_t i = 0; i < queries.count; i++) {
      float* s = scores + i * split_len();
      const T* next = is_first ? v + n * i / queries.count * d : nullptr;  // each query prefetches n / count values
      const ScoreMod mod = score_mod_of(queries.first_head + i);
      const float m_i = LOG2_E * score_keys<D>(q + i * d, k, n, d, mod, begin - position, s, next, queries.count);
      const float l_i = exponentiate(s, n, LOG2_E, m_i, [&](f32x16 p, int64_t key) { store_vec(p, s + key); });
      shared.softmax[queries.index + i] = {m_i, l_i};
    }
    accumulate_pv<D>(queries.count, scores, split_len(), v, n, d, shared.partial + queries.index * d,
                     is_first ? next_keys : nullptr);
  }

  // Combines the splits of all sequences that have several. The outputs of the other sequences are complete.
  void combine_splits(const Shared& shared) const {
    const Range range = thread_range(n_queries());
    for (int64_t i = range.begin; i < range.end; i++) {
      const int64_t head = i % n_heads, token = i / n_heads, b = token / query_len, n = n_splits(b);
      const Task first_task{b, head / heads_per_kv_head(), 0, 0};
      const int64_t first = first_index(first_task, token % query_len) + head % heads_per_kv_head();
      if (n > 1) combine_query(shared, first, n, token, head);
    }
  }

  // Combines the n splits of a query: a head of a token in [batch, query_len]. first is the index of its first split in
  // Shared::partial and Shared::softmax.
  //
  //     out  =  the sum of weights_s * partial_s        weights: combine_softmaxes
  void combine_query(const Shared& shared, int64_t first, int64_t n, int64_t token, int64_t head) const {
    static thread_local Scratch scratch;
    float* weights = scratch.at_least<float>(n);
    const int64_t stride = queries_per_kv_head();  // from a split to the next one
    combine_softmaxes(shared.softmax + first, n, stride, sink(head), weights);
    for (int64_t i = 0; i < head_dim; i += LANES) {
      f32x16 acc = {};
      for (int64_t s = 0; s < n; s++)
        acc += weights[s] * load_partial(shared.partial + (first + s * stride) * head_dim, i, head_dim);
      store_partial(acc, out + (token * n_heads + head) * head_dim, i, head_dim);
    }
  }

  // ---- Scores ----

  ScoreMod score_mod_of(int64_t head) const {
    ScoreMod mod = score_mod;
    if (alibi_slopes) mod.slope = alibi_slopes[head];
    return mod;
  }
  float sink(int64_t head) const { return sinks ? to_float(sinks[head]) : NEGATIVE_INFINITY; }

  // ---- Splits ----

  // The first key that the token at a position sees.
  int64_t first_key_of(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
  // The first key that a new token of sequence b sees.
  int64_t first_key(int64_t b) const { return first_key_of(start_pos[b]); }
  int64_t first_key(const Task& task) const { return first_key(task.b) + task.split * split_len(); }
  // The keys of a split. With more tokens in a step, splits are longer and fewer. That bounds the scratch memory for
  // partial outputs, which grows with tokens times splits.
  int64_t split_len() const { return SPLIT_LEN * divide_up(batch * query_len, TOKEN_BLOCK); }
  int64_t count_splits(int64_t n_keys) const { return divide_up(n_keys, split_len()); }
  int64_t n_splits(int64_t b) const { return count_splits(start_pos[b] + query_len - first_key(b)); }
  int64_t max_splits() const { return count_splits(max_seq_len); }
  bool any_sequence_is_split() const {
    for (int64_t b = 0; b < batch; b++)
      if (n_splits(b) > 1) return true;
    return false;
  }

  // ---- Tasks ----

  int64_t n_token_blocks() const { return divide_up(query_len, TOKEN_BLOCK); }  // of a sequence
  int64_t n_tasks(int64_t b) const { return n_kv_heads * n_splits(b) * n_token_blocks(); }  // of sequence b

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

  // ---- Queries ----

  int64_t n_queries() const { return batch * query_len * n_heads; }
  int64_t heads_per_kv_head() const { return n_heads / n_kv_heads; }
  // The queries of a key/value head are [query_len, heads_per_kv_head]. query_index is an index into them, flattened.
  int64_t queries_per_kv_head() const { return query_len * heads_per_kv_head(); }
  int64_t query_index(int64_t t, int64_t head) const { return t * heads_per_kv_head() + head % heads_per_kv_head(); }
  // The index in Shared::partial and Shared::softmax of a task's first query of new token t.
  int64_t first_index(const Task& task, int64_t t) const {
    const auto& [b, kv_head, split, token_block] = task;
    return ((b * n_kv_heads + kv_head) * max_splits() + split) * queries_per_kv_head() + query_index(t, 0);
  }
};
