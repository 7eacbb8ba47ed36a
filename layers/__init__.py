"""The layers of a model. model.py composes them.

A forward calls a kernel of the layer's backend. If the backend has none, the layer computes in plain PyTorch: in
prefill, on other devices and with --kernels off. The plain PyTorch is also the definition with which the tests compare
the kernels. What has no weights is a function of tensors and a backend.

    backend.py      the backends: which code computes an operation, for how many tokens; how rounding differs
    collectives.py  what the ranks of a tensor-parallel run tell each other
    aten.py         matmuls with quantized weights by PyTorch's own kernels, without a C++ compiler
    weight.py       WeightMatrix: a weight in some format, packed for some backend; Embedding
    linear.py       RMSNorm, Linear, the activations
    experts.py      the experts of a mixture: route, ExpertsGateUp, ExpertsDown
    rope.py         positions: the tables of RoPE, the slopes of ALiBi
    kv_cache.py     KVCache: keys, values and ids of earlier tokens, and the tables of RoPE
    attention.py    attend: q/k norm, RoPE, cache write, attention
    sampling.py     sample: from logits to a token
    packing.py      chooses the backend of a model, and packs the weights for the backend

Within layers/ each file imports only from files above it in this list.

A CUDA graph can hold kernels and plain PyTorch. A CPU graph can hold only C++ kernels, but not sample, rope_and_cache
and dequantize: sample runs after the graph, and only prefill uses the others.
"""
