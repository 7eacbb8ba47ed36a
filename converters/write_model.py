"""Writes model.pth from tensors with canonical names: the last step of every converter.

    write_model(Path("model.pth"), CanonicalCheckpoint(config, tensors, read))

It renames tensors, and stacks those that are always used together: q, k and v; gate and up; the experts of a layer.
Only one weight is in memory at a time. Quantized weights stay quantized.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import empty_model, save_checkpoint
from config import ModelConfig
from converters.canonical_checkpoint import (
    CANONICAL_PARTS,
    EMBEDDING,
    HEAD,
    MOE_CANONICAL_PARTS,
    CanonicalCheckpoint,
    SourceTensors,
    TensorReader,
)
from converters.quantized_weight import QuantizedWeight, have_one_order, promote_formats
from formats import Unquantized, WeightFormat
from layers.linear import quantizable_linears
from utils.errors import UsageError

# Linear layer -> the norm before it. A layer with an input_order permutes x before the fused norm. rms(x) does not
# change, but the weight of the norm must be in the same order, so it is stored permuted.
NORM_BEFORE = {
    "attention.qkv_proj": "pre_attention_norm", "feed_forward.gate_up_proj": "pre_ffn_norm", "lm_head": "norm",
}
# Names of buffers that some checkpoints store, but that we compute: RoPE tables and constants of masks
BUFFERS = re.compile(r"(inv_freq|freqs_cos|freqs_sin|cos_cached|sin_cached|masked_bias)$")
# Names of layers for multi-token prediction, without which the model writes the same
EXTRA_LAYERS = re.compile(r"^(model\.)?mtp\.")

Announcement = Callable[[], None]


@dataclass
class StackedTensor:
    """A tensor of model.pth: the canonical tensors called part_names, concatenated along dim 0."""

    shape: torch.Size
    dtype: torch.dtype
    part_names: list[str]
    linear_format: WeightFormat | None = None  # of the weight; None if the tensor cannot be quantized
    input_order: Tensor | None = None  # of a linear layer; see QuantizedWeight
    element_order: Tensor | None = None  # of a norm: the input_order of the layer after it

    @property
    def format(self) -> WeightFormat:
        return self.linear_format or Unquantized()


def write_model(path: Path, checkpoint: CanonicalCheckpoint, announce: Announcement | None = None) -> Path:
    """Writes checkpoint to path, and the tokenizer beside it. Returns the path, whose name gets the format of quantized
    weights: model_int4.g128.pth. float64 becomes float32. Raises UsageError if a tensor is missing, left over, or of
    the wrong shape or dtype.

    announce: called after all checks, just before the data is read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"cannot write to {path.parent}: {e.strerror}") from None
    config, tensors, read = checkpoint.config, checkpoint.tensors, checkpoint.read
    if config.tie_embeddings and HEAD in tensors and EMBEDDING in tensors:
        if is_same_weight(read(HEAD), read(EMBEDDING)):
            tensors = {name: tensor for name, tensor in tensors.items() if name != HEAD}
        else:
            config = replace(config, tie_embeddings=False)  # as transformers does
    stacks = plan_stacks(config, tensors)
    used = {part_name for stack in stacks.values() for part_name in stack.part_names}
    check_left_over({name: tensors[name] for name in tensors if name not in used}, read)
    default = most_common_format(stacks)
    if default.is_quantized:
        path = path.with_name(f"{path.stem}_{default.name}{path.suffix}")
    warn_dequantized(stacks, tensors)
    empty = {}
    for name, stack in stacks.items():
        for tensor_name, t in stack.format.allocate(stack.shape, stack.dtype, "meta").items():
            empty[stored_name(name, tensor_name)] = t
        if stack.input_order is not None:
            empty[stored_name(name, "input_order")] = stack.input_order.int()
    if announce is not None:
        announce()
    quantization = describe_formats(stacks, default)
    save_checkpoint(path, config, empty, quantization, stack_tensors(stacks, read), checkpoint.tokenizer_files)
    return path


def check_left_over(tensors: SourceTensors, read: TensorReader):
    """Raises UsageError if one of tensors would change the output of the model. Buffers, biases of zeros and layers for
    multi-token prediction do not; a line is printed about the latter."""
    extra = [name for name in tensors if EXTRA_LAYERS.search(name)]
    if extra:
        why = "this model does not predict several tokens at once"
        print(f"{len(extra)} tensors are ignored, as {min(extra)}: {why}", file=sys.stderr)
    names = [name for name in tensors if name not in extra and not BUFFERS.search(name)]
    left_over = [name for name in names if not (name.endswith("_proj.bias") and is_zero(read(name)))]
    if left_over:
        what = f"the checkpoint's tensor {min(left_over)} has no place in this model"
        raise UsageError(f"{what} ({len(left_over)} left over)")


