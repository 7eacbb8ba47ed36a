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

// A loop has part `index` of `count` parts of the tokens. next_block: how many blocks ahead the next unread block is,
// 1, or 2 if two blocks are read in step.
struct TokenPart { int64_t index, count, next_block; };

// Prefetches for a loop over M tokens that reads BLOCKS blocks in step.
template <int M, int BLOCKS> class Prefetcher {
  static constexpr bool IS_WHOLE = M <= 2;  // one or two tokens are never a part
  int64_t begin;           // the distance in bytes from the first weights of a block to what is prefetched with them
  int64_t step = 64;       // how many bytes to prefetch for 64 bytes read
  int64_t limit, skipped;  // from offset `limit` on, the address would be in the other block, so `skipped` is added

 public:
  Prefetcher(const Weights& w, const TokenPart& part)
      : begin(std::min(PREFETCH, w.block_bytes())), limit(w.block_bytes() - begin),
        skipped((part.next_block - 1) * w.block_bytes()) {
    if (IS_WHOLE || part.count == 1) return;
    begin = part.next_block * w.block_bytes() + part.index * w.block_bytes() / part.count;
    step = 64 / part.count, limit = w.block_bytes();
  }

  // Prefetches for the weights at an offset in a block.
  [[gnu::always_inline]] void operator()(const char* block, int64_t offset) const {
    if constexpr (IS_WHOLE && BLOCKS == 1) return prefetch_l1(block + offset + PREFETCH);
    const char* p = block + begin + offset / 64 * step;
    prefetch_l1(BLOCKS > 1 && offset >= limit ? p + skipped : p);
  }
};
