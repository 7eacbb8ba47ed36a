"""How the stored elements and scales of a weight become floats in the Triton kernels.

    int4_pair, e2m1_pair     two elements of 4 bits, out of a word of a tile
    e4m3_to_floats           elements of 8 bits, four in a word
    unpack_scale_words       a scale and a zero point in one word
    e8m0_to_float            a scale that is a power of two

kernels/formats/triton_layouts.py stores them so.

The floats are of DTYPE, which is x's. Two 16-bit floats share a register, so elements are taken out of a word in pairs:
16 bits apart, and side by side in their row. For float32 they are taken out one by one.

e4m3 and e2m1 are floats themselves. Exponent and mantissa go where DTYPE's exponent ends and its mantissa begins:

    bits of a bfloat16    15      14 ... 7    6 ... 0
                          sign    exponent    mantissa
    e4m3 (FP8)            s       0000eeee    mmm0000
    e2m1 (FP4)            s       000000ee    m000000

The exponent of DTYPE has another bias, so the float is the element times 2^-120 or 2^-126. That holds for subnormal
elements, too, which become subnormal floats. The product with BIAS_FACTOR, 2^120 or 2^126, is the element again,
exactly.
"""

import torch
import triton
import triton.language as tl

SIGN_MASK = tl.constexpr(-0x7FFF8000)  # the signs of two 16-bit floats, 0x80008000, as an int32


@triton.jit
def join_halves(words, DTYPE: tl.constexpr):
    """Returns the 16-bit floats in the low and the high half of each word: [..., 2]."""
    return tl.join(words.to(tl.int16).to(DTYPE, bitcast=True), (words >> 16).to(tl.int16).to(DTYPE, bitcast=True))


@triton.jit
def join_bfloat16_halves(words, DTYPE: tl.constexpr):
    """Returns the bfloat16s in the low and the high half of each word, as DTYPE, bfloat16 or float32: [..., 2]. A
    bfloat16 is the upper half of the same float32."""
    if DTYPE == tl.bfloat16:
        return join_halves(words, DTYPE)
    else:
        return tl.join((words << 16).to(DTYPE, bitcast=True), (words & -65536).to(DTYPE, bitcast=True))


# ---- Int4 -----------------------------------------------------------------------------------------------------------


def pack_offset(dtype: torch.dtype) -> int:
    """Returns OFFSET (see int4_pair) twice, as two floats of dtype in a word. Float32 has no use for it."""
    return 0x43004300 if dtype == torch.bfloat16 else 0x64006400


@triton.jit
def offset_of(DTYPE: tl.constexpr):
    """Returns OFFSET (see int4_pair)."""
    OFFSET: tl.constexpr = 128 if DTYPE == tl.bfloat16 else 1024 if DTYPE == tl.float16 else 0
    return OFFSET


@triton.jit
def int4_pair(words, packed_offset, DTYPE: tl.constexpr):
    """Decodes the elements q in bits 0-3 and 16-19 of words, as OFFSET + q of DTYPE: [..., 2]. The caller subtracts
    OFFSET.

    OR the nibble into the mantissa of OFFSET, which is 1024.0 (float16) or 128.0 (bfloat16): the value is OFFSET + q.
    packed_offset has OFFSET in both halves, so two elements take one and-or instruction (lop3). It is a runtime
    argument because the mask already takes lop3's immediate. For float32 OFFSET is 0, and elements are converted."""
    nibbles = words & 0x000F000F
    if DTYPE == tl.float32:
        return tl.join((nibbles & 15).to(DTYPE), (nibbles >> 16).to(DTYPE))
    else:
        return join_halves(nibbles | packed_offset, DTYPE)


@triton.jit
def unpack_scale_words(words):
    """What pack_scales packed: scales, and zero points as they are stored, both float32."""
    return (words & -256).to(tl.float32, bitcast=True), (words & 255).to(tl.float32)


# ---- Float8: e4m3 ---------------------------------------------------------------------------------------------------


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


# ---- MXFP4: e2m1 and e8m0 -------------------------------------------------------------------------------------------


@triton.jit
def e2m1_bias_factor(DTYPE: tl.constexpr):
    """Returns BIAS_FACTOR of e2m1."""
    BIAS_FACTOR: tl.constexpr = 2.0**14 if DTYPE == tl.float16 else 2.0**126
    return BIAS_FACTOR


@triton.jit
def e2m1_pair(words, packed_offset, DTYPE: tl.constexpr):
    """Decodes the elements in bits 0-3 and 16-19 of words, divided by BIAS_FACTOR: [..., 2]."""
    if DTYPE == tl.float16:
        return join_halves(((words << 9) & 0x0E000E00) | ((words << 12) & SIGN_MASK), DTYPE)
    else:
        return join_bfloat16_halves(((words << 6) & 0x01C001C0) | ((words << 12) & SIGN_MASK), DTYPE)


@triton.jit
def e8m0_to_float(scales):
    """Returns 2^(scale - 127), float32, for uint8 scales. For 0 that is a subnormal number with one bit set."""
    return tl.maximum(scales.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
