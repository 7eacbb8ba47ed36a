"""The command line of generate.py: the options, the checks of their values, and the prompts. A --prompt_file has one
prompt a line:

    prompts.txt      a line is a text
    prompts.jsonl    a line is {"prompt": "..."} or, for a chat, {"messages": [{"role": "user", "content": "..."}]};
                     texts in JSON may contain line breaks
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch

from cli import common_args
from config import ModelConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, build_sequences, check_length, check_stop
from engine.speculate import MAX_SPECULATE_K
from kernels.schema import MAX_TRITON_QUERY_LEN, MAX_TRITON_TOKENS
from text.prompt import read_prompt
from text.tokenizer import Tokenizer
from utils.errors import UsageError, check_integer
from utils.files import ROOT, read_text

DEMO = ROOT / "checkpoints/SmolLM2-135M-Instruct/model.pth"
DEFAULT_PROMPT = "Hello, my name is"
DEFAULT_MAX_NEW_TOKENS = 200
# The defaults of --speculate_k. Prompt lookup proposes 7 tokens, because a lookup costs nothing. A step verifies these
# 7 and the last token together. 8 tokens take a GPU's tensor cores as long as one.
DEFAULT_SPECULATE_K = {"draft": 5, "lookup": 7}


def parse_args(doc: str) -> argparse.Namespace:
    """Returns the options of the command line, with three more fields:

        conversation       whether messages are read from standard input
        speculative        whether steps verify proposed tokens
        sampling_params    temperature, top_k and so on as a SamplingParams

    In a conversation without --max_new_tokens, only the context limits an answer: max_new_tokens is sys.maxsize. Raises
    UsageError for invalid values and for options that exclude each other. doc: the script's docstring, for --help."""
    args = build_parser(doc).parse_args()
    has_prompt = args.prompt is not None or args.prompt_file is not None
    if args.prompt is None:
        args.prompt = DEFAULT_PROMPT
    args.conversation = args.interactive or (args.chat and not has_prompt)
    if args.max_new_tokens is None:
        args.max_new_tokens = sys.maxsize if args.conversation else DEFAULT_MAX_NEW_TOKENS
    args.speculative = args.draft_checkpoint_path is not None or args.prompt_lookup is not None
    check_counts(args)
    check_prompt(args, has_prompt)
    check_speculation(args)
    check_parallel(args)
    check_environment(args)
    args.sampling_params = build_sampling_params(args)
    if args.logprobs is not None and args.parallel is None:
        args.parallel = 1  # only the scheduler reports log-probabilities
    if args.speculate_k is None:
        args.speculate_k = DEFAULT_SPECULATE_K["lookup" if args.prompt_lookup else "draft"]
    return args


def build_parser(doc: str) -> argparse.ArgumentParser:
    parser = common_args.build_parser(doc)
    common_args.add_checkpoint_path(parser, DEMO, f"{common_args.CHECKPOINT_HELP} (default: the demo's)")
    add_prompt_options(parser)
    add_length_options(parser)
    add_sampling_options(parser)
    add_speculation_options(parser)
    add = parser.add_argument
    description = "compile or, on a GPU, capture the decode step; a CPU whose kernels take the step captures it anyway"
    add("--compile", action="store_true", help=description)
    add("--compile_prefill", action="store_true", help="compile prefill too")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the last sample (of every rank)")
    common_args.add_device(parser)
    common_args.add_precision(parser)
    common_args.add_kernels(parser)
    common_args.add_threads(parser)
    add("--logprobs", type=int, metavar="N", help="in --json, each token's log-probability and the N likeliest tokens")
    add("--json", action="store_true", help="one JSON object for each prompt on stdout instead of text")
    return parser


def add_prompt_options(parser: argparse.ArgumentParser):
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help=f"text to continue (default: {DEFAULT_PROMPT!r})")
    description = "one prompt a line; in a .jsonl file a line is {\"prompt\": ...} or {\"messages\": [...]}"
    prompt.add_argument("--prompt_file", type=Path, help=description)
    prompt.add_argument("--prompt_tokens", type=int, metavar="N", help="N random tokens, for benchmarks")
    add = parser.add_argument
    add("--chat", action="store_true", help="--prompt as a chat message; without --prompt, a conversation")
    add("--interactive", action="store_true", help="a conversation: the same as --chat without --prompt")
    add("--system", help="system message of a chat")
    description = f"complete N prompts of --prompt_file at a time; a GPU's kernels take up to {MAX_TRITON_TOKENS}"
    add("--parallel", type=int, metavar="N", help=description)
    add("--num_samples", type=int, default=1, help="how often each prompt is continued (default: %(default)s)")
    add("--batch_size", type=int, default=1, help="independent samples at a time; the first streams (default: 1)")


