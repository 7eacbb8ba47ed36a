"""Writes model.pth from tensors with canonical names: the last step of every converter.

    convert(Path("model.pth"), SourceModel(config, tensors, read))

convert renames tensors, and stacks tensors that are always used together: q, k and v; gate and up; the experts of a
layer. Only one weight is in memory at a time. Quantized weights stay quantized.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import save_checkpoint
from config import ModelConfig
from converters.quantized_weight import LazyWeight, common_format, have_one_order
from kernels.formats import Unquantized, WeightFormat
from model import empty_model
from utils.errors import UsageError
from utils.files import replace_file

# ---- Canonical names ------------------------------------------------------------------------------------------------

# Tensors of every format and family get canonical names before they are stacked. The canonical names are:
#
#     Hugging Face's for Llama      such as input_layernorm (before attention), post_attention_layernorm (before the
#                                   feed-forward)
#     Hugging Face's for Qwen       q_norm, k_norm, gate, experts, shared_expert_gate
#     Hugging Face's for gpt-oss    sinks
#     our own                       post_attention_norm (after attention), post_ffn_norm (after the feed-forward)

# Our module in model.pth -> the canonical modules whose weights are concatenated along dim 0 to our weight
CANONICAL_SOURCES = {
    "embed_tokens": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
    # In a layer, without the prefixes: "layers.3." of our names, "model.layers.3." of canonical names
    "pre_attention_norm": ["input_layernorm"],
    "attention": ["self_attn"],  # the sinks
    "attention.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.o_proj": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "post_attention_norm": ["post_attention_norm"],
    "pre_ffn_norm": ["post_attention_layernorm"],
    "post_ffn_norm": ["post_ffn_norm"],
    "feed_forward.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],  # without a gate, up_proj alone
    "feed_forward.down_proj": ["mlp.down_proj"],
}
# The same for a mixture of experts. Our tensor stacks all experts; {e} is an expert's number.
MOE_SOURCES = CANONICAL_SOURCES | {
    "feed_forward.router": ["mlp.gate"],
    "feed_forward.gate_up_proj": ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
    "feed_forward.down_proj": ["mlp.experts.{e}.down_proj"],
}
# A linear layer -> the norm before the layer. The norm's elements have the order of the layer's inputs.
NORM_BEFORE = {
    "attention.qkv_proj": "pre_attention_norm", "feed_forward.gate_up_proj": "pre_ffn_norm", "lm_head": "norm",
}
# Names of buffers that some checkpoints store, and that are computed here: tables of RoPE, constants of masks
BUFFERS = re.compile(r"(inv_freq|freqs_cos|freqs_sin|cos_cached|sin_cached|masked_bias)$")
# Names of layers for multi-token prediction. Without these layers the model's output is the same.
EXTRA_LAYERS = re.compile(r"^(model\.)?mtp\.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

SourceTensors = dict[str, Tensor | LazyWeight]  # by Hugging Face's names or, after renaming, by canonical names
Announcement = Callable[[], None]
TensorReader = Callable[[str], Tensor | LazyWeight]  # canonical name of a tensor -> the tensor with its data


@dataclass
class SourceModel:
    """A checkpoint of any format, ready to be written as model.pth."""

    config: ModelConfig
    tensors: SourceTensors  # by canonical names, perhaps on the meta device: only shapes and dtypes count
    read: TensorReader
    tokenizer_files: dict[str, bytes | None] = field(default_factory=dict)  # name -> contents; None: remove the file
    note: str = ""  # to print when model.pth is written


@dataclass
class TensorPlan:
    """One of our tensors, and the canonical tensors (sources) that make it, concatenated along dim 0."""

    shape: torch.Size
    dtype: torch.dtype
    sources: list[str]
    linear_format: WeightFormat | None = None  # the format of the weight; None: the tensor cannot be quantized
    input_order: Tensor | None = None  # of a linear layer: see LazyWeight
    element_order: Tensor | None = None  # of a norm: the input_order of the layer after the norm

    @property
    def format(self) -> WeightFormat:
        return self.linear_format or Unquantized()


def convert(path: Path, model: SourceModel, announce: Announcement | None = None) -> Path:
    """Writes model to path, without the tokenizer's files. Returns the path, whose name says how weights are quantized,
    if they are: model_int4.g128.pth. float64 becomes float32. Raises UsageError naming a tensor that is missing, left
    over, of the wrong shape, or of the wrong dtype.

    announce: called after all checks, just before the data is read."""
    config, tensors, read = model.config, model.tensors, model.read
    if config.tie_embeddings and HEAD in tensors and EMBEDDING in tensors and not has_tied_head(tensors, read):
        config = replace(config, tie_embeddings=False)  # as transformers does
    plans = plan_tensors(config, tensors)
    used = {source for plan in plans.values() for source in plan.sources}
    if config.tie_embeddings:
        used.add(HEAD)
    check_left_over({name: tensors[name] for name in tensors if name not in used}, read)
    default = most_common_format(plans)
    if default.quantization is not None:
        path = path.with_name(f"{path.stem}_{default.name}{path.suffix}")
    warn_dequantized(plans, tensors)
    shapes = {}
    for name, plan in plans.items():
        for tensor_name, t in plan.format.empty(plan.shape, plan.dtype, "meta").items():
            shapes[stored_name(name, tensor_name)] = (tuple(t.shape), t.dtype)
        if plan.input_order is not None:
            shapes[stored_name(name, "input_order")] = (tuple(plan.input_order.shape), torch.int32)
    if announce is not None:
        announce()
    save_checkpoint(path, config, shapes, stack_tensors(plans, read), describe_formats(plans, default))
    return path


def check_left_over(tensors: SourceTensors, read: TensorReader):
    """Raises UsageError if one of tensors would change the model's output. Ignores tensors that change nothing:
    buffers, biases of zeros, and layers for multi-token prediction. Prints a line about the last kind."""
    extra = [name for name in tensors if EXTRA_LAYERS.search(name)]
    if extra:
        why = "this model does not predict several tokens at once"
        print(f"{len(extra)} tensors are ignored, as {min(extra)}: {why}", file=sys.stderr)
    names = [name for name in tensors if name not in extra and not BUFFERS.search(name)]
    left_over = [name for name in names if not (name.endswith("_proj.bias") and is_zero(read(name)))]
    if left_over:
        what = f"the checkpoint's tensor {min(left_over)} has no place in this model"
        raise UsageError(f"{what} ({len(left_over)} left over)")


def is_zero(tensor: Tensor | LazyWeight) -> bool:
    return isinstance(tensor, Tensor) and not tensor.any()


def has_tied_head(tensors: SourceTensors, read: TensorReader) -> bool:
    head, embedding = read(HEAD), read(EMBEDDING)
    return isinstance(head, Tensor) and isinstance(embedding, Tensor) and torch.equal(head, embedding)


def stored_name(name: str, tensor_name: str) -> str:
    """Returns the name in model.pth of one part of our tensor called name. tensor_name: the part, such as weight or
    scales."""
    return name if tensor_name == "weight" else f"{name.removesuffix('.weight')}.{tensor_name}"


def write_folder(folder: Path, model: SourceModel, announce: Announcement | None = None) -> Path:
    """Writes model.pth and the tokenizer's files to folder. Returns the path of model.pth; convert chooses the name.
    The tokenizer's files come first, so that a folder with model.pth has a complete tokenizer."""
    if not model.tokenizer_files:
        return convert(folder / "model.pth", model, announce)
    unnamed = folder / "model.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob("model*.tmp"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        unnamed = convert(unnamed, model, announce)
        for name, content in model.tokenizer_files.items():
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                replace_file(folder / name, content)
        os.replace(unnamed, unnamed.with_suffix(".pth"))
    except OSError as e:
        raise UsageError(f"cannot write to {folder}: {e.strerror}") from None
    finally:
        unnamed.unlink(missing_ok=True)
    return unnamed.with_suffix(".pth")


