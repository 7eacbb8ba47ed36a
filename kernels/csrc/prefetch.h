// What the loops of dot.h prefetch. A core reaches memory's bandwidth only if it asks for weights long before it
// multiplies them: PREFETCH_DISTANCE bytes ahead, in the order of reading. A loop over a pair of adjacent blocks reads
// both in step, then the next pair:
//
//     block 0  ------->  block 2  ------->  block 4
//     block 1  ------->  block 3  ------->  block 5
//
// The scales of the pair's groups are read in step, too. Prefetch them in the same order. They mislead the processor's
// own prefetcher, because the scales of block 0 end where those of block 1 begin.
//
// With more than BLOCK_M tokens, the loop runs once for each tile of tokens. Only the first tile reads the blocks from
// memory. Each of n tiles prefetches an n-th of the next blocks, to keep memory busy all the time:
//
//     tokens 0-3    read blocks 0 and 1, prefetch the first half of blocks 2 and 3
//     tokens 4-8    read blocks 0 and 1, prefetch the second half
#pragma once

#include "weights.h"

// A core that reads 40 GB/s at a latency of 200 ns has 8,000 bytes in flight. L1 then still has room for activations.
constexpr int64_t PREFETCH_DISTANCE = 8192;

// A tile is up to BLOCK_M tokens that a loop multiplies together. index counts the n_tiles tiles. n_adjacent is the
// number of the loop's blocks that are adjacent in memory: 1 or 2.
struct TokenTile { int64_t index, n_tiles, n_adjacent; };

// Prefetches for a loop over M tokens that reads BLOCKS blocks in step.
template <int M, int BLOCKS> class Prefetcher {
  static constexpr bool IS_ONLY = M <= 2;  // one or two tokens are the only tile
  int64_t distance;   // in bytes, from the first weights of a block to the weights that are prefetched first
  int64_t step = 64;  // bytes to prefetch for 64 bytes read
  // Blocks 0 and 1 are read in step, so block 2 follows block 0. From offset jump_from on, the prefetched address is
  // jump_bytes further, to skip block 1:
  //
  //     | block 0      read | block 1            | block 2  prefetched     |
  //                     |<--- distance + jump_bytes --->|
  int64_t jump_from, jump_bytes;
  int64_t distance_groups, jump_groups;  // distance and jump_bytes, counted in groups of weights

 public:
  Prefetcher(const Weights& w, const TokenTile& tile)
      : distance(std::min(PREFETCH_DISTANCE, w.block_bytes())), jump_from(w.block_bytes() - distance),
        jump_bytes((tile.n_adjacent - 1) * w.block_bytes()), distance_groups(w.n_groups * distance / w.block_bytes()),
        jump_groups((tile.n_adjacent - 1) * w.n_groups) {
    if (IS_ONLY || tile.n_tiles == 1) return;
    distance = tile.n_adjacent * w.block_bytes() + tile.index * w.block_bytes() / tile.n_tiles;
    step = 64 / tile.n_tiles, jump_from = w.block_bytes();
  }

  // Prefetches for the weights at an offset in a block.
  [[gnu::always_inline]] void operator()(const char* block, int64_t offset) const {
    if constexpr (IS_ONLY && BLOCKS == 1) return prefetch_l1(block + offset + PREFETCH_DISTANCE);
    const char* p = block + distance + offset / 64 * step;
    prefetch_l1(BLOCKS > 1 && offset >= jump_from ? p + jump_bytes : p);
  }

  // Prefetches scales and zeros for group `group` of the block with this index.
  template <typename F> [[gnu::always_inline]] void scales(const Weights& w, int64_t block, int64_t group) const {
    const int64_t jump = group + distance_groups >= w.n_groups ? jump_groups : 0;
    const int64_t i = block * w.n_groups + group + distance_groups + jump;
    prefetch_l1(w.scales + i * BLOCK_N * F::SCALE_BYTES);
    if constexpr (F::HAS_ZEROS) prefetch_l1(w.zeros + i * BLOCK_N);
  }
};
