"""The matmul of a few tokens with a weight in any format, in Triton. It reads weights once for all tokens, and fuses
the norm before the matmul (prologue) and the steps after it (epilogue): a decode step on a GPU is memory-bound.

    fused_linear    y = x W^T with prologue and epilogue, in the order of layers/linear.py: Linear
    rms_norm        a norm that no matmul follows
    permute_inputs  puts x in the order of the columns of W

They implement torch.ops.gptfast_triton.* (kernels/schema.py). formats.py has what depends on the format of W.

Other GPUs than NVIDIA's leave out the instructions that only NVIDIA's have. With TRITON_INTERPRET=1 the kernels run on
CPU tensors. tests/test_triton.py checks them in this way.

M, N and K are CUTLASS's, for y [M, N] = x W^T: M tokens, N outputs (the rows of W), K inputs (the columns of W). Names
such as offs_m have the same letters.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.schema import (
    WeightArguments,
    empty_permute_inputs,
    empty_rms_norm,
    output_width,
    register_triton,
)
from kernels.triton.elements import MAGIC_NUMBERS
from kernels.triton.epilogue import EpilogueArgs, epilogue, inverse_rms, load_per_output, load_residual
from kernels.triton.formats import KernelFormat, kernel_format
from kernels.triton.launch import (
    MMA_N,
    choose_tiles,
    dot_dtype,
    min_block_m,
    pdl_options,
    pdl_wait,
)
from kernels.triton.weights import (
    BlockSizes,
    ProgramWeights,
    WeightLayout,
    prefetch_weights,
    program_weights,
    slice_columns,
    slice_starts,
    weights_of_expert,
)

# ---- fused_linear ---------------------------------------------------------------------------------------------------
#
# A program computes BLOCK_N outputs of all tokens. Each step of the loop multiplies a tile of W with a tile of x:
#
#                                                   BLOCK_M tokens
#                                                  +---------+
#                                                  | slice 0 |
#                                                  +---------+
#                                          BLOCK_K | slice 1 |  of x, transposed
#                                                  +---------+
#                                                  |   ...   |
#                       BLOCK_K                    +---------+
#            +---------+---------+---------+       +---------+
#    BLOCK_N | slice 0 | slice 1 |   ...   |       |   acc   |  [K_SLICES, BLOCK_N, BLOCK_M], a sum for each slice
#    outputs +---------+---------+---------+       +---------+
#                        of W
#
# W is the left operand. An instruction of the tensor cores, mma.m16n8k16, multiplies [16, 16] with [16, 8]: 16
# outputs with 8 tokens. So 8 tokens cost as much as one.
#
# Each warp takes some of the slices (CUTLASS's sliced-K). The sums of the slices are added up after the loop.
#
# The norm is fused: norm(x) W^T = (x * norm_weight) W^T / rms(x). The loop also sums x^2, and the epilogue multiplies
# with 1 / rms(x).
#
# If IS_GATED, W is a gate projection above an up projection. A program has rows of both, because it computes
# activation(gate) * up: BLOCK_OUT = BLOCK_N / 2 outputs (weights.py: program_outputs).
#
# With experts, W is a stack of matrices, and topk_ids has TOP_K experts for each token. A pair is a token and one of
# the experts of the token.


class Norm(NamedTuple):
    """The norm before the matmul."""

    weight_ptr: tl.tensor | None  # [K], or None without a norm
    eps: tl.tensor


class Operands(NamedTuple):
    """What a program multiplies, and where it stores the results."""

    w: ProgramWeights
    bias_ptr: tl.tensor | None  # of the outputs of w
    x_ptr: tl.tensor
    y_ptr: tl.tensor
    rows_x: tl.tensor  # [BLOCK_M], the row of each token at x_ptr
    rows_y: tl.tensor  # [BLOCK_M], the row of each token at y_ptr
    mask_m: tl.tensor  # [BLOCK_M], false for a token that the program does not have


@triton.jit
def fused_linear_kernel(
    w_ptr, scales_ptr,  # W [N, K], of experts [E, N, K], and the scales of W, as the format packs them
    x_ptr,  # [M, K]; if X_IS_PER_PAIR [M * TOP_K, K]
    topk_ids_ptr,  # [M, TOP_K]
    y_ptr,  # [M, N_OUT]; with topk_ids [M * TOP_K, N_OUT]
    norm,  # Norm
    epilogue_args,  # epilogue.py: EpilogueArgs
    magic_number,  # see elements.py: int4_pair
    N, num_tokens, NUM_TOKENS_CONST: tl.constexpr,
    K: tl.constexpr, TOP_K: tl.constexpr, X_IS_PER_PAIR: tl.constexpr,
    DOT: tl.constexpr, LAYOUT: tl.constexpr,  # formats.py: KernelFormat; weights.py: WeightLayout
    SIZES: tl.constexpr,  # weights.py: BlockSizes
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr,
    DTYPE: tl.constexpr,  # the type of both operands of tl.dot
    USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,  # see launch.py
):
    """Computes y = epilogue(norm(x) W^T), with N_OUT = N outputs, or N / 2 if IS_GATED. An argument that is None leaves
    its step out.

    Grid: [N / BLOCK_N]. Program i computes outputs [i * BLOCK_OUT, (i + 1) * BLOCK_OUT) of all tokens. With topk_ids,
    the grid is [N / BLOCK_N, M * TOP_K] (see operands_of_expert).

    NUM_TOKENS_CONST: up to MMA_N tokens, M itself: add_squares has a tensor for each token, so every M has a compiled
    kernel of its own. For more tokens, None: one compiled kernel serves all num_tokens with the same BLOCK_M."""
    # Prologue. Before pdl_wait, read only W
    N_OUT = N // 2 if IS_GATED else N
    w = program_weights(w_ptr, scales_ptr, magic_number, N, N_OUT, SIZES)
    if USE_PDL and topk_ids_ptr is None:
        prefetch_weights(w, LAYOUT, SIZES)
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    if NUM_TOKENS_CONST is not None:
        num_tokens = NUM_TOKENS_CONST
    offs_m = tl.arange(0, SIZES.BLOCK_M)
    operands = Operands(w, epilogue_args.bias_ptr, x_ptr, y_ptr, offs_m, offs_m, offs_m < num_tokens)
    if topk_ids_ptr is not None:
        operands, is_done = operands_of_expert(
            operands, topk_ids_ptr, NUM_TOKENS_CONST, K, TOP_K, X_IS_PER_PAIR, LAYOUT
        )
        if is_done:
            return
    # Load the operands of the epilogue now: after the loop it would wait for memory. But load the residual of many
    # tokens after the loop, because the loop needs the registers
    y_offsets, mask_y = output_offsets(operands, N_OUT, SIZES.BLOCK_OUT)
    channel_scale = load_per_output(operands.w.scales_ptr if LAYOUT.HAS_CHANNEL_SCALES else None, operands.w)
    bias = load_per_output(operands.bias_ptr, operands.w)
    residual = None
    if NUM_TOKENS_CONST is not None:
        residual = load_residual(epilogue_args.residual_ptr, y_offsets, mask_y)

    # Loop
    acc = tl.full([SIZES.K_SLICES, SIZES.BLOCK_N, SIZES.BLOCK_M], 0.0, tl.float32)
    squares = ()
    if norm.weight_ptr is not None:
        squares = zero_squares(NUM_TOKENS_CONST, SIZES.K_SLICES, SIZES.SLICE_K)
    starts = slice_starts(LAYOUT.IS_TILED, SIZES.SLICE_K, SIZES.K_SLICES)
    for k in tl.range(0, K, SIZES.BLOCK_K, num_stages=SIZES.NUM_STAGES):
        k_starts = k + starts  # [K_SLICES]
        offs_k = slice_columns(k_starts, SIZES.SLICE_K)  # [K_SLICES, SLICE_K]
        x = load_x(operands, norm.weight_ptr, offs_k, NUM_TOKENS_CONST, K, DTYPE)
        if norm.weight_ptr is not None:
            squares = add_squares(squares, operands.x_ptr, offs_k, NUM_TOKENS_CONST, K)
        acc = DOT(acc, x, operands.w, k, k_starts, K, LAYOUT.GROUP_SIZE, SIZES.BLOCK_OUT)
    if USE_PDL and not TRIGGER_EARLY:
        tl.extra.cuda.gdc_launch_dependents()

    # Epilogue
    if NUM_TOKENS_CONST is None:
        residual = load_residual(epilogue_args.residual_ptr, y_offsets, mask_y)
    y = tl.sum(acc, axis=0)  # [BLOCK_N, BLOCK_M]
    if LAYOUT.HAS_CHANNEL_SCALES:
        y *= channel_scale
    if norm.weight_ptr is not None:
        y *= inverse_rms(squares, norm.eps, NUM_TOKENS_CONST, K, SIZES.BLOCK_M)[None, :]
    y = epilogue(y, bias, residual, epilogue_args, ACTIVATION, IS_GATED)  # [BLOCK_OUT, BLOCK_M]
    tl.store(operands.y_ptr + y_offsets, y, mask=mask_y)


@triton.jit
def operands_of_expert(
    operands, topk_ids_ptr, NUM_TOKENS_CONST: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    X_IS_PER_PAIR: tl.constexpr, LAYOUT: tl.constexpr,
):
    """Returns the Operands of this program's expert, and whether another program computes them.

    Axis 1 of the grid is the pairs. The first program of an expert computes all pairs of the expert, and the other
    programs of the expert return at once. So each expert is read once:

        pair        0          1             2          3             for M = 2 and TOP_K = 2
        token       0          0             1          1
        expert      5          2             2          7
        program     pair 0     pairs 1, 2    returns    pair 3

    operands: the Operands of all tokens, with the first expert of W [E, N, K]."""
    pair = tl.program_id(1)
    expert = tl.load(topk_ids_ptr + pair)
    w, bias_ptr = weights_of_expert(operands.w, operands.bias_ptr, expert, K, LAYOUT)
    if NUM_TOKENS_CONST == 1:  # all pairs have different experts
        x_ptr = operands.x_ptr + (pair * K if X_IS_PER_PAIR else 0)
        y_ptr = operands.y_ptr + pair * w.N_OUT
        return Operands(w, bias_ptr, x_ptr, y_ptr, operands.rows_x, operands.rows_y, operands.mask_m), False
    else:
        pairs, has_pair, first_pair = pairs_of(expert, topk_ids_ptr, operands.rows_x, operands.mask_m, TOP_K)
        rows_x = pairs if X_IS_PER_PAIR else operands.rows_x
        return Operands(w, bias_ptr, operands.x_ptr, operands.y_ptr, rows_x, pairs, has_pair), first_pair < pair


@triton.jit
def pairs_of(expert, topk_ids_ptr, token, mask_m, TOP_K: tl.constexpr):
    """Returns the pair of every token [BLOCK_M] with expert, whether the token has this pair, and the first such pair.
    A token has an expert at most once."""
    pair, has_pair = token * TOP_K, token < 0
    for i in tl.static_range(TOP_K):
        is_expert = tl.load(topk_ids_ptr + token * TOP_K + i, mask=mask_m, other=-1) == expert
        pair = tl.where(is_expert, token * TOP_K + i, pair)
        has_pair |= is_expert
    AFTER_ALL: tl.constexpr = token.shape[0] * TOP_K  # more than any pair
    return pair, has_pair, tl.min(tl.where(has_pair, pair, AFTER_ALL), axis=0)


@triton.jit
def output_offsets(operands, N_OUT, BLOCK_OUT: tl.constexpr):
    """Returns where the outputs of the program are in y, and which outputs exist. Both are [BLOCK_OUT, BLOCK_M]."""
    offs_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    return operands.rows_y[None, :] * N_OUT + offs_out[:, None], operands.mask_m[None, :] & (offs_out < N_OUT)[:, None]


@triton.jit
def load_x(operands, norm_weight_ptr, offs_k, NUM_TOKENS_CONST: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    """Loads inputs offs_k [K_SLICES, SLICE_K] of all tokens, and multiplies with the weight of the norm:
    [K_SLICES, SLICE_K, BLOCK_M]."""
    mask_k = offs_k < K
    if NUM_TOKENS_CONST == 1:  # the same token in every column
        x = tl.load(operands.x_ptr + offs_k, mask=mask_k, other=0.0)[:, :, None]
    else:
        offsets = offs_k[:, :, None] + operands.rows_x * K
        x = tl.load(operands.x_ptr + offsets, mask=mask_k[:, :, None] & operands.mask_m, other=0.0)
    x = x.to(DTYPE)
    if norm_weight_ptr is not None:
        x *= tl.load(norm_weight_ptr + offs_k, mask=mask_k, other=0.0).to(DTYPE)[:, :, None]
    return tl.broadcast_to(x, [offs_k.shape[0], offs_k.shape[1], operands.rows_x.shape[0]])


@triton.jit
def zero_squares(NUM_TOKENS_CONST: tl.constexpr, K_SLICES: tl.constexpr, SLICE_K: tl.constexpr):
    """Returns the first squares of add_squares: zeros [K_SLICES, SLICE_K] for every token, as a tuple."""
    squares = ()
    for _ in tl.static_range(NUM_TOKENS_CONST):
        squares = squares + (tl.zeros([K_SLICES, SLICE_K], tl.float32),)
    return squares


@triton.jit
def add_squares(squares, x_ptr, offs_k, NUM_TOKENS_CONST: tl.constexpr, K: tl.constexpr):
    """Adds the squares of inputs offs_k [K_SLICES, SLICE_K] to squares, a tuple with a tensor for every token."""
    new = ()
    for m in tl.static_range(NUM_TOKENS_CONST):
        x = tl.load(x_ptr + offs_k + m * K, mask=offs_k < K, other=0.0).to(tl.float32)
        new = new + (squares[m] + x * x,)
    return new


@register_triton
def fused_linear(
    x: Tensor, *, w: WeightArguments, bias: Tensor | None = None, norm_weight: Tensor | None = None, eps: float = 0.0,
    residual: Tensor | None = None, activation: str | None = None, gated: bool = False, out_scale: float = 1.0,
    softcap: float = 0.0, clip: float = 0.0, out_dtype: torch.dtype | None = None, topk_ids: Tensor | None = None,
) -> Tensor:
    """Computes epilogue(norm(x) W^T) for x [..., K] of up to MAX_TRITON_TOKENS tokens and W [n, K]: [..., n], or
    [..., n / 2] if gated.

    topk_ids [..., top_k]: only from moe.py. W [E, n, K] is then a stack of experts, and the result is [..., top_k, n].
    x has a vector for each token, or for each id."""
    n, k, group_size = w.n, x.shape[-1], w.group_size
    n_inputs = x.numel() // k  # vectors [K] in x
    num_tokens, n_pairs, top_k, y_shape = n_inputs, 1, 1, x.shape[:-1]
    if topk_ids is not None:
        n_pairs, top_k, y_shape = topk_ids.numel(), topk_ids.shape[-1], topk_ids.shape
        num_tokens = n_pairs // top_k
    y = x.new_empty(*y_shape, output_width(n, gated), dtype=out_dtype or x.dtype)
    num_tokens_const = num_tokens if num_tokens <= MMA_N else None
    if norm_weight is not None and num_tokens_const is None:  # registers have no room for the squares of many tokens
        x, norm_weight = rms_norm(x, norm_weight, eps, None), None
    format = kernel_format(w.format)
    sizes, num_warps = choose_sizes(x, w, format, num_tokens, gated)
    grid = triton.cdiv(n, sizes.BLOCK_N), n_pairs
    fused_linear_kernel[grid](
        w_ptr=w.weight, scales_ptr=w.scales, x_ptr=x, topk_ids_ptr=topk_ids, y_ptr=y, norm=Norm(norm_weight, eps),
        epilogue_args=EpilogueArgs(
            bias, residual, out_scale if out_scale != 1 else None, softcap or None, clip or None
        ),
        magic_number=MAGIC_NUMBERS.get(x.dtype, 0),
        N=n, num_tokens=num_tokens, NUM_TOKENS_CONST=num_tokens_const, K=k, TOP_K=top_k,
        X_IS_PER_PAIR=n_inputs > num_tokens, DOT=format.dot,
        LAYOUT=WeightLayout(
            format.is_tiled, format.stride(w.weight), group_size, format.has_channel_scales(group_size, k)
        ),
        SIZES=sizes, ACTIVATION=activation, IS_GATED=gated, DTYPE=dot_dtype(x),
        num_warps=num_warps, **pdl_options(x.device, grid),
    )
    return y


def choose_sizes(
    x: Tensor, w: WeightArguments, format: KernelFormat, num_tokens: int, gated: bool
) -> tuple[BlockSizes, int]:
    """Returns the sizes of a program of fused_linear, and its number of warps."""
    tiles = choose_tiles(x, format, w.n, gated, w.group_size, num_tokens)
    slice_k = min(64, tiles.warp_k)
    if format.has_group_scales(w.group_size, x.shape[-1]):
        slice_k = min(slice_k, w.group_size)
    block_k = tiles.num_warps * tiles.warp_k
    sizes = BlockSizes(
        BLOCK_M=max(min_block_m(x), triton.next_power_of_2(num_tokens)), BLOCK_N=tiles.block_n,
        BLOCK_OUT=tiles.block_n // 2 if gated else tiles.block_n, BLOCK_K=block_k, SLICE_K=slice_k,
        K_SLICES=block_k // slice_k, NUM_STAGES=tiles.num_stages,
    )
    return sizes, tiles.num_warps


# ---- rms_norm -------------------------------------------------------------------------------------------------------


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, y_ptr, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):
    """Computes y [M, DIM] = [residual +] x / rms(x) * weight. Grid: [M]. Program m has token m. BLOCK is a power of 2,
    at least DIM."""
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    d = tl.arange(0, BLOCK)
    offsets, mask = tl.program_id(0) * DIM + d, d < DIM
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps) * weight
    if residual_ptr is not None:
        y += residual
    tl.store(y_ptr + offsets, y, mask=mask)


@register_triton
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """Computes [residual +] x / rms(x) * weight over the last dimension."""
    y, dim = empty_rms_norm(x), x.shape[-1]
    grid = (x.numel() // dim,)
    rms_norm_kernel[grid](
        x, weight, residual, y, eps, DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=8,
        **pdl_options(x.device, grid),
    )
    return y


# ---- permute_inputs --------------------------------------------------------------------------------------------------


@triton.jit
def permute_inputs_kernel(
    x_ptr, input_order_ptr, y_ptr,
    K: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):
    """Computes y[m, i] = x[m, input_order[i]], for x [M, K] and y [M, N].

    Grid: [M, N / BLOCK]. Program (m, j) has block j of token m."""
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    # This load need not wait: input_order belongs to the weight, and no kernel writes it
    input_order = tl.load(input_order_ptr + offs_n, mask=mask, other=0)
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    x = tl.load(x_ptr + tl.program_id(0) * K + input_order, mask=mask, other=0.0)
    tl.store(y_ptr + tl.program_id(0) * N + offs_n, x, mask=mask)


@register_triton
def permute_inputs(x: Tensor, input_order: Tensor) -> Tensor:
    """Returns x[..., input_order], for x [..., K] and input_order int32 [N]: [..., N]."""
    k, n = x.shape[-1], len(input_order)
    y, block = empty_permute_inputs(x, input_order), min(1024, triton.next_power_of_2(n))
    grid = x.numel() // k, triton.cdiv(n, block)
    permute_inputs_kernel[grid](x, input_order, y, K=k, N=n, BLOCK=block, **pdl_options(x.device, grid))
    return y
