"""How many bytes a decode step reads. The bytes, divided by the memory's bandwidth, are the least time of a step."""

from layers.experts import ExpertsDown, ExpertsGateUp
from layers.weight import Embedding
from model import Transformer


def active_weight_bytes(model: Transformer) -> int:
    """Bytes of weights that a decode step of one token reads: all but the embedding and the experts not chosen."""
    total = 0
    for module in model.modules():
        if isinstance(module, Embedding):  # a tied embedding is the head, which a step reads
            continue
        own_tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        is_experts = isinstance(module, ExpertsGateUp | ExpertsDown)
        fraction = model.config.moe.active_fraction if is_experts else 1
        total += fraction * sum(tensor.nbytes for tensor in own_tensors)
    return round(total)


def step_bytes(model: Transformer, n_attended: float, batch_size: int = 1) -> int:
    """Bytes that a decode step reads: the weights, and the keys and values of n_attended tokens of each sequence
    (config.py: mean_attended_tokens)."""
    return active_weight_bytes(model) + round(batch_size * n_attended * model.kv_bytes_per_token())
