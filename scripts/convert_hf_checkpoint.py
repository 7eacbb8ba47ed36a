"""Converts a folder in Hugging Face's or Meta's format to model.pth.

    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B
    python scripts/convert_hf_checkpoint.py --checkpoint_dir checkpoints/meta-llama/Llama-3.2-1B --lora my-adapter

The folder holds one of these:

- Hugging Face's config.json and safetensors or pytorch_model.bin, in one file or many
- Meta's params.json and consolidated.00.pth, consolidated.01.pth ...; Llama 3's tokenizer.model becomes tokenizer.json
- one .pt of karpathy's tinyllamas

A quantized checkpoint from Hugging Face (GPTQ, AWQ, compressed-tensors, FP8, MXFP4) keeps its values, and the name of
the result tells their format, as in model_int4.g128.pth (docs/quantized_checkpoints.md).

--lora merges a LoRA adapter of PEFT into a model in Hugging Face's format. The result is my-adapter/model.pth. If the
adapter has no tokenizer, the base model's is copied. The base model's own model.pth does not change.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

from cli import common_args
from cli.script import run_script
from converters.convert_folder import convert_folder


def main():
    parser = common_args.build_parser(__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth goes there too")
    description = "merge the LoRA adapter in this folder (adapter_config.json), and write model.pth there"
    parser.add_argument("--lora", type=Path, metavar="FOLDER", help=description)
    args = parser.parse_args()
    print(f"wrote {convert_folder(args.checkpoint_dir, args.lora)}")


if __name__ == "__main__":
    run_script(main)
