"""A Hugging Face checkpoint's folder, or karpathy's tinyllamas, to model.pth.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B

The folder holds config.json and safetensors or pytorch_model.bin, in one file or many; or one .pt of tinyllamas.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import is_table, load_pickle, read_json
from config import ModelConfig, UsageError
from converters.families import config_from_hf, find_family
from converters.hf_tensors import META_FFN_TO_HF, adapt, rename_tensor, reorder_heads, rope_order
from converters.model_tensors import EMBEDDING, HEAD, HFTensors, TensorReader, convert


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


# ---- Hugging Face's folders -----------------------------------------------------------------------------------------


def read_folder(folder: Path) -> HFTensors:
    """All tensors of a folder, memory-mapped: none is read yet."""
    load, files = load_safetensors, list_files(folder, "model.safetensors")
    if files is None:
        load, files = load_bin, list_files(folder, "pytorch_model.bin")
    if files is None:
        raise UsageError(f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor their index.json)")
    tensors = {}
    for file in files:
        tensors.update(load(folder / file))
    return tensors


def list_files(folder: Path, whole: str) -> list[str] | None:
    """The names of a checkpoint's files: whole, if it is one file, or those that its index names. None: neither is
    there."""
    if (folder / whole).is_file():
        return [whole]
    index = folder / f"{whole}.index.json"
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


def load_safetensors(file: Path) -> HFTensors:
    if not file.is_file():
        raise UsageError(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UsageError(f"{file} is truncated or not safetensors: {e}") from None
    except ValueError as e:
        if "UntypedStorage" in str(e):  # about every second Ctrl-C in load_file; PyTorch hides the KeyboardInterrupt
            raise KeyboardInterrupt from None
        raise


def load_bin(file: Path) -> HFTensors:
    tensors = load_pickle(file, legacy=True)
    if not is_table(tensors):
        raise UsageError(f"{file} is not a table of tensors")
    return tensors


# ---- tinyllamas -----------------------------------------------------------------------------------------------------

META_TO_HF = META_FFN_TO_HF | {  # parts of Meta's names -> Hugging Face's
    "tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    ".wq.": ".q_proj.", ".wk.": ".k_proj.", ".wv.": ".v_proj.", ".wo.": ".o_proj.",
    ".attention.": ".self_attn.", ".feed_forward.": ".mlp.",
}  # fmt: skip


def read_tinyllamas(folder: Path) -> tuple[ModelConfig, HFTensors, TensorReader]:
    """karpathy/tinyllamas: one .pt of {"model_args", "model"}, with Meta's names and Meta's order of RoPE's rows, which
    reading changes to Hugging Face's."""
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
            tensors[HEAD if name == "output.weight" else "model." + rename_tensor(name, META_TO_HF)] = tensor
        config = tinyllamas_config(data["model_args"], tensors)
    except UsageError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as e:
        raise UsageError(f"{file} is not one of tinyllamas: {type(e).__name__} {e}") from None

    order = rope_order(config, interleaved=True)
    return config, tensors, lambda name: reorder_heads(name, tensors[name], order)


def tinyllamas_config(args: dict, tensors: HFTensors) -> ModelConfig:
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
