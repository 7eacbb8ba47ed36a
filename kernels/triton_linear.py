"""The products of a decode step on a GPU, in Triton: a few rows of x times a weight in any format.

    linear        y = x W^T; before it a norm, after it bias, activation, scale, softcap, clip and residual
    dequantize    a whole matrix, for prefill, whose products are PyTorch's
    rms_norm      a norm that no product follows

They implement torch.ops.gptfast_triton.* (kernels/schema.py). kernels/reference.py says in plain PyTorch what each
computes. Nothing here is one vendor's. TRITON_INTERPRET=1 runs it on CPU tensors, which is how
tests/test_triton.py checks it.

In shape comments M is rows of x, N rows of W, which are outputs, and K columns of both, which are inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import Int4, Int8
from kernels.schema import ACTIVATION_IDS, triton_op
from kernels.triton_int4 import magic_word, offset_of, scales_and_zeros, tiles_to_floats
from kernels.triton_launch import choose_tiles, dot_dtype, min_block_m_of, overlap_options, wait_for_previous_kernel

INT8, INT4 = tl.constexpr(Int8.format_id), tl.constexpr(Int4.format_id)
SILU, GELU_TANH = tl.constexpr(ACTIVATION_IDS["silu"]), tl.constexpr(ACTIVATION_IDS["gelu_tanh"])
CLAMPED_SWIGLU = tl.constexpr(ACTIVATION_IDS["clamped_swiglu"])
PREFETCH_BYTES = 16384  # of W that a program asks for before it waits for the previous kernel: about what its loop does

# ---- linear ---------------------------------------------------------------------------------------------------------
#
# The matrix unit takes 16 rows of W at a time and, as the columns of its other factor, 8 or more rows of x. So up to 8
# rows of x cost what one costs. A program has BLOCK_N rows of W and all of K. Its warps share K out (CUTLASS's
# sliced-K): of the K_SLICES * BLOCK_K columns of a step of the loop each warp takes some slices. Each slice has a sum
# of its own; the K_SLICES sums are added up after the loop.
#
# The norm costs no pass of its own. The loop multiplies x with the norm's weight and sums x's squares. 1 / rms, one
# factor for a whole row of x, follows after the loop.
#
# With an activation W is a gate and an up projection, one above the other. The first half of a program's rows are of
# the gate, the second half are the same rows of the up projection: so it has both factors of its outputs.


@triton.jit
def linear_kernel(
    w_ptr, scales_ptr, bias_ptr, x_ptr, norm_ptr, residual_ptr, topk_ids_ptr, y_ptr,
    eps, scale, softcap, clip, magic, N,
    M: tl.constexpr, K: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_K: tl.constexpr, X_HAS_PAIRS: tl.constexpr,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_SLICES: tl.constexpr,
    NUM_STAGES: tl.constexpr, PREFETCH_BYTES: tl.constexpr, N_THREADS: tl.constexpr,
    USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):  # fmt: skip
    """y [M, N_OUT] = epilogue(x [M, K] W [N, K]^T). A pointer is None where there is no such tensor, and so are scale,
    softcap and clip. DTYPE is the type of the products' factors. USE_PDL, TRIGGER_EARLY: see triton_launch.py.

    With topk_ids [M, TOP_K] W is a stack of experts [E, N, K], and y has a row for each pair of a token and one of its
    experts: [M * TOP_K, N_OUT]. x has a row for each pair, too, if X_HAS_PAIRS, else for each token. The second axis of
    programs is pairs. The program of an expert's first pair computes all pairs of this expert, so that the expert is
    read once; the programs of the others have nothing to do."""
    N_OUT = N // 2 if ACTIVATION else N  # outputs of a row of x
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if ACTIVATION else BLOCK_N
    offs_n = block_rows(tl.arange(0, BLOCK_N), BLOCK_OUT, N_OUT)
    mask_n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_N) % BLOCK_OUT < N_OUT
    if USE_PDL and topk_ids_ptr is None:
        prefetch_rows(w_ptr, N, K, KIND, BLOCK_N, BLOCK_OUT, PREFETCH_BYTES, N_THREADS)
    wait_for_previous_kernel(USE_PDL, TRIGGER_EARLY)
    offs_m = tl.arange(0, BLOCK_M)
    x_row, y_row, mask_m = offs_m, offs_m, offs_m < M
    if topk_ids_ptr is not None:
        pair = tl.program_id(1)
        expert = tl.load(topk_ids_ptr + pair)
        if M == 1:
            x_ptr += pair * K if X_HAS_PAIRS else 0
            y_ptr += pair * N_OUT
        else:
            y_row, mask_m = pairs_of(expert, topk_ids_ptr, offs_m, M, TOP_K)
            if tl.min(tl.where(mask_m, y_row, M * TOP_K), axis=0) < pair:
                return
            x_row = y_row if X_HAS_PAIRS else x_row
        first_row = expert * N  # in the rows of all experts
        w_ptr += first_row * (tl.cdiv(K, 64) * 8 if KIND == INT4 else K)  # int4: words, in whole tiles
        if scales_ptr is not None:
            scales_ptr += first_row * tl.cdiv(K, GROUP_SIZE)
        if bias_ptr is not None:
            bias_ptr += first_row

    # What the epilogue needs is asked for before the loop, so that nothing has to wait for it afterwards.
    offs_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    y_offsets = y_row[None, :] * N_OUT + offs_out[:, None]  # [BLOCK_OUT, BLOCK_M]
    mask_y = mask_m[None, :] & (offs_out < N_OUT)[:, None]
    if KIND == INT8:
        row_scale = tl.load(scales_ptr + offs_n, mask=mask_n, other=0.0)[:, None]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + y_offsets, mask=mask_y, other=0.0).to(tl.float32)

    acc = tl.zeros([K_SLICES, BLOCK_N, BLOCK_M], tl.float32)
    squares = ()  # of each row of x
    for _ in tl.static_range(M):
        squares = squares + (tl.zeros([K_SLICES, BLOCK_K], tl.float32),)
    slices = slice_offsets(KIND, BLOCK_K, K_SLICES)
    for k in tl.range(0, K, K_SLICES * BLOCK_K, num_stages=NUM_STAGES):
        offs_k = (k + slices)[:, None] + tl.arange(0, BLOCK_K)[None, :]  # [K_SLICES, BLOCK_K]
        x = load_x(x_ptr, norm_ptr, x_row, mask_m, offs_k, M, K, DTYPE)  # [K_SLICES, BLOCK_K, BLOCK_M]
        if norm_ptr is not None:
            squares = add_squares(squares, x_ptr, offs_k, M, K)
        if KIND == INT4:
            words = load_tiles(w_ptr, k, N, K, BLOCK_N, BLOCK_OUT, K_SLICES * BLOCK_K)
            scales, zeros = load_scales(scales_ptr, offs_n, mask_n, k + slices, N, K, GROUP_SIZE)
            w = tiles_to_floats(words, magic, BLOCK_N // 16, BLOCK_K, DTYPE)
            acc += int4_product(w, x, scales, zeros + offset_of(DTYPE))
        else:
            w = load_w(w_ptr, offs_n, mask_n, offs_k, K)  # [K_SLICES, BLOCK_N, BLOCK_K]
            acc = tl.dot(w.to(DTYPE), x, acc, input_precision="ieee")

    if USE_PDL and not TRIGGER_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.sum(acc, axis=0)  # [BLOCK_N, BLOCK_M]
    if KIND == INT8:
        y *= row_scale
    if norm_ptr is not None:
        y *= inverse_rms(squares, eps, M, K, BLOCK_M)[None, :]
    if bias_ptr is not None:
        y += bias
    if ACTIVATION:
        y = glu(y, ACTIVATION)
    if scale is not None:
        y *= scale
    if softcap is not None:
        y = cap(y, softcap)
    if clip is not None:
        y = tl.clamp(y, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    if residual_ptr is not None:
        y += residual
    tl.store(y_ptr + y_offsets, y, mask=mask_y)


@triton.jit
def prefetch_rows(
    w_ptr, N, K: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PREFETCH_BYTES: tl.constexpr, N_THREADS: tl.constexpr,
):  # fmt: skip
    """Begins to bring the first PREFETCH_BYTES of a program's weights into the L2 cache: as much of each of its rows,
    or of int4 of each of its rows of tiles. One thread asks for one row, since many small requests are slow."""
    UNIT: tl.constexpr = 16 if KIND == INT4 else 1  # rows of W that are stored together
    ROWS: tl.constexpr = BLOCK_N // UNIT
    BYTES: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    ROW_BYTES: tl.constexpr = (K + 63) // 64 * 512 if KIND == INT4 else K * BYTES
    CHUNK: tl.constexpr = min(ROW_BYTES, PREFETCH_BYTES // ROWS) // 16 * 16
    if CHUNK > 0 and ROW_BYTES % 16 == 0:
        i = tl.arange(0, N_THREADS)
        N_OUT = N // (BLOCK_N // BLOCK_OUT)
        row = block_rows(i % ROWS, BLOCK_OUT // UNIT, N_OUT // UNIT)
        row = tl.minimum(row, tl.cdiv(N, UNIT) - 1)
        address = w_ptr.to(tl.int64) + row.to(tl.int64) * ROW_BYTES
        size = tl.where(i < ROWS, CHUNK, 0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def pairs_of(expert, topk_ids_ptr, token, M: tl.constexpr, TOP_K: tl.constexpr):
    """Which pair every token [BLOCK_M] has with expert, and whether it has one. A token has an expert once at most."""
    pair, has_pair = token * TOP_K, token < 0
    for i in tl.static_range(TOP_K):
        is_this = tl.load(topk_ids_ptr + token * TOP_K + i, mask=token < M, other=-1) == expert
        pair = tl.where(is_this, token * TOP_K + i, pair)
        has_pair |= is_this
    return pair, has_pair


@triton.jit
def block_rows(i, BLOCK_OUT: tl.constexpr, N_OUT):
    """Which row of W is a program's i-th; or which tile of 16 rows, if all arguments count tiles."""
    return tl.program_id(0) * BLOCK_OUT + i % BLOCK_OUT + i // BLOCK_OUT * N_OUT