def add_length_options(parser: argparse.ArgumentParser):
    add = parser.add_argument
    description = f"default: {DEFAULT_MAX_NEW_TOKENS}; in a conversation what is left of the context"
    add("--max_new_tokens", type=int, help=description)
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--ignore_eos", action="store_true", help="continue after an end token, for benchmarks")


def add_sampling_options(parser: argparse.ArgumentParser):
    """Adds --seed, and an option for each field of SamplingParams."""
    add = parser.add_argument
    description = (
        "default: %(default)s; in a file, the seed of each prompt is 1 larger than the last one. A seed draws other "
        "tokens on another device, and with --kernels off"
    )
    add("--seed", type=int, default=1234, help=description)
    for field in fields(SamplingParams):
        default = 0.8 if field.name == "temperature" else field.default
        description = field.metadata["help"] + ("" if default is None else " (default: %(default)s)")
        add(f"--{field.name}", type=field.metadata["type"], default=default, help=description)


def add_speculation_options(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--draft_checkpoint_path", type=Path, help="a smaller model of the same vocabulary, to speculate")
    add("--draft_tp", choices=["on", "off"], help="off: of several ranks, each has all of the draft (default: on)")
    lookup = "speculate without a draft: on what followed the last N tokens, or fewer, before (default: 3)"
    add("--prompt_lookup", type=int, nargs="?", const=3, metavar="N", help=lookup)
    k = "tokens to propose at a time, at most (default: {draft}, looked up: {lookup})".format(**DEFAULT_SPECULATE_K)
    k += f"; on a GPU, more than {MAX_TRITON_QUERY_LEN - 1} (fewer if more than 4 query heads share a key/value head) "
    k += "are verified without the kernels, several times slower"
    add("--speculate_k", type=int, metavar="K", help=k)


def check_counts(args: argparse.Namespace):
    for name in ("num_samples", "max_new_tokens", "batch_size", "prompt_tokens", "speculate_k", "parallel"):
        if (value := getattr(args, name)) is not None:
            check_integer(f"--{name}", value, 1)
    try:
        check_stop(args.stop)
    except UsageError:
        raise UsageError("--stop needs a text that is not empty") from None
    check_integer("--seed", args.seed, -(2**63), 2**64 - 1)


def check_prompt(args: argparse.Namespace, has_prompt: bool):
    is_chat = args.chat or args.interactive
    if (is_chat and args.prompt_tokens) or (args.interactive and has_prompt):
        raise UsageError("a conversation takes its messages from standard input: leave the prompt out")
    if args.system and not is_chat:
        raise UsageError("--system belongs to a chat: add --chat")
    if args.conversation and args.json:
        raise UsageError("--json needs --prompt: a conversation has no single result")
    if args.conversation and (args.batch_size > 1 or args.num_samples > 1 or args.ignore_eos or args.profile):
        raise UsageError("a conversation does without --batch_size, --num_samples, --ignore_eos and --profile")


def check_speculation(args: argparse.Namespace):
    if args.draft_checkpoint_path and args.prompt_lookup:
        raise UsageError("--draft_checkpoint_path and --prompt_lookup are two ways to speculate; choose one")
    if args.draft_tp and not args.draft_checkpoint_path:
        raise UsageError("--draft_tp belongs to --draft_checkpoint_path")
    if args.speculate_k and not args.speculative:
        raise UsageError("--speculate_k belongs to --draft_checkpoint_path or --prompt_lookup")
    if args.speculative and args.batch_size > 1:
        raise UsageError("speculation is for one sequence: leave out --batch_size")
    if args.prompt_lookup is not None and args.prompt_lookup < 2:
        raise UsageError(f"--prompt_lookup looks for at least 2 tokens, not {args.prompt_lookup}")
    for name in ("speculate_k", "prompt_lookup"):
        value = getattr(args, name)
        if value is not None and value > MAX_SPECULATE_K:
            raise UsageError(f"--{name} must be at most {MAX_SPECULATE_K}, not {value}")


def check_parallel(args: argparse.Namespace):
    if args.parallel is not None and args.prompt_file is None:
        raise UsageError("--parallel is for the prompts of a --prompt_file")
    if args.logprobs is not None and (args.logprobs < 0 or not args.json):
        raise UsageError("--logprobs takes 0 or more and needs --json, which shows them")
    if args.parallel is None and args.logprobs is None:
        return
    name = "--logprobs" if args.parallel is None else "--parallel"
    if args.speculative:
        raise UsageError(f"{name} does without speculation: leave out --draft_checkpoint_path and --prompt_lookup")
    if args.batch_size > 1 or args.num_samples > 1 or args.profile or args.compile_prefill:
        raise UsageError(f"{name} does without --batch_size, --num_samples, --profile and --compile_prefill")


def check_environment(args: argparse.Namespace):
    if args.profile:
        common_args.check_output_file(args.profile, "--profile ")
    if args.checkpoint_path == DEMO and not DEMO.is_file():
        raise UsageError("no --checkpoint_path given and no demo model here; run ./scripts/demo.sh, which gets one")


def build_sampling_params(args: argparse.Namespace) -> SamplingParams:
    try:
        return SamplingParams(**{field.name: getattr(args, field.name) for field in fields(SamplingParams)})
    except UsageError as e:
        raise UsageError(f"--{e}") from None  # the message begins with the name of field and option


# ---- Prompts ---------------------------------------------------------------------------------------------------------


def read_prompts(args: argparse.Namespace) -> list[str | list[dict]]:
    """Returns the prompts of --prompt or --prompt_file, each a text or a chat's messages. A conversation has none yet.
    Raises UsageError for a prompt that is empty or malformed, before the model is loaded."""
    if args.conversation:
        return []
    prompts = read_prompt_file(args.prompt_file) if args.prompt_file else [args.prompt]
    if not prompts or not all(prompts):
        raise UsageError(f"{args.prompt_file or 'the prompt'} is empty; give some text")
    return [with_chat_options(prompt, args) for prompt in prompts]


def to_sequences(
    prompts: list[str | list[dict]], args: argparse.Namespace, tokenizer: Tokenizer, config: ModelConfig
) -> list[Sequence]:
    """Returns a Sequence for each of prompts, or one Sequence of --prompt_tokens. Raises UsageError if a prompt cannot
    be continued, for example because it exceeds the context. With --parallel, the Sequence has an error instead, unless
    no prompt can be continued."""
    options = {"params": args.sampling_params, "stop": tuple(args.stop), "n_logprobs": args.logprobs}
    options["eos_ids"] = () if args.ignore_eos else config.eos_ids
    if args.prompt_tokens:
        check_length(args.prompt_tokens, args.max_new_tokens, config.max_seq_len)
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(config.vocab_size, (args.prompt_tokens,), generator=generator).tolist()
        options |= {"prompt": tokenizer.decode(ids), "tokenizer": tokenizer, "seed": args.seed}
        return [Sequence(ids, args.max_new_tokens, **options)]
    sequences = build_sequences(prompts, tokenizer, config, args.max_new_tokens, args.seed, **options)
    failed = [i for i, sequence in enumerate(sequences) if sequence.error]
    if failed and (args.parallel is None or len(failed) == len(sequences)):
        number = f"prompt {failed[0] + 1}: " if len(sequences) > 1 else ""
        raise UsageError(f"{number}{sequences[failed[0]].error}")
    return sequences


def with_chat_options(prompt: str | list[dict], args: argparse.Namespace) -> str | list[dict]:
    if isinstance(prompt, str) and args.chat:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str) and args.system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": args.system}, *prompt]
    return prompt


def read_prompt_file(path: Path) -> list[str | list[dict]]:
    """Reads a text, or the messages of a chat, from each line. Skips empty lines, and names them on stderr."""
    lines = read_text(path).split("\n")
    prompts = []
    while lines and not lines[-1].strip():  # a file usually ends with a line break: no message about that
        del lines[-1]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            print(f"{path}: line {number} is empty and is skipped", file=sys.stderr)
        elif path.suffix == ".jsonl":
            prompts.append(parse_json_line(line, f"{path}, line {number}"))
        else:
            prompts.append(line)
    return prompts


def parse_json_line(line: str, place: str) -> str | list[dict]:
    """Reads a prompt from a line of a .jsonl file. place: the file and the line's number, for the error."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{place} is not JSON: {e}") from None
    types = {"prompt": str, "messages": list}
    given = [name for name in types if isinstance(entry, dict) and name in entry]
    prompt = entry[given[0]] if len(given) == 1 else None
    if not prompt or not isinstance(prompt, types[given[0]]):
        raise UsageError(f'{place} needs {{"prompt": text}} or {{"messages": [{{"role": ..., "content": text}}]}}')
    try:
        return read_prompt(prompt)
    except UsageError as e:
        raise UsageError(f"{place}: {e}") from None
