"""Converts the stored elements and scales of a weight to floats, in the Triton kernels.

    tiles_to_floats          elements of 4 bits, 8 in a word of a tile; calls int4_pair or e2m1_pair
    int4_pair, e2m1_pair     two elements of 4 bits from a word
    e4m3_to_floats           elements of 8 bits, four in a word
    unpack_scale_words       a scale and a zero point in one word
    decode_e8m0              a scale that is a power of two

formats/triton_layouts.py packs the words.

The floats have the type DTYPE of x. A register holds two 16-bit floats, so the functions decode elements in pairs. The
two elements of a pair are 16 bits apart in the word, and neighbours in their row of W. For float32 each element is
decoded alone.

e4m3 and e2m1 are floats themselves. Their exponent and mantissa are shifted to where the exponent of DTYPE ends and
the mantissa of DTYPE begins:

    bits of a bfloat16    15      14 ... 7    6 ... 0
                          sign    exponent    mantissa
    e4m3 (FP8)            s       0000eeee    mmm0000
    e2m1 (FP4)            s       000000ee    m000000

DTYPE has a larger exponent bias, so the result is the element times 2^-120 (e4m3) or 2^-126 (e2m1). A subnormal element
becomes a subnormal float. Multiplying with BIAS_FACTOR, 2^120 or 2^126, gives the element exactly.
"""

import torch
import triton
import triton.language as tl

from kernels.triton import MAGIC_BIASES

BFLOAT16_BIAS, FLOAT16_BIAS = tl.constexpr(MAGIC_BIASES[torch.bfloat16]), tl.constexpr(MAGIC_BIASES[torch.float16])
# The magic_number of int4_pair, by type of x: a word of two floats, each of which is the bias
MAGIC_NUMBERS = {
    dtype: torch.tensor([bias, bias], dtype=dtype, device="cpu").view(torch.int32).item()
    for dtype, bias in MAGIC_BIASES.items()
}
SIGN_MASK = tl.constexpr(-0x7FFF8000)  # the signs of two 16-bit floats, 0x80008000, as an int32


# ---- Elements of 4 bits ---------------------------------------------------------------------------------------------


@triton.jit
def tiles_to_floats(
    words, magic_number, DECODE: tl.constexpr, TILES_N: tl.constexpr, SLICE_K: tl.constexpr, DTYPE: tl.constexpr
):
    """Decodes the words [TILES_N * TILES_K, 128] of TILES_N rows of TILES_K tiles to the left operand of tl.dot, in
    slices of SLICE_K columns: [64 TILES_K / SLICE_K, 16 TILES_N, SLICE_K]. formats/triton_layouts.py draws a
    tile.

    DECODE: int4_pair or e2m1_pair.
    SLICE_K: 64, a whole tile, or 32, half a tile. Then all left halves come before all right halves."""
    TILES_K: tl.constexpr = words.shape[0] // TILES_N
    words = tl.reshape(words, [TILES_N, TILES_K, 8, 4, 4])  # tile_n, tile_k, lane / 4, lane % 4, word
    # Bits 0 and 16 hold columns c + 0 and c + 1, bits 8 and 24 columns c + 16 and c + 17, and so on: see the drawing
    columns_0_1_16_17 = tl.join(DECODE(words, magic_number, DTYPE), DECODE(words >> 8, magic_number, DTYPE))
    columns_2_3_18_19 = tl.join(DECODE(words >> 4, magic_number, DTYPE), DECODE(words >> 12, magic_number, DTYPE))
    q = tl.join(columns_0_1_16_17, columns_2_3_18_19)
    # Now every digit of a row and of a column has an axis:
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


@triton.jit
def int4_pair(words, magic_number, DTYPE: tl.constexpr):
    """Decodes the elements q in bits 0-3 and 16-19 of words to bias + q, of DTYPE: [..., 2]. The caller subtracts the
    bias, magic_bias(DTYPE).

    The trick: OR q into the mantissa of 1024.0 (float16) or 128.0 (bfloat16), and the float becomes 1024 + q or
    128 + q. magic_number has this float in both halves, so one instruction (lop3) masks and ORs two elements. It is an
    argument of the kernel, because lop3 has room for one immediate operand: the mask. For float32 the bias is 0, and q
    is converted to a float."""
    nibbles = words & 0x000F000F
    if DTYPE == tl.float32:
        return tl.join((nibbles & 15).to(DTYPE), (nibbles >> 16).to(DTYPE))
    else:
        return join_halves(nibbles | magic_number, DTYPE)


