"""Measures a model's quality: tasks of the lm-evaluation-harness, or the perplexity of a text.

    python eval.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth --tasks hellaswag --limit 100
    python eval.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model_int8.pth --text_file book.txt

Tasks need `pip install lm_eval`, version 0.4. The perplexity is per token. The text is cut into windows that do not
overlap, and each window is scored by itself. Every window begins with the bos token, if the tokenizer has one.
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from cli.interrupts import exit_on_interrupt

    exit_on_interrupt()

from cli import common_args
from cli.ranks import process_group
from cli.script import run_script
from converters.checkpoint_path import ensure_converted
from evaluation.lm_harness import evaluate, harness_model, task_manager
from evaluation.scoring import perplexity
from loading import load
from utils.errors import UsageError, check_integer
from utils.files import read_text

OOM_HINT = "take a quantized checkpoint, a smaller --batch_size or --max_seq_length"
TEXT_WINDOW = 1024  # tokens of a text's window, unless the model's context is shorter


def parse_args() -> argparse.Namespace:
    parser = common_args.build_parser(__doc__)
    add = parser.add_argument
    common_args.add_checkpoint_path(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="lm_eval's tasks or groups by name, or their files")
    what.add_argument("--text_file", type=Path, help="measure the perplexity of this text")
    add("--limit", type=int, help="examples of each task (default: all)")
    add("--include_path", type=Path, help="folder of further task files")
    add("--apply_chat_template", action="store_true", help="ask as a user would, in the checkpoint's chat template")
    description = "tokens of a window (default: 1024 for a text, the model's context for tasks)"
    add("--max_seq_length", dest="max_seq_len", metavar="MAX_SEQ_LENGTH", type=int, help=description)
    add("--batch_size", type=int, default=1, help="sequences scored at a time (default: %(default)s)")
    add("--compile", action="store_true", help="compile the model")
    common_args.add_device(parser)
    common_args.add_precision(parser)
    common_args.add_kernels(parser)
    common_args.add_threads(parser)
    add("--json", action="store_true", help="the results as one line of JSON")
    args = parser.parse_args()
    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) is not None:
            check_integer(f"--{name}", value, 1)
    if args.text_file and (args.limit or args.include_path or args.apply_chat_template):
        raise UsageError("--limit, --include_path and --apply_chat_template belong to --tasks")
    return args


def main():
    args = parse_args()
    common_args.set_threads(args.threads)
    # Check everything else first: loading the model takes long.
    text = read_text(args.text_file) if args.text_file else None
    manager = task_manager(args.tasks, args.include_path) if args.tasks else None
    load_options = common_args.build_load_options(args)
    model, tokenizer = load(ensure_converted(args.checkpoint_path), **load_options)
    length = context = model.config.max_seq_len
    if args.max_seq_len is not None:
        length = args.max_seq_len
    elif text is not None:
        length = min(TEXT_WINDOW, context)
    if not 2 <= length <= context:
        raise UsageError(f"--max_seq_length must be 2 to {context}, the model's context, not {length}")
    if text is not None:
        results = perplexity(model, tokenizer, text, length, args.batch_size, args.compile)
        table = "\n".join(f"{name:15}{value:.6g}" for name, value in results.items())
    else:
        lm = harness_model(model, tokenizer, length, args.batch_size, args.compile)
        results, table = evaluate(lm, args.tasks, manager, args.limit, args.apply_chat_template)
    print(json.dumps(results) if args.json else table)


if __name__ == "__main__":
    with process_group():
        run_script(main, OOM_HINT)
