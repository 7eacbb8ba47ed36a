"""The operations of a decode step on a GPU, in Triton: what kernels.cpp is on a CPU. kernels.py says how weights are
stored, holds the references and calls this file, which it imports only where there is a GPU.

    linear        a matrix-vector product for up to 8 rows of x, with what comes before and after it
    attend        q/k norm, RoPE, cache write and attention over the tokens in the cache
    route         the router's softmax and choice; experts: the feed-forward of the chosen ones
    dequantize    a whole matrix, for the products of prefill

Nothing here is one vendor's. TRITON_INTERPRET=1 runs it on CPU tensors, which is how tests/test_triton.py checks it.
kernels_triton.json, which --tune of scripts/benchmark.py and benchmark_gpu.py writes, says for the GPUs it was run on
how the products are launched; for others launch() guesses.
"""

import json
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

# ---- Products -------------------------------------------------------------------------------------------------------
#
# y = x W^T for M rows of x, by matrix units: they take 16 rows of W and P >= M columns at a time, so M costs nothing. A
# program makes the outputs of 16 R rows of W; with HALVES = 2 these are as many of W's second half as of its first. Its
# warps share K out: of every B WIDE elements each warp takes some, in products of its own of BK each, whose sums are
# added at the end.


@triton.jit
def pair(w, magic, TYPE: tl.constexpr):
    """The two numbers in bits 0-3 and 16-19 of words: [..., 2], too large by OFFSET. They are the last bits of a 16-bit
    float's mantissa, if its exponent is right, so that two take one and-or. magic, which has both exponents, is no
    constant: an instruction has room for one, which is the mask."""
    w &= 0xF000F
    if TYPE == tl.float32:
        a, b = (w & 15).to(TYPE), (w >> 16).to(TYPE)
    else:
        w |= magic
        a, b = w.to(tl.int16).to(TYPE, bitcast=True), (w >> 16).to(tl.int16).to(TYPE, bitcast=True)
    return tl.join(a, b)


