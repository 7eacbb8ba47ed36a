// The softmax of attention, computed for some of the keys at a time, for attention.h and prefill_attention.h. The names
// are FlashAttention's:
//
//     m_i     =  the maximum of score * log2(e)
//     p       =  2^(score * log2(e) - m_i)
//     l_i     =  the sum of p
//     output  =  (the sum of p v) / l_i         =  softmax(scores) v
//
// The output is the same for every m_i. The maximum keeps p from overflowing. m_i ignores a score that is NaN. Its p is
// NaN, and so is the output.
#pragma once

#include "simd.h"

// A softmax over some keys
struct SoftmaxState { float m_i, l_i; };

// Computes p = 2^(score * exponent_scale - m_i) for scores [n], 16 at a time: store(p, i) gets p of scores i to
// i + 15. Returns the sum of p. Scores beyond n, up to a multiple of 16, must be -infinity.
inline float exponentiate(const float* scores, int64_t n, float exponent_scale, float m_i, auto store) {
  f32x16 l_i = {};
#pragma GCC unroll 4  // the steps of a single exponential wait for each other
  for (int64_t i = 0; i < n; i += LANES) {
    const f32x16 p = exp2_vec(load_vec(scores + i) * exponent_scale - m_i);
    l_i += p;
    store(p, i);
  }
  return sum(l_i);
}

// Computes the weights [n] with which the n splits s of a query's keys are combined:
//
//     m_i        =  the maximum of all m_s and of sink * log2(e)
//     alpha_s    =  2^(m_s - m_i)
//     l_i        =  the sum of alpha_s * l_s, and of 2^(sink * log2(e) - m_i)
//     weights_s  =  alpha_s / l_i
//     output     =  the sum of weights_s * (the sum of p v of split s)
//
// splits[s * stride] is m_s and l_s. A sink is the score of one more key, whose value is zero. -infinity means no sink.
inline void combine_softmaxes(const SoftmaxState* splits, int64_t n, int64_t stride, float sink, float* weights) {
  float m_i = sink * LOG2_E;
  for (int64_t s = 0; s < n; s++) m_i = std::max(m_i, splits[s * stride].m_i);
  float l_i = std::exp2(sink * LOG2_E - m_i);
  for (int64_t s = 0; s < n; s++) {
    const auto [m_s, l_s] = splits[s * stride];
    weights[s] = l_s == 0 ? 0 : std::exp2(m_s - m_i);  // alpha_s; l_s is 0 if the query sees no key of the split
    l_i += weights[s] * l_s;
  }
  for (int64_t s = 0; s < n; s++) weights[s] /= l_i;
}
