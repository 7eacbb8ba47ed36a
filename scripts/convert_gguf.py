"""Converts a GGUF file to model.pth and a tokenizer.

    python scripts/convert_gguf.py model.Q4_1.gguf --checkpoint_dir checkpoints/model
    python scripts/convert_gguf.py model-00001-of-00003.gguf --checkpoint_dir checkpoints/model    # and the other parts
    python scripts/convert_gguf.py model.Q4_1.gguf --checkpoint_dir checkpoints/model --keep       # stays quantized

Tensors may be F32, F16, BF16 or any quantized type that the gguf package can dequantize. The vocabulary becomes
tokenizer.json (byte-level BPE) or tokenizer.model (sentencepiece). The bos and eos tokens and the chat template go to
tokenizer_config.json.

With --keep, quantized weights stay quantized, and none is rounded again unless the result would be larger than 1.1
times the GGUF. Its name tells the format of most weights: model_int4.g32.pth. The command prints how each type was
converted. --keep takes Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K and MXFP4.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

import torch

from cli import common_args
from cli.script import exit_with_error, run_script

try:
    from converters.convert_gguf import convert_gguf
    from converters.gguf_config import ARCHITECTURES
except ImportError as e:
    exit_with_error(f"this script needs `pip install gguf protobuf` ({e})")


def main():
    parser = common_args.build_parser(__doc__)
    architectures = ", ".join(ARCHITECTURES)
    description = f"a .gguf of one of the architectures {architectures}; Mixtral is a llama, and Olmo 3 an olmo2"
    parser.add_argument("file", type=Path, help=description)
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="model.pth and the tokenizer go there")
    description = "of the stored weights (default: %(default)s)"
    parser.add_argument("--dtype", choices=common_args.PRECISIONS, default="bfloat16", help=description)
    description = "leave quantized weights quantized, and name the file as most of them are stored: model_int4.g32.pth"
    parser.add_argument("--keep", action="store_true", help=description)
    args = parser.parse_args()
    path = convert_gguf(args.file, args.checkpoint_dir, getattr(torch, args.dtype), args.keep)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