def plan_tensors(config: ModelConfig, tensors: SourceTensors) -> dict[str, TensorPlan]:
    """Plans every tensor of our checkpoint."""
    try:
        model = empty_model(config.with_layers(1))  # the shapes are the same in every layer
    except RuntimeError as e:
        raise UsageError(f"no model has the sizes of this config: {str(e).splitlines()[0]}") from None
    one_layer = model.state_dict()
    if config.tie_embeddings:
        del one_layer["lm_head.weight"]
    quantizable = {f"{name}.weight" for name, _ in model.quantizable_linears()} | {"embed_tokens.weight"}
    plans = {}
    for i in range(config.n_layers):
        for name_in_layer_0, tensor in one_layer.items():
            name = name_in_layer_0.replace("layers.0.", f"layers.{i}.")
            if name not in plans:
                sources = source_shapes(name, tensor.shape, config)
                plan = plans[name] = TensorPlan(tensor.shape, common_dtype(sources, tensors), list(sources))
                if name_in_layer_0 in quantizable:
                    choose_format(name, plan, [tensors[source] for source in sources])
    for name, plan in plans.items():
        prefix, module = re.fullmatch(r"(layers\.\d+\.)?(.+)\.\w+", name).groups(default="")
        norm = plans.get(f"{prefix}{NORM_BEFORE.get(module)}.weight")
        if plan.input_order is not None and norm is not None:
            norm.element_order = plan.input_order
    return plans


