"""A Hugging Face checkpoint's folder, or karpathy's tinyllamas, to model.pth.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B
    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B --lora my-adapter

The folder holds config.json and safetensors or pytorch_model.bin, in one file or many; or one .pt of tinyllamas. --lora
merges a LoRA adapter of PEFT into it. The result is my-adapter/model.pth, with the base's tokenizer beside it unless
the adapter has its own. The base's model.pth stays as it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import torch

from checkpoint import is_table, load_pickle, read_json
from config import ModelConfig, UsageError
from converters.families import config_from_hf, find_family
from converters.hf_files import read_folder
from converters.hf_tensors import META_FFN_TO_HF, adapt, rename_tensor, reorder_heads, rope_order
from converters.lora import ADAPTER_CONFIG, read_adapter
from converters.model_tensors import EMBEDDING, HEAD, HFTensors, TensorReader, convert, write_folder
from tokenizer import TOKENIZER_FILES, TOKENIZERS


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth goes there too")
    help = "merge the LoRA adapter in this folder (adapter_config.json), and write model.pth there"
    parser.add_argument("--lora", type=Path, metavar="FOLDER", help=help)
    args = parser.parse_args()
    print(f"wrote {convert_folder(args.checkpoint_dir, args.lora)}")


def convert_folder(folder: Path, lora: Path | None = None) -> Path:
    """Writes model.pth of a checkpoint's folder into it or, with an adapter in the folder lora, of both into that.
    Returns its path."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    if lora is not None:
        return merge_folders(folder, lora)
    path = folder / "model.pth"
    if (folder / "config.json").is_file():
        config, hf = read_configs(folder)
        tensors = read_folder(folder)
        read = adapt(tensors, config, find_family(hf))
    elif (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "its base model"
        what = f"{folder} holds an adapter, not a model"
        raise UsageError(f"{what}: give the folder of {base} as --checkpoint_dir, and this one as --lora")
    else:
        config, tensors, read = read_tinyllamas(folder)
    convert(path, config, tensors, read)
    return path


def read_configs(folder: Path) -> tuple[ModelConfig, dict]:
    """The model's config, and config.json, from which it is."""
    generation = read_json(folder / "generation_config.json", {})
    hf = read_json(folder / "config.json")
    return config_from_hf(hf, generation), hf


def merge_folders(folder: Path, lora: Path) -> Path:
    """Writes model.pth of the model in folder and the adapter in lora, into lora."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: --lora needs a model in Hugging Face's format")
    if lora.resolve() == folder.resolve():
        raise UsageError("put the adapter into a folder of its own: model.pth goes there, and the base has one, too")
    adapter = read_adapter(lora)
    check_not_quantized(folder)
    config, hf = read_configs(folder)
    tensors = read_folder(folder)
    read = adapt(tensors, config, find_family(hf), adapter)
    files = {}
    if not any((lora / name).is_file() for name in TOKENIZERS):
        of_base = [name for name in TOKENIZER_FILES if (folder / name).is_file() and not (lora / name).exists()]
        files = {name: (folder / name).read_bytes() for name in of_base}
    write_folder(lora, config, tensors, read, files)
    return lora / "model.pth"


def check_not_quantized(folder: Path):
    """Raises UsageError for a base of quantized weights; not for gpt-oss, whose attention is not."""
    hf = read_json(folder / "config.json")
    quantization = hf.get("quantization_config") if isinstance(hf, dict) else None
    if quantization and not (isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"):
        what = f"{folder} is quantized (config.json: quantization_config), and an adapter cannot be merged into that"
        raise UsageError(f"{what}: give the model that it was made from")


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
