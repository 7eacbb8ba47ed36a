"""The operations of a decode step on a GPU, in Triton: what kernels.cpp is on a CPU. kernels.py says how weights are
stored, holds the references and calls this file, which it imports only where there is a GPU.

    linear        a matrix-vector product for up to 8 rows of x, with what comes before and after it
    attend        q/k norm, RoPE, cache write and attention over the tokens in the cache
    route         the router's softmax and choice; experts: the feed-forward of the chosen ones
    dequantize    a whole matrix, for the products of prefill

Nothing here is one vendor's. TRITON_INTERPRET=1 runs it on CPU tensors, which is how tests/test_triton.py checks it.
kernels_triton.json, which scripts/benchmark_gpu.py --tune writes, says for the GPUs it was run on how many rows and
warps a program of linear takes; for others launch() guesses.
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
# y = x W^T for M rows of x. A program makes BN outputs, or with HALVES = 2 BN of the first N / 2 and the BN that belong
# to them of the rest. Its T threads lie along K: in a step of the loop each takes 16 bytes of every row of W, and the
# same elements of x. All that threads exchange is their sums, at the end. Plain multiplications and additions: there
# are too few rows for matrix units, and memory is what one waits for.


@triton.jit
def add_plain(
    acc, squares, k, w_ptr, x_ptr, norm_ptr, rows, ok, N, K: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr,
    HALVES: tl.constexpr, BN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A step of linear_kernel's loop for numbers of 16 or 32 bits, T times V of each row."""
    V: tl.constexpr = 128 // BITS
    at = k + tl.arange(0, T * V)
    weights, new, new_squares = (), (), ()
    for h in tl.static_range(HALVES):
        row = (rows + h * (N // HALVES)).to(tl.int64) * K
        w = tl.load(w_ptr + row[:, None] + at[None, :], mask=ok[:, None] & (at < K)[None, :], other=0.0)
        weights = weights + (w.to(tl.float32),)
    for m in tl.static_range(M):
        x = tl.load(x_ptr + m * K + at, mask=at < K, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            new_squares = new_squares + (squares[m] + tl.sum(tl.reshape(x * x, [T, V]), axis=1),)
            x *= tl.load(norm_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        for h in tl.static_range(HALVES):
            xw = tl.reshape(weights[h] * x[None, :], [BN, T, V])
            new = new + (acc[m * HALVES + h] + tl.sum(xw, axis=2),)
    return new, new_squares


@triton.jit
def add_packed(
    acc, squares, k, w_ptr, scales_ptr, zeros_ptr, x_ptr, norm_ptr, rows, ok, N, K: tl.constexpr, GROUP: tl.constexpr,
    M: tl.constexpr, BITS: tl.constexpr, HALVES: tl.constexpr, BN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The same for int8 and int4, as words of E elements, 4 words a thread, which of int4 belong to one group."""
    E: tl.constexpr = 32 // BITS
    word = k // E + tl.arange(0, 4 * T)
    first = k + tl.arange(0, T) * (4 * E)  # a thread's first element
    words, scales, zeros, new, new_squares = (), (), (), (), ()
    for h in tl.static_range(HALVES):
        row = rows + h * (N // HALVES)
        at = row.to(tl.int64)[:, None] * (K // E) + word[None, :]
        w = tl.load(w_ptr + at, mask=ok[:, None] & (word < K // E)[None, :], other=0)
        if BITS == 4:  # scales and zeros lie column by column, [G, N]: one load has those of BN rows
            at = (first // GROUP).to(tl.int64)[None, :] * N + row[:, None]
            inside = ok[:, None] & (first < K)[None, :]
            scales = scales + (tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32),)
            zeros = zeros + (tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32) * 0.0625,)
        else:
            w ^= -0x7F7F7F80  # every byte's sign: from -128..127 to 0..255
        a, b = tl.split(tl.reshape(w, [BN, 2 * T, 2]))
        w0, w2 = tl.split(tl.reshape(a, [BN, T, 2]))
        w1, w3 = tl.split(tl.reshape(b, [BN, T, 2]))
        words = words + (w0, w1, w2, w3)
    e = tl.arange(0, 8)
    bit = 8 * (e % 4) + (e // 4 * 4 if BITS == 4 else 0)
    down = tl.where(bit + BITS > 23, 12 if BITS == 4 else 16, 0)
    power = ((217 + down - bit) << 23).to(tl.float32, bitcast=True)  # 2 ** (90 + down - bit)
    numbers = ()
    for h in tl.static_range(HALVES):
        for u in tl.static_range(E // 2):  # 8 elements at a time: a word of int4, two of int8
            if BITS == 4:
                numbers = numbers + (octet(words[4 * h + u], words[4 * h + u], BITS, BN, T),)
            else:
                numbers = numbers + (octet(words[4 * h + 2 * u], words[4 * h + 2 * u + 1], BITS, BN, T),)
    for m in tl.static_range(M):
        parts, sum_x, sum_squares = (), tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
        for _ in tl.static_range(HALVES):
            parts = parts + (tl.zeros([BN, T], tl.float32),)
        for u in tl.static_range(E // 2):
            at = first[:, None] + u * 8 + e[None, :]
            x = tl.load(x_ptr + m * K + at, mask=at < K, other=0.0).to(tl.float32)
            if norm_ptr is not None:
                sum_squares += tl.sum(x * x, axis=1)
                x *= tl.load(norm_ptr + at, mask=at < K, other=0.0).to(tl.float32)
            sum_x += tl.sum(x, axis=1)
            x, added = (x * power[None, :])[None, :, :], ()
            for h in tl.static_range(HALVES):
                added = added + (parts[h] + tl.sum(numbers[E // 2 * h + u] * x, axis=2),)
            parts = added
        if norm_ptr is not None:
            new_squares = new_squares + (squares[m] + sum_squares,)
        for h in tl.static_range(HALVES):
            if BITS == 4:
                part = scales[h] * (parts[h] * 2.0**59 - zeros[h] * sum_x[None, :])
            else:
                part = parts[h] * 2.0**59 - 128 * sum_x[None, :]
            new = new + (acc[m * HALVES + h] + part,)
    return new, new_squares


@triton.jit
def octet(a, b, BITS: tl.constexpr, BN: tl.constexpr, T: tl.constexpr):
    """8 unsigned numbers q of BITS bits out of words a and b [BN, T]: float32 [BN, T, 8]. Where its bits stand in a
    float's mantissa, from bit BIT on, q already is one, q 2^(BIT - 149), and multiplications take it as it is: no
    conversion, and one shift for several. What x is multiplied by makes the products q x 2^-59: nothing is lost for x
    between 1e-18 and 1e11. The 8 stay in one thread, so joining them moves nothing."""
    if BITS == 4:
        c = a >> 12
        a0, a1, a2, a3 = a & 0xF, a & 0xF00, a & 0xF0000, c & 0xF000  # bits 0, 8, 16, 24 - 12
        b0, b1, b2, b3 = a & 0xF0, a & 0xF000, c & 0xF00, c & 0xF0000  # 4, 12, 20 - 12, 28 - 12
    else:
        c, d = a >> 16, b >> 16
        a0, a1, a2, a3 = a & 0xFF, a & 0xFF00, c & 0xFF, c & 0xFF00
        b0, b1, b2, b3 = b & 0xFF, b & 0xFF00, d & 0xFF, d & 0xFF00
    even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
    odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.reshape(tl.join(even, odd), [BN, T, 8]).to(tl.float32, bitcast=True)


@triton.jit
def linear_kernel(
    w_ptr, scales_ptr, zeros_ptr, bias_ptr, x_ptr, norm_ptr, residual_ptr, chosen_ptr, y_ptr, eps, N, K: tl.constexpr,
    GROUP: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr, HALVES: tl.constexpr,
    BN: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """linear; with chosen [rows, SLOTS] of experts W, for one x and one of its experts a program of the second axis."""
    E: tl.constexpr = 32 // BITS if BITS < 16 else 1
    slot, rows, OUT = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN), N // HALVES
    ok = rows < OUT
    if chosen_ptr is not None:
        expert = tl.load(chosen_ptr + slot)
        x_ptr += slot // SLOTS * K
        y_ptr += slot * OUT
        w_ptr += expert * N * (K // E)
        if BITS == 8:
            scales_ptr += expert * N
        if BITS == 4:
            scales_ptr += expert * N * tl.cdiv(K, GROUP)
            zeros_ptr += expert * N * tl.cdiv(K, GROUP)
    acc, squares = (), ()
    for _ in tl.static_range(M * HALVES):
        acc = acc + (tl.zeros([BN, T], tl.float32),)
    if norm_ptr is not None:
        for _ in tl.static_range(M):
            squares = squares + (tl.zeros([T], tl.float32),)
    for k in range(0, K, 128 // BITS * T):
        if BITS >= 16:
            acc, squares = add_plain(
                acc, squares, k, w_ptr, x_ptr, norm_ptr, rows, ok, N, K, M, BITS, HALVES, BN, T
            )  # fmt: skip
        else:
            acc, squares = add_packed(
                acc, squares, k, w_ptr, scales_ptr, zeros_ptr, x_ptr, norm_ptr, rows, ok, N, K, GROUP, M, BITS, HALVES,
                BN, T,
            )  # fmt: skip
    for m in tl.static_range(M):
        out = ()
        for h in tl.static_range(HALVES):
            y = tl.sum(acc[m * HALVES + h], axis=1)
            if BITS == 8:
                y *= tl.load(scales_ptr + rows + h * OUT, mask=ok, other=0.0)
            if norm_ptr is not None:
                y *= tl.rsqrt(tl.sum(squares[m], axis=0) / K + eps)
            if bias_ptr is not None:
                y += tl.load(bias_ptr + rows + h * OUT, mask=ok, other=0.0).to(tl.float32)
            out = out + (y,)
        one = out[0]
        if HALVES == 2:  # silu(gate) * up
            one = one * tl.sigmoid(one) * out[1]
        if residual_ptr is not None:
            one += tl.load(residual_ptr + m * OUT + rows, mask=ok, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * OUT + rows, one, mask=ok)


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
def dequantize_kernel(
    w_ptr, scales_ptr, zeros_ptr, y_ptr, N, K, GROUP, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """W [N, K] as numbers, a tile [BN, BK] a program."""
    rows, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows < N)[:, None] & (k < K)[None, :]
    at = rows.to(tl.int64)[:, None]
    if BITS == 8:
        q = tl.load(w_ptr + at * K + k[None, :], mask=inside, other=0).to(tl.float32)
        scale = tl.load(scales_ptr + rows, mask=rows < N, other=0.0)[:, None]
    else:
        byte = k // 8 * 4 + k % 4  # element j of 8 is in the low half of byte j of 4, j + 4 in its high half
        q = tl.load(w_ptr + at * (K // 2) + byte[None, :], mask=inside, other=0)
        q = ((q >> (k % 8 // 4 * 4).to(tl.uint8)[None, :]) & 15).to(tl.float32)
        group = (k // GROUP).to(tl.int64)[None, :] * N + rows[:, None]
        q -= tl.load(zeros_ptr + group, mask=inside, other=0).to(tl.float32) * 0.0625
        scale = tl.load(scales_ptr + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at * K + k[None, :], q * scale, mask=inside)


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
    """(multiprocessors, threads of a warp, what kernels_triton.json says of this kind of GPU)."""
    if device.type == "cpu":
        return 16, 32, {}  # the interpreter
    properties, path = torch.cuda.get_device_properties(device), Path(__file__).with_suffix(".json")
    table = json.loads(path.read_text()) if path.exists() else {}
    return properties.multi_processor_count, properties.warp_size, table.get(properties.name, {})


def launch(device: torch.device, bits: int, n: int, k: int, m: int, halves: int) -> dict[str, int]:
    """Rows of W [n, k] for a program and its warps: as many rows as leave every multiprocessor two programs and their
    sums in registers, as many warps as K has work for."""
    processors, lanes, table = gpu(device)
    if known := table.get(f"{bits} {n} {k} {m} {halves}"):
        bn, warps = known
    elif device.type == "cpu":
        bn, warps = 64, 2  # the interpreter takes long for every program
    else:
        warps = min(4, triton.next_power_of_2(triton.cdiv(k, lanes * 128 // bits)))
        bn = (4 if bits > 8 or m > 1 else 8) // halves // (2 if m > 4 else 1)
        while bn > 1 and triton.cdiv(n // halves, bn) < 2 * processors:
            bn //= 2
    return {"BN": bn, "T": lanes * warps, "num_warps": warps}


def layout(weight: Tensor, zeros: Tensor | None) -> tuple[Tensor, int]:
    """The weight as the kernels take it, and its bits."""
    if weight.is_floating_point():
        return weight, 8 * weight.element_size()
    return weight.view(torch.int32), 8 if zeros is None else 4


@custom_op("gptfast_triton::linear", mutates_args=())
def linear(
    x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, group: int,
    norm: Tensor | None, eps: float, residual: Tensor | None, swiglu: bool, wide: bool,
) -> Tensor:  # fmt: skip
    """kernels.linear for up to MAX_ROWS rows, with its arguments' tensors."""
    n, k = weight.shape[0], x.shape[-1]
    weight, bits = layout(weight, zeros)
    halves, m = 1 + swiglu, x.numel() // k
    y = linear_shape(x, n, swiglu, wide)
    sizes = launch(x.device, bits, n, k, m, halves)
    linear_kernel[(triton.cdiv(n // halves, sizes["BN"]), 1)](
        weight, scales, zeros, bias, x, norm, residual, None, y, eps, n, k, group, m, 1, bits, halves, **sizes
    )
    return y


def linear_shape(x: Tensor, n: int, swiglu: bool, wide: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], n // (1 + swiglu), dtype=torch.float32 if wide else x.dtype)


@linear.register_fake
def _(x, weight, scales, zeros, bias, group, norm, eps, residual, swiglu, wide):
    return linear_shape(x, weight.shape[0], swiglu, wide)


@custom_op("gptfast_triton::experts", mutates_args=())
def experts(
    x: Tensor, norm: Tensor, eps: float, share: Tensor, chosen: Tensor, w13: Tensor, scales13: Tensor | None,
    zeros13: Tensor | None, w2: Tensor, scales2: Tensor | None, zeros2: Tensor | None, width: int, group: int,
) -> Tensor:  # fmt: skip
    """kernels.experts: of every row of x only the chosen experts, in no order, since each is read by one row."""
    (*_, slots), k = chosen.shape, x.shape[-1]
    w13, bits = layout(w13, zeros13)
    w2, _ = layout(w2, zeros2)
    h, y = x.new_empty(chosen.numel(), width), x.new_empty(*chosen.shape, k, dtype=torch.float32)
    sizes = launch(x.device, bits, 2 * width, k, 1, 2)
    linear_kernel[(triton.cdiv(width, sizes["BN"]), chosen.numel())](
        w13, scales13, zeros13, None, x, norm, None, chosen, h, eps, 2 * width, k, group, 1, slots, bits, 2, **sizes
    )
    sizes = launch(x.device, bits, k, width, 1, 1)
    linear_kernel[(triton.cdiv(k, sizes["BN"]), chosen.numel())](
        w2, scales2, zeros2, None, h, None, None, chosen, y, 0.0, k, width, group, 1, 1, bits, 1, **sizes
    )
    return (x + (share[..., None] * y).sum(-2)).to(x.dtype)


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
    processors, *_ = gpu(qkv.device)
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
        BLOCK=max(16, 8192 // (dv * qkv.element_size())),  # 8 KB of keys and of values, twice: any GPU has room for it
        TYPE=tl.float32 if qkv.device.type == "cpu" else getattr(tl, str(qkv.dtype).removeprefix("torch.")),
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
def dequantize(weight: Tensor, scales: Tensor, zeros: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """kernels.dequantize for one matrix, its scales and zeros laid out by enable."""
    y = dequantized_shape(weight, scales, zeros, group, dtype)
    n, k = y.shape
    grid = (triton.cdiv(n, 4), triton.cdiv(k, 1024))
    dequantize_kernel[grid](weight, scales, zeros, y, n, k, group, 8 if zeros is None else 4, 4, 1024)
    return y


@dequantize.register_fake
def dequantized_shape(weight, scales, zeros, group, dtype):
    return weight.new_empty(weight.shape[0], weight.shape[1] * (1 if zeros is None else 2), dtype=dtype)


def enable(model: torch.nn.Module):
    """Puts model on these operations. Weights stay as they are; of int4 the scales and zeros are laid out by columns,
    which only their strides tell."""
    for w in model.modules():
        if not hasattr(w, "fast") or w.fast:
            continue
        if w.scales is None or (w.n_in % 8 == 0 and (w.zeros is None or w.group % 32 == 0)):
            if w.zeros is not None:
                w.scales, w.zeros = (t.mT.contiguous().mT for t in (w.scales, w.zeros))
            w.fast, w.gpu = (w.weight, w.scales, w.zeros, w.bias), True
