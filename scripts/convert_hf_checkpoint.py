"""A Hugging Face checkpoint's folder, or karpathy's tinyllamas, to model.pth.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

The folder holds config.json and safetensors or pytorch_model.bin, in one file or many; or one .pt of tinyllamas.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from checkpoint import is_table, load_pickle, read_json, save_checkpoint
from config import ModelConfig, UsageError
from families import Family, config_from_hf, find_family
from model import empty_model

# Our module -> the modules of Hugging Face whose weights, concatenated along dim 0, are its weight
HF_SOURCES = {
    "embed_tokens": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
    # In a layer: ours begins with "layers.3.", theirs with "model.layers.3."
    "attention_norm": ["input_layernorm"],
    "attention": ["self_attn"],  # its sinks
    "attention.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.o_proj": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "post_attention_norm": ["post_attention_norm"],
    "ffn_norm": ["post_attention_layernorm"],
    "post_ffn_norm": ["post_ffn_norm"],
    "feed_forward.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.down_proj": ["mlp.down_proj"],
}
# For a mixture of experts. {e} is the expert's number: our tensor holds all experts.
MOE_SOURCES = HF_SOURCES | {
    "feed_forward.router": ["mlp.gate"],
    "feed_forward.gate_up_proj": ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
    "feed_forward.down_proj": ["mlp.experts.{e}.down_proj"],
}

# Parts of names in other checkpoints -> what HF_SOURCES calls them
FEED_FORWARD_NAMES = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
MIXTRAL_NAMES = FEED_FORWARD_NAMES | {".block_sparse_moe.": ".mlp."}
META_NAMES = FEED_FORWARD_NAMES | {
    "tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    ".wq.": ".q_proj.", ".wk.": ".k_proj.", ".wv.": ".v_proj.", ".wo.": ".o_proj.",
    ".attention.": ".self_attn.", ".feed_forward.": ".mlp.",
}  # fmt: skip
# Renames of each family, by its model_type, made before HF_SOURCES is used. There, as in Llama, input_layernorm comes
# before attention and post_attention_layernorm before the feed-forward. Renames are made in order: the first of
# GEMMA_NORMS frees a name, which the second one takes.
GEMMA_NORMS = {
    ".post_attention_layernorm.": ".post_attention_norm.", ".pre_feedforward_layernorm.": ".post_attention_layernorm.",
    ".post_feedforward_layernorm.": ".post_ffn_norm.",
}  # fmt: skip
GLM4_NORMS = {".post_self_attn_layernorm.": ".post_attention_norm.", ".post_mlp_layernorm.": ".post_ffn_norm."}
GROK_NAMES = {
    ".pre_attn_norm.scale": ".input_layernorm.weight", ".post_attn_norm.scale": ".post_attention_norm.weight",
    ".pre_moe_norm.scale": ".post_attention_layernorm.weight", ".post_moe_norm.scale": ".post_ffn_norm.weight",
    "model.norm.scale": "model.norm.weight", ".attn.": ".self_attn.", ".moe_block.": ".mlp.",
    ".linear_v.": ".up_proj.", ".linear_1.": ".down_proj.", ".linear.": ".gate_proj.",
}  # fmt: skip
DBRX_NAMES = {
    "transformer.wte.": "model.embed_tokens.", "transformer.norm_f.": "model.norm.",
    "transformer.blocks.": "model.layers.", ".norm_attn_norm.norm_1.": ".input_layernorm.",
    ".norm_attn_norm.norm_2.": ".post_attention_layernorm.", ".norm_attn_norm.attn.": ".self_attn.",
    ".Wqkv.": ".qkv_proj.", ".out_proj.": ".o_proj.", ".ffn.router.layer.": ".mlp.gate.",
    ".ffn.experts.mlp.": ".mlp.experts.",
}  # fmt: skip
DBRX_EXPERT_NAMES = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}
FAMILY_NAMES = {
    "gemma2": GEMMA_NORMS, "gemma3_text": GEMMA_NORMS, "olmo2": GEMMA_NORMS, "olmo3": GEMMA_NORMS, "glm4": GLM4_NORMS,
    "mixtral": MIXTRAL_NAMES, "gpt_oss": {".mlp.router.": ".mlp.gate."}, "grok-1": GROK_NAMES,
    "baichuan": {".W_pack.": ".qkv_proj."}, "dbrx": DBRX_NAMES,
}  # fmt: skip
UNUSED = re.compile(r"(inv_freq|freqs_cos|freqs_sin)$")  # tables that some checkpoints hold, and we compute
BAICHUAN_1_VOCAB = 64000  # Baichuan 2 has a larger vocabulary, and scales every row of its head to length one
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, Tensor]
Reader = Callable[[str], Tensor]


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth goes there too")
    folder = parser.parse_args().checkpoint_dir
    convert_folder(folder)
    print(f"wrote {folder / 'model.pth'}")


def convert_folder(folder: Path):
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    if (folder / "config.json").is_file():
        generation = read_json(folder / "generation_config.json", {})
        hf = read_json(folder / "config.json")
        config, tensors = config_from_hf(hf, generation), read_folder(folder)
        read = adapt(tensors, config, find_family(hf))
    else:
        config, tensors, read = read_tinyllamas(folder)
    convert(folder / "model.pth", config, tensors, read)


# ---- From Hugging Face's tensors to ours ----------------------------------------------------------------------------


@dataclass
class TensorPlan:
    """One of our tensors, and the tensors of Hugging Face whose concatenation along dim 0 it is."""

    shape: torch.Size
    dtype: torch.dtype
    sources: list[str]


def convert(path: Path, config: ModelConfig, tensors: Tensors, read: Reader | None = None):
    """Writes model.pth from tensors named as Hugging Face does. With read, these are looked at for their shapes and
    dtypes alone, and read(name) gives the data. One of ours is in memory at a time. Raises UsageError naming a tensor
    that is missing, left over, of the wrong shape or of a foreign dtype."""
    read = read or tensors.__getitem__
    if config.tie_embeddings and HEAD in tensors and EMBEDDING in tensors:
        if not torch.equal(read(HEAD), read(EMBEDDING)):  # whatever config.json says; transformers takes the head, too
            config = replace(config, tie_embeddings=False)
    plans = plan_tensors(config, tensors)
    used = {source for plan in plans.values() for source in plan.sources}
    if config.tie_embeddings:
        used.add(HEAD)
    left_over = [name for name in tensors if name not in used and not UNUSED.search(name)]
    if left_over:
        what = f"the checkpoint's tensor {min(left_over)} has no place in this model"
        raise UsageError(f"{what} ({len(left_over)} left over)")
    shapes = {name: (plan.shape, plan.dtype) for name, plan in plans.items()}
    save_checkpoint(path, config, shapes, iter_tensors(plans, read))


def plan_tensors(config: ModelConfig, tensors: Tensors) -> dict[str, TensorPlan]:
    """A plan for every tensor of our checkpoint. Raises UsageError if tensors lack what it needs."""
    try:
        one_layer = empty_model(config.with_layers(1)).state_dict()
    except RuntimeError as e:
        raise UsageError(f"no model has the sizes of this config: {str(e).splitlines()[0]}") from None
    if config.tie_embeddings:
        del one_layer["lm_head.weight"]
    plans = {}
    for i in range(config.n_layers):
        for name, ours in one_layer.items():
            name = name.replace("layers.0.", f"layers.{i}.")
            if name not in plans:
                sources = sources_of(name, ours.shape, config)
                plans[name] = TensorPlan(ours.shape, common_dtype(sources, tensors), list(sources))
    return plans


def sources_of(name: str, shape: torch.Size, config: ModelConfig) -> dict[str, list[int]]:
    """The names and shapes of Hugging Face's tensors whose concatenation along dim 0 is our tensor called name. Ours is
    a vector [N], a matrix [N, K], or the vectors or matrices of all experts [E, ...]."""
    layer, module, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias|sinks)", name).groups()
    prefix = f"model.{layer}" if layer else ""
    templates = (MOE_SOURCES if config.moe else HF_SOURCES)[module]
    n_experts = 1
    if "{e}" in templates[0]:
        n_experts, *shape = shape
    n_rows, *n_columns = shape
    rows = [n_rows // len(templates)] * len(templates)
    if module == "feed_forward.router" and config.moe.n_shared_experts:
        templates, rows = [*templates, "mlp.shared_expert_gate"], [config.moe.n_experts, 1]
    if module == "attention.qkv_proj":
        rows = [n_heads * config.head_dim for n_heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    sources = {}
    for e in range(n_experts):
        for template, n in zip(templates, rows, strict=True):
            sources[f"{prefix}{template.format(e=e)}.{kind}"] = [n, *n_columns]
    return sources


def common_dtype(sources: dict[str, list[int]], tensors: Tensors) -> torch.dtype:
    """The narrowest dtype in which no source loses anything. Raises UsageError for one that is missing or wrong."""
    dtype = None
    for name, shape in sources.items():
        if name not in tensors:
            raise UsageError(f"the checkpoint has no tensor {name}")
        found = tensors[name]
        if list(found.shape) != shape:
            raise UsageError(f"tensor {name} is {list(found.shape)}; the config makes it {shape}")
        if found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UsageError(f"tensor {name} is {found.dtype}, not float32, float16 or bfloat16")
        dtype = torch.promote_types(dtype or found.dtype, found.dtype)
    return dtype


def iter_tensors(plans: dict[str, TensorPlan], read: Reader) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one at a time."""
    for name, plan in plans.items():
        ours = torch.empty(plan.shape, dtype=plan.dtype)
        start = 0
        for source in plan.sources:
            theirs = read(source).detach()
            rows = ours.flatten(0, 1) if ours.dim() > theirs.dim() else ours  # of all experts one below the other
            rows[start : start + len(theirs)].copy_(theirs)
            start += len(theirs)
        yield name, ours


