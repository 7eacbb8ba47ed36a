"""Where the elements of a weight W [N, K] lie for the Triton kernels, and how a program loads its part.

    program_outputs    which outputs, that is rows of W, a program computes
    prefetch_weights   starts to bring them into the cache
    slice_starts, load_rows, load_tiles, load_slice_scales    what a step of fused_linear's loop multiplies

There are two layouts. W in rows is [N, K], row after row. W in tiles (IS_TILED) is stored in tiles of 16 rows and 64
columns, which kernels/formats/triton_layouts.py draws. formats.py says which format has which layout, and how it is
multiplied.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.triton.tiles import TILE_K, TILE_N, TILE_WORDS


class ProgramWeights(NamedTuple):
    """Holds the weights of a program of fused_linear: some rows of W [N, K]. Functions that take this call it w."""

    ptr: tl.tensor
    scales_ptr: tl.tensor
    packed_offset: tl.tensor  # elements.py: int4_pair
    offs_n: tl.tensor  # [BLOCK_N], the rows: see program_outputs
    mask_n: tl.tensor  # [BLOCK_N], which of them W has
    N: tl.tensor
    N_OUT: tl.tensor


@triton.jit
def program_outputs(i, BLOCK_OUT: tl.constexpr, N_OUT):
    """Returns which row of W is row i of this program, for i in [0, BLOCK_N).

    Without an activation the rows of a program follow each other: BLOCK_OUT = BLOCK_N, N_OUT = N. With one, W is a gate
    projection of N_OUT rows above an up projection of N_OUT rows. Then BLOCK_OUT = BLOCK_N / 2, and program p takes the
    same rows of both:

        i                             row of W
        0 ... BLOCK_OUT - 1           p BLOCK_OUT ... (p + 1) BLOCK_OUT - 1        of the gate projection
        BLOCK_OUT ... BLOCK_N - 1     the same + N_OUT                             of the up projection

    If BLOCK_OUT and N_OUT count tiles of 16 rows, so do i and the result."""
    return tl.program_id(0) * BLOCK_OUT + i % BLOCK_OUT + i // BLOCK_OUT * N_OUT


@triton.jit
def prefetch_weights(
    w_ptr, N, N_OUT,
    W_STRIDE: tl.constexpr, IS_TILED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PREFETCH_BYTES: tl.constexpr, N_THREADS: tl.constexpr,
):  # fmt: skip
    """Starts to bring the first PREFETCH_BYTES of the weights of a program into the L2 cache: equally many of each row
    or, if IS_TILED, of each 16 rows, which are stored together. One thread asks for all of a row, since many small
    requests are slow."""
    UNIT_N: tl.constexpr = TILE_N if IS_TILED else 1  # rows that are stored together
    N_UNITS: tl.constexpr = BLOCK_N // UNIT_N
    UNIT_BYTES: tl.constexpr = UNIT_N * W_STRIDE * w_ptr.dtype.element_ty.primitive_bitwidth // 8
    PREFETCHED: tl.constexpr = min(UNIT_BYTES, PREFETCH_BYTES // N_UNITS) // 16 * 16  # bytes of each unit
    if PREFETCHED > 0 and UNIT_BYTES % 16 == 0:  # the instruction takes multiples of 16
        thread = tl.arange(0, N_THREADS)
        unit = program_outputs(thread % N_UNITS, BLOCK_OUT // UNIT_N, N_OUT // UNIT_N)
        unit = tl.minimum(unit, tl.cdiv(N, UNIT_N) - 1)
        address = w_ptr.to(tl.int64) + unit.to(tl.int64) * UNIT_BYTES
        size = tl.where(thread < N_UNITS, PREFETCHED, 0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def slice_starts(IS_TILED: tl.constexpr, SLICE_K: tl.constexpr, K_SLICES: tl.constexpr):
    """Returns the column of a step in which each slice begins: [K_SLICES]. If slices are half a tile wide, all left
    halves come before all right halves, as tiles_to_floats returns them."""
    i = tl.arange(0, K_SLICES)
    if IS_TILED:
        TILES_IN_STEP: tl.constexpr = K_SLICES * SLICE_K // TILE_K
        return i % TILES_IN_STEP * TILE_K + i // TILES_IN_STEP * SLICE_K
    return i * SLICE_K


@triton.jit
def slice_columns(k_starts, SLICE_K: tl.constexpr):
    """Returns the columns of slices that begin at k_starts [K_SLICES]: [K_SLICES, SLICE_K]."""
    return k_starts[:, None] + tl.arange(0, SLICE_K)[None, :]


@triton.jit
def load_rows(w, k_starts, K: tl.constexpr, SLICE_K: tl.constexpr):
    """Loads from a W in rows: the outputs of the program, of the slices that begin at columns k_starts [K_SLICES]:
    [K_SLICES, BLOCK_N, SLICE_K]."""
    offs_k = slice_columns(k_starts, SLICE_K)
    offsets = w.offs_n.to(tl.int64)[None, :, None] * K + offs_k[:, None, :]
    return tl.load(w.ptr + offsets, mask=w.mask_n[None, :, None] & (offs_k < K)[:, None, :], other=0)


@triton.jit
def load_tiles(w, k, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads from a W in tiles: the outputs of the program and columns [k, k + BLOCK_K), as the words of whole tiles:
    [BLOCK_N / TILE_N * BLOCK_K / TILE_K, TILE_WORDS]."""
    TILES_IN_STEP: tl.constexpr = BLOCK_K // TILE_K  # side by side
    i = tl.arange(0, BLOCK_N // TILE_N * TILES_IN_STEP)
    tile_n = program_outputs(i // TILES_IN_STEP, BLOCK_OUT // TILE_N, w.N_OUT // TILE_N)
    tile_k = k // TILE_K + i % TILES_IN_STEP
    mask = (tile_n < tl.cdiv(w.N, TILE_N)) & (tile_k < tl.cdiv(K, TILE_K))
    tile = tile_n.to(tl.int64) * tl.cdiv(K, TILE_K) + tile_k
    offsets = tile[:, None] * TILE_WORDS + tl.arange(0, TILE_WORDS)[None, :]
    return tl.load(w.ptr + offsets, mask=mask[:, None], other=0)


@triton.jit
def load_slice_scales(w, k_starts, K: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Loads scales that are stored column by column, [n_groups, N]: those of the outputs of the program and of the
    slices that begin at columns k_starts [K_SLICES], each of which lies in one group: [K_SLICES, BLOCK_N, 1]."""
    offsets = (k_starts // GROUP_SIZE)[:, None] * w.N + w.offs_n[None, :]
    mask = (k_starts < K)[:, None] & w.mask_n[None, :]
    return tl.load(w.scales_ptr + offsets, mask=mask, other=0)[:, :, None]


@triton.jit
def load_scales(scales_ptr, offs_n, offs_k, mask, N, GROUP_SIZE):
    """Loads scales that are stored column by column: those of outputs offs_n [X] and columns offs_k [Y]: [X, Y]."""
    offsets = (offs_k // GROUP_SIZE).to(tl.int64)[None, :] * N + offs_n[:, None]
    return tl.load(scales_ptr + offsets, mask=mask, other=0)
