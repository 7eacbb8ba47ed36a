// The operation sample: chooses the next token by its logits. layers/sampling.py does the same in PyTorch. Here the
// threads share the passes over the vocabulary, and nothing is sorted. (PyTorch's argmax is not vectorized, and takes
// 0.2 ms for 49,152 tokens.)
#pragma once

#include <cmath>
#include <limits>

#include "op_list.h"

// Both are explained in kernels/schema.py
constexpr int64_t INVALID_TOKEN = GPTFAST_INVALID_TOKEN;
constexpr float SMALLEST_TEMPERATURE = GPTFAST_SMALLEST_TEMPERATURE;

// The options that exclude tokens
struct TokenFilters {
  int64_t top_k;  // 0 means all
  double top_p;   // 1 means all
  float min_p;
};

// Computes tokens [m] from logits [m, n]. Without rand, it takes the likeliest token, or the first of tied tokens. With
// rand, it draws a token by exp(logit / temperature) among the tokens that filters keep. If a logit is not finite, the
// token is INVALID_TOKEN.
struct SampleOp {
  const float* logits;
  int64_t m, n;
  const double* rand;          // [m], random numbers in [0, 1), or null
  const float* temperature;    // [m], or [1] for all rows, or null
  int64_t temperature_stride;  // 1, or 0 for all rows
  TokenFilters filters;
  int64_t* tokens;

  // The vocabulary is cut into N_PARTS parts. A part begins at a multiple of LANES.
  static constexpr int64_t N_PARTS = 32;
  static constexpr int64_t BLOCK = 16 * LANES;   // weights that are added up in float; double adds up the blocks
  static constexpr int64_t MAX_COPIED = 1024;    // a multiple of LANES
  static constexpr uint32_t MAX_STEP = 8 << 23;  // 8 in the exponent of a float: a factor of 2^8

  Range part_range(int64_t part) const {
    const Range vecs = split_range(part, N_PARTS, divide_up(n, LANES));
    return {vecs.begin * LANES, std::min(vecs.end * LANES, n)};
  }
  int64_t padded_n() const { return round_up(n, LANES); }
  size_t shared_bytes() const { return m * (N_PARTS + (rand ? padded_n() : 0)) * sizeof(float); }

  // Phase 1: the threads share the parts of all rows, and find the largest logit of each part. Phase 2, with rand: they
  // compute the weights of each part. Phase 3: they share the rows, and choose a token for each.
  void execute(char* shared, Barrier& barrier) const {
    float* largest = reinterpret_cast<float*>(shared);  // [m, N_PARTS]
    float* weights = largest + m * N_PARTS;             // [m, padded_n]
    const Range parts = thread_range(m * N_PARTS);
    for (int64_t i = parts.begin; i < parts.end; i++)
      largest[i] = largest_logit(logits + i / N_PARTS * n, part_range(i % N_PARTS));
    barrier.wait();
    if (rand) {
      for (int64_t i = parts.begin; i < parts.end; i++) {
        const int64_t row = i / N_PARTS;
        compute_weights(row, part_range(i % N_PARTS), largest + row * N_PARTS, weights + row * padded_n());
      }
      barrier.wait();
    }
    const Range rows = thread_range(m);
    for (int64_t row = rows.begin; row < rows.end; row++) {
      const float* row_largest = largest + row * N_PARTS;
      const bool is_finite = std::none_of(row_largest, row_largest + N_PARTS, [](float x) { return std::isnan(x); });
      if (!is_finite) tokens[row] = INVALID_TOKEN;
      else if (rand) tokens[row] = draw(weights + row * padded_n(), rand[row]);
      else tokens[row] = likeliest(logits + row * n, row_largest);
    }
  }

  // Returns the largest of row[range.begin] to row[range.end - 1], or NaN if a logit is not finite.
  static float largest_logit(const float* row, Range range) {
    constexpr float LEAST = -std::numeric_limits<float>::max();
    f32x16 largest = f32x16{} + LEAST, zeros{};
    for (int64_t i = range.begin; i < range.end; i += LANES) {
      const f32x16 v = mask_lanes(load_partial(row, i, range.end), range.end - i, LEAST);
      largest = max_vec(v, largest);
      zeros += 0 * v;  // NaN if a logit is NaN or infinite
    }
    return max_lane(largest) + sum(zeros);
  }

  // Returns the index of the first largest logit in row [n], from the largest logits of all parts [N_PARTS].
  int64_t likeliest(const float* row, const float* largest) const {
    const int64_t best = std::max_element(largest, largest + N_PARTS) - largest;
    const Range range = part_range(best);
    return std::find(row + range.begin, row + range.end, largest[best]) - row;
  }

  // ---- Drawing ------------------------------------------------------------------------------------------------------

  // Computes weights exp((logit - largest logit) / temperature) of the tokens in range. The likeliest token has the
  // weight 1.
  void compute_weights(int64_t row, Range range, const float* largest, float* weights) const {
    const float max = *std::max_element(largest, largest + N_PARTS);
    const float divisor = std::max(temperature[row * temperature_stride], SMALLEST_TEMPERATURE);
    const float scale = LOG2_E / divisor;
    for (int64_t i = range.begin; i < range.end; i += LANES) {
      const f32x16 w = exp2_vec((load_partial(logits + row * n, i, range.end) - max) * scale);
      store_vec(mask_lanes(w, range.end - i, 0), weights + i);
    }
  }

  struct Sum {
    double weight;
    int64_t n_tokens;
    Sum operator+(const Sum& other) const { return {weight + other.weight, n_tokens + other.n_tokens}; }
  };