# ---- Reading Hugging Face's folders ---------------------------------------------------------------------------------


def read_folder(folder: Path) -> Tensors:
    """The tensors of a folder by the names in our tables, memory-mapped: none is read yet."""
    load, files = load_safetensors, list_files(folder, "model.safetensors")
    if files is None:
        load, files = load_bin, list_files(folder, "pytorch_model.bin")
    if files is None:
        raise UsageError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor their index.json)")
    tensors = {}
    for file in files:
        tensors.update(load(folder / file))
    return tensors


def list_files(folder: Path, stem: str) -> list[str] | None:
    """The names of a checkpoint's files: stem itself, or those that its index names. None if there is neither."""
    index = folder / f"{stem}.index.json"
    if (folder / stem).is_file():
        return [stem]
    if not index.is_file():
        return None
    content = read_json(index)
    file_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise UsageError(f"{index} has no weight_map of file names")
    files = sorted(set(file_of.values()))
    for file in files:
        if Path(file).name != file:
            raise UsageError(f"{index} names {file!r}, which is not a file of the folder itself")
    return files


def load_safetensors(file: Path) -> Tensors:
    if not file.is_file():
        raise UsageError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is truncated or not safetensors: {e}") from None


def load_bin(file: Path) -> Tensors:
    tensors = load_pickle(file, legacy=True)
    if not is_table(tensors):
        raise UsageError(f"{file} is not a table of tensors")
    return tensors


