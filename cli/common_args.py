"""Options that several scripts have. Name, default and help of an option are the same in every script."""

import argparse
import os
from pathlib import Path

from utils.errors import UsageError, check_integer

PRECISIONS = ["bfloat16", "float16", "float32"]  # the names of model.py: DTYPES
MAX_THREADS = 1024
CHECKPOINT_HELP = "model.pth, next to its tokenizer; or a model's folder or .gguf, which is converted once"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage of all options."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def build_parser(doc: str) -> argparse.ArgumentParser:
    """Returns a parser whose --help begins with doc, the script's docstring."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_checkpoint_path(
    parser: argparse.ArgumentParser, default: Path | None = None, help: str = CHECKPOINT_HELP
):
    parser.add_argument("--checkpoint_path", type=Path, default=default, required=default is None, help=help)


def add_device(parser: argparse.ArgumentParser):
    parser.add_argument("--device", help="cpu, cuda, mps, xpu ... (default: the machine's accelerator, else cpu)")


def add_precision(parser: argparse.ArgumentParser):
    parser.add_argument("--precision", choices=PRECISIONS, default="bfloat16", help="default: %(default)s")


def add_kernels(parser: argparse.ArgumentParser):
    description = "off: PyTorch's plain operations everywhere"
    parser.add_argument("--kernels", choices=["auto", "off"], default="auto", help=description)


def add_threads(parser: argparse.ArgumentParser):
    description = "of a CPU (default: OMP_NUM_THREADS, else one for each core that the process may use)"
    parser.add_argument("--threads", type=int, metavar="N", help=description)


def device_and_dtype(args: argparse.Namespace):
    import torch  # here, because scripts/download.py need not wait for this import

    from utils.machine import pick_device

    return pick_device(args.device), getattr(torch, args.precision)


def build_load_options(args: argparse.Namespace) -> dict:
    """Returns arguments of loading.load, from --device, --precision and, in scripts that have it, --kernels."""
    device, dtype = device_and_dtype(args)
    return {"device": device, "dtype": dtype, "use_kernels": getattr(args, "kernels", "auto") == "auto"}


def set_threads(n: int | None):
    """Applies --threads to this process and to the processes that it starts."""
    if n is None:
        return
    check_integer("--threads", n, 1, MAX_THREADS)
    import torch  # here, because scripts/download.py need not wait for this import

    os.environ["OMP_NUM_THREADS"] = str(n)
    torch.set_num_threads(n)


def check_output_file(path: Path, what: str = ""):
    """Raises UsageError if path cannot be a file that a script writes. what: goes before the path in the message."""
    if not path.absolute().parent.is_dir() or (path.exists() and not path.is_file()):
        raise UsageError(f"{what}{path} must be a file in a folder that exists")
