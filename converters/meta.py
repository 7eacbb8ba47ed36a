"""Reads Llama in Meta's own format: consolidated.00.pth, consolidated.01.pth ... and params.json.

    model = read_meta(Path("checkpoints/Llama3.2-1B"))

Each file holds a shard of every matrix, for one of several GPUs. Mistral has consolidated files of the same format. A
model of karpathy/tinyllamas keeps params and tensors in one file (read_tinyllamas).

params.json does not state the length of the context. infer_llama_version takes the first row that applies:

    Llama 3.2    use_scaled_rope, the head is the embedding   131072   RoPE is stretched 32-fold
    Llama 3.1    use_scaled_rope                              131072   8-fold
    Mistral      hidden_dim                                    32768
    Llama 3      rope_theta 500000                              8192
    CodeLlama    another rope_theta                            16384
    Llama 1      norm_eps 1e-6, or 80 layers, no n_kv_heads     2048   the 65B has norm_eps 1e-5
    Llama 2      none of these                                  4096
"""

import itertools
import math
import re
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import rename_tensor
from config import ModelConfig, RopeScaling
from converters.canonical_checkpoint import EMBEDDING, HEAD, CanonicalCheckpoint, SourceTensors
from converters.family_tensors import META_FFN_TO_CANONICAL
from converters.hf_tensors import reorder_heads, rope_row_order
from converters.meta_tokenizer import read_meta_tokenizer
from converters.source_files import hint_at_subfolder
from utils.errors import UsageError, convert_type_errors
from utils.files import is_state_dict, load_safetensors, load_torch_file, load_torch_state_dict, read_json

PARAMS = "params.json"
META_TO_CANONICAL = META_FFN_TO_CANONICAL | {  # part of a name in Meta's files -> part of the canonical name
    "tok_embeddings": "embed_tokens", "attention_norm": "pre_attention_norm", "ffn_norm": "pre_ffn_norm",
    ".wq.": ".q_proj.", ".wk.": ".k_proj.", ".wv.": ".v_proj.", ".wo.": ".o_proj.",
    ".attention.": ".self_attn.", ".feed_forward.": ".mlp.",
}
KNOWN_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "multiple_of",
    "ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope", "sliding_window", "max_seq_len",
    "max_batch_size", "model_parallel_size",
}
LLAMA31_CONTEXT, LLAMA31_TRAINED_CONTEXT = 131072, 8192
LLAMA3_THETA = 500000


def to_canonical_name(name: str) -> str:
    return HEAD if name == "output.weight" else "model." + rename_tensor(name, META_TO_CANONICAL)


# ---- Meta's folders -------------------------------------------------------------------------------------------------


def read_meta(folder: Path) -> CanonicalCheckpoint:
    """The result has the tokenizer files that folder lacks, and a note about values that params.json lacks."""
    path = folder / PARAMS
    params, files = read_json(path), shard_files(folder)
    shards = collect_shards(files)
    with convert_type_errors(f"{path}, or a tensor that does not fit it,", RuntimeError):
        check_params(params)
        check_shard_count(folder, params, shards, len(files))
        dims = {name: shard_dim(name, shards[name][0], params["dim"]) for name in shards}
        check_whole_tensors({name: shards[name] for name in shards if dims[name] is None})
        tensors = {name: concat_shards([t.to("meta") for t in shards[name]], dims[name]) for name in shards}
        has_tied_head = HEAD not in shards
        if not has_tied_head:
            head, embedding = (concat_shards(shards[name], dims[name]) for name in (HEAD, EMBEDDING))
            has_tied_head = torch.equal(head, embedding)
        config, note = meta_config(params, tensors, has_tied_head)
    config, tokenizer = read_meta_tokenizer(folder, config)
    row_order = rope_row_order(config, interleaved=True)

    def read(name: str) -> Tensor:
        return reorder_heads(name, concat_shards(shards[name], dims[name]), row_order)

    return CanonicalCheckpoint(config, tensors, read, tokenizer, note)