def rename(name: str, new_names: dict[str, str]) -> str:
    for old, new in new_names.items():
        name = name.replace(old, new)
    return name


# ---- From a family's tensors to Llama's -----------------------------------------------------------------------------


def adapt(tensors: Tensors, config: ModelConfig, family: Family) -> Reader:
    """Renames and splits tensors, in place, so that the tables fit. What else is to be done is left to the Reader, so
    that a tensor's data is read only when its turn comes."""
    names = FAMILY_NAMES.get(family.model_type, {})
    for name in list(tensors):
        tensors[rename(name, names)] = tensors.pop(name)
    makers = dequantized_mxfp4(tensors) if family.model_type == "gpt_oss" else {}
    split_fused(tensors, config)
    split_experts(tensors, is_transposed=family.model_type == "gpt_oss")
    if config.moe is not None and config.moe.n_shared_experts:
        split_shared_expert(tensors, config)
    if family.model_type == "dbrx":
        split_dbrx_experts(tensors, config)
    order = rope_order(config, family.interleaved_rope)

    def read(name: str) -> Tensor:
        tensor = makers[name]() if name in makers else tensors[name]
        tensor = reorder_heads(name, tensor, order)
        if family.model_type == "baichuan" and config.vocab_size > BAICHUAN_1_VOCAB and name == HEAD:
            tensor = F.normalize(tensor.float()).to(tensor.dtype)
        if family.norm_offset and re.search(r"norm\.weight$", name):
            tensor = (tensor.float() + family.norm_offset).to(tensor.dtype)
        if family.layer_norm:
            tensor = center_outputs(name, tensor)
        return tensor

    return read


