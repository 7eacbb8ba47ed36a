"""A GGUF file to model.pth and its tokenizer.

    python scripts/convert_gguf.py model.Q4_1.gguf --checkpoint_dir checkpoints/model
    python scripts/convert_gguf.py model-00001-of-00003.gguf --checkpoint_dir checkpoints/model    # and the other parts

Reads the architectures llama (Mixtral, too), qwen2, qwen3, qwen3moe, gemma, gemma2, gemma3, phi3, olmo2 (Olmo 3, too),
smollm3, granite, glm4 and gpt-oss, in F32, F16, BF16 and every quantized type that the gguf package dequantizes. The
vocabulary becomes tokenizer.json (byte-level BPE) or tokenizer.model (sentencepiece); bos, eos and chat template go to
tokenizer_config.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import cli

    cli.start()

import torch

import cli

try:
    from converters.gguf_tensors import convert_gguf
except ImportError as e:
    cli.exit_with(f"this script needs `pip install gguf protobuf` ({e})")


def main():
    parser = cli.make_parser(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth and the tokenizer go there")
    help = "of the stored weights (default: %(default)s)"
    parser.add_argument("--dtype", choices=cli.PRECISIONS, default="bfloat16", help=help)
    args = parser.parse_args()
    convert_gguf(args.file, args.checkpoint_dir, getattr(torch, args.dtype))
    print(f"wrote {args.checkpoint_dir / 'model.pth'}")


if __name__ == "__main__":
    cli.run(main)