def is_zero(tensor: Tensor | QuantizedWeight) -> bool:
    return isinstance(tensor, Tensor) and not tensor.any()


def is_same_weight(a: Tensor | QuantizedWeight, b: Tensor | QuantizedWeight) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def stored_name(name: str, tensor_name: str) -> str:
    """Returns the name in model.pth of one part of our tensor called name. tensor_name: such as weight or scales."""
    return name if tensor_name == "weight" else f"{name.removesuffix('.weight')}.{tensor_name}"


def plan_stacks(config: ModelConfig, tensors: SourceTensors) -> dict[str, StackedTensor]:
    try:
        model = empty_model(config.with_layers(1))  # shapes are the same in every layer
    except RuntimeError as e:
        raise UsageError(f"no model has the sizes of this config: {str(e).splitlines()[0]}") from None
    one_layer = model.state_dict()
    if config.tie_embeddings:
        del one_layer["lm_head.weight"]
    quantizable = {f"{name}.weight" for name, _ in quantizable_linears(model)} | {"embed_tokens.weight"}
    stacks = {}
    for i in range(config.n_layers):
        for name_in_layer_0, tensor in one_layer.items():
            name = name_in_layer_0.replace("layers.0.", f"layers.{i}.")
            if name not in stacks:
                parts = part_shapes(name, tensor.shape, config)
                stack = stacks[name] = StackedTensor(tensor.shape, common_dtype(parts, tensors), list(parts))
                if name_in_layer_0 in quantizable:
                    choose_format(name, stack, [tensors[part_name] for part_name in parts])
    for name, stack in stacks.items():
        prefix, module = re.fullmatch(r"(layers\.\d+\.)?(.+)\.\w+", name).groups(default="")
        norm = stacks.get(f"{prefix}{NORM_BEFORE.get(module)}.weight")
        if stack.input_order is not None and norm is not None:
            norm.element_order = stack.input_order
    return stacks


def choose_format(name: str, stack: StackedTensor, weights: list[Tensor | QuantizedWeight]):
    stack.linear_format = promote_formats(weights)
    if not stack.format.is_quantized:
        return
    if loses_order(name, stack, weights):
        stack.linear_format = Unquantized()
    else:
        stack.input_order = weights[0].input_order


def loses_order(name: str, stack: StackedTensor, weights: list[QuantizedWeight]) -> bool:
    """Whether act-order keeps weights from staying quantized. Linear layers can have an order of inputs, but experts
    and the embedding cannot, and stacked weights must all have the same."""
    can_have_order = len(stack.shape) == 2 and name != "embed_tokens.weight"
    has_order = any(weight.input_order is not None for weight in weights)
    return has_order and not (can_have_order and have_one_order(weights))