def rope_order(config: ModelConfig, interleaved: bool) -> Tensor | None:
    """Which of a head's elements come where, so that RoPE's pairs are half a head apart and those that it does not
    rotate come last in both halves. None: they already do. interleaved: a pair's elements are side by side, as in
    Meta's files. Of six elements, 0 2 4 1 3 5 is the order then."""
    rotary_dim = config.rotary_dim or config.head_dim
    if rotary_dim == config.head_dim and not interleaved:
        return None
    rotated = torch.arange(rotary_dim)
    first, second = (rotated[::2], rotated[1::2]) if interleaved else rotated.chunk(2)
    rest_first, rest_second = torch.arange(rotary_dim, config.head_dim).tensor_split(2)
    return torch.cat([first, rest_first, second, rest_second])


def reorder_heads(name: str, tensor: Tensor, order: Tensor | None) -> Tensor:
    """The tensor of this name with the rows of each head in rope_order's order, if it is of queries or keys."""
    if order is None or not re.search(r"self_attn\.[qk]_(proj|norm)\.", name):
        return tensor
    return tensor.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def center_outputs(name: str, tensor: Tensor) -> Tensor:
    """The tensor of this name, without the mean over its outputs if these are added to x: an embedding, or the last
    product of a sublayer. If the mean of every summand is zero, so is that of x, and LayerNorm(x) is RMSNorm(x). What
    is subtracted makes no difference, since every LayerNorm would subtract it from x."""
    is_embedding = name == EMBEDDING
    if not is_embedding and not re.search(r"\.(o_proj|down_proj)\.weight$", name):
        return tensor
    wide = tensor.float()
    return (wide - wide.mean(1 if is_embedding else 0, keepdim=True)).to(tensor.dtype)


def split_fused(tensors: Tensors, config: ModelConfig):
    """Replaces Phi-3's qkv_proj and its and GLM's gate_up_proj by views of their parts."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.)(self_attn\.)qkv_proj\.(\w+)", name)
        if match is not None and tensors[name].shape[:1] == (q + 2 * kv,):
            prefix, attention, kind = match.groups()
            for part, tensor in zip("qkv", tensors.pop(name).split([q, kv, kv]), strict=True):
                tensors[f"{prefix}{attention}{part}_proj.{kind}"] = tensor
        match = re.fullmatch(r"(.*\.mlp\.)gate_up_proj\.weight", name)
        if match is not None and tensors[name].dim() == 2:
            (prefix,) = match.groups()
            tensors[f"{prefix}gate_proj.weight"], tensors[f"{prefix}up_proj.weight"] = tensors.pop(name).tensor_split(2)


def split_experts(tensors: Tensors, is_transposed: bool):
    """Replaces what holds all experts of a layer by views of one expert's each: gate_up_proj [E, 2F, dim] and down_proj
    [E, dim, F] as transformers 5 writes them. gpt-oss has them transposed, the rows of gate and up in turn, and biases.
    """
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)(_bias)?", name)
        if match is None or tensors[name].dim() < 2:
            continue
        prefix, projection, is_bias = match.groups()
        kind = "bias" if is_bias else "weight"
        for e, tensor in enumerate(tensors.pop(name)):
            if is_transposed and tensor.dim() == 2:
                tensor = tensor.mT
            if projection == "down_proj":
                tensors[f"{prefix}.{e}.down_proj.{kind}"] = tensor
                continue
            gate, up = (tensor[::2], tensor[1::2]) if is_transposed else tensor.tensor_split(2)
            tensors[f"{prefix}.{e}.gate_proj.{kind}"] = gate
            tensors[f"{prefix}.{e}.up_proj.{kind}"] = up


def split_shared_expert(tensors: Tensors, config: ModelConfig):
    """Replaces a shared expert, n_shared_experts times as wide as the others, by the experts that it is the sum of."""
    n_experts, n_shared_experts = config.moe.n_experts, config.moe.n_shared_experts
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.mlp)\.shared_expert\.(\w+)\.weight", name)
        if match is None or tensors[name].dim() != 2:
            continue
        prefix, projection = match.groups()
        dim = 1 if projection == "down_proj" else 0
        for i, part in enumerate(tensors.pop(name).tensor_split(n_shared_experts, dim)):
            tensors[f"{prefix}.experts.{n_experts + i}.{projection}.weight"] = part


def split_dbrx_experts(tensors: Tensors, config: ModelConfig):
    """Replaces DBRX's w1, v1 and w2, each of all experts [E F, dim], by views of one expert's. w2's are transposed."""
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.experts)\.(w1|v1|w2)", name)
        if match is None or tensors[name].dim() != 2:
            continue
        prefix, kind = match.groups()
        for e, tensor in enumerate(tensors.pop(name).tensor_split(config.moe.n_experts)):
            tensors[f"{prefix}.{e}.{DBRX_EXPERT_NAMES[kind]}.weight"] = tensor.mT if kind == "w2" else tensor


