"""Hugging Face checkpoint folder, or karpathy's tinyllamas, to model.pth.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

The folder holds config.json and safetensors or pytorch_model.bin, in one file or many; or one .pt of tinyllamas.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoint import load_pickle, read_json, run, save_checkpoint
from model import ModelConfig, Transformer, UsageError

# One line for each of our tensors: the names it is made of (concatenated along the rows; {e} once for each expert).
TABLE = {
    "tok_embeddings.weight": ["model.embed_tokens.weight"],
    "norm.weight": ["model.norm.weight"],
    "output.weight": ["lm_head.weight"],
    "layers.{i}.attention_norm.weight": ["model.layers.{i}.input_layernorm.weight"],
    "layers.{i}.attention.wqkv.{p}": [f"model.layers.{{i}}.self_attn.{x}_proj.{{p}}" for x in "qkv"],
    "layers.{i}.attention.wo.{p}": ["model.layers.{i}.self_attn.o_proj.{p}"],
    "layers.{i}.attention.q_norm.weight": ["model.layers.{i}.self_attn.q_norm.weight"],
    "layers.{i}.attention.k_norm.weight": ["model.layers.{i}.self_attn.k_norm.weight"],
    "layers.{i}.ffn_norm.weight": ["model.layers.{i}.post_attention_layernorm.weight"],
    "layers.{i}.feed_forward.w13.{p}": [f"model.layers.{{i}}.mlp.{x}_proj.{{p}}" for x in ("gate", "up")],
    "layers.{i}.feed_forward.w2.{p}": ["model.layers.{i}.mlp.down_proj.{p}"],
    "layers.{i}.feed_forward.gate.weight": ["model.layers.{i}.mlp.gate.weight"],
    "layers.{i}.feed_forward.experts.w13": [
        f"model.layers.{{i}}.mlp.experts.{{e}}.{x}_proj.weight" for x in ("gate", "up")
    ],
    "layers.{i}.feed_forward.experts.w2": ["model.layers.{i}.mlp.experts.{e}.down_proj.weight"],
}
MIXTRAL = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
TINYLLAMAS = {  # Meta's names; order matters
    "_orig_mod.": "", "tok_embeddings.": "model.embed_tokens.", "output.": "lm_head.", "layers.": "model.layers.",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention.w": "self_attn.w",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
    ".wq.": ".q_proj.", ".wk.": ".k_proj.", ".wv.": ".v_proj.", ".wo.": ".o_proj.",
}  # fmt: skip
UNUSED = re.compile(r"rotary_emb\.inv_freq$|^freqs_(cos|sin)$|^rope\.freqs$")

Source = tuple[torch.Size, torch.dtype, Callable[[], torch.Tensor]]  # of one tensor; the last reads it


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth goes there too")
    folder = parser.parse_args().checkpoint_dir
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    if (folder / "config.json").is_file():
        generation = read_json(folder / "generation_config.json", {})
        config = ModelConfig.from_hf(read_json(folder / "config.json"), generation)
        sources = read_sources(folder)
    else:
        config, sources = read_tinyllamas(folder)
    convert(folder / "model.pth", config, sources)
    print(f"wrote {folder / 'model.pth'}")


def convert(path: Path, config: ModelConfig, sources: dict[str, Source]):
    """Writes model.pth from tensors named as Hugging Face does. Raises UsageError naming a missing, left-over or
    misshapen one."""
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in Transformer(config).state_dict().items()}
    left = {name for name in sources if not UNUSED.search(name)}
    if config.tie_embeddings:
        left.discard("lm_head.weight")
    groups, shapes = {}, {}
    for name, shape in wanted.items():
        if name == "output.weight" and config.tie_embeddings:
            continue
        i = re.search(r"\d+", name)
        pattern = re.sub(r"\d+", "{i}", name, count=1)
        if pattern not in TABLE:
            pattern = re.sub(r"(weight|bias)$", "{p}", pattern)
        experts = range(config.moe.n_experts if config.moe and "experts" in name else 1)
        p = name.rsplit(".")[-1]
        parts = [x.format(i=i and i[0], p=p, e=e) for e in experts for x in TABLE[pattern]]
        for part in parts:
            if part not in sources:
                raise UsageError(f"the checkpoint has no tensor {part}")
        columns = {tuple(sources[part][0][1:]) for part in parts}
        rows = sum(sources[part][0][0] if sources[part][0] else 0 for part in parts)
        if rows != shape.numel() // max(1, shape[1:].numel() if len(shape) < 3 else shape[-1]) or len(columns) != 1 or (
            columns != {tuple(shape[-1:]) if len(shape) > 1 else ()}
        ):
            found = [list(sources[part][0]) for part in parts[:3]]
            raise UsageError(f"{parts[0]} ... have shapes {found}, which do not make {name} {list(shape)}")
        left -= set(parts)
        groups[name], shapes[name] = parts, (tuple(shape), sources[parts[0]][1])
    if left:
        raise UsageError(f"the checkpoint's tensor {min(left)} has no place in this model ({len(left)} left over)")

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parts in groups.items():
            shape, dtype = shapes[name]
            out = torch.empty(shape, dtype=dtype)
            flat, row = out.view(-1, *shape[2:]) if len(shape) == 3 else out, 0
            for part in parts:
                tensor = sources[part][2]()
                flat[row : row + tensor.shape[0]] = tensor
                row += tensor.shape[0]
            yield name, out

    save_checkpoint(path, config, shapes, tensors())


def read_sources(folder: Path) -> dict[str, Source]:
    """The tensors of a folder, none of them read yet."""
    for stem, read in (("model.safetensors", from_safetensors), ("pytorch_model.bin", from_pickle)):
        files = [folder / stem] if (folder / stem).is_file() else []
        if (folder / f"{stem}.index.json").is_file():
            index = read_json(folder / f"{stem}.index.json")
            table = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(table, dict) or not all(isinstance(x, str) for x in table.values()):
                raise UsageError(f"{folder / stem}.index.json has no weight_map of file names")
            names = sorted(set(table.values()))
            if bad := [name for name in names if Path(name).name != name]:
                raise UsageError(f"{stem}.index.json names {bad[0]!r}, which is not a file of the folder itself")
            files = [folder / name for name in names]
        if files:
            sources = {}
            for file in files:
                sources |= read(file)
            return {rename(name, MIXTRAL) if ".block_sparse_moe." in name else name: s for name, s in sources.items()}
    raise UsageError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor their index.json)")


def from_safetensors(file: Path) -> dict[str, Source]:
    if not file.is_file():
        raise UsageError(f"{file} does not exist")
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

    def reader(name):
        def read():  # opened for each tensor, so that the pages of the others leave memory
            with safe_open(file, "pt") as f:
                return f.get_tensor(name)

        return read

    try:
        with safe_open(file, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            for name, s in slices.items():
                if s.get_dtype() not in dtypes:
                    raise UsageError(f"{file}: {name} is {s.get_dtype()}; only F32, F16 and BF16 are supported")
            return {n: (torch.Size(s.get_shape()), dtypes[s.get_dtype()], reader(n)) for n, s in slices.items()}
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is truncated or not safetensors: {e}") from None


def from_pickle(file: Path) -> dict[str, Source]:
    tensors = load_pickle(file)
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UsageError(f"{file} is not a table of tensors")
    return {name: (t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()}


def read_tinyllamas(folder: Path) -> tuple[ModelConfig, dict[str, Source]]:
    """karpathy/tinyllamas: one .pt of {"model_args", "model"}, Meta's names and Meta's order of RoPE's rows."""
    files = sorted(folder.glob("*.pt"))
    if len(files) != 1:
        raise UsageError(f"{folder} holds no config.json, nor exactly one .pt of tinyllamas")
    data = load_pickle(files[0])
    if not isinstance(data, dict) or not {"model_args", "model"} <= set(data):
        raise UsageError(f"{files[0]} has no model_args and model, so it is not one of tinyllamas")
    args, tensors = data["model_args"], {rename(name, TINYLLAMAS): t for name, t in data["model"].items()}
    try:
        n_heads = args["n_heads"]
        config = ModelConfig(
            dim=args["dim"],
            n_layers=args["n_layers"],
            n_heads=n_heads,
            n_kv_heads=args.get("n_kv_heads") or n_heads,
            head_dim=args["dim"] // n_heads,
            ffn_dim=tensors["model.layers.0.mlp.gate_proj.weight"].shape[0],
            vocab_size=args["vocab_size"],
            max_seq_len=args["max_seq_len"],
            tie_embeddings="lm_head.weight" not in tensors
            or torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]),
            bos_id=1,
            eos_ids=(1, 2),  # a story ends where the next would begin
        )
    except (KeyError, TypeError, ZeroDivisionError) as e:
        raise UsageError(f"{files[0]}: {e} is missing from model_args or the tensors") from None
    for name, t in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = unpermute(t, config.head_dim)
    return config, {name: (t.shape, t.dtype, lambda t=t: t) for name, t in tensors.items()}


def rename(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def unpermute(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of Q or K from Meta's RoPE order (pairs side by side) to Hugging Face's (pairs half a head apart)."""
    return weight.view(-1, head_dim // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    run(main)
