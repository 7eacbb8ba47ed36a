"""The prompts of generate.py's command line, as requests. A --prompt_file has one prompt a line:

    prompts.txt      a line is a text
    prompts.jsonl    a line is {"prompt": "..."} or, for a chat, {"messages": [{"role": "user", "content": "..."}]};
                     texts in JSON may contain line breaks
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from config import ModelConfig
from engine.request import Request, build_request
from text.chat_template import read_message
from text.tokenizer import Tokenizer
from utils.errors import UsageError
from utils.files import read_text


class Prompt(NamedTuple):
    source: str | list[dict]  # a text to continue, or a chat's messages
    request: Request


def read_sources(args: argparse.Namespace) -> list[str | list[dict]]:
    """Returns the prompts of --prompt or --prompt_file as they are written. This needs no tokenizer, so a mistake in
    the file is found before the model is loaded. Raises UsageError for a prompt that is empty or malformed."""
    sources = read_prompt_file(args.prompt_file) if args.prompt_file else [args.prompt]
    check_not_empty(sources, args)
    return sources


def encode_prompts(
    sources: list[str | list[dict]], args: argparse.Namespace, tokenizer: Tokenizer, config: ModelConfig
) -> list[Prompt]:
    """Returns the prompts of sources, the result of read_sources, or of --prompt_tokens. Raises UsageError for a prompt
    that is empty or far too long."""
    options = {"sampling": args.sampling, "stop": tuple(args.stop), "n_logprobs": args.logprobs}
    if args.prompt_tokens:
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(config.vocab_size, (args.prompt_tokens,), generator=generator).tolist()
        return [Prompt(tokenizer.decode(ids), Request(ids, args.max_new_tokens, **options))]
    prompts = []
    for i, source in enumerate(with_chat_options(source, args) for source in sources):
        seed = args.seed + i  # for --parallel, where every prompt has random numbers of its own
        request = build_request(source, tokenizer, config.max_seq_len, args.max_new_tokens, seed=seed, **options)
        prompts.append(Prompt(source, request))
    check_not_empty([prompt.request.prompt_ids for prompt in prompts], args)  # a tokenizer may drop all of a text
    return prompts


def check_not_empty(prompts: Sequence[str | list], args: argparse.Namespace):
    """Raises UsageError if there is no prompt, or if one of them is empty."""
    if not prompts or not all(prompts):
        raise UsageError(f"{args.prompt_file or 'the prompt'} is empty; give some text")


def with_chat_options(source: str | list[dict], args: argparse.Namespace) -> str | list[dict]:
    """Applies --chat and --system to source: a text, or the messages of a chat."""
    if isinstance(source, str) and args.chat and source:
        source = [{"role": "user", "content": source}]
    if not isinstance(source, str) and args.system and source[0]["role"] != "system":
        source = [{"role": "system", "content": args.system}, *source]
    return source


def read_prompt_file(path: Path) -> list[str | list[dict]]:
    """Reads a text, or the messages of a chat, from each line. Skips empty lines, and names them on stderr."""
    text, sources = read_text(path).rstrip(), []
    for number, line in enumerate(text.split("\n") if text else [], start=1):
        if not line.strip():
            print(f"{path}: line {number} is empty and is skipped", file=sys.stderr)
        elif path.suffix == ".jsonl":
            sources.append(parse_json_line(line, f"{path}, line {number}"))
        else:
            sources.append(line)
    return sources


def parse_json_line(line: str, place: str) -> str | list[dict]:
    """Reads a prompt from a line of a .jsonl file. place: the file and the line's number, for the error."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{place} is not JSON: {e}") from None
    source = None
    if isinstance(fields, dict) and len(fields.keys() & {"prompt", "messages"}) == 1:
        source = fields.get("prompt", fields.get("messages"))
    if isinstance(source, str) and "prompt" in fields and source:
        return source
    if isinstance(source, list) and "messages" in fields and source:
        try:
            return [read_message(message) for message in source]
        except UsageError as e:
            raise UsageError(f"{place}: {e}") from None
    raise UsageError(f'{place} needs {{"prompt": text}} or {{"messages": [{{"role": ..., "content": text}}]}}')
