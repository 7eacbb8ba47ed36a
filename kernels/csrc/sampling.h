// The operation sample, for temperature 0: chooses the likeliest token. This kernel replaces PyTorch's argmax, which is
// not vectorized and takes 0.2 ms for 49,152 tokens.
#pragma once

#include <limits>

#include "tape.h"

// Computes tokens [m] = argmax(logits [m, n]). Of tied tokens, takes the first. If a logit is not finite, writes -1.
struct SampleOp {
  const float* logits;
  int64_t m, n;
  int64_t* tokens;

  // The vocabulary is cut into N_PARTS parts. A part begins at a multiple of LANES.
  static constexpr int64_t N_PARTS = 32;

  Range part_range(int64_t part) const {
    const Range vecs = range_of_thread(part, N_PARTS, divide_up(n, LANES));
    return {vecs.begin * LANES, std::min(vecs.end * LANES, n)};
  }
  size_t shared_bytes() const { return m * N_PARTS * sizeof(float); }

  // Phase 1: the threads share the parts of all rows, and find the largest logit of each part. Phase 2: the threads
  // share the rows, and find the first occurrence of the row's largest logit.
  void execute(char* shared, Barrier& barrier) const {
    float* largest = reinterpret_cast<float*>(shared);  // [m, N_PARTS]
    const Range parts = thread_range(m * N_PARTS);
    for (int64_t i = parts.begin; i < parts.end; i++)
      largest[i] = largest_logit(logits + i / N_PARTS * n, part_range(i % N_PARTS));
    barrier.wait();
    const Range rows = thread_range(m);
    for (int64_t row = rows.begin; row < rows.end; row++)
      tokens[row] = likeliest(logits + row * n, largest + row * N_PARTS);
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
    int64_t best = 0;
    for (int64_t part = 0; part < N_PARTS; part++) {
      if (std::isnan(largest[part])) return -1;
      if (largest[part] > largest[best]) best = part;
    }
    const Range range = part_range(best);
    return std::find(row + range.begin, row + range.end, largest[best]) - row;
  }
};