def choose_format(name: str, plan: TensorPlan, weights: list[Tensor | LazyWeight]):
    """Chooses the format and the order of inputs for our weight called name, which stacks weights."""
    plan.linear_format = common_format(weights)
    if plan.format.quantization is None:
        return
    if loses_order(name, plan, weights):
        plan.linear_format = Unquantized()
    else:
        plan.input_order = weights[0].input_order


def loses_order(name: str, plan: TensorPlan, weights: list[LazyWeight]) -> bool:
    """Returns whether weights cannot stay quantized because of act-order. Linear layers can have an order of inputs,
    experts and the embedding cannot. Weights that are stacked must have the same order."""
    can_have_order = len(plan.shape) == 2 and name != "embed_tokens.weight"
    has_order = any(weight.input_order is not None for weight in weights)
    return has_order and not (can_have_order and have_one_order(weights))


def source_shapes(name: str, shape: torch.Size, config: ModelConfig) -> dict[str, list[int]]:
    """Returns the names and shapes of the canonical tensors whose concatenation along dim 0 is our tensor called name.
    Our tensor is a vector [N] or a matrix [N, K]; with experts it is [E, N] or [E, N, K], while a canonical tensor
    belongs to one expert."""
    layer, module, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias|sinks)", name).groups()
    modules = (MOE_SOURCES if config.moe else CANONICAL_SOURCES)[module]
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
        for source, n in zip(modules, rows, strict=True):
            shapes[f"{prefix}{source.format(e=e)}.{kind}"] = [n, *n_columns]
    return shapes


def common_dtype(sources: dict[str, list[int]], tensors: SourceTensors) -> torch.dtype:
    """Returns the narrowest dtype that holds all sources exactly, apart from quantized sources. If all sources are
    quantized, returns bfloat16. Checks that no source is missing, or has the wrong shape or dtype."""
    dtype = None
    for name, shape in sources.items():
        if name not in tensors:
            raise UsageError(f"the checkpoint has no tensor {name}")
        tensor = tensors[name]
        if list(tensor.shape) != shape:
            raise UsageError(f"tensor {name} is {list(tensor.shape)}; the config makes it {shape}")
        if isinstance(tensor, LazyWeight):
            continue
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UsageError(f"tensor {name} is {tensor.dtype}, not float32, float16 or bfloat16")
        dtype = torch.promote_types(dtype or tensor.dtype, tensor.dtype)
    return torch.float32 if dtype == torch.float64 else dtype or torch.bfloat16


