"""Where the elements of a weight W [N, K] are stored for the Triton kernels, and how a program loads a part of W.

    program_outputs    which outputs, that is rows of W, a program computes
    program_weights, weights_of_expert    the ProgramWeights of a program, and of one of its experts
    prefetch_weights   prefetches the first weights of a program into the L2 cache
    slice_starts, load_rows, load_tiles, load_group_scales    load what one step of fused_linear's loop multiplies
    load_scales        loads the scales of a tile that is dequantized

W has one of two layouts:

    rows     [N, K], row after row
    tiles    tiles of 16 rows and 64 columns (IS_TILED); formats/triton_layouts.py draws one

formats.py lists the layout of each format. linear.py and formats.py call these functions.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from formats import triton_layouts

TILE_N, TILE_K = tl.constexpr(triton_layouts.TILE_N), tl.constexpr(triton_layouts.TILE_K)
TILE_WORDS = tl.constexpr(triton_layouts.TILE_N * triton_layouts.TILE_K // 8)  # of 8 elements
# Bytes of W that a program prefetches before it waits for the previous kernel: about what the loop has in flight
PREFETCH_BYTES = tl.constexpr(16384)


class WeightLayout(NamedTuple):
    """How W is stored (formats.py: KernelFormat)."""

    IS_TILED: bool
    STRIDE: int  # elements or words of an output
    GROUP_SIZE: int
    HAS_CHANNEL_SCALES: bool


class BlockSizes(NamedTuple):
    """The sizes of a program of fused_linear (drawn in linear.py), derived from launch.py: TileConfig."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_OUT: int  # BLOCK_N, or BLOCK_N / 2 with a gated activation
    BLOCK_K: int
    SLICE_K: int
    K_SLICES: int
    NUM_STAGES: int


class ProgramWeights(NamedTuple):
    """The weights of a program of fused_linear: some rows of W [N, K]. Arguments of this type are called w."""

    ptr: tl.tensor
    scales_ptr: tl.tensor
    magic_number: tl.tensor  # see elements.py: int4_pair
    offs_n: tl.tensor  # [BLOCK_N], the rows: see program_outputs
    mask_n: tl.tensor  # [BLOCK_N], false for a row beyond the end of W
    N: tl.tensor
    N_OUT: tl.tensor  # N, or N / 2 with a gated activation


@triton.jit
def program_outputs(i, BLOCK_OUT: tl.constexpr, N_OUT):
    """Returns the row of W that is row i of this program, for i in [0, BLOCK_N).

    Without a gated activation the rows of a program are contiguous: BLOCK_OUT = BLOCK_N, N_OUT = N. With one, W is a
    gate projection of N_OUT rows above an up projection of N_OUT rows. Then BLOCK_OUT = BLOCK_N / 2, and program p
    takes the same rows of both projections:

        i                             row of W
        0 ... BLOCK_OUT - 1           p BLOCK_OUT ... (p + 1) BLOCK_OUT - 1        of the gate projection
        BLOCK_OUT ... BLOCK_N - 1     N_OUT + these rows                           of the up projection

    If BLOCK_OUT and N_OUT count tiles of 16 rows, i and the result count tiles, too."""
    return tl.program_id(0) * BLOCK_OUT + i % BLOCK_OUT + i // BLOCK_OUT * N_OUT


@triton.jit
def program_weights(w_ptr, scales_ptr, magic_number, N, N_OUT, SIZES: tl.constexpr):
    i = tl.arange(0, SIZES.BLOCK_N)
    offs_n = program_outputs(i, SIZES.BLOCK_OUT, N_OUT)
    mask_n = tl.program_id(0) * SIZES.BLOCK_OUT + i % SIZES.BLOCK_OUT < N_OUT
    return ProgramWeights(w_ptr, scales_ptr, magic_number, offs_n, mask_n, N, N_OUT)


@triton.jit
def weights_of_expert(w, bias_ptr, expert, K: tl.constexpr, LAYOUT: tl.constexpr):
    """Returns w and bias_ptr at the matrix of expert. Takes w and bias_ptr at the first expert of a stack [E, N, K]."""
    first_output = expert * w.N  # among the outputs of all experts
    w_ptr, scales_ptr = w.ptr + first_output * LAYOUT.STRIDE, w.scales_ptr
    if scales_ptr is not None:
        scales_ptr += first_output * tl.cdiv(K, LAYOUT.GROUP_SIZE)
    if bias_ptr is not None:
        bias_ptr += first_output
    return ProgramWeights(w_ptr, scales_ptr, w.magic_number, w.offs_n, w.mask_n, w.N, w.N_OUT), bias_ptr


