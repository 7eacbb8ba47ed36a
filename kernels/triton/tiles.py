"""How a tile of 4-bit elements becomes a matrix unit's factor. kernels/formats/triton_layouts.py draws tiles."""

import triton
import triton.language as tl

TILE_N, TILE_K = tl.constexpr(16), tl.constexpr(64)  # rows and columns of a tile
TILE_WORDS = tl.constexpr(128)


@triton.jit
def tiles_to_floats(
    words, packed_offset, DECODE: tl.constexpr, TILES_N: tl.constexpr, SLICE_K: tl.constexpr, DTYPE: tl.constexpr
):
    """The words [TILES_N * TILES_K, 128] of TILES_N rows of TILES_K tiles -> what DECODE, int4_pair or e2m1_pair, makes
    of their elements, in slices of SLICE_K columns: [64 TILES_K / SLICE_K, 16 TILES_N, SLICE_K]. A slice is a tile wide
    (64) or half a tile (32). Then all left halves come before all right halves."""
    TILES_K: tl.constexpr = words.shape[0] // TILES_N
    words = tl.reshape(words, [TILES_N, TILES_K, 8, 4, 4])  # tile_n, tile_k, lane / 4, lane % 4, word
    # Bits 0 and 16 hold columns c + 0 and c + 1, bits 8 and 24 columns c + 16 and c + 17, and so on: see the drawing
    columns_0_1_16_17 = tl.join(DECODE(words, packed_offset, DTYPE), DECODE(words >> 8, packed_offset, DTYPE))
    columns_2_3_18_19 = tl.join(DECODE(words >> 4, packed_offset, DTYPE), DECODE(words >> 12, packed_offset, DTYPE))
    q = tl.join(columns_0_1_16_17, columns_2_3_18_19)
    # Now there is an axis for every digit of an element's place:
    #
    #     axis   0       1       2         3            4      5          6         7          8
    #     digit  tile_n  tile_k  lane_row  lane_column  row_8  column_32  column_1  column_16  column_2
    #
    #     row    = 16 tile_n + 8 row_8 + lane_row                                                   axes 0 4 2
    #     column = 64 tile_k + 32 column_32 + 16 column_16 + 4 lane_column + 2 column_2 + column_1  axes 1 5 7 3 8 6
    q = tl.reshape(q, [TILES_N, TILES_K, 8, 4, 2, 2, 2, 2, 2])
    if SLICE_K == 64:
        q = tl.permute(q, 1, 0, 4, 2, 5, 7, 3, 8, 6)  # slice: 1    row: 0 4 2    column in the slice: 5 7 3 8 6
    else:
        q = tl.permute(q, 5, 1, 0, 4, 2, 7, 3, 8, 6)  # slice: 5 1    row: 0 4 2    column in the slice: 7 3 8 6
    return tl.reshape(q, [64 * TILES_K // SLICE_K, 16 * TILES_N, SLICE_K])