def stack_tensors(plans: dict[str, TensorPlan], read: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) for every tensor of our checkpoint. Only one weight is in memory at a time. Checks that all
    numbers are finite."""
    for name, plan in plans.items():
        ours = plan.format.empty(plan.shape, plan.dtype, "cpu")
        start = 0
        for source in plan.sources:
            weight = read(source)
            if plan.element_order is not None:
                weight = weight[plan.element_order]
            is_quantized = isinstance(weight, LazyWeight)
            theirs = weight.read_as(plan.format, plan.dtype) if is_quantized else {"weight": weight.detach()}
            for tensor_name, t in theirs.items():
                rows = ours[tensor_name]
                rows = rows.flatten(0, 1) if rows.dim() > t.dim() else rows  # [E, N, ...] -> [E N, ...]
                rows[start : start + len(t)].copy_(t)
                if plan.format == Unquantized():  # converters have checked the scales of quantized weights
                    check_finite_tensor(source, rows[start : start + len(t)])
            start += weight.shape[0]
        for tensor_name, t in ours.items():
            yield stored_name(name, tensor_name), t
        if plan.input_order is not None:
            yield stored_name(name, "input_order"), plan.input_order.int()


def check_finite_tensor(name: str, tensor: Tensor):
    # aminmax reads the tensor once, and allocates nothing. A NaN makes both results NaN.
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):
        raise UsageError(f"tensor {name} holds numbers that are not finite: the file is damaged")


# ---- Formats --------------------------------------------------------------------------------------------------------


def most_common_format(plans: dict[str, TensorPlan]) -> WeightFormat:
    """Returns the format that most quantized weights have, or Unquantized if no weight is quantized."""
    counts = Counter(plan.format for plan in plans.values() if plan.format.quantization is not None)
    return counts.most_common(1)[0][0] if counts else Unquantized()


def describe_formats(plans: dict[str, TensorPlan], default: WeightFormat) -> dict | None:
    """Returns the header's "quantization": the default format, the layers with another format, and the layers with an
    order of inputs."""
    if default.quantization is None:
        return None
    layers, embedding = {}, plans["embed_tokens.weight"].format
    if "lm_head.weight" not in plans and embedding != default:  # a tied head
        layers["lm_head"] = embedding.quantization
    if embedding.quantization is not None:  # the default format does not apply to the embedding
        layers["embed_tokens"] = embedding.quantization
    for name, plan in plans.items():
        if plan.linear_format not in (None, default) and name != "embed_tokens.weight":
            layers[name.removesuffix(".weight")] = plan.format.quantization
    act_order = [name.removesuffix(".weight") for name, plan in plans.items() if plan.input_order is not None]
    others = {"layers": layers, "act_order": act_order}
    return default.quantization | {field: value for field, value in others.items() if value}


def warn_dequantized(plans: dict[str, TensorPlan], tensors: SourceTensors):
    """Prints which of the checkpoint's quantized weights become unquantized, and why."""
    names_of: dict[str, list[str]] = {}  # reason -> names
    for name, plan in plans.items():
        quantized = {name: tensors[name] for name in plan.sources if isinstance(tensors[name], LazyWeight)}
        if plan.format.quantization is None and quantized:
            names_of.setdefault(why_dequantized(name, plan, list(quantized.values())), []).extend(quantized)
    for why, names in names_of.items():
        print(f"{len(names)} weights are not kept quantized, as {names[0]}: {why}", file=sys.stderr)


def why_dequantized(name: str, plan: TensorPlan, weights: list[LazyWeight]) -> str:
    """Returns why weights, which are stacked in our tensor called name, become unquantized."""
    if plan.linear_format is None:
        return "routers have 16 bits here"
    if loses_order(name, plan, weights) or any(isinstance(weight.format, Unquantized) for weight in weights):
        why = "act-order (desc_act) has scattered the inputs of their groups"
        return f"{why}; a checkpoint without it becomes a smaller file"
    if not all(weight.is_storable() for weight in weights):
        return "no format here has their group size, number of inputs, or scales of float32"
    return "there is no format for them together with what they are stacked with"