# ---- gpt-oss's weights of four bits ---------------------------------------------------------------------------------

FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # of the numbers 0 to 7; 8 to 15 are the same, negative


def dequantized_mxfp4(tensors: Tensors) -> dict[str, Callable[[], Tensor]]:
    """Replaces the blocks and scales of experts' projections by tensors without data, one expert's matrix each in
    bfloat16, and returns for each of their names the function that makes it."""
    makers = {}
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)_blocks", name)
        if match is None:
            continue
        prefix, projection = match.groups()
        scales_name = f"{prefix}.{projection}_scales"
        if scales_name not in tensors:
            raise UsageError(f"the checkpoint has no tensor {scales_name}")
        blocks, scales = tensors.pop(name), tensors.pop(scales_name)
        is_bytes = blocks.dtype == scales.dtype == torch.uint8
        if not is_bytes or scales.dim() != 3 or blocks.shape != (*scales.shape, 16):
            raise UsageError(f"tensors {name} and {scales_name} are not MXFP4: bytes [E, N, K/32, 16] and [E, N, K/32]")
        n_experts, n_rows, n_groups, n_bytes = blocks.shape
        for e in range(n_experts):
            parts = {"down_proj": slice(None)}
            if projection == "gate_up_proj":  # their rows in turn
                parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            for part, rows in parts.items():
                part_name = f"{prefix}.{e}.{part}.weight"
                shape = len(range(n_rows)[rows]), n_groups * n_bytes * 2
                tensors[part_name] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
                makers[part_name] = partial(dequantize_mxfp4, blocks[e], scales[e], rows)
    return makers


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, rows: slice) -> Tensor:
    """Some rows of a matrix in the Open Compute Project's MXFP4: blocks [N, K / 32, 16], two numbers a byte, the lower
    half first; scales [N, K / 32], powers of two with a bias of 127 -> [rows, K] bfloat16, which is exact."""
    values = torch.tensor(FP4_VALUES + [-value for value in FP4_VALUES])
    blocks = blocks[rows].int()
    numbers = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [rows, K / 32, 32]
    return torch.ldexp(values[numbers], scales[rows].int()[..., None] - 127).flatten(-2).to(torch.bfloat16)


# ---- Reading tinyllamas ---------------------------------------------------------------------------------------------


def read_tinyllamas(folder: Path) -> tuple[ModelConfig, Tensors, Reader]:
    """karpathy/tinyllamas: one .pt of {"model_args", "model"}, with Meta's names and Meta's order of RoPE's rows, which
    the Reader changes to Hugging Face's."""
    files = sorted(folder.glob("*.pt"))
    if len(files) != 1:
        raise UsageError(f"{folder} holds no config.json, nor exactly one .pt of tinyllamas")
    (file,) = files
    try:
        data = dict(load_pickle(file, legacy=True))
        if not is_table(data["model"]):
            raise UsageError(f"{file} is not a table of tensors")
        tensors = {}
        for name, tensor in data["model"].items():
            name = name.removeprefix("_orig_mod.")  # torch.compile's
            tensors[HEAD if name == "output.weight" else "model." + rename(name, META_NAMES)] = tensor
        config = tinyllamas_config(data["model_args"], tensors)
    except UsageError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as e:
        raise UsageError(f"{file} is not one of tinyllamas: {type(e).__name__} {e}") from None

    order = rope_order(config, interleaved=True)
    return config, tensors, lambda name: reorder_heads(name, tensors[name], order)


def tinyllamas_config(args: dict, tensors: Tensors) -> ModelConfig:
    return ModelConfig(
        dim=args["dim"], n_layers=args["n_layers"], n_heads=args["n_heads"],
        n_kv_heads=args.get("n_kv_heads") or args["n_heads"], head_dim=args["dim"] // args["n_heads"],
        ffn_dim=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        vocab_size=args["vocab_size"], max_seq_len=args["max_seq_len"],
        tie_embeddings=torch.equal(tensors[HEAD], tensors[EMBEDDING]),
        bos_id=1, eos_ids=(1,),  # a story ends where the next would begin
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
