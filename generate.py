"""Generate text.  (Work in progress: loading.)"""

from pathlib import Path

import torch

from checkpoint import read_checkpoint
from model import Transformer, UsageError


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model in path, on device, in dtype, in inference mode. Memory-mapped where nothing needs to change."""
    config, quantization, tensors = read_checkpoint(path)
    if quantization is not None:
        raise UsageError(f"{path} is quantized as {quantization!r}, which this version does not read")
    with torch.device("meta"):
        model = Transformer(config)
    wanted = model.state_dict()
    if config.tie_embeddings:
        tensors["output.weight"] = tensors.get("tok_embeddings.weight")
    for name in wanted.keys() | tensors.keys():
        ours, theirs = wanted.get(name), tensors.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise UsageError(f"{path}: tensor {name} is missing, left over or of the wrong shape; convert it again")
    moved = {id(t): t.to(device, dtype) for t in tensors.values()}  # by identity: a tied head stays tied
    model.load_state_dict({name: moved[id(t)] for name, t in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)
