// What the loops of dot.h prefetch. A core reaches memory's bandwidth only if weights are asked for long before they
// are multiplied.
//
// A loop prefetches PREFETCH bytes ahead, in the order in which weights are read. A loop over two adjacent blocks reads
// both blocks in step. Then a loop reads the next two blocks, so the order is
//
//     block 0  ------->  block 2  ------->  block 4
//     block 1  ------->  block 3  ------->  block 5
//
// If there are too many tokens for one loop, the tokens are cut into m-blocks of up to BLOCK_M tokens, and the loop for
// each m-block reads the same blocks. The first loop reads the blocks from memory, and the other loops read the blocks
// from the cache. So that memory is never idle, each of n loops prefetches an n-th of the next blocks:
//
//     tokens 0-3    read blocks 0 and 1, prefetch the first half of blocks 2 and 3
//     tokens 4-8    read blocks 0 and 1, prefetch the second half
#pragma once

#include "weights.h"

// A core that reads 40 GB/s at a latency of 200 ns has 8,000 bytes in flight. L1 then still has room for activations.
constexpr int64_t PREFETCH = 8192;

// Which m-block a loop multiplies, and how many blocks of weights are adjacent in memory: 1 or 2.
struct MBlock { int64_t index, n_m_blocks, n_adjacent; };

// Prefetches for a loop over M tokens that reads BLOCKS blocks in step.
template <int M, int BLOCKS> class Prefetcher {
  static constexpr bool IS_ONLY = M <= 2;  // one or two tokens are the only m-block
  int64_t distance;   // in bytes, from the first weights of a block to the weights that are prefetched first
  int64_t step = 64;  // bytes to prefetch for 64 bytes read
  // A loop reads blocks 0 and 1 in step, and then blocks 2 and 3. Near the end of block 0, `distance` bytes further
  // would be block 1, which is being read already. So from offset jump_from on, jump_bytes are added, which skips
  // block 1:
  //
  //     | block 0      read | block 1            | block 2  prefetched     |
  //                     |<--- distance + jump_bytes --->|
  int64_t jump_from, jump_bytes;

 public:
  Prefetcher(const Weights& w, const MBlock& m_block)
      : distance(std::min(PREFETCH, w.block_bytes())), jump_from(w.block_bytes() - distance),
        jump_bytes((m_block.n_adjacent - 1) * w.block_bytes()) {
    if (IS_ONLY || m_block.n_m_blocks == 1) return;
    distance = m_block.n_adjacent * w.block_bytes() + m_block.index * w.block_bytes() / m_block.n_m_blocks;
    step = 64 / m_block.n_m_blocks, jump_from = w.block_bytes();
  }

  // Prefetches for the weights at an offset in a block.
  [[gnu::always_inline]] void operator()(const char* block, int64_t offset) const {
    if constexpr (IS_ONLY && BLOCKS == 1) return prefetch_l1(block + offset + PREFETCH);
    const char* p = block + distance + offset / 64 * step;
    prefetch_l1(BLOCKS > 1 && offset >= jump_from ? p + jump_bytes : p);
  }
};
