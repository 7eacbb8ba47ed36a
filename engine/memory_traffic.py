"""The bytes that a decode step reads from memory: over the memory's bandwidth, the least time of a step.

    n_attended = mean_attended_tokens(model.config, n_tokens=300)
    seconds = step_bytes(model, n_attended) / read_bandwidth(model.device)  # utils/machine.py
"""

from config import ModelConfig
from layers.experts import ExpertsDown, ExpertsGateUp
from layers.kv_cache import kv_bytes_per_token
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


def mean_attended_tokens(config: ModelConfig, n_tokens: int) -> float:
    """Returns how many of n_tokens tokens the last one sees, itself included: the mean over all layers, some of which
    may have a sliding window."""
    visible = [min(n_tokens, config.window(i) or n_tokens) for i in range(config.n_layers)]
    return sum(visible) / config.n_layers


def step_bytes(model: Transformer, n_attended: float, batch_size: int = 1) -> int:
    """Bytes that a decode step reads: the weights, and the keys and values of n_attended tokens of each sequence."""
    return active_weight_bytes(model) + round(batch_size * n_attended * kv_bytes_per_token(model))
