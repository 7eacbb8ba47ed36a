"""Products of a few tokens and a weight in any format, in Triton. A decode step on a GPU mostly waits for weights, so
each is read once for all tokens, and what comes before and after a product is computed with it.

    fused_linear    y = x W^T, and what comes before and after the product, in the order that kernels/ops.py gives
    rms_norm        a norm that no product follows
    permute_inputs  puts x in the order of the columns of W

They implement torch.ops.gptfast_triton.* (kernels/schema.py). formats.py has what depends on the format of W.

Instructions that only NVIDIA's GPUs have are left out on other GPUs. With TRITON_INTERPRET=1 the kernels run on CPU
tensors: so tests/test_triton.py checks them.

In shape comments M is tokens, N outputs (the rows of W) and K inputs (the columns of W).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.schema import ACTIVATION_IDS, GATED_IDS, WeightArguments, output_width, triton_op
from kernels.triton.elements import magic_number
from kernels.triton.formats import kernel_format
from kernels.triton.launch import (
    MMA_TOKENS,
    choose_tiles,
    dot_dtype,
    min_block_m,
    pdl_options,
    pdl_wait,
)
from kernels.triton.weights import ProgramWeights, prefetch_weights, program_outputs, slice_columns, slice_starts

ACTIVATION_NAMES = {i: name for name, i in ACTIVATION_IDS.items()}
# Bytes of W that a program prefetches before it waits for the previous kernel: about what the loop has in flight
PREFETCH_BYTES = 16384

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
# W is the left factor. An instruction of NVIDIA's matrix unit, mma.m16n8k16, multiplies [16, 16] with [16, 8]: 16
# outputs with 8 tokens. So 8 tokens cost as much as one.
#
# Each warp takes some of the slices (CUTLASS's sliced-K). The sums of the slices are added up after the loop.
#
# The norm is fused: norm(x) W^T = (x * norm_weight) W^T / rms(x). The loop also sums x^2, and the epilogue multiplies
# with 1 / rms(x).
#
# If IS_GATED, W is a gate projection above an up projection. A program has rows of both, so that it can compute
# activation(gate) * up: BLOCK_OUT = BLOCK_N / 2 outputs (weights.py: program_outputs).
#
# With experts, W is a stack of matrices, and topk_ids has TOP_K experts for each token. A pair is a token and one of
# the experts of the token.


@triton.jit
def fused_linear_kernel(
    w_ptr, scales_ptr,  # W [N, K], of experts [E, N, K], and the scales of W, as the format packs them
    bias_ptr,  # [N], of experts [E, N]
    x_ptr,  # [M, K]; if X_IS_PER_PAIR [M * TOP_K, K]
    norm_weight_ptr,  # [K]
    residual_ptr,  # [M, N_OUT]
    topk_ids_ptr,  # [M, TOP_K]
    y_ptr,  # [M, N_OUT]; with topk_ids [M * TOP_K, N_OUT]
    eps,  # of the norm
    out_scale, softcap, clip,  # of the epilogue
    magic_number, N,  # magic_number: see elements.py: int4_pair
    n_tokens, N_TOKENS: tl.constexpr,  # one of the two is the number of tokens, the other is None
    K: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_K: tl.constexpr, X_IS_PER_PAIR: tl.constexpr,
    MULTIPLY: tl.constexpr, IS_TILED: tl.constexpr, HAS_CHANNEL_SCALES: tl.constexpr,  # formats.py: KernelFormat
    W_STRIDE: tl.constexpr,  # elements or words that W stores for an output
    ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr,
    DTYPE: tl.constexpr,  # the type of both factors of the products
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_SLICES: tl.constexpr,
    NUM_STAGES: tl.constexpr, PREFETCH_BYTES: tl.constexpr, N_THREADS: tl.constexpr,
    USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,  # see launch.py
):
    """Computes y = epilogue(norm(x) W^T), with N_OUT = N outputs, or N / 2 if IS_GATED. None as an argument means
    that the step is left out.

    Grid: [N / BLOCK_N]. Program i computes outputs [i * BLOCK_OUT, (i + 1) * BLOCK_OUT) of all tokens.

    Grid with topk_ids: [N / BLOCK_N, M * TOP_K]. Axis 1 is the (token, expert) pairs. The first pair of an expert
    computes all pairs of that expert, so the expert is read once. The programs of its other pairs return at once.

    For up to MMA_TOKENS tokens the number is a compile-time constant, N_TOKENS, so there is a kernel for each number.
    For more it is the run-time argument n_tokens, and there is one kernel for each BLOCK_M."""
    SLICE_K: tl.constexpr = BLOCK_K // K_SLICES
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    N_OUT = N // 2 if IS_GATED else N
    offs_n = program_outputs(tl.arange(0, BLOCK_N), BLOCK_OUT, N_OUT)
    mask_n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_N) % BLOCK_OUT < N_OUT
    if USE_PDL and topk_ids_ptr is None:
        prefetch_weights(w_ptr, N, N_OUT, W_STRIDE, IS_TILED, BLOCK_N, BLOCK_OUT, PREFETCH_BYTES, N_THREADS)
    pdl_wait(USE_PDL, TRIGGER_EARLY)

    # Find the rows of x and y that belong to each token: at the index of the token, or of its pair with the expert
    offs_m = tl.arange(0, BLOCK_M)
    m_end = N_TOKENS if n_tokens is None else n_tokens
    x_index, y_index, mask_m = offs_m, offs_m, offs_m < m_end
    if topk_ids_ptr is not None:
        pair = tl.program_id(1)
        expert = tl.load(topk_ids_ptr + pair)
        if N_TOKENS == 1:
            x_ptr += pair * K if X_IS_PER_PAIR else 0
            y_ptr += pair * N_OUT
        else:
            y_index, mask_m = pairs_of(expert, topk_ids_ptr, offs_m, m_end, TOP_K)
            AFTER_ALL: tl.constexpr = (BLOCK_M if N_TOKENS is None else N_TOKENS) * TOP_K  # more than any pair
            if tl.min(tl.where(mask_m, y_index, AFTER_ALL), axis=0) < pair:
                return
            x_index = y_index if X_IS_PER_PAIR else x_index
        first_output = expert * N  # among the outputs of all experts
        w_ptr += first_output * W_STRIDE
        if scales_ptr is not None:
            scales_ptr += first_output * tl.cdiv(K, GROUP_SIZE)
        if bias_ptr is not None:
            bias_ptr += first_output

    # Load the operands of the epilogue before the loop, so that the epilogue does not wait for memory. Only the
    # residual of many tokens is loaded after the loop, since registers have no room for it during the loop
    offs_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    y_offsets = y_index[None, :] * N_OUT + offs_out[:, None]  # [BLOCK_OUT, BLOCK_M]
    mask_y = mask_m[None, :] & (offs_out < N_OUT)[:, None]
    channel_scale, bias, residual = None, None, None
    if HAS_CHANNEL_SCALES:
        channel_scale = tl.load(scales_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None and n_tokens is None:
        residual = tl.load(residual_ptr + y_offsets, mask=mask_y, other=0.0).to(tl.float32)

    # Accumulate
    acc = tl.zeros([K_SLICES, BLOCK_N, BLOCK_M], tl.float32)
    squares = ()
    if norm_weight_ptr is not None:
        squares = zero_squares(N_TOKENS, K_SLICES, SLICE_K)
    starts = slice_starts(IS_TILED, SLICE_K, K_SLICES)
    w = ProgramWeights(w_ptr, scales_ptr, magic_number, offs_n, mask_n, N, N_OUT)
    for k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        k_starts = k + starts  # [K_SLICES]
        offs_k = slice_columns(k_starts, SLICE_K)  # [K_SLICES, SLICE_K]
        x = load_x(x_ptr, norm_weight_ptr, x_index, mask_m, offs_k, N_TOKENS, K, DTYPE)
        if norm_weight_ptr is not None:
            squares = add_squares(squares, x_ptr, offs_k, N_TOKENS, K)
        acc = MULTIPLY(acc, x, w, k, k_starts, K, GROUP_SIZE, BLOCK_OUT)
    if USE_PDL and not TRIGGER_EARLY:
        tl.extra.cuda.gdc_launch_dependents()

    # Epilogue
    if residual_ptr is not None and n_tokens is not None:
        residual = tl.load(residual_ptr + y_offsets, mask=mask_y, other=0.0).to(tl.float32)
    y = tl.sum(acc, axis=0)  # [BLOCK_N, BLOCK_M]
    if HAS_CHANNEL_SCALES:
        y *= channel_scale
    if norm_weight_ptr is not None:
        y *= inverse_rms(squares, eps, N_TOKENS, K, BLOCK_M)[None, :]
    y = epilogue(y, bias, out_scale, softcap, clip, residual, ACTIVATION, IS_GATED)  # [BLOCK_OUT, BLOCK_M]
    tl.store(y_ptr + y_offsets, y, mask=mask_y)


@triton.jit
def pairs_of(expert, topk_ids_ptr, token, m_end, TOP_K: tl.constexpr):
    """Returns the pair of every token [BLOCK_M] with expert, and whether the token has this pair. A token has an expert
    at most once."""
    pair, has_pair = token * TOP_K, token < 0
    for i in tl.static_range(TOP_K):
        is_expert = tl.load(topk_ids_ptr + token * TOP_K + i, mask=token < m_end, other=-1) == expert
        pair = tl.where(is_expert, token * TOP_K + i, pair)
        has_pair |= is_expert
    return pair, has_pair


@triton.jit
def load_x(
    x_ptr, norm_weight_ptr, x_index, mask_m, offs_k, N_TOKENS: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr
):
    """Loads inputs offs_k [K_SLICES, SLICE_K] of the tokens at rows x_index [BLOCK_M] of x, and multiplies them with
    the weight of the norm: [K_SLICES, SLICE_K, BLOCK_M]."""
    mask_k = offs_k < K
    if N_TOKENS == 1:  # the same token in every column
        x = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0)[:, :, None]
    else:
        x = tl.load(x_ptr + offs_k[:, :, None] + x_index * K, mask=mask_k[:, :, None] & mask_m, other=0.0)
    x = x.to(DTYPE)
    if norm_weight_ptr is not None:
        x *= tl.load(norm_weight_ptr + offs_k, mask=mask_k, other=0.0).to(DTYPE)[:, :, None]
    return tl.broadcast_to(x, [offs_k.shape[0], offs_k.shape[1], x_index.shape[0]])


@triton.jit
def zero_squares(N_TOKENS: tl.constexpr, K_SLICES: tl.constexpr, SLICE_K: tl.constexpr):
    """Returns the first squares of add_squares: zeros [K_SLICES, SLICE_K] for every token, as a tuple."""
    squares = ()
    for _ in tl.static_range(N_TOKENS):
        squares = squares + (tl.zeros([K_SLICES, SLICE_K], tl.float32),)
    return squares


@triton.jit
def add_squares(squares, x_ptr, offs_k, N_TOKENS: tl.constexpr, K: tl.constexpr):
    """Adds the squares of inputs offs_k [K_SLICES, SLICE_K] to squares, a tuple with a tensor for every token."""
    new = ()
    for m in tl.static_range(N_TOKENS):
        x = tl.load(x_ptr + offs_k + m * K, mask=offs_k < K, other=0.0).to(tl.float32)
        new = new + (squares[m] + x * x,)
    return new


@triton.jit
def inverse_rms(squares, eps, N_TOKENS: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr):
    """Returns 1 / rms of every token: [BLOCK_M]."""
    offs_m, total = tl.arange(0, BLOCK_M), tl.zeros([BLOCK_M], tl.float32)
    for m in tl.static_range(N_TOKENS):
        total = tl.where(offs_m == m, tl.sum(tl.sum(squares[m], axis=1), axis=0), total)
    return tl.rsqrt(total / K + eps)


@triton.jit
def epilogue(y, bias, out_scale, softcap, clip, residual, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr):
    """Applies what follows the product, in the order that kernels/ops.py gives: y and bias [BLOCK_N, BLOCK_M or 1],
    residual [BLOCK_OUT, BLOCK_M] -> [BLOCK_OUT, BLOCK_M]."""
    if bias is not None:
        y += bias
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION, IS_GATED)
    if out_scale is not None:
        y *= out_scale
    if softcap is not None:
        y = apply_softcap(y, softcap)
    if clip is not None:
        y = tl.clamp(y, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    if residual is not None:
        y += residual
    return y


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, IS_GATED: tl.constexpr):
    """Computes activation(gate) * up [F, M] of y [2 F, M], gate above up. If not IS_GATED, computes activation(y).
    A new activation is one more branch."""
    if IS_GATED:
        halves = tl.reshape(y, [2, y.shape[0] // 2, y.shape[1]])
        gate, up = tl.split(tl.permute(halves, [1, 2, 0]))
    else:
        gate, up = y, None
    if ACTIVATION == "swiglu":
        gate *= tl.sigmoid(gate)
    elif ACTIVATION == "geglu":
        gate *= 0.5 * (1 + tl.erf(0.70710678 * gate))
    elif ACTIVATION == "relu2":
        gate = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
        gate *= gate
    elif ACTIVATION == "geglu_tanh" or ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), and 1.5957691 = 2 sqrt(2 / pi)
        gate *= tl.sigmoid(1.5957691 * (gate + 0.044715 * gate * gate * gate))
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu", "no kernel for this activation")
        gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL) + 1
        gate *= tl.sigmoid(1.702 * gate)
    if IS_GATED:
        gate *= up
    return gate


@triton.jit
def apply_softcap(x, softcap):
    """Returns softcap * tanh(x / softcap), which stays between -softcap and softcap."""
    return softcap * (2 * tl.sigmoid(2 / softcap * x) - 1)


@triton_op
def fused_linear(
    x: Tensor, *, w: WeightArguments, bias: Tensor | None = None, norm_weight: Tensor | None = None, eps: float = 0.0,
    residual: Tensor | None = None, activation: int = 0, out_scale: float = 1.0, softcap: float = 0.0,
    clip: float = 0.0, float32_out: bool = False, topk_ids: Tensor | None = None,
) -> Tensor:
    """Computes epilogue(norm(x) W^T) for x [..., K] of up to MAX_TRITON_TOKENS tokens and W [n, K]:
    [..., n], with a gated activation [..., n / 2].

    topk_ids [..., top_k], which only moe.py passes: W [E, n, K] is a stack of experts, and the result is
    [..., top_k, n]. x has a vector for each token, or for each id."""
    n, k, group_size = w.n, x.shape[-1], w.group_size
    n_inputs = x.numel() // k  # vectors [K] in x
    n_tokens, n_pairs, top_k, y_shape = n_inputs, 1, 1, x.shape[:-1]
    if topk_ids is not None:
        n_pairs, top_k, y_shape = topk_ids.numel(), topk_ids.shape[-1], topk_ids.shape
        n_tokens = n_pairs // top_k
    is_gated = activation in GATED_IDS
    y = x.new_empty(*y_shape, output_width(n, activation), dtype=torch.float32 if float32_out else x.dtype)
    has_few_tokens = n_tokens <= MMA_TOKENS
    if norm_weight is not None and not has_few_tokens:  # registers have no room for the squares of many tokens
        x, norm_weight = rms_norm(x, norm_weight, eps, None), None
    format, tiles = kernel_format(w.format_id), choose_tiles(x, w.format_id, n, is_gated, group_size, n_tokens)
    block_k = tiles.num_warps * tiles.warp_k
    slice_k = min(64, tiles.warp_k)
    if format.has_slice_scales(group_size, k):
        slice_k = min(slice_k, group_size)
    grid = triton.cdiv(n, tiles.block_n), n_pairs
    fused_linear_kernel[grid](
        w_ptr=w.weight, scales_ptr=w.scales, bias_ptr=bias, x_ptr=x, norm_weight_ptr=norm_weight,
        residual_ptr=residual, topk_ids_ptr=topk_ids, y_ptr=y,
        eps=eps, out_scale=out_scale if out_scale != 1 else None, softcap=softcap or None, clip=clip or None,
        magic_number=magic_number(x.dtype), N=n, K=k, GROUP_SIZE=group_size,
        n_tokens=None if has_few_tokens else n_tokens, N_TOKENS=n_tokens if has_few_tokens else None,
        TOP_K=top_k, X_IS_PER_PAIR=n_inputs > n_tokens,
        MULTIPLY=format.multiply, IS_TILED=format.is_tiled,
        HAS_CHANNEL_SCALES=format.has_channel_scales(group_size, k), W_STRIDE=format.stride(w.weight),
        ACTIVATION=ACTIVATION_NAMES[activation], IS_GATED=is_gated, DTYPE=dot_dtype(x),
        BLOCK_M=max(min_block_m(x), triton.next_power_of_2(n_tokens)), BLOCK_N=tiles.block_n,
        BLOCK_K=block_k, K_SLICES=block_k // slice_k,
        NUM_STAGES=tiles.num_stages, PREFETCH_BYTES=PREFETCH_BYTES, N_THREADS=32 * tiles.num_warps,
        num_warps=tiles.num_warps,
        **pdl_options(x.device, grid),
    )
    return y


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


@triton_op
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """Computes [residual +] x / rms(x) * weight over the last dimension."""
    y, dim = torch.empty_like(x), x.shape[-1]
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
    # input_order belongs to the weight: no kernel writes input_order, so this load need not wait
    input_order = tl.load(input_order_ptr + offs_n, mask=mask, other=0)
    pdl_wait(USE_PDL, TRIGGER_EARLY)
    x = tl.load(x_ptr + tl.program_id(0) * K + input_order, mask=mask, other=0.0)
    tl.store(y_ptr + tl.program_id(0) * N + offs_n, x, mask=mask)


@triton_op
def permute_inputs(x: Tensor, input_order: Tensor) -> Tensor:
    """Returns x[..., input_order], for x [..., K] and input_order int32 [N]: [..., N]."""
    k, n = x.shape[-1], len(input_order)
    y, block = x.new_empty(*x.shape[:-1], n), min(1024, triton.next_power_of_2(n))
    grid = x.numel() // k, triton.cdiv(n, block)
    permute_inputs_kernel[grid](x, input_order, y, K=k, N=n, BLOCK=block, **pdl_options(x.device, grid))
    return y
