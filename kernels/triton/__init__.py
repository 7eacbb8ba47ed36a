"""The Triton kernels: the operations of a decode step on a GPU. In reading order:

    linear.py       fused_linear: the matmul of a few tokens with a weight; rms_norm and permute_inputs
    formats.py      for each weight format, how fused_linear multiplies and how W is dequantized; dequantize and embed
    epilogue.py     the epilogue of fused_linear: bias, activation, softcap, residual
    weights.py      where the elements of W are stored, and how a program loads a part of W
    elements.py     converts stored elements and scales to floats
    launch.py       what the GPU can do, the tile sizes of a matmul (tuned.json), kernels that overlap
    moe.py          a mixture of experts: route, experts_gate_up, experts_down
    attention.py    attend; heads.py: loads, norm and RoPE of the new tokens
    sampling.py     sample

linear, formats, moe, attention and sampling register their operations as torch.ops.gptfast_triton.* when they are
imported (kernels/schema.py). They allocate their results with schema.py's empty_NAME. In these files `import triton` is
the library.

A weight of int4 takes this path. It is packed once, when the model is loaded:

    formats/triton_layouts.py: pack_tiles, pack_scales     from a checkpoint's bytes to tiles and to words of scales

Then, in every decode step:

    linear.py: fused_linear             looks up KERNEL_FORMATS, chooses the tile sizes, launches the kernel
    linear.py: fused_linear_kernel      the loop over K; each step calls DOT: here dot_int4
    formats.py: dot_int4                acc += scale * (q x - zero * sum of x), by calling
        weights.py: load_tiles              words of 8 elements
        elements.py: tiles_to_floats        words to the left operand of tl.dot, by int4_pair
        weights.py: load_group_scales       words of a scale and a zero point
        elements.py: unpack_scale_words     words to scales and zero points
        formats.py: dot_with_zeros          tl.dot on the tensor cores
"""

import torch

# Here, because machines without Triton need them, too
TRITON_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_silu", "relu2")  # that epilogue.py computes
MAGIC_BIASES = {torch.bfloat16: 128, torch.float16: 1024}  # what elements.py: int4_pair adds, by type; 0 for float32
