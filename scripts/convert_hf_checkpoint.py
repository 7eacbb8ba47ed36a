"""Hugging Face checkpoint folder, or karpathy's tinyllamas, to model.pth.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

The folder holds config.json and safetensors or pytorch_model.bin, in one file or many; or one .pt of tinyllamas.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is being loaded; run() sees to the rest
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_pickle, read_json, run, save_checkpoint
from model import ModelConfig, Transformer, UsageError

# For each of our modules the ones it is made of, concatenated along the rows; {i} is the layer, {e} every expert.
TABLE = {
    "tok_embeddings": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "output": ["lm_head"],
    "layers.{i}.attention_norm": ["model.layers.{i}.input_layernorm"],
    "layers.{i}.attention.wqkv": [f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"],
    "layers.{i}.attention.wo": ["model.layers.{i}.self_attn.o_proj"],
    "layers.{i}.attention.q_norm": ["model.layers.{i}.self_attn.q_norm"],
    "layers.{i}.attention.k_norm": ["model.layers.{i}.self_attn.k_norm"],
    "layers.{i}.ffn_norm": ["model.layers.{i}.post_attention_layernorm"],
    "layers.{i}.feed_forward.w13": [f"model.layers.{{i}}.mlp.{x}_proj" for x in ("gate", "up")],
    "layers.{i}.feed_forward.w2": ["model.layers.{i}.mlp.down_proj"],
    "layers.{i}.feed_forward.gate": ["model.layers.{i}.mlp.gate"],
    "layers.{i}.feed_forward.experts.w13": [f"model.layers.{{i}}.mlp.experts.{{e}}.{x}_proj" for x in ("gate", "up")],
    "layers.{i}.feed_forward.experts.w2": ["model.layers.{i}.mlp.experts.{e}.down_proj"],
}
MIXTRAL = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
META = {
    "tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
UNUSED = re.compile(r"(inv_freq|freqs_cos|freqs_sin)$")

Tensors = dict[str, torch.Tensor]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        convert(folder / "model.pth", *read_tinyllamas(folder))


def convert(path: Path, config: ModelConfig, tensors: Tensors, read: Callable[[str], torch.Tensor] | None = None):
    """Writes model.pth from tensors named as Hugging Face does. With read, they are only looked at for shape and dtype,
    and read(name) gives the data. One of ours is made at a time. Raises UsageError naming a tensor that is missing,
    left over, of the wrong shape or of a foreign dtype."""
    read, tied = read or tensors.__getitem__, ("lm_head.weight", "model.embed_tokens.weight")
    if config.tie_embeddings and all(name in tensors for name in tied) and not torch.equal(*map(read, tied)):
        config = replace(config, tie_embeddings=False)  # whatever config.json says: transformers takes what is there
    try:
        with torch.device("meta"):
            one_layer = Transformer(replace(config, n_layers=1)).state_dict()
    except RuntimeError as e:
        raise UsageError(f"no model has the sizes of this config: {str(e).splitlines()[0]}") from None
    parts, shapes = {}, {}  # of each of ours: the names it is made of; its shape and dtype
    for i in range(config.n_layers):
        for name, like in one_layer.items():
            if (i and not name.startswith("layers.")) or (name == "output.weight" and config.tie_embeddings):
                continue
            name, names, dtype = name.replace("layers.0.", f"layers.{i}."), [], None
            for part, shape in parts_of(name, like, config):
                if part not in tensors:
                    raise UsageError(f"the checkpoint has no tensor {part}")
                found = tensors[part]
                if list(found.shape) != shape:
                    raise UsageError(f"tensor {part} is {list(found.shape)}; the config makes it {shape}")
                if found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise UsageError(f"tensor {part} is {found.dtype}, not float32, float16 or bfloat16")
                dtype = torch.promote_types(dtype or found.dtype, found.dtype)  # that loses nothing
                names.append(part)
            parts[name], shapes[name] = names, (like.shape, dtype)
    left = {name for name in tensors if not UNUSED.search(name)}.difference(*parts.values())
    if config.tie_embeddings:
        left.discard("lm_head.weight")
    if left:
        raise UsageError(f"the checkpoint's tensor {min(left)} has no place in this model ({len(left)} left over)")

    def joined() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (shape, dtype) in shapes.items():
            out = torch.empty(shape, dtype=dtype)
            pieces = as_rows(out).split([tensors[part].shape[0] for part in parts[name]])
            for piece, part in zip(pieces, parts[name], strict=True):
                piece.copy_(read(part).detach())
            yield name, out

    save_checkpoint(path, config, shapes, joined())


def parts_of(name: str, ours: torch.Tensor, config: ModelConfig) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of each of Hugging Face's tensors that ours is made of, in the order of its rows."""
    stem, kind = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name).groups()
    layer = re.search(r"\d+", stem)
    sources = TABLE[re.sub(r"\d+", "{i}", stem, count=1)]
    n_experts = config.moe.n_experts if ".experts." in name else 1
    total, *columns = as_rows(ours).shape
    rows = [total // n_experts // len(sources)] * len(sources)
    if ".wqkv" in name:
        rows = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
    for e in range(n_experts):
        for source, n in zip(sources, rows, strict=True):
            yield source.format(i=layer and layer[0], e=e) + (kind or ".weight"), [n, *columns]


def as_rows(t: torch.Tensor) -> torch.Tensor:
    """[..., rows, columns] as [rows, columns]; a vector as it is."""
    return t.flatten(0, max(t.dim() - 2, 0))


def read_folder(folder: Path) -> Tensors:
    """The tensors of a folder by their current names, memory-mapped: none is read yet."""
    for stem, load in (("model.safetensors", load_safetensors), ("pytorch_model.bin", load_bin)):
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            files = [stem]
        elif index.is_file():
            content = read_json(index)
            table = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
                raise UsageError(f"{index} has no weight_map of file names")
            files = sorted(set(table.values()))
            if bad := [name for name in files if Path(name).name != name]:
                raise UsageError(f"{index} names {bad[0]!r}, which is not a file of the folder itself")
        else:
            continue
        tensors = {}
        for file in files:
            for name, tensor in load(folder / file).items():
                tensors[rename(name, MIXTRAL) if ".block_sparse_moe." in name else name] = tensor
        return split_experts(tensors)
    raise UsageError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor their index.json)")