@triton.jit
def slice_offsets(KIND: tl.constexpr, BLOCK_K: tl.constexpr, K_SLICES: tl.constexpr):
    """Where the slices of a step's columns begin: [K_SLICES]. int4's are in tiles_to_floats' order."""
    i = tl.arange(0, K_SLICES)
    if KIND == INT4:
        TILES_K: tl.constexpr = K_SLICES * BLOCK_K // 64
        return i % TILES_K * 64 + i // TILES_K * BLOCK_K
    return i * BLOCK_K


@triton.jit
def load_x(x_ptr, norm_ptr, x_row, mask_m, offs_k, M: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    """Columns offs_k of rows x_row [BLOCK_M] of x, times the norm's weight: [K_SLICES, BLOCK_K, BLOCK_M]."""
    mask_k = offs_k < K
    if M == 1:  # the same in every column
        x = tl.load(x_ptr + offs_k, mask=mask_k, other=0.0)[:, :, None]
    else:
        x = tl.load(x_ptr + offs_k[:, :, None] + x_row * K, mask=mask_k[:, :, None] & mask_m, other=0.0)
    x = x.to(DTYPE)
    if norm_ptr is not None:
        x *= tl.load(norm_ptr + offs_k, mask=mask_k, other=0.0).to(DTYPE)[:, :, None]
    return tl.broadcast_to(x, [offs_k.shape[0], offs_k.shape[1], x_row.shape[0]])


@triton.jit
def add_squares(squares, x_ptr, offs_k, M: tl.constexpr, K: tl.constexpr):
    """squares, a tuple of M, plus those of columns offs_k of x."""
    new = ()
    for m in tl.static_range(M):
        x = tl.load(x_ptr + offs_k + m * K, mask=offs_k < K, other=0.0).to(tl.float32)
        new = new + (squares[m] + x * x,)
    return new


@triton.jit
def inverse_rms(squares, eps, M: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr):
    """1 / rms of every row of x: [BLOCK_M]."""
    offs_m, total = tl.arange(0, BLOCK_M), tl.zeros([BLOCK_M], tl.float32)
    for m in tl.static_range(M):
        total = tl.where(offs_m == m, tl.sum(tl.sum(squares[m], axis=1), axis=0), total)
    return tl.rsqrt(total / K + eps)


@triton.jit
def load_w(w_ptr, offs_n, mask_n, offs_k, K: tl.constexpr):
    """Rows offs_n [BLOCK_N] of W, its columns in slices: [K_SLICES, BLOCK_N, BLOCK_K]."""
    offsets = offs_n.to(tl.int64)[None, :, None] * K + offs_k[:, None, :]
    return tl.load(w_ptr + offsets, mask=mask_n[None, :, None] & (offs_k < K)[:, None, :], other=0)


@triton.jit
def load_tiles(w_ptr, k, N, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, STEP_K: tl.constexpr):
    """int4's tiles of a program's rows and of columns [k, k + STEP_K): words [BLOCK_N / 16 * STEP_K / 64, 128]."""
    TILES_K: tl.constexpr = STEP_K // 64
    i = tl.arange(0, BLOCK_N // 16 * TILES_K)
    N_OUT = N // (BLOCK_N // BLOCK_OUT)
    tile_n = block_rows(i // TILES_K, BLOCK_OUT // 16, N_OUT // 16)
    tile_k = k // 64 + i % TILES_K
    mask = (tile_n < tl.cdiv(N, 16)) & (tile_k < tl.cdiv(K, 64))
    offsets = (tile_n.to(tl.int64) * tl.cdiv(K, 64) + tile_k)[:, None] * 128 + tl.arange(0, 128)[None, :]
    return tl.load(w_ptr + offsets, mask=mask[:, None], other=0)


@triton.jit
def load_scales(scales_ptr, offs_n, mask_n, slice_k, N, K: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """int4's scales and zeros of rows offs_n and of the slices that begin at slice_k: both [K_SLICES, BLOCK_N, 1]. A
    slice lies in one group."""
    offsets = (slice_k // GROUP_SIZE)[:, None] * N + offs_n[None, :]
    mask = (slice_k < K)[:, None] & mask_n[None, :]
    scale, zero = scales_and_zeros(tl.load(scales_ptr + offsets, mask=mask, other=0))
    return scale[:, :, None], zero[:, :, None]


@triton.jit
def int4_product(w, x, scale, zero):
    """Of every slice W x: [K_SLICES, BLOCK_N, BLOCK_M]. scale and zero are the same for all of a slice's columns, so

        sum of (w - zero) * scale * x  =  scale * (sum of w * x  -  zero * sum of x)

    The sum of x is a product with ones: the matrix unit has time to spare, and its result lies where it is needed. The
    ones come out of a join as w does, so that Triton gives both one layout and loads x once for the two products."""
    half = tl.full([w.shape[0], w.shape[1], w.shape[2] // 2], 1.0, w.dtype)
    ones = tl.reshape(tl.join(half, half), w.shape)
    sum_x = tl.dot(ones, x, input_precision="ieee")  # the same for every row
    return scale * (tl.dot(w, x, input_precision="ieee") - zero * sum_x)


@triton.jit
def glu(y, ACTIVATION: tl.constexpr):
    """y [2 F, M], gate above up -> activation(gate) * up [F, M]. Another activation is another branch."""
    y = tl.reshape(y, [2, y.shape[0] // 2, y.shape[1]])
    gate, up = tl.split(tl.permute(y, [1, 2, 0]))
    if ACTIVATION == SILU:
        gate *= tl.sigmoid(gate)
    elif ACTIVATION == GELU_TANH:  # (1 + tanh(u)) / 2 = sigmoid(2 u), and 1.5957691 = 2 sqrt(2 / pi)
        gate *= tl.sigmoid(1.5957691 * (gate + 0.044715 * gate * gate * gate))
    elif ACTIVATION == CLAMPED_SWIGLU:
        gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL) + 1
        gate *= tl.sigmoid(1.702 * gate)
    return gate * up


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap), which stays between -softcap and softcap."""
    return softcap * (2 * tl.sigmoid(2 / softcap * x) - 1)


# ---- dequantize -----------------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(w_ptr, scales_ptr, y_ptr, N, K, GROUP_SIZE, KIND: tl.constexpr):
    """W [N, K], 16 rows and 64 columns a program."""
    tile_n, tile_k = tl.program_id(0), tl.program_id(1)
    offs_n, offs_k = tile_n * 16 + tl.arange(0, 16), tile_k * 64 + tl.arange(0, 64)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    offsets = offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    if KIND == INT8:
        y = tl.load(w_ptr + offsets, mask=mask, other=0).to(tl.float32)
        y *= tl.load(scales_ptr + offs_n, mask=offs_n < N, other=0.0)[:, None]
    else:
        w = tl.load(w_ptr + (tile_n.to(tl.int64) * tl.cdiv(K, 64) + tile_k) * 128 + tl.arange(0, 128))
        y = tl.reshape(tiles_to_floats(w[None, :], 0, 1, 64, tl.float32), [16, 64])
        group = (offs_k // GROUP_SIZE).to(tl.int64)[None, :] * N + offs_n[:, None]
        scale, zero = scales_and_zeros(tl.load(scales_ptr + group, mask=mask, other=0))
        y = (y - zero) * scale
    tl.store(y_ptr + offsets, y, mask=mask)


# ---- rms_norm -------------------------------------------------------------------------------------------------------


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, y_ptr, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr, TRIGGER_EARLY: tl.constexpr,
):  # fmt: skip
    """y [rows, N] = [residual +] x / rms(x) * weight. A program has a row; BLOCK >= N is a power of two."""
    wait_for_previous_kernel(USE_PDL, TRIGGER_EARLY)
    n = tl.arange(0, BLOCK)
    offsets, mask = tl.program_id(0) * N + n, n < N
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + n, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / N + eps) * weight
    if residual_ptr is not None:
        y += residual
    tl.store(y_ptr + offsets, y, mask=mask)


# ---- Operations -----------------------------------------------------------------------------------------------------


def launch_linear(
    y: Tensor, x: Tensor, weight: Tensor, scales: Tensor | None, format_id: int, n: int, group_size: int,
    bias: Tensor | None = None, norm: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None,
    activation: int = 0, scale: float = 1.0, softcap: float = 0.0, clip: float = 0.0, topk_ids: Tensor | None = None,
):  # fmt: skip
    """Fills y with linear_kernel. With topk_ids [M, top_k] y has a row for each id, and x a row for each token or for
    each id."""
    k = x.shape[-1]
    n_rows, is_int4 = x.numel() // k, format_id == Int4.format_id
    m, n_pairs, top_k = n_rows, 1, 1
    if topk_ids is not None:
        n_pairs, top_k = topk_ids.numel(), topk_ids.shape[-1]
        m = n_pairs // top_k
    bits = 4 if is_int4 else 8 * weight.element_size()
    config = choose_tiles(x, bits, n, activation > 0, group_size)
    block_n = 16 * config.tiles
    grid = triton.cdiv(n, block_n), n_pairs
    block_k = 32 if bits == 32 or is_int4 and group_size == 32 else 64
    slices_per_unit = 64 // block_k if is_int4 else 1  # of config.depth
    linear_kernel[grid](
        weight, scales, bias, x, norm, residual, topk_ids, y,
        eps, scale if scale != 1 else None, softcap or None, clip or None, magic_word(x.dtype), n,
        m, k, group_size, top_k, n_rows > m,
        format_id, activation, dot_dtype(x),
        BLOCK_M=max(min_block_m_of(x), triton.next_power_of_2(m)),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        K_SLICES=config.num_warps * config.depth * slices_per_unit,
        NUM_STAGES=config.num_stages,
        PREFETCH_BYTES=PREFETCH_BYTES,
        N_THREADS=32 * config.num_warps,
        num_warps=config.num_warps,
        **overlap_options(x.device, grid),
    )  # fmt: skip


def supports(w) -> bool:
    """Whether these kernels can read a model.Linear w."""
    if not w.format.fits_kernels(w.in_features):
        return False
    if not isinstance(w.format, Int4):
        return True
    whole_tiles = w.n_experts is None or w.out_features % 16 == 0  # experts lie one behind the other
    return w.format.group_size % 32 == 0 and whole_tiles


@triton_op
def linear(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, format_id: int, n: int, group_size: int,
    bias: Tensor | None, norm: Tensor | None, eps: float, residual: Tensor | None, activation: int, scale: float,
    softcap: float, clip: float, float32_out: bool,
) -> Tensor:  # fmt: skip
    """[residual +] [clip] [cap] scale * [activation] ([rms_norm] x W^T [+ bias]) for x [..., K] of up to
    MAX_TRITON_TOKENS rows and W [n, K]."""
    dtype = torch.float32 if float32_out else x.dtype
    y = x.new_empty(*x.shape[:-1], n // 2 if activation else n, dtype=dtype)
    epilogue = activation, scale, softcap, clip
    launch_linear(y, x, weight, scales, format_id, n, group_size, bias, norm, eps, residual, *epilogue)
    return y


@triton_op
def dequantize(
    weight: Tensor, scales: Tensor | None, zeros: Tensor | None, format_id: int, n: int, group_size: int, k: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The matrix W [n, k] of an int8 or int4 weight."""
    y = weight.new_empty(n, k, dtype=dtype)
    grid = triton.cdiv(n, 16), triton.cdiv(k, 64)
    dequantize_kernel[grid](weight, scales, y, n, k, group_size, format_id)
    return y


@triton_op
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """[residual +] x / rms(x) * weight over the last dimension."""
    y, n = torch.empty_like(x), x.shape[-1]
    grid = (x.numel() // n,)
    rms_norm_kernel[grid](
        x, weight, residual, y, eps, n,
        BLOCK=triton.next_power_of_2(n),
        num_warps=8,
        **overlap_options(x.device, grid),
    )  # fmt: skip
    return y
