// What the loops of dot.h prefetch. A core reaches memory's bandwidth only if it asks for weights long before it
// multiplies them.
//
// A loop prefetches PREFETCH bytes ahead, in the order in which weights are read. A loop over two adjacent blocks reads
// both in step. Then a loop reads the next two, so the order is
//
//     block 0  ------->  block 2  ------->  block 4
//     block 1  ------->  block 3  ------->  block 5
//
// If there are too many tokens for one loop, several loops read the same blocks, each for a part of the tokens. The
// first loop reads the blocks from memory, the others from the cache. So that memory is never idle, each of n loops
// prefetches an n-th of the next blocks:
//
//     tokens 0-3    read blocks 0 and 1, prefetch the first half of blocks 2 and 3
//     tokens 4-8    read blocks 0 and 1, prefetch the second half
#pragma once

#include "weights.h"

// A core that reads 40 GB/s at a latency of 200 ns has 8,000 bytes in flight. They leave room for activations in L1.
constexpr int64_t PREFETCH = 8192;

// Part `index` of `count` parts of the tokens. next_block says which block follows a block in the order above: the next
// one, 1, or the one after that, 2.
struct Part { int64_t index, count, next_block; };

// Prefetches for a loop over M tokens that reads N streams in step. A stream is a block, or an output of an unquantized
// block.
template <int M, int N> class Prefetcher {
  static constexpr int64_t AHEAD = PREFETCH / N;
  static constexpr bool IS_WHOLE = M <= 2;  // one or two tokens are never a part
  int64_t begin = AHEAD;   // the distance in bytes from the first weights of a block to what is prefetched with them
  int64_t step = 64;       // how many bytes to prefetch for 64 bytes read
  int64_t limit, skipped;  // from this offset in a stream, skips so many bytes, which belong to the other streams

 public:
  Prefetcher(const Weights& w, const Part& part, int64_t stream_bytes, int64_t skipped)
      : limit(stream_bytes - AHEAD), skipped(skipped) {
    if (IS_WHOLE || part.count == 1) return;
    const int64_t block_bytes = w.block_bytes();
    begin = part.next_block * block_bytes + part.index * block_bytes / part.count;
    step = 64 / part.count, limit = stream_bytes;
  }

  // Prefetches for the weights at an offset in a block. offset_in_stream is the same offset, or that in the output.
  [[gnu::always_inline]] void operator()(const char* block, int64_t offset, int64_t offset_in_stream) const {
    if constexpr (IS_WHOLE && N == 1) return prefetch_l1(block + offset + AHEAD);
    const char* p = block + begin + offset / 64 * step;
    prefetch_l1(N > 1 && offset_in_stream >= limit ? p + skipped : p);
  }
};

// Returns the Prefetcher of a loop over BLOCKS blocks of quantized weights.
template <int M, int BLOCKS> Prefetcher<M, BLOCKS> block_prefetcher(const Weights& w, const Part& part) {
  return {w, part, w.block_bytes(), (part.next_block - 1) * w.block_bytes()};
}