def shard_files(folder: Path) -> list[Path]:
    """Returns the files in the order of the shards. Raises UsageError if one is missing."""
    files = sorted(folder.glob("consolidated.*.pth"))
    for i, file in enumerate(files):
        if file.name != f"consolidated.{i:02d}.pth":
            raise UsageError(f"{folder} holds {file.name}, but no consolidated.{i:02d}.pth")
    if files:
        return files
    files = [file for pattern in ("consolidated*.safetensors", "*.pt") for file in folder.glob(pattern)]
    if len(files) != 1:
        raise UsageError(f"{folder} holds {PARAMS}, but no consolidated.00.pth, nor a single .safetensors or .pt of it")
    return files


def collect_shards(files: list[Path]) -> dict[str, list[Tensor]]:
    """Returns {canonical name of a tensor: its shard in each file, memory-mapped}."""
    load = load_safetensors if files[0].suffix == ".safetensors" else load_torch_state_dict
    contents = [load(file) for file in files]
    for file, tensors in zip(files, contents, strict=True):
        if difference := tensors.keys() ^ contents[0].keys():
            raise UsageError(f"{file.name} and {files[0].name} do not both have the tensor {min(difference)}")
    names = [name for name in contents[0] if name != "rope.freqs"]  # a table that layers/rope.py computes
    return {to_canonical_name(name): [tensors[name] for tensors in contents] for name in names}


def shard_dim(name: str, shard: Tensor, dim: int) -> int | None:
    """Returns the dimension along which a tensor was sharded, or None if every shard has the whole tensor. Llama 1 and
    2 shard the embedding by columns. Llama 3 shards it by rows, so a shard has all dim columns."""
    if shard.dim() < 2:
        return None
    if name == EMBEDDING:
        return 0 if shard.shape[1] == dim else 1
    return 1 if re.search(r"\.(o_proj|down_proj)\.", name) else 0


def check_whole_tensors(tensors: dict[str, list[Tensor]]):
    """Checks that tensors that were not sharded, such as norms, have the same values in all files."""
    for name, copies in tensors.items():
        if not all(torch.equal(copy.float(), copies[0].float()) for copy in copies):
            raise UsageError(f"the files consolidated.* hold different values of the tensor {name}")


def concat_shards(shards: list[Tensor], dim: int | None) -> Tensor:
    return shards[0] if dim is None or len(shards) == 1 else torch.cat(shards, dim)


# ---- params.json ----------------------------------------------------------------------------------------------------


def check_params(params: dict):
    params = {name: value for name, value in params.items() if value is not None and value is not False}
    for name in ("dim", "n_layers", "n_heads", "norm_eps"):
        if name not in params:
            raise UsageError(f"{PARAMS}: {name} is missing")
    if unknown := params.keys() - KNOWN_PARAMS:
        raise UsageError(f"{PARAMS}: {min(unknown)} = {params[min(unknown)]!r} is not supported")


def check_shard_count(folder: Path, params: dict, shards: dict[str, list[Tensor]], n_files: int):
    """Checks that no shard is missing or occurs twice: the columns of o_proj must add up to n_heads * head_dim."""
    name = "model.layers.0.self_attn.o_proj.weight"
    if name not in shards or shards[name][0].dim() != 2:
        return
    n_rows, n_columns = shards[name][0].shape
    n_needed, rest = divmod(params["n_heads"] * meta_head_dim(params), n_columns)
    if n_rows == params["dim"] and rest == 0 and n_needed != n_files:
        raise UsageError(f"{folder}: the model is in {n_needed} files consolidated.*; {n_files} are there")
    for i, j in itertools.combinations(range(n_files), 2):
        if torch.equal(shards[name][i], shards[name][j]):
            raise UsageError(f"{folder}: consolidated.{i:02d}.pth and consolidated.{j:02d}.pth hold the same shard")


def meta_head_dim(params: dict) -> int:
    return params.get("head_dim") or params["dim"] // params["n_heads"]