@triton.jit
def prefetch_weights(w, LAYOUT: tl.constexpr, SIZES: tl.constexpr):
    """Prefetches the first PREFETCH_BYTES of the weights of a program into the L2 cache, as many bytes of each unit. A
    unit is a row or, if IS_TILED, 16 rows, because these are stored together. One thread requests all bytes of a unit:
    many small requests are slow."""
    UNIT_N: tl.constexpr = TILE_N if LAYOUT.IS_TILED else 1  # rows of a unit
    N_UNITS: tl.constexpr = SIZES.BLOCK_N // UNIT_N
    UNIT_BYTES: tl.constexpr = UNIT_N * LAYOUT.STRIDE * w.ptr.dtype.element_ty.primitive_bitwidth // 8
    PREFETCHED: tl.constexpr = min(UNIT_BYTES, PREFETCH_BYTES // N_UNITS) // 16 * 16  # bytes of a unit
    if PREFETCHED > 0 and UNIT_BYTES % 16 == 0:  # the instruction takes multiples of 16
        thread = tl.arange(0, tl.extra.cuda.num_threads())
        unit = program_outputs(thread % N_UNITS, SIZES.BLOCK_OUT // UNIT_N, w.N_OUT // UNIT_N)
        unit = tl.minimum(unit, tl.cdiv(w.N, UNIT_N) - 1)
        address = w.ptr.to(tl.int64) + unit.to(tl.int64) * UNIT_BYTES
        size = tl.where(thread < N_UNITS, PREFETCHED, 0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1,
        )


@triton.jit
def slice_starts(IS_TILED: tl.constexpr, SLICE_K: tl.constexpr, K_SLICES: tl.constexpr):
    """Returns the first column of each slice, counted from the first column of the step: [K_SLICES]. If slices are half
    a tile wide, all left halves come before all right halves, as in the result of tiles_to_floats."""
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
    """Loads the rows of the program from a W in rows, in the slices that begin at columns k_starts [K_SLICES]:
    [K_SLICES, BLOCK_N, SLICE_K]."""
    offs_k = slice_columns(k_starts, SLICE_K)
    offsets = w.offs_n.to(tl.int64)[None, :, None] * K + offs_k[:, None, :]
    return tl.load(w.ptr + offsets, mask=w.mask_n[None, :, None] & (offs_k < K)[:, None, :], other=0)


@triton.jit
def load_tiles(w, k, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Loads the rows of the program from a W in tiles, in columns [k, k + BLOCK_K). The result is the words of whole
    tiles: [BLOCK_N / TILE_N * BLOCK_K / TILE_K, TILE_WORDS]."""
    TILES_IN_STEP: tl.constexpr = BLOCK_K // TILE_K
    i = tl.arange(0, BLOCK_N // TILE_N * TILES_IN_STEP)
    tile_n = program_outputs(i // TILES_IN_STEP, BLOCK_OUT // TILE_N, w.N_OUT // TILE_N)
    tile_k = k // TILE_K + i % TILES_IN_STEP
    mask = (tile_n < tl.cdiv(w.N, TILE_N)) & (tile_k < tl.cdiv(K, TILE_K))
    tile = tile_n.to(tl.int64) * tl.cdiv(K, TILE_K) + tile_k
    offsets = tile[:, None] * TILE_WORDS + tl.arange(0, TILE_WORDS)[None, :]
    return tl.load(w.ptr + offsets, mask=mask[:, None], other=0)


@triton.jit
def load_group_scales(w, k_starts, K: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """Loads the scales of the rows of the program, in the slices that begin at columns k_starts [K_SLICES]:
    [K_SLICES, BLOCK_N, 1]. A slice lies in one group. The scales are stored as [n_groups, N]."""
    offsets = (k_starts // GROUP_SIZE)[:, None] * w.N + w.offs_n[None, :]
    mask = (k_starts < K)[:, None] & w.mask_n[None, :]
    return tl.load(w.scales_ptr + offsets, mask=mask, other=0)[:, :, None]


@triton.jit
def load_scales(scales_ptr, offs_n, offs_k, mask, N, GROUP_SIZE):
    """Loads the scales of rows offs_n [X] and columns offs_k [Y]: [X, Y]. The scales are stored as [n_groups, N]."""
    offsets = (offs_k // GROUP_SIZE).to(tl.int64)[None, :] * N + offs_n[:, None]
    return tl.load(scales_ptr + offsets, mask=mask, other=0)
