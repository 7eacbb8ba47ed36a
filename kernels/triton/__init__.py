"""The operations of a decode step on a GPU, in Triton. In the order in which to read them:

    linear.py       a few tokens times a weight: fused_linear, rms_norm and gather_inputs
    weights.py      where a weight's elements lie, and how a program loads its part
    formats.py      how each weight format is multiplied and dequantized; embed and dequantize
    elements.py     stored elements and scales to floats
    tiles.py        stored elements of 4 bits to a matrix unit's factor
    launch.py       what the GPU can do, the tile sizes of a product (tuned.json), kernels that overlap
    moe.py          a mixture of experts: route, experts_gate_up, experts_down
    attention.py    attend
    engine/sampling.py     sample

linear, formats, moe, attention and sampling register their operations as torch.ops.gptfast_triton.* when they are
imported (kernels/schema.py). kernels/reference.py computes the same in plain PyTorch. In these files `import triton` is
the library.
"""
