// The operations of a mixture of experts: route chooses the experts of each token, then experts_gate_up and
// experts_down multiply with their weights.
#pragma once

#include "dot.h"

// A pair of a token and one of its experts is an index into topk_ids [m, top_k], flattened: topk_ids[pair] is the
// expert, and pair / top_k is the token. A batch is 1 to MAX_CPU_TOKENS pairs with the same expert.
struct ExpertBatch {
  int64_t expert;
  std::vector<int64_t> pairs;
};

// Groups pairs [n_pairs] by expert: the weights of an expert are then read once for all pairs of a batch. Sorts the
// batches by expert: otherwise the order in which a token's experts are summed would depend on the other tokens.
inline std::vector<ExpertBatch> group_by_expert(const int64_t* topk_ids, int64_t n_pairs) {
  std::vector<ExpertBatch> batches;
  for (int64_t pair = 0; pair < n_pairs; pair++) {
    const int64_t expert = topk_ids[pair];
    const auto is_before = [](int64_t e, const ExpertBatch& batch) { return e < batch.expert; };
    auto next = std::upper_bound(batches.begin(), batches.end(), expert, is_before);  // after the expert's last batch
    if (next == batches.begin() || next[-1].expert != expert || next[-1].pairs.size() == MAX_CPU_TOKENS)
      next = batches.insert(next, ExpertBatch{expert, {}}) + 1;
    next[-1].pairs.push_back(pair);
  }
  return batches;
}

// hidden [m, top_k, n_out] = [activation] ([rms_norm] x [m, k] W^T [+ bias]). Each expert in topk_ids [m, top_k] has W
// [n, k] and bias [n].
template <typename T> struct ExpertsGateUpOp {
  const T* x;
  int64_t m, top_k;
  const int64_t* topk_ids;
  Weights w;              // [n_experts, n, k]
  const T* bias;          // [n_experts, n] or null
  const T* norm_weight;   // [k] or null
  float eps;
  Activation activation;  // as in FusedLinearOp
  T* hidden;

  Prologue<T> prologue() const { return {x, m, w, norm_weight, eps}; }
  size_t shared_bytes() const { return prologue().shared_bytes(); }

  // A task is a block of outputs of a batch. The threads share the tasks.
  void execute(char* shared, Barrier& barrier) const {
    const int64_t n_out = activation.gated ? w.n / 2 : w.n, n_blocks = divide_up(n_out, BLOCK_N);
    const std::vector<ExpertBatch> batches = group_by_expert(topk_ids, m * top_k);
    std::vector<TokenPtr> tokens(m);
    prologue().run(shared, barrier, tokens.data());
    TokenPtr batch_tokens[MAX_CPU_TOKENS];
    BlockSums sums[2];
    const Range range = thread_range(n_blocks * batches.size());
    for (int64_t task = range.begin; task < range.end; task++) {
      const auto& [expert, pairs] = batches[task / n_blocks];
      const int64_t block = task % n_blocks, n_pairs = pairs.size();
      const int64_t blocks[] = {block, block + n_blocks};  // gate, up
      for (int64_t i = 0; i < n_pairs; i++) batch_tokens[i] = tokens[pairs[i] / top_k];
      matmul<T>(n_pairs, w.expert(expert), blocks, activation.gated ? 2 : 1, batch_tokens, sums);
      const T* expert_bias = bias ? bias + expert * w.n : nullptr;
      for (int64_t i = 0; i < n_pairs; i++) {
        const f32x16 v = add_bias_and_activate(sums, i, 0, blocks, expert_bias, w.n, activation);
        store_partial(v, hidden + pairs[i] * n_out, block * BLOCK_N, n_out);
      }
    }
  }
};

