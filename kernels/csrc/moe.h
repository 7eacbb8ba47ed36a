// A mixture of experts: the choice of experts, and the products with their weights.
#pragma once

#include "dot.h"

// A slot is one token's choice of one expert: an index into topk_ids [m, top_k], flattened. The token is slot / top_k.
struct ExpertUse {
  int64_t expert;
  std::vector<int64_t> slots;  // up to MAX_TOKENS that chose the expert
};

// Puts slots [n_slots] of the same expert together, so that its weights are read once for all of them. They are sorted
// by expert, so that a token's sum over its experts does not depend on the other tokens.
inline std::vector<ExpertUse> group_by_expert(const int64_t* topk_ids, int64_t n_slots) {
  std::vector<ExpertUse> uses;
  for (int64_t slot = 0; slot < n_slots; slot++) {
    const int64_t expert = topk_ids[slot];
    const auto is_before = [](int64_t e, const ExpertUse& use) { return e < use.expert; };
    auto next = std::upper_bound(uses.begin(), uses.end(), expert, is_before);  // the one after the expert's last use
    if (next == uses.begin() || next[-1].expert != expert || next[-1].slots.size() == MAX_TOKENS)
      next = uses.insert(next, ExpertUse{expert, {}}) + 1;
    next[-1].slots.push_back(slot);
  }
  return uses;
}

// hidden [m, top_k, n_out] = [activation] ([rms_norm] x [m, k] W^T [+ bias]), W [n, k] and bias [n] of each expert in
// topk_ids [m, top_k]
template <typename T> struct ExpertsGateUpOp {
  const T* x;
  int64_t m, top_k;
  const int64_t* topk_ids;
  Weights w;      // [n_experts, n, k]
  const T* bias;  // [n_experts, n] or null
  const T* norm;
  float eps;
  int64_t activation;  // as in LinearOp
  T* hidden;

  Activations<T> activations() const { return {x, m, w, norm, eps}; }
  size_t shared_bytes() const { return activations().shared_bytes(); }

  // The threads share out the blocks of outputs of all experts in use.
  void execute(char* shared, Barrier& barrier) const {
    const int64_t n_out = activation ? w.n / 2 : w.n, n_blocks = (n_out + BLOCK_N - 1) / BLOCK_N;
    const std::vector<ExpertUse> uses = group_by_expert(topk_ids, m * top_k);
    PreparedRow rows[MAX_TOKENS], rows_of_expert[MAX_TOKENS];
    activations().prepare(shared, barrier, rows);
    Outputs y[2];
    const Share share = my_share(n_blocks * uses.size());
    for (int64_t task = share.begin; task < share.end; task++) {
      const ExpertUse& use = uses[task / n_blocks];
      const int64_t block = task % n_blocks, n_slots = use.slots.size();
      const int64_t blocks[] = {block, block + n_blocks};  // gate, up
      for (int64_t i = 0; i < n_slots; i++) rows_of_expert[i] = rows[use.slots[i] / top_k];
      dot<T>(n_slots, w.expert(use.expert), blocks, activation ? 2 : 1, rows_of_expert, y);
      const T* expert_bias = bias ? bias + use.expert * w.n : nullptr;
      for (int64_t i = 0; i < n_slots; i++) {
        Vec v = add_bias(y[0][i], expert_bias, blocks[0], w.n);
        if (activation) v = activate(v, add_bias(y[1][i], expert_bias, blocks[1], w.n), activation);
        store_partial(v, hidden + use.slots[i] * n_out, block * BLOCK_N, n_out);
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

  Activations<T> activations() const { return {hidden, m * top_k, w, nullptr, 0}; }
  size_t shared_bytes() const { return activations().shared_bytes(); }

  // The threads share out the blocks of outputs: one thread adds up all experts of a block.
  void execute(char* shared, Barrier& barrier) const {
    const std::vector<ExpertUse> uses = group_by_expert(topk_ids, m * top_k);
    std::vector<PreparedRow> rows(m * top_k);
    activations().prepare(shared, barrier, rows.data());
    PreparedRow rows_of_expert[MAX_TOKENS];
    Outputs y[2], total;
    const Share share = my_share(w.n_blocks());
    for (int64_t block = share.begin; block < share.end; block++) {
      std::fill_n(total, m, Vec{});
      for (const ExpertUse& use : uses) {
        const int64_t n_slots = use.slots.size();
        for (int64_t i = 0; i < n_slots; i++) rows_of_expert[i] = rows[use.slots[i]];
        dot<T>(n_slots, w.expert(use.expert), &block, 1, rows_of_expert, y);
        const T* expert_bias = bias ? bias + use.expert * w.n : nullptr;
        for (int64_t i = 0; i < n_slots; i++) {
          const int64_t slot = use.slots[i];
          total[slot / top_k] += topk_weights[slot] * add_bias(y[0][i], expert_bias, block, w.n);
        }
      }
      for (int64_t i = 0; i < m; i++) {
        if (residual) total[i] += load_partial(residual + i * w.n, block * BLOCK_N, w.n);
        store_partial(total[i], out + i * w.n, block * BLOCK_N, w.n);
      }
    }
  }
};

// topk_weights, topk_ids [m, top_k] = the largest entries of softmax(logits [m, n_experts]). The weights are divided by
// their sum if normalize. If a logit is NaN, the ids are still top_k different ones, and all weights are NaN.
//
// With n_shared, another n_shared experts follow behind them, in topk_weights and topk_ids [m, top_k + n_shared] and as
// ids. Then logits are [m, n_experts + 1], and the sigmoid of the last one is the weight of each shared expert.
struct RouteOp {
  const float* logits;
  int64_t m, n_experts, top_k, n_shared;
  bool normalize;
  float* topk_weights;
  int64_t* topk_ids;

  void execute(char*, Barrier&) const {
    const Share share = my_share(m);
    const int64_t n_logits = n_experts + (n_shared ? 1 : 0), n_chosen = top_k + n_shared;
    for (int64_t i = share.begin; i < share.end; i++)
      route_row(logits + i * n_logits, topk_weights + i * n_chosen, topk_ids + i * n_chosen);
  }

  void route_row(const float* row, float* weights, int64_t* ids) const {
    const float max = *std::max_element(row, row + n_experts);
    float total = 0, chosen = 0;  // sums of exp(logit - max)
    for (int64_t e = 0; e < n_experts; e++) total += std::exp(row[e] - max);
    for (int64_t i = 0; i < top_k; i++) {
      int64_t best = -1;
      for (int64_t e = 0; e < n_experts; e++) {
        const bool taken = std::find(ids, ids + i, e) != ids + i;
        if (!taken && (best < 0 || row[e] > row[best])) best = e;
      }
      ids[i] = best;
      chosen += weights[i] = std::exp(row[best] - max);
    }
    const float sum = normalize ? chosen + 0 * total : total;  // 0 * total: NaN if any logit is
    for (int64_t i = 0; i < top_k; i++) weights[i] /= sum;
    for (int64_t i = 0; i < n_shared; i++) {
      ids[top_k + i] = n_experts + i;
      weights[top_k + i] = 1 / (1 + std::exp(-row[n_experts]));
    }
  }
};