@triton.jit
def numbers(w, magic, B: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr):
    """Words [R B, 128] of what tiles() makes -> [B 64 / BK, 16 R, BK], too large by OFFSET. Matrix units want each
    number from the thread that loaded it, so nothing moves."""
    w = tl.reshape(w, [R, B, 8, 4, 4])
    even = tl.join(pair(w, magic, TYPE), pair(w >> 8, magic, TYPE))
    q = tl.join(even, tl.join(pair(w >> 4, magic, TYPE), pair(w >> 12, magic, TYPE)))
    q = tl.reshape(q, [R, B, 8, 4, 2, 2, 2, 2, 2])  # row % 8, k / 4 % 4, row / 8, k / 32, k % 2, k / 16, k / 2
    q = tl.permute(q, [1, 0, 4, 2, 5, 7, 3, 8, 6] if BK == 64 else [5, 1, 0, 4, 2, 7, 3, 8, 6])
    return tl.reshape(q, [B * 64 // BK, 16 * R, BK])


@triton.jit
def linear_kernel(
    w_ptr, scales_ptr, zeros_ptr, bias_ptr, x_ptr, norm_ptr, residual_ptr, chosen_ptr, y_ptr, eps, magic, N,
    K: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr,
    HALVES: tl.constexpr, TYPE: tl.constexpr, P: tl.constexpr, R: tl.constexpr, B: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """linear; with chosen [rows, SLOTS] of experts W, for one x and one of its experts a program of the second axis.
    eps is that of the norm, and TYPE that of the products' factors."""
    SIDE: tl.constexpr = 16 * R // HALVES
    WIDE: tl.constexpr = 64 if BITS == 4 else BK
    OFFSET: tl.constexpr = 0 if TYPE == tl.float32 else 128 if TYPE == tl.bfloat16 else 1024
    OUT = N // HALVES
    i, p, blocks = tl.arange(0, 16 * R), tl.arange(0, P), tl.arange(0, B * WIDE // BK)
    out = tl.program_id(0) * SIDE + i % SIDE
    rows, ok = out + i // SIDE * OUT, out < OUT
    if chosen_ptr is not None:
        slot = tl.program_id(1)
        expert = tl.load(chosen_ptr + slot)
        x_ptr += slot // SLOTS * K
        y_ptr += slot * OUT
        w_ptr += expert * N * (tl.cdiv(K, 64) * 8 if BITS == 4 else K)
        if BITS <= 8:
            scales_ptr += expert * N * (tl.cdiv(K, GROUP) if BITS == 4 else 1)
        if BITS == 4:
            zeros_ptr += expert * N * tl.cdiv(K, GROUP)
    acc, squares = tl.zeros([B * WIDE // BK, 16 * R, P], tl.float32), ()
    for _ in tl.static_range(M):
        squares = squares + (tl.zeros([B * WIDE // BK, BK], tl.float32),)
    for k in tl.range(0, K, B * WIDE, num_stages=STAGES):
        first = k + blocks % B * WIDE + blocks // B * BK  # of each block
        at = first[:, None] + tl.arange(0, BK)[None, :]
        if M == 1:  # in every column the same
            x = tl.load(x_ptr + at, mask=at < K, other=0.0)[:, :, None]
        else:
            x = tl.load(x_ptr + at[:, :, None] + p * K, mask=(at < K)[:, :, None] & (p < M), other=0.0)
        x = x.to(TYPE)
        if norm_ptr is not None:  # what every column has in common follows at the end
            x *= tl.load(norm_ptr + at, mask=at < K, other=0.0).to(TYPE)[:, :, None]
            new = ()
            for m in tl.static_range(M):
                one = tl.load(x_ptr + at + m * K, mask=at < K, other=0.0).to(tl.float32)
                new = new + (squares[m] + one * one,)
            squares = new
        x = tl.broadcast_to(x, [B * WIDE // BK, BK, P])
        if BITS == 4:
            block, tile = k // 64 + tl.arange(0, R * B) % B, tl.arange(0, R * B) // B
            tile = tl.program_id(0) * (SIDE // 16) + tile % (SIDE // 16) + tile // (SIDE // 16) * (OUT // 16)
            inside = (tile < tl.cdiv(N, 16)) & (block < tl.cdiv(K, 64))
            at = (tile.to(tl.int64) * tl.cdiv(K, 64) + block)[:, None] * 128 + tl.arange(0, 128)[None, :]
            w = tl.load(w_ptr + at, mask=inside[:, None], other=0)
            at = (first // GROUP)[:, None] * N + rows[None, :]
            inside = (first < K)[:, None] & ok[None, :]
            scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)[:, :, None]
            zero = tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32)[:, :, None] * 0.0625 + OFFSET
            w = numbers(w, magic, B, R, BK, TYPE)
            half = tl.full([B * 64 // BK, 16 * R, BK // 2], 1.0, TYPE)
            ones = tl.reshape(tl.join(half, half), w.shape)
            sums = tl.dot(ones, x, input_precision="ieee")  # of x, for every row the same
            acc += scale * (tl.dot(w, x, input_precision="ieee") - zero * sums)
        else:
            w = rows.to(tl.int64)[None, :, None] * K + at[:, None, :]
            w = tl.load(w_ptr + w, mask=ok[None, :, None] & (at < K)[:, None, :], other=0).to(TYPE)
            acc = tl.dot(w, x, acc, input_precision="ieee")
    y = tl.sum(acc, axis=0)  # [16 R, P]
    if BITS == 8:
        y *= tl.load(scales_ptr + rows, mask=ok, other=0.0)[:, None]
    if norm_ptr is not None:
        total = tl.zeros([P], tl.float32)
        for m in tl.static_range(M):
            total = tl.where(p == m, tl.sum(tl.sum(squares[m], axis=1), axis=0), total)
        y *= tl.rsqrt(total / K + eps)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=ok, other=0.0).to(tl.float32)[:, None]
    if HALVES == 2:  # silu(gate) * up
        gate, up = tl.split(tl.permute(tl.reshape(y, [2, SIDE, P]), [1, 2, 0]))
        y, out = gate * tl.sigmoid(gate) * up, tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    at, inside = p[None, :] * OUT + out[:, None], (p < M)[None, :] & (out < OUT)[:, None]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit
def route_kernel(
    logits_ptr, share_ptr, chosen_ptr, E: tl.constexpr, SLOTS: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Of a row of logits [rows, E] the SLOTS likeliest and their probabilities; WIDTH is a power of two from E on."""
    row, e = tl.program_id(0), tl.arange(0, WIDTH)
    logits = tl.load(logits_ptr + row * E + e, mask=e < E, other=-float("inf"))
    p = tl.exp(logits - tl.max(logits, axis=0))
    left, slots = tl.where(p == p, p, 0.0), tl.arange(0, WIDTH)  # NaN has no order
    shares, chosen = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.int32)
    for i in tl.static_range(SLOTS):
        best = tl.argmax(left, axis=0)
        shares = tl.where(slots == i, tl.max(left, axis=0), shares)
        chosen = tl.where(slots == i, best, chosen)
        left = tl.where(e == best, -1.0, left)
    total = tl.sum(p, axis=0)
    total = total * 0 + tl.sum(shares, axis=0) if NORMALIZE else total  # NaN all the same
    tl.store(share_ptr + row * SLOTS + slots, shares / total, mask=slots < SLOTS)
    tl.store(chosen_ptr + row * SLOTS + slots, chosen.to(tl.int64), mask=slots < SLOTS)


@triton.jit
def mix_kernel(x_ptr, share_ptr, y_ptr, out_ptr, K, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, K] = x + the sum over the slots of share [rows, SLOTS] times y [rows, SLOTS, K]."""
    row, k = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    for slot in tl.static_range(SLOTS):
        at = row * SLOTS + slot
        total += tl.load(share_ptr + at) * tl.load(y_ptr + at * K + k, mask=k < K, other=0.0)
    tl.store(out_ptr + row * K + k, total, mask=k < K)


@triton.jit
def dequantize_kernel(w_ptr, scales_ptr, zeros_ptr, y_ptr, N, K, GROUP, BITS: tl.constexpr):
    """W [N, K] as numbers, 16 rows and 64 columns a program."""
    tile, block = tl.program_id(0), tl.program_id(1)
    rows, k = tile * 16 + tl.arange(0, 16), block * 64 + tl.arange(0, 64)
    inside = (rows < N)[:, None] & (k < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + k[None, :]
    if BITS == 8:
        y = tl.load(w_ptr + at, mask=inside, other=0).to(tl.float32)
        y *= tl.load(scales_ptr + rows, mask=rows < N, other=0.0)[:, None]
    else:
        w = tl.load(w_ptr + (tile.to(tl.int64) * tl.cdiv(K, 64) + block) * 128 + tl.arange(0, 128))
        y = tl.reshape(numbers(w[None, :], 0, 1, 1, 64, tl.float32), [16, 64])
        group = (k // GROUP).to(tl.int64)[None, :] * N + rows[:, None]
        y -= tl.load(zeros_ptr + group, mask=inside, other=0).to(tl.float32) * 0.0625
        y *= tl.load(scales_ptr + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y, mask=inside)


# ---- Attention ------------------------------------------------------------------------------------------------------
#
# A program has one key/value head, all queries of up to 8 tokens that look at it, and an equal part of the tokens that
# are in the cache, whose number is read on the device. The last part takes the new tokens too: from qkv, not from the
# cache, into which only it writes, so that no program waits for another.


@triton.jit
def rotated(
    ptr, norm_ptr, token, ok, rope_ptr, eps, D: tl.constexpr, HALF: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """Rows of D numbers at ptr [R], normed and rotated for token [R]: both halves, [R, HALF] of TYPE."""
    d = tl.arange(0, HALF)
    inside = ok[:, None] & (d < D // 2)[None, :]
    a = tl.load(ptr[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptr[:, None] + d[None, :] + D // 2, mask=inside, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / D + eps)[:, None]
        a *= scale * tl.load(norm_ptr + d, mask=d < D // 2, other=0.0).to(tl.float32)[None, :]
        b *= scale * tl.load(norm_ptr + D // 2 + d, mask=d < D // 2, other=0.0).to(tl.float32)[None, :]
    angle = rope_ptr + token[:, None] * D + 2 * d[None, :]  # [T, D / 2, 2]
    cos = tl.load(angle, mask=inside, other=0.0)
    sin = tl.load(angle + 1, mask=inside, other=0.0)
    return (a * cos - b * sin).to(TYPE), (b * cos + a * sin).to(TYPE)


@triton.jit
def look(q1, q2, k1, k2, v, seen, scale, top, total, acc):
    """Adds keys (halves k1 and k2 [S, HALF]) and values [S, DV] that seen [R, S] allows to a running softmax. Products
    are of q's type."""
    k1, k2, v = k1.to(q1.dtype), k2.to(q1.dtype), v.to(q1.dtype)
    scores = tl.dot(q1, tl.trans(k1), input_precision="ieee") + tl.dot(q2, tl.trans(k2), input_precision="ieee")
    scores = tl.where(seen, scores * scale, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    p, fade = tl.exp2(scores - new_top[:, None]), tl.exp2(top - new_top)
    acc = acc * fade[:, None] + tl.dot(p.to(q1.dtype), v, input_precision="ieee")
    return new_top, total * fade + tl.sum(p, axis=1), acc


@triton.jit
def attend_kernel(
    qkv_ptr, k_ptr, v_ptr, position_ptr, rope_ptr, q_norm_ptr, k_norm_ptr, out_ptr, sums_ptr, eps, scale, S, TOKENS,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    R: tl.constexpr, HALF: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """See attend. R rows: query head r % SHARE of this group, token r // SHARE. scale is that of base-2 logits."""
    SHARE: tl.constexpr = HEADS // GROUPS
    WIDTH: tl.constexpr = (HEADS + 2 * GROUPS) * D
    split, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    qkv_ptr += b * TOKENS * WIDTH
    k_ptr += (b * GROUPS + group) * S * D
    v_ptr += (b * GROUPS + group) * S * D
    start = tl.load(position_ptr).to(tl.int32)
    r, dv = tl.arange(0, R), tl.arange(0, DV)
    token, head = r // SHARE, group * SHARE + r % SHARE
    ok = token < TOKENS
    q1, q2 = rotated(qkv_ptr + token * WIDTH + head * D, q_norm_ptr, token, ok, rope_ptr, eps, D, HALF, TYPE)
    top, total = tl.full([R], -1e38, tl.float32), tl.zeros([R], tl.float32)
    acc = tl.zeros([R, DV], tl.float32)

    begin = tl.maximum(start - WINDOW + 1, 0) if WINDOW else 0
    part = tl.cdiv(tl.cdiv(start - begin, SPLITS), BLOCK) * BLOCK
    begin += split * part
    end = tl.minimum(begin + part, start)
    half = tl.arange(0, HALF)
    for at in range(begin, end, BLOCK):
        key = at + tl.arange(0, BLOCK)
        inside = (key < end)[:, None] & (half < D // 2)[None, :]
        k1 = tl.load(k_ptr + key[:, None] * D + half[None, :], mask=inside, other=0.0)
        k2 = tl.load(k_ptr + key[:, None] * D + half[None, :] + D // 2, mask=inside, other=0.0)
        v = tl.load(v_ptr + key[:, None] * D + dv[None, :], mask=(key < end)[:, None] & (dv < D)[None, :], other=0.0)
        seen = (key < end)[None, :] & ok[:, None]
        if WINDOW:
            seen &= key[None, :] > (start + token)[:, None] - WINDOW
        top, total, acc = look(q1, q2, k1, k2, v, seen, scale, top, total, acc)
    if split == SPLITS - 1:
        new = tl.arange(0, 16)
        here = (new < TOKENS) & (start + new < S)
        k_new = qkv_ptr + new * WIDTH + (HEADS + group) * D
        k1, k2 = rotated(k_new, k_norm_ptr, new, here, rope_ptr, eps, D, HALF, TYPE)
        v_new = k_new[:, None] + GROUPS * D + dv[None, :]
        v = tl.load(v_new, mask=here[:, None] & (dv < D)[None, :], other=0.0)
        seen = here[None, :] & ok[:, None] & (new[None, :] <= token[:, None])
        if WINDOW:
            seen &= new[None, :] > token[:, None] - WINDOW
        top, total, acc = look(q1, q2, k1, k2, v, seen, scale, top, total, acc)
        to = (start + new)[:, None] * D
        inside = here[:, None] & (half < D // 2)[None, :]
        tl.store(k_ptr + to + half[None, :], k1, mask=inside)
        tl.store(k_ptr + to + half[None, :] + D // 2, k2, mask=inside)
        tl.store(v_ptr + to + dv[None, :], v, mask=here[:, None] & (dv < D)[None, :])
    inside = ok[:, None] & (dv < D)[None, :]
    at = (b * TOKENS + token) * HEADS + head  # of a row of out [B, TOKENS, HEADS, (SPLITS,) D]
    if SPLITS == 1:
        tl.store(out_ptr + at[:, None] * D + dv[None, :], acc / total[:, None], mask=inside)
    else:
        at = at * SPLITS + split
        tl.store(out_ptr + at[:, None] * D + dv[None, :], acc, mask=inside)
        tl.store(sums_ptr + at * 2, top, mask=ok)
        tl.store(sums_ptr + at * 2 + 1, total, mask=ok)


@triton.jit
def combine_kernel(
    parts_ptr, sums_ptr, out_ptr, D: tl.constexpr, SPLITS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The parts of one query's attention [SPLITS, D], with their maxima and sums [SPLITS, 2], put together."""
    row, s, dv = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, DV)
    at = row * SPLITS + s
    top = tl.load(sums_ptr + at * 2, mask=s < SPLITS, other=-float("inf"))
    factor = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(factor * tl.load(sums_ptr + at * 2 + 1, mask=s < SPLITS, other=0.0), axis=0)
    inside = (s < SPLITS)[:, None] & (dv < D)[None, :]
    parts = tl.load(parts_ptr + at.to(tl.int64)[:, None] * D + dv[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + row * D + dv, tl.sum(parts * factor[:, None], axis=0) / total, mask=dv < D)


# ---- Operations -----------------------------------------------------------------------------------------------------


@cache
def gpu(device: torch.device) -> tuple[int, int, dict[str, list[int]]]:
    """(multiprocessors, the fewest columns that matrix units take, what kernels_triton.json says of this GPU)."""
    if device.type == "cpu":
        return 16, 8, {}  # the interpreter
    properties, path = torch.cuda.get_device_properties(device), Path(__file__).with_suffix(".json")
    table = json.loads(path.read_text()) if path.exists() else {}
    columns = 16 if torch.version.hip else 8 if properties.major >= 8 else 1  # Triton uses none of Turing's
    return properties.multi_processor_count, columns, table.get(properties.name, {})


def product_key(bits: int, n: int, k: int, halves: int, group: int) -> str:
    """What kernels_triton.json calls a product with W [n, k]."""
    return f"{bits} {n} {k} {halves}" + (" g32" if bits == 4 and group == 32 else "")


def launch(x: Tensor, bits: int, n: int, m: int, halves: int, group: int) -> dict[str, int]:
    """How linear_kernel is to be run for m rows of x [..., K] and W [n, K]: a program's tiles of 16 rows and warps, and
    of a warp the blocks of K that it takes at a time and the stages of its loads. The guess gives every multiprocessor
    two programs, if there are so many, and none more than 99 KB of shared memory, or 64 unless units take 8 columns."""
    processors, columns, table = gpu(x.device)
    columns = columns if x.element_size() == 2 else 1  # of float32 they would cut something off
    if columns > 1 and (known := table.get(product_key(bits, n, x.shape[-1], halves, group))):
        tiles, warps, depth, stages = known
    elif columns == 8:
        tiles = 2 if halves == 2 or triton.cdiv(n, 32) >= 4 * processors else 1
        tiles = 4 if bits <= 8 and triton.cdiv(n, 64) >= 3 * processors else tiles
        warps = 4 if triton.cdiv(n, 16 * tiles) >= 2 * processors else 8
        full = (bits == 8 and tiles == 4) or (warps == 8 and (bits > 4 or tiles == 2))
        depth, stages = 1 if full else 2, 3
    else:
        tiles, warps, depth, stages = halves, 8 // x.element_size(), 1, 2
    columns = max(columns, triton.next_power_of_2(m))
    return {"R": tiles, "B": warps * depth, "P": columns, "STAGES": stages, "num_warps": warps}


def product(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, n: int, group: int,
    norm: Tensor | None, eps: float, residual: Tensor | None, chosen: Tensor | None, y: Tensor, m: int, slots: int,
    halves: int,
):  # fmt: skip
    """Runs linear_kernel: y from m rows of x; with chosen [..., slots], one row of x and y for every expert chosen."""
    bits, k = 4 if zeros is not None else 8 * weight.element_size(), x.shape[-1]
    block = {4: min(group, 64), 8: 64, 16: 64, 32: 32}[bits]
    sizes = launch(x, bits, n, m, halves, group)
    grid = triton.cdiv(n // halves, 16 * sizes["R"] // halves), 1 if chosen is None else chosen.numel()
    magic = 0x43004300 if x.dtype == torch.bfloat16 else 0x64006400
    linear_kernel[grid](
        weight, scales, zeros, bias, x, norm, residual, chosen, y, eps, magic, n, k, group, m, slots, bits, halves,
        BK=block, TYPE=factors(x), **sizes,
    )  # fmt: skip


def factors(x: Tensor) -> tl.dtype:
    """The type in which matrix units take x; the interpreter has no arithmetic of bfloat16."""
    return tl.float32 if x.device.type == "cpu" and x.dtype == torch.bfloat16 else getattr(tl, str(x.dtype)[6:])


@custom_op("gptfast_triton::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, n: int, group: int,
    norm: Tensor | None, eps: float, residual: Tensor | None, swiglu: bool, wide: bool,
) -> Tensor:  # fmt: skip
    """kernels.linear for up to MAX_ROWS rows, with its arguments' tensors."""
    y = linear_shape(x, n, swiglu, wide)
    rows = x.numel() // x.shape[-1]
    product(x, weight, scales, zeros, bias, n, group, norm, eps, residual, None, y, rows, 1, 1 + swiglu)
    return y


def linear_shape(x: Tensor, n: int, swiglu: bool, wide: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], n // (1 + swiglu), dtype=torch.float32 if wide else x.dtype)


@linear.register_fake
def _(x, weight, scales, zeros, bias, n, group, norm, eps, residual, swiglu, wide):
    return linear_shape(x, n, swiglu, wide)


@custom_op("gptfast_triton::experts", mutates_args=())
def experts(
    x: Tensor, norm: Tensor, eps: float, share: Tensor, chosen: Tensor, w13: Tensor, scales13: Tensor | None,
    zeros13: Tensor | None, w2: Tensor, scales2: Tensor | None, zeros2: Tensor | None, width: int, group: int,
) -> Tensor:  # fmt: skip
    """kernels.experts: of every row of x only the chosen experts, in no order, since each is read by one row."""
    slots, k = chosen.shape[-1], x.shape[-1]
    h, y = x.new_empty(chosen.numel(), width), x.new_empty(*chosen.shape, k, dtype=torch.float32)
    product(x, w13, scales13, zeros13, None, 2 * width, group, norm, eps, None, chosen, h, 1, slots, 2)
    product(h, w2, scales2, zeros2, None, k, group, None, 0.0, None, chosen, y, 1, 1, 1)
    out = torch.empty_like(x)
    mix_kernel[triton.cdiv(k, 512), x.numel() // k](x, share, y, out, k, slots, 512)
    return out


@experts.register_fake
def _(x, *args):
    return torch.empty_like(x)


@custom_op("gptfast_triton::attend", mutates_args=("k_cache", "v_cache"))
def attend(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, rope: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, heads: int, window: int,
) -> Tensor:  # fmt: skip
    """What model.Attention.attend does: qkv [B, T, (H + 2 G) D] at positions [T], rope [T, D/2, 2] -> [B, T, H D]."""
    (b, t, _), (_, groups, length, d) = qkv.shape, k_cache.shape
    processors = gpu(qkv.device)[0]
    span = min(length, window) if window else length
    # Parts of at least 64 tokens, until every multiprocessor has two; putting them together is a kernel more
    splits = min(triton.cdiv(2 * processors, b * groups), triton.cdiv(span, 64)) if span > 128 else 1
    dv = max(16, triton.next_power_of_2(d))
    out = qkv.new_empty(b, t, heads * d)
    parts = out if splits == 1 else qkv.new_empty(b * t * heads, splits, d, dtype=torch.float32)
    sums = out if splits == 1 else parts.new_empty(b * t * heads, splits, 2)
    attend_kernel[(splits, groups, b)](
        qkv, k_cache, v_cache, positions, rope, q_norm, k_norm, parts, sums, eps, 1.4426950408889634 * d**-0.5,
        length, t, heads, groups, d, window, splits,
        R=max(16, triton.next_power_of_2(t * heads // groups)),
        HALF=max(16, triton.next_power_of_2(d // 2)),
        DV=dv,
        BLOCK=max(16, 8192 // (dv * qkv.element_size())),  # some 8 KB of keys and of values, twice: any GPU has room
        TYPE=factors(qkv),
        num_stages=2,
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(b * t * heads,)](parts, sums, out, d, splits, dv, triton.next_power_of_2(splits))
    return out


@attend.register_fake
def _(qkv, k_cache, v_cache, positions, rope, q_norm, k_norm, eps, heads, window):
    return qkv.new_empty(*qkv.shape[:-1], heads * k_cache.shape[-1])


@custom_op("gptfast_triton::route", mutates_args=())
def route(logits: Tensor, slots: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """kernels.route: float32 logits [..., E] -> share and chosen [..., slots]."""
    share, chosen = route_shapes(logits, slots, normalize)
    e = logits.shape[-1]
    route_kernel[(logits.numel() // e,)](logits, share, chosen, e, slots, normalize, triton.next_power_of_2(e))
    return share, chosen


@route.register_fake
def route_shapes(logits, slots, normalize):
    shape = (*logits.shape[:-1], slots)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@custom_op("gptfast_triton::dequantize", mutates_args=())
def dequantize(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, n: int, k: int, group: int, dtype: torch.dtype
) -> Tensor:
    """kernels.dequantize for one matrix [n, k] as enable lays it out."""
    y = weight.new_empty(n, k, dtype=dtype)
    grid = triton.cdiv(n, 16), triton.cdiv(k, 64)
    dequantize_kernel[grid](weight, scales, zeros, y, n, k, group, 8 if zeros is None else 4)
    return y


@dequantize.register_fake
def _(weight, scales, zeros, n, k, group, dtype):
    return weight.new_empty(n, k, dtype=dtype)


def tiles(weight: Tensor) -> Tensor:
    """int4 [..., N, K / 2] as in a checkpoint -> [..., N / 16, K / 64, 128] int32, filled up with zeros: of 16 rows and
    64 columns four words for each thread of a warp, those that a matrix unit wants it to have: row % 8 = thread / 4 and
    k / 4 % 4 = thread % 4."""
    halves = weight.unflatten(-1, (-1, 4))
    q = torch.cat([halves & 15, halves >> 4], dim=-1).flatten(-2)  # [..., N, K]
    q = torch.nn.functional.pad(q, (0, -q.shape[-1] % 64, 0, -q.shape[-2] % 16))
    q = q.unflatten(-1, (-1, 2, 2, 4, 2, 2)).unflatten(-7, (-1, 2, 8))
    q = q[..., 0, :] | q[..., 1, :] << 4  # [..., N / 16, row / 8, row % 8, K / 64, k / 32, k / 16, k / 4, k % 2]
    lead = range(q.dim() - 8)
    q = q.permute(*lead, *(len(lead) + i for i in (0, 3, 2, 6, 1, 4, 7, 5)))
    return q.flatten(-6).contiguous().view(torch.int32)


def enable(model: torch.nn.Module):
    """Puts model on these operations. Of int4 the weights are laid out as tiles, their scales and zeros by columns."""
    for w in model.modules():
        if not hasattr(w, "fast") or w.fast:
            continue
        whole = w.weight.dim() == 2 or w.n_out % 16 == 0  # experts lie one behind the other
        if w.scales is None or (w.n_in % 8 == 0 and (w.zeros is None or w.group % 32 == 0 and whole)):
            if w.zeros is not None:
                w.weight, w.scales, w.zeros = tiles(w.weight), *(t.mT.contiguous().mT for t in (w.scales, w.zeros))
            w.fast, w.gpu = (w.weight, w.scales, w.zeros, w.bias), True