// out [m, n] = [residual +] the sum over a token's experts of
//     topk_weights [m, top_k] * (hidden [m, top_k, k] W^T [+ bias])
template <typename T> struct ExpertsDownOp {
  const T* hidden;
  int64_t m, top_k;
  const int64_t* topk_ids;
  const float* topk_weights;
  Weights w;          // [n_experts, n, k]
  const T* bias;      // [n_experts, n] or null
  const T* residual;  // [m, n] or null
  T* out;

  Prologue<T> prologue() const { return {hidden, m * top_k, w, nullptr, 0}; }
  size_t shared_bytes() const { return prologue().shared_bytes(); }

  // The threads share the blocks of outputs. One thread sums the outputs of a block over all experts.
  void execute(char* shared, Barrier& barrier) const {
    const std::vector<ExpertBatch> batches = group_by_expert(topk_ids, m * top_k);
    std::vector<TokenPtr> rows(m * top_k);  // a row of hidden for each pair
    prologue().run(shared, barrier, rows.data());
    TokenPtr batch_rows[MAX_CPU_TOKENS];
    BlockSums sums[2];  // matmul fills sums[0] alone
    std::vector<f32x16> total(m);
    const Range range = thread_range(w.n_blocks());
    for (int64_t block = range.begin; block < range.end; block++) {
      std::ranges::fill(total, f32x16{});
      for (const auto& [expert, pairs] : batches) {
        const int64_t n_pairs = pairs.size();
        for (int64_t i = 0; i < n_pairs; i++) batch_rows[i] = rows[pairs[i]];
        matmul<T>(n_pairs, w.expert(expert), &block, 1, batch_rows, sums);
        const T* expert_bias = bias ? bias + expert * w.n : nullptr;
        for (int64_t i = 0; i < n_pairs; i++) {
          const int64_t pair = pairs[i];
          total[pair / top_k] += topk_weights[pair] * add_bias(sums[0][i], expert_bias, block, w.n);
        }
      }
      for (int64_t i = 0; i < m; i++) {
        if (residual) total[i] += load_partial(residual + i * w.n, block * BLOCK_N, w.n);
        store_partial(total[i], out + i * w.n, block * BLOCK_N, w.n);
      }
    }
  }
};

// Computes topk_weights and topk_ids [m, top_k], the largest entries of softmax(logits [m, n_experts]). If
// norm_topk_prob, divides the weights of a token by their sum. If a logit is NaN, all weights of the token are NaN, and
// the ids are top_k different experts.
//
// Every token uses the shared experts. With n_shared_experts > 0, logits are [m, n_experts + 1]. The sigmoid of the
// last logit is the weight of each shared expert:
//
//     topk_ids[token]        top_k chosen experts    n_experts, n_experts + 1, ...
//     topk_weights[token]    softmax                 sigmoid, sigmoid, ...
struct RouteOp {
  const float* logits;
  int64_t m, n_experts, top_k, n_shared_experts;
  bool norm_topk_prob;
  float* topk_weights;
  int64_t* topk_ids;

  void execute(char*, Barrier&) const {
    const Range range = thread_range(m);
    const int64_t n_logits = n_experts + (n_shared_experts ? 1 : 0), n_chosen = top_k + n_shared_experts;
    for (int64_t i = range.begin; i < range.end; i++)
      route_token(logits + i * n_logits, topk_weights + i * n_chosen, topk_ids + i * n_chosen);
  }

  void route_token(const float* logits, float* weights, int64_t* ids) const {
    const float max = *std::max_element(logits, logits + n_experts);
    float total = 0, topk_total = 0;  // sums of exp(logit - max)
    for (int64_t e = 0; e < n_experts; e++) total += std::exp(logits[e] - max);
    for (int64_t i = 0; i < top_k; i++) {
      int64_t best = -1;
      for (int64_t e = 0; e < n_experts; e++) {
        const bool taken = std::find(ids, ids + i, e) != ids + i;
        if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
      }
      ids[i] = best;
      topk_total += weights[i] = std::exp(logits[best] - max);
    }
    const float sum = norm_topk_prob ? topk_total + 0 * total : total;  // 0 * total is NaN if any logit is NaN
    for (int64_t i = 0; i < top_k; i++) weights[i] /= sum;
    for (int64_t i = 0; i < n_shared_experts; i++) {
      ids[top_k + i] = n_experts + i;
      weights[top_k + i] = 1 / (1 + std::exp(-logits[n_experts]));
    }
  }
};