  // Returns the sum of the weights [size] that exceed threshold. size is a multiple of LANES. A higher threshold never
  // has a larger sum, even with rounding, because the order of the additions is always the same.
  static Sum sum_above(float threshold, const float* weights, int64_t size) {
    Sum total{};
    i32x16 n_tokens{};
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
      f32x16 sums[4] = {};  // independent: no addition waits for the previous one
      const int64_t end = std::min(begin + BLOCK, size);
      for (int64_t i = begin; i < end; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          if (i + j * LANES >= end) break;
          const f32x16 w = load_vec(weights + i + j * LANES);
          const i32x16 is_above = w > threshold;  // -1 is true
          sums[j] += is_above ? w : f32x16{};
          n_tokens -= is_above;
        }
      total.weight += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    for (int lane = 0; lane < LANES; lane++) total.n_tokens += n_tokens[lane];
    return total;
  }

  // Copies the weights in (low, high], up to MAX_COPIED. Pads the copies with zeros to a multiple of LANES, and returns
  // this multiple.
  static int64_t copy_between(float low, float high, const float* weights, int64_t size, float* copied) {
    int64_t n = 0;
    for (int64_t i = 0; i < size; i += LANES) {
      const f32x16 w = load_vec(weights + i);
      if (!any_lane(w > low)) continue;
      const i32x16 is_copied = (w > low) & (w <= high);  // -1 is true
      for (int lane = 0; lane < LANES; lane++) {  // without branches: they would be unpredictable
        copied[n] = w[lane];
        n -= is_copied[lane];
      }
    }
    while (n % LANES) copied[n++] = 0;
    return n;
  }

  // Finds the smallest set of likeliest tokens for which is_enough(Sum) is true. Returns t such that the set is
  // {weight > t}. If several tokens tie at the border, only as many as needed stay: the weights of the last ones become
  // 0. If even all tokens above low are not enough, returns low. The bits of positive floats are ordered like the
  // floats, so the search bisects the bits:
  //
  //     0 ........ low ........ middle ........ high ........ 1
  //                 |                            |
  //                 the tokens above are enough  the tokens above are not enough
  static float find_threshold(float low, float* weights, int64_t size, auto is_enough) {
    const auto bits = [](float x) { return std::bit_cast<uint32_t>(x); };
    alignas(64) float copied[MAX_COPIED + 1];
    const float* searched = weights;  // becomes copied, once copied has room for the weights in (low, high]
    int64_t searched_size = size;
    Sum above_low = sum_above(low, weights, size), above_high{}, above_searched{};
    if (!is_enough(above_low)) return low;
    float high = 1;  // no weight is larger
    while (above_low.n_tokens - above_high.n_tokens > 1 && bits(high) - bits(low) > 1) {
      if (searched == weights && above_low.n_tokens - above_high.n_tokens <= MAX_COPIED) {
        searched_size = copy_between(low, high, weights, size, copied);
        searched = copied, above_searched = above_high;
      }
      const float middle = std::bit_cast<float>(bits(high) - std::min(MAX_STEP, (bits(high) - bits(low)) / 2));
      const Sum above_middle = above_searched + sum_above(middle, searched, searched_size);
      if (is_enough(above_middle)) low = middle, above_low = above_middle;
      else high = middle, above_high = above_middle;
    }
    if (above_low.n_tokens - above_high.n_tokens == 1) return low;
    // No float is between low and high, so the weights in (low, high] are equal.
    for (int64_t i = 0; i < size; i++) {
      if (weights[i] != high) continue;
      if (is_enough(above_high)) weights[i] = 0;
      else above_high = above_high + Sum{high, 1};
    }
    return low;
  }

  // Returns t such that the filters keep the tokens {weight > t} of weights [padded_n]. Makes some weights 0, as
  // find_threshold does.
  float apply_filters(float* weights) const {
    const int64_t size = padded_n();
    float threshold = 0;
    if (filters.top_k && filters.top_k < n)
      threshold = find_threshold(threshold, weights, size, [&](const Sum& s) { return s.n_tokens >= filters.top_k; });
    if (filters.top_p < 1) {
      const double enough = filters.top_p * sum_above(threshold, weights, size).weight;
      threshold = find_threshold(threshold, weights, size, [&](const Sum& s) { return s.weight >= enough; });
    }
    return std::max(threshold, std::nextafter(filters.min_p, 0.0f));
  }

  // Draws a token by weights [padded_n], and overwrites some weights. Inverse transform sampling: takes the first token
  // at which the cumulative sum exceeds rand times the sum of all weights.
  int64_t draw(float* weights, double rand) const {
    const int64_t size = padded_n();
    const float threshold = apply_filters(weights);
    constexpr double LARGEST = 1 - std::numeric_limits<double>::epsilon();  // a random number may be rounded to 1
    const double target = std::min(rand, LARGEST) * sum_above(threshold, weights, size).weight;
    double sum = 0;
    for (int64_t begin = 0; begin < size; begin += BLOCK) {
      const int64_t end = std::min(begin + BLOCK, size);
      const double block_sum = sum_above(threshold, weights + begin, end - begin).weight;
      if (sum + block_sum <= target) {
        sum += block_sum;
        continue;
      }
      int64_t token = -1;  // after the loop the last kept token, if rounding made the sum too small
      for (int64_t i = begin; i < end && sum <= target; i++)
        if (weights[i] > threshold) token = i, sum += weights[i];
      return token;
    }
    return -1;  // not reached: the sum after the last block is the sum of all weights
  }
};