def meta_config(params: dict, tensors: SourceTensors, has_tied_head: bool) -> tuple[ModelConfig, str]:
    """Returns the config and a note about inferred values, or "" if none was inferred."""
    generation, context, factor = infer_llama_version(params, has_tied_head)
    stretched = f" and RoPE stretched {factor:g}-fold" if factor else ""
    note = f"{PARAMS} leaves this open: a context of {context} tokens{stretched}, as {generation} has"
    if params.get("max_seq_len"):
        context, note = params["max_seq_len"], ""
    vocab_size = params.get("vocab_size", -1)
    scaling = RopeScaling("llama3", factor, original_max_seq_len=LLAMA31_TRAINED_CONTEXT) if factor else None
    config = ModelConfig(
        dim=params["dim"], n_layers=params["n_layers"], n_heads=params["n_heads"],
        n_kv_heads=params.get("n_kv_heads") or params["n_heads"], head_dim=meta_head_dim(params),
        ffn_dim=params.get("hidden_dim") or meta_ffn_dim(params),
        vocab_size=len(tensors[EMBEDDING]) if vocab_size == -1 else vocab_size, max_seq_len=context,
        norm_eps=params["norm_eps"], rope_theta=params.get("rope_theta") or 10000.0, rope_scaling=scaling,
        sliding_window=params.get("sliding_window") or 0, tie_embeddings=has_tied_head,
    )
    return config, note


def infer_llama_version(params: dict, has_tied_head: bool) -> tuple[str, int, float]:
    """Returns (version, context, factor by which RoPE is stretched or 0): see the top of this file."""
    theta = params.get("rope_theta") or 10000
    if params.get("use_scaled_rope"):
        return ("Llama 3.2", LLAMA31_CONTEXT, 32.0) if has_tied_head else ("Llama 3.1", LLAMA31_CONTEXT, 8.0)
    if params.get("hidden_dim"):
        return "Mistral", 32768, 0
    if theta == LLAMA3_THETA:
        return "Llama 3", LLAMA31_TRAINED_CONTEXT, 0
    if theta != 10000:
        return "CodeLlama", 16384, 0
    is_65b = params["n_layers"] == 80 and not params.get("n_kv_heads")
    return ("Llama 1", 2048, 0) if params["norm_eps"] < 5e-6 or is_65b else ("Llama 2", 4096, 0)


def meta_ffn_dim(params: dict) -> int:
    """Two thirds of 4 dim, times ffn_dim_multiplier, rounded up to multiple_of."""
    ffn_dim, multiple_of = int(2 * 4 * params["dim"] / 3), params.get("multiple_of") or 256
    if params.get("ffn_dim_multiplier"):
        ffn_dim = int(params["ffn_dim_multiplier"] * ffn_dim)
    return math.ceil(ffn_dim / multiple_of) * multiple_of


# ---- tinyllamas -----------------------------------------------------------------------------------------------------


def read_tinyllamas(folder: Path) -> CanonicalCheckpoint:
    """Reads a model of karpathy/tinyllamas: one .pt of {"model_args", "model"}, with names and RoPE rows as in Meta's
    files."""
    files = sorted(folder.glob("*.pt"))
    if len(files) != 1:
        what = f"{folder} holds no config.json, nor exactly one .pt of tinyllamas"
        raise UsageError(what + hint_at_subfolder(folder))
    (file,) = files
    with convert_type_errors(f"{file} is not one of tinyllamas: it", RuntimeError):
        data = dict(load_torch_file(file, legacy=True))
        if not is_state_dict(data["model"]):
            raise UsageError(f"{file} is not a table of tensors")
        tensors = {}
        for name, tensor in data["model"].items():
            name = name.removeprefix("_orig_mod.")  # torch.compile adds this prefix
            tensors[to_canonical_name(name)] = tensor
        config = tinyllamas_config(data["model_args"], tensors)
    row_order = rope_row_order(config, interleaved=True)
    return CanonicalCheckpoint(config, tensors, read=lambda name: reorder_heads(name, tensors[name], row_order))


def tinyllamas_config(args: dict, tensors: SourceTensors) -> ModelConfig:
    return ModelConfig(
        dim=args["dim"], n_layers=args["n_layers"], n_heads=args["n_heads"],
        n_kv_heads=args.get("n_kv_heads") or args["n_heads"], head_dim=args["dim"] // args["n_heads"],
        ffn_dim=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
        vocab_size=args["vocab_size"], max_seq_len=args["max_seq_len"],
        tie_embeddings=torch.equal(tensors[HEAD], tensors[EMBEDDING]),
        bos_id=1, eos_ids=(1,),  # a story ends where the next would begin
    )
