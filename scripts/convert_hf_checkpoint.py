"""A Hugging Face checkpoint's folder, or karpathy's tinyllamas, to model.pth.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

The folder holds config.json and safetensors or pytorch_model.bin, in one file or many; or one .pt of tinyllamas.
"""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from checkpoint import is_table, load_pickle, read_json, save_checkpoint
from config import ModelConfig, UsageError
from model import Transformer

# For each of our modules those of Hugging Face's whose rows it is made of, one below the other
TABLE = {
    "embed_tokens": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
    # of a layer, after "layers.3." and "model.layers.3."
    "attention_norm": ["input_layernorm"],
    "attention.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.o_proj": ["self_attn.o_proj"],
    "attention.q_norm": ["self_attn.q_norm"],
    "attention.k_norm": ["self_attn.k_norm"],
    "ffn_norm": ["post_attention_layernorm"],
    "feed_forward.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.down_proj": ["mlp.down_proj"],
}
# The same where the feed-forward is a mixture of experts. {e} is the expert: ours holds all of them.
MOE_TABLE = TABLE | {
    "feed_forward.router": ["mlp.gate"],
    "feed_forward.gate_up_proj": ["mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"],
    "feed_forward.down_proj": ["mlp.experts.{e}.down_proj"],
}

# Other names of the same modules, in pieces, each with the one that stands in the tables
FEED_FORWARD_NAMES = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
MIXTRAL_NAMES = FEED_FORWARD_NAMES | {".block_sparse_moe.": ".mlp."}
META_NAMES = FEED_FORWARD_NAMES | {
    "tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    ".wq.": ".q_proj.", ".wk.": ".k_proj.", ".wv.": ".v_proj.", ".wo.": ".o_proj.",
    ".attention.": ".self_attn.", ".feed_forward.": ".mlp.",
}  # fmt: skip
UNUSED = re.compile(r"(inv_freq|freqs_cos|freqs_sin)$")  # tables that some checkpoints hold, and we compute
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
        config = ModelConfig.from_hf(read_json(folder / "config.json"), generation)
        convert(folder / "model.pth", config, read_folder(folder))
    else:
        config, tensors, read = read_tinyllamas(folder)
        convert(folder / "model.pth", config, tensors, read)


# ---- From Hugging Face's tensors to ours ----------------------------------------------------------------------------


@dataclass
class Recipe:
    """What one of our tensors is, and Hugging Face's whose rows it is made of, from top to bottom."""

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
    recipes = plan(config, tensors)
    used = {source for recipe in recipes.values() for source in recipe.sources}
    if config.tie_embeddings:
        used.add(HEAD)
    left_over = [name for name in tensors if name not in used and not UNUSED.search(name)]
    if left_over:
        what = f"the checkpoint's tensor {min(left_over)} has no place in this model"
        raise UsageError(f"{what} ({len(left_over)} left over)")
    shapes = {name: (recipe.shape, recipe.dtype) for name, recipe in recipes.items()}
    save_checkpoint(path, config, shapes, concatenated(recipes, read))


def plan(config: ModelConfig, tensors: Tensors) -> dict[str, Recipe]:
    """A recipe for every tensor of our checkpoint. Raises UsageError if tensors lack what it needs."""
    try:
        with torch.device("meta"):
            one_layer = Transformer(replace(config, n_layers=1)).state_dict()
    except RuntimeError as e:
        raise UsageError(f"no model has the sizes of this config: {str(e).splitlines()[0]}") from None
    if config.tie_embeddings:
        del one_layer["lm_head.weight"]
    recipes = {}
    for i in range(config.n_layers):
        for name, ours in one_layer.items():
            name = name.replace("layers.0.", f"layers.{i}.")
            if name not in recipes:
                sources = sources_of(name, ours.shape, config)
                recipes[name] = Recipe(ours.shape, common_dtype(sources, tensors), list(sources))
    return recipes


def sources_of(name: str, shape: torch.Size, config: ModelConfig) -> dict[str, list[int]]:
    """The names and shapes of Hugging Face's tensors that ours of this name is made of, from top to bottom. Ours is a
    vector [N], a matrix [N, K] or all experts' matrices [E, N, K]."""
    layer, module, kind = re.fullmatch(r"(layers\.\d+\.)?(.+)\.(weight|bias)", name).groups()
    prefix = f"model.{layer}" if layer else ""
    templates = (MOE_TABLE if config.moe else TABLE)[module]
    n_experts = shape[0] if len(shape) == 3 else 1
    n_rows, *n_columns = shape[-2:]
    rows = [n_rows // len(templates)] * len(templates)
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


def concatenated(recipes: dict[str, Recipe], read: Reader) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one at a time."""
    for name, recipe in recipes.items():
        ours = torch.empty(recipe.shape, dtype=recipe.dtype)
        rows = ours.flatten(0, 1) if ours.dim() == 3 else ours  # of all experts one below the other
        start = 0
        for source in recipe.sources:
            theirs = read(source).detach()
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
        for name, tensor in load(folder / file).items():
            if ".block_sparse_moe." in name:
                name = rename(name, MIXTRAL_NAMES)
            tensors[name] = tensor
    split_experts(tensors)
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
        raise UsageError(f"{file} does not exist")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is truncated or not safetensors: {e}") from None


def load_bin(file: Path) -> Tensors:
    tensors = load_pickle(file, legacy=True)
    if not is_table(tensors):
        raise UsageError(f"{file} is not a table of tensors")
    return tensors


def split_experts(tensors: Tensors):
    """Replaces what holds all experts of a layer, gate_up_proj [E, 2F, dim] and down_proj [E, dim, F] as transformers 5
    writes them, by views of one expert's matrix each."""
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if match is None or tensors[name].dim() != 3:
            continue
        prefix, kind = match.groups()
        for e, matrix in enumerate(tensors.pop(name)):
            if kind == "down_proj":
                tensors[f"{prefix}.{e}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.tensor_split(2)
                tensors[f"{prefix}.{e}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{e}.up_proj.weight"] = up


def rename(name: str, new_names: dict[str, str]) -> str:
    for old, new in new_names.items():
        name = name.replace(old, new)
    return name


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

    def read(name: str) -> Tensor:
        is_qk = re.search(r"[qk]_proj\.weight$", name)
        return unpermute(tensors[name], config.head_dim) if is_qk else tensors[name]

    return config, tensors, read


def tinyllamas_config(args: dict, tensors: Tensors) -> ModelConfig:
    return ModelConfig(
        dim=args["dim"], n_layers=args["n_layers"], n_heads=args["n_heads"],
        n_kv_heads=args.get("n_kv_heads") or args["n_heads"], head_dim=args["dim"] // args["n_heads"],
        ffn_dim=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        vocab_size=args["vocab_size"], max_seq_len=args["max_seq_len"],
        tie_embeddings=torch.equal(tensors[HEAD], tensors[EMBEDDING]),
        bos_id=1, eos_ids=(1,),  # a story ends where the next would begin
    )  # fmt: skip


def unpermute(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of Q or K from Meta's RoPE order, pairs side by side, to Hugging Face's, pairs half a head apart:
    of each head rows 0 1 2 3 4 5 become 0 2 4 1 3 5."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))  # [H, D/2, 2, ...]
    return pairs.transpose(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    cli.run(main)