def part_shapes(name: str, shape: torch.Size, config: ModelConfig) -> dict[str, list[int]]:
    """Returns the names and shapes of the canonical tensors that make our tensor called name, concatenated along dim 0.
    Ours is [N] or [N, K], or [E, N] or [E, N, K] with experts; a canonical tensor belongs to one expert."""
    layer, module, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias|sinks)", name).groups()
    modules = (MOE_CANONICAL_PARTS if config.moe else CANONICAL_PARTS)[module]
    n_experts = 1
    if "{e}" in modules[0]:
        n_experts, *shape = shape
    n_rows, *n_columns = shape
    if module == "feed_forward.gate_up_proj":
        modules = modules[-len(config.gate_up_dims) :]
    if module == "attention.qkv_proj":
        rows = [config.q_dim, config.kv_dim, config.kv_dim]
    elif module == "feed_forward.router" and config.moe.n_shared_experts:
        modules, rows = [*modules, "mlp.shared_expert_gate"], [config.moe.n_experts, 1]
    else:
        rows = [n_rows // len(modules)] * len(modules)
    prefix = f"model.{layer}" if layer else ""
    shapes = {}
    for e in range(n_experts):
        for canonical_module, n in zip(modules, rows, strict=True):
            shapes[f"{prefix}{canonical_module.format(e=e)}.{kind}"] = [n, *n_columns]
    return shapes


def common_dtype(part_shapes: dict[str, list[int]], tensors: SourceTensors) -> torch.dtype:
    """Returns the narrowest dtype that holds all unquantized parts of our tensor exactly, or bfloat16 if there are
    none. Checks that no part is missing or has the wrong shape or dtype."""
    dtype = None
    for name, shape in part_shapes.items():
        if name not in tensors:
            raise UsageError(f"the checkpoint has no tensor {name}")
        tensor = tensors[name]
        if list(tensor.shape) != shape:
            raise UsageError(f"tensor {name} is {list(tensor.shape)}; the config makes it {shape}")
        if isinstance(tensor, QuantizedWeight):
            continue
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UsageError(f"tensor {name} is {tensor.dtype}, not float32, float16 or bfloat16")
        dtype = torch.promote_types(dtype or tensor.dtype, tensor.dtype)
    return torch.float32 if dtype == torch.float64 else dtype or torch.bfloat16


def stack_tensors(stacks: dict[str, StackedTensor], read: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for each tensor of model.pth, of which only one is in memory at a time. Checks that all
    numbers are finite."""
    for name, stack in stacks.items():
        ours = stack.format.allocate(stack.shape, stack.dtype, "cpu")
        start = 0
        for part_name in stack.part_names:
            weight = read(part_name)
            if stack.element_order is not None:
                weight = weight[stack.element_order]
            is_quantized = isinstance(weight, QuantizedWeight)
            theirs = weight.read_as(stack.format, stack.dtype) if is_quantized else {"weight": weight.detach()}
            for tensor_name, t in theirs.items():
                rows = ours[tensor_name]
                rows = rows.flatten(0, 1) if rows.dim() > t.dim() else rows  # [E, N, ...] -> [E N, ...]
                rows[start : start + len(t)].copy_(t)
                if stack.format == Unquantized():  # of quantized weights, converters have checked the scales
                    check_finite_tensor(part_name, rows[start : start + len(t)])
            start += weight.shape[0]
        for tensor_name, t in ours.items():
            yield stored_name(name, tensor_name), t
        if stack.input_order is not None:
            yield stored_name(name, "input_order"), stack.input_order.int()


def check_finite_tensor(name: str, tensor: Tensor):
    # aminmax reads the tensor once and allocates nothing. A NaN makes both results NaN.
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise UsageError(f"tensor {name} holds numbers that are not finite: the file is damaged")


# ---- Formats --------------------------------------------------------------------------------------------------------


def most_common_format(stacks: dict[str, StackedTensor]) -> WeightFormat:
    counts = Counter(stack.format for stack in stacks.values() if stack.format.is_quantized)
    return counts.most_common(1)[0][0] if counts else Unquantized()


def describe_formats(stacks: dict[str, StackedTensor], default: WeightFormat) -> dict | None:
    """Returns "quantization" for the header: the default format, the layers with another one, and the layers with an
    order of inputs."""
    if not default.is_quantized:
        return None
    layers, embedding = {}, stacks["embed_tokens.weight"].format
    if "lm_head.weight" not in stacks and embedding != default:  # a tied head
        layers["lm_head"] = embedding.to_dict()
    if embedding.is_quantized:  # the default does not apply to the embedding
        layers["embed_tokens"] = embedding.to_dict()
    for name, stack in stacks.items():
        if stack.linear_format not in (None, default) and name != "embed_tokens.weight":
            layers[name.removesuffix(".weight")] = stack.format.to_dict()
    act_order = [name.removesuffix(".weight") for name, stack in stacks.items() if stack.input_order is not None]
    others = {"layers": layers, "act_order": act_order}
    return default.to_dict() | {field: value for field, value in others.items() if value}


def warn_dequantized(stacks: dict[str, StackedTensor], tensors: SourceTensors):
    names_of: dict[str, list[str]] = {}  # reason -> names
    for name, stack in stacks.items():
        quantized = {name: tensors[name] for name in stack.part_names if isinstance(tensors[name], QuantizedWeight)}
        if not stack.format.is_quantized and quantized:
            names_of.setdefault(why_dequantized(name, stack, list(quantized.values())), []).extend(quantized)
    for why, names in names_of.items():
        print(f"{len(names)} weights are not kept quantized, as {names[0]}: {why}", file=sys.stderr)


def why_dequantized(name: str, stack: StackedTensor, weights: list[QuantizedWeight]) -> str:
    if stack.linear_format is None:
        return "routers have 16 bits here"
    if loses_order(name, stack, weights) or any(isinstance(weight.format, Unquantized) for weight in weights):
        why = "act-order (desc_act) has scattered the inputs of their groups"
        return f"{why}; a checkpoint without it becomes a smaller file"
    if not all(weight.is_storable() for weight in weights):
        return "no format here has their group size, number of inputs, or scales of float32"
    return "there is no format for them together with what they are stacked with"