@triton.jit
def magic_bias(DTYPE: tl.constexpr):
    """Returns what int4_pair adds to every element."""
    BIAS: tl.constexpr = BFLOAT16_BIAS if DTYPE == tl.bfloat16 else FLOAT16_BIAS if DTYPE == tl.float16 else 0
    return BIAS


@triton.jit
def e2m1_pair(words, magic_number, DTYPE: tl.constexpr):
    """Decodes the elements in bits 0-3 and 16-19 of words, divided by e2m1_bias_factor(DTYPE): [..., 2]. magic_number
    is not used: DECODE has the arguments of int4_pair."""
    if DTYPE == tl.float16:
        return join_halves(((words << 9) & 0x0E000E00) | ((words << 12) & SIGN_MASK), DTYPE)
    else:
        return join_bfloat16_halves(((words << 6) & 0x01C001C0) | ((words << 12) & SIGN_MASK), DTYPE)


@triton.jit
def e2m1_bias_factor(DTYPE: tl.constexpr):
    """Returns BIAS_FACTOR of e2m1."""
    BIAS_FACTOR: tl.constexpr = 2.0**14 if DTYPE == tl.float16 else 2.0**126
    return BIAS_FACTOR


# ---- Elements of 8 bits: e4m3 ---------------------------------------------------------------------------------------


@triton.jit
def e4m3_to_floats(words, DTYPE: tl.constexpr):
    """Decodes words of e4m3 (pack_words) [X, Y, Z] to floats of DTYPE [X, Y, 4 Z]. NaN becomes 480."""
    BIAS_FACTOR: tl.constexpr = 2.0**8 if DTYPE == tl.float16 else 2.0**120
    pairs = tl.join(e4m3_pair(words << 8, DTYPE), e4m3_pair(words, DTYPE))  # [X, Y, Z, element of its pair, pair]
    pairs = tl.permute(pairs, 0, 1, 2, 4, 3)
    return tl.reshape(pairs, [words.shape[0], words.shape[1], 4 * words.shape[2]]) * BIAS_FACTOR


@triton.jit
def e4m3_pair(words, DTYPE: tl.constexpr):
    """Decodes the elements in bits 8-15 and 24-31 of words, divided by BIAS_FACTOR: [..., 2]."""
    if DTYPE == tl.float16:
        return join_halves(((words >> 1) & 0x3F803F80) | (words & SIGN_MASK), DTYPE)
    else:
        return join_bfloat16_halves(((words >> 4) & 0x07F007F0) | (words & SIGN_MASK), DTYPE)


# ---- Scales ---------------------------------------------------------------------------------------------------------


@triton.jit
def unpack_scale_words(words):
    """The inverse of pack_scales. Returns scales and stored zero points, both float32."""
    return (words & -256).to(tl.float32, bitcast=True), (words & 255).to(tl.float32)


@triton.jit
def decode_e8m0(scales):
    """Returns 2^(scale - 127), float32, for uint8 scales. 2^-127 is a subnormal number with one bit set."""
    return tl.maximum(scales.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)


# ---- Two 16-bit floats in a word ------------------------------------------------------------------------------------


@triton.jit
def join_halves(words, DTYPE: tl.constexpr):
    """Returns the 16-bit floats in the low and the high half of each word: [..., 2]."""
    return tl.join(words.to(tl.int16).to(DTYPE, bitcast=True), (words >> 16).to(tl.int16).to(DTYPE, bitcast=True))


@triton.jit
def join_bfloat16_halves(words, DTYPE: tl.constexpr):
    """Returns the bfloat16s in the low and the high half of each word, converted to DTYPE, bfloat16 or float32:
    [..., 2]. A bfloat16 is the upper half of a float32 with the same value."""
    if DTYPE == tl.bfloat16:
        return join_halves(words, DTYPE)
    else:
        return tl.join((words << 16).to(DTYPE, bitcast=True), (words & -65536).to(DTYPE, bitcast=True))