def load_safetensors(file: Path) -> Tensors:
    if not file.is_file():
        raise UsageError(f"{file} does not exist")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is truncated or not safetensors: {e}") from None


def load_bin(file: Path) -> Tensors:
    return check_tensors(file, load_pickle(file, legacy=True))


def check_tensors(file: Path, table) -> Tensors:
    if not isinstance(table, dict) or not all(isinstance(t, torch.Tensor) for t in table.values()):
        raise UsageError(f"{file} is not a table of tensors")
    return {str(name): t for name, t in table.items()}


def split_experts(tensors: Tensors) -> Tensors:
    """Fused experts, gate_up_proj [E, 2F, D] and down_proj [E, D, F], as views of one each."""
    for name in [name for name, t in tensors.items() if re.search(r"\.experts\.\w+_proj$", name) and t.dim() == 3]:
        stem, proj = name.rsplit(".", 1)
        for e, t in enumerate(tensors.pop(name)):
            new = {"gate_proj": t.tensor_split(2)[0], "up_proj": t.tensor_split(2)[1]} if "_up" in proj else {proj: t}
            tensors |= {f"{stem}.{e}.{part}.weight": x for part, x in new.items()}
    return tensors


def read_tinyllamas(folder: Path) -> tuple[ModelConfig, Tensors, Callable[[str], torch.Tensor]]:
    """karpathy/tinyllamas: one .pt of {"model_args", "model"}, Meta's names and Meta's order of RoPE's rows."""
    files = sorted(folder.glob("*.pt"))
    if len(files) != 1:
        raise UsageError(f"{folder} holds no config.json, nor exactly one .pt of tinyllamas")
    try:
        data = dict(load_pickle(files[0], legacy=True))
        args, tensors = data["model_args"], {}
        for name, t in check_tensors(files[0], data["model"]).items():
            name = name.removeprefix("_orig_mod.")
            tensors["lm_head.weight" if name == "output.weight" else "model." + rename(name, META)] = t
        config = ModelConfig(
            dim=args["dim"],
            n_layers=args["n_layers"],
            n_heads=args["n_heads"],
            n_kv_heads=args.get("n_kv_heads") or args["n_heads"],
            head_dim=args["dim"] // args["n_heads"],
            ffn_dim=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
            vocab_size=args["vocab_size"],
            max_seq_len=args["max_seq_len"],
            tie_embeddings=torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]),
            bos_id=1,
            eos_ids=(1,),  # a story ends where the next would begin
        )
    except (LookupError, TypeError, ArithmeticError, RuntimeError) as e:
        raise UsageError(f"{files[0]} is not one of tinyllamas: {type(e).__name__} {e}") from None
    in_meta_order = re.compile(r"[qk]_proj\.weight$")
    return config, tensors, lambda n: unpermute(tensors[n], config.head_dim) if in_meta_order.search(n) else tensors[n]


def rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def unpermute(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of Q or K from Meta's RoPE order (pairs side by side) to Hugging Face's (pairs half a head apart)."""
    return weight.view(-1, head_dim // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    run(main)
