"""Measure a model's quality: tasks of the lm-evaluation-harness, or the perplexity of a text.

    python eval.py --checkpoint_path checkpoints/M/model.pth --tasks hellaswag winogrande --limit 100
    python eval.py --checkpoint_path checkpoints/M/model_int8.pth --text_file book.txt

Tasks need `pip install lm_eval`, version 0.4. The perplexity is per token. The text is cut into windows that do not
overlap, and each is scored by itself. It begins with the token with which the tokenizer begins every text, if any.
"""

import argparse
import json
import math
from collections.abc import Iterator
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import cli

if __name__ == "__main__":
    cli.exit_on_interrupt()

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import tp
from chat_template import render
from checkpoint import read_text
from config import UsageError
from loading import load
from machine import pick_device
from model import Transformer
from sampling import Sampling
from steps import (
    NOT_FINITE,
    Steps,
    build_steps,
    check_finite,
    compile_blocks,
    device_of,
    hidden_in_chunks,
    make_kv_cache,
)
from tokenizer import Tokenizer

OOM_HINT = "take a quantized checkpoint, a smaller --batch_size or --max_seq_length"
TEXT_WINDOW = 1024  # tokens of a window of text, unless the model's context is shorter
LOGITS_CHUNK = 256  # positions whose logits are in memory at a time


def parse_args() -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_checkpoint_path(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="lm_eval's tasks or groups by name, or their files")
    what.add_argument("--text_file", type=Path, help="measure the perplexity of this text")
    add("--limit", type=int, help="examples of each task (default: all)")
    add("--include_path", type=Path, help="folder of further task files")
    add("--apply_chat_template", action="store_true", help="ask as a user would, in the checkpoint's chat template")
    add("--max_seq_length", type=int, help="tokens of a window (default: of a text 1024, of tasks all the model has)")
    add("--batch_size", type=int, default=1, help="sequences scored at a time (default: %(default)s)")
    add("--compile", action="store_true", help="compile the model")
    cli.add_device(parser)
    cli.add_precision(parser)
    cli.add_kernels(parser)
    add("--json", action="store_true", help="the results as one line of JSON")
    args = parser.parse_args()
    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    if args.text_file and (args.limit or args.include_path or args.apply_chat_template):
        raise UsageError("--limit, --include_path and --apply_chat_template belong to --tasks")
    return args


def main():
    args = parse_args()
    # Check everything else before loading the model, which takes long.
    text = read_text(args.text_file) if args.text_file else None
    manager = task_manager(args.tasks, args.include_path) if args.tasks else None
    device, dtype = pick_device(args.device), getattr(torch, args.precision)
    model, tokenizer = load(args.checkpoint_path, device, dtype, use_kernels=args.kernels == "auto")
    length = context = model.config.max_seq_len
    if args.max_seq_length is not None:
        length = args.max_seq_length
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


# ---- Log-likelihoods of given tokens --------------------------------------------------------------------------------


def windows_of(tokenizer: Tokenizer, text: str, length: int) -> list[list[int]]:
    """text as windows of length token ids, the last one maybe shorter. Each begins with the tokenizer's bos_ids."""
    bos = tokenizer.bos_ids
    ids = tokenizer.encode(text)[len(bos) :]
    step = length - len(bos)
    return [bos + ids[i : i + step] for i in range(0, len(ids), step)]


def perplexity(
    model: Transformer, tokenizer: Tokenizer, text: str, length: int, batch_size: int = 1, compile: bool = False
) -> dict:
    """exp of the mean negative log-likelihood of text's tokens, in windows of length tokens. A window's first token is
    given, the others are predicted."""
    windows = windows_of(tokenizer, text, length)
    sequences = [ScoredSequence(window, n_scored=len(window) - 1) for window in windows if len(window) > 1]
    if not sequences:
        raise UsageError("the text is too short: there must be a token to predict")
    scores = scores_of(model, sequences, batch_size, compile)
    nll, n_tokens = 0.0, 0
    for score in tqdm(scores, "windows", len(sequences), disable=None, leave=False):
        nll -= score.logprobs.double().sum().item()
        n_tokens += len(score.logprobs)
    if not math.isfinite(nll):
        raise UsageError(NOT_FINITE)
    mean = nll / n_tokens
    result = math.exp(mean) if mean < 700 else math.inf  # beyond that, exp overflows
    return {"perplexity": result, "tokens": n_tokens, "windows": len(sequences), "nll_per_token": mean}


class ScoredSequence(NamedTuple):
    """Tokens, the last n_scored of which are scored. At least one token must come before these. For example,
    ScoredSequence([5, 8, 2], 1) asks how likely 2 is after 5 and 8."""

    ids: list[int]
    n_scored: int


class Score(NamedTuple):
    """The model's judgement of a sequence's last n tokens, each given the tokens before it."""

    index: int  # of the sequence
    logprobs: Tensor  # [n]
    is_greedy: Tensor  # [n], whether the token is the model's likeliest


@torch.inference_mode()
def scores_of(
    model: Transformer, sequences: list[ScoredSequence], batch_size: int = 1, compile: bool = False
) -> Iterator[Score]:
    """Yields the score of every sequence, the longest first. In a batch, shorter ones are padded on the right, which
    causal attention ignores."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    batch_size = min(batch_size, len(sequences))
    device = device_of(model)
    kv_cache = make_kv_cache(model, batch_size, len(sequences[order[0]].ids) - 1, OOM_HINT)
    positions = torch.zeros(batch_size, dtype=torch.long, device=device)
    compiled_model = compile_blocks(model, dynamic=True) if compile else None
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        inputs = [sequences[i].ids[:-1] for i in indices]
        inputs += inputs[:1] * (batch_size - len(inputs))  # the last batch may be smaller; repeat its first sequence
        tokens = pad(inputs).to(device)
        hidden = torch.cat(list(hidden_in_chunks(model, tokens, positions, kv_cache, compiled_model)), dim=1)
        for i, x in zip(indices, hidden, strict=False):
            yield score_sequence(model, i, sequences[i], x)


def pad(id_lists: list[list[int]]) -> Tensor:
    """Pads with zeros on the right: [B, length of the longest]."""
    return pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in id_lists], batch_first=True)


def score_sequence(model: Transformer, index: int, sequence: ScoredSequence, hidden: Tensor) -> Score:
    """The score of a sequence. hidden [T, dim]: the hidden states of all its tokens but the last."""
    n, last = sequence.n_scored, len(sequence.ids) - 1
    targets = torch.tensor(sequence.ids[-n:], device=hidden.device)
    logprobs, is_greedy = [], []
    for x, target in zip(hidden[last - n : last].split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True):
        logits = model.logits(x)
        logprobs.append(-F.cross_entropy(logits, target, reduction="none"))
        is_greedy.append(logits.argmax(-1) == target)
    return Score(index, torch.cat(logprobs), torch.cat(is_greedy))


# ---- The tasks of lm_eval -------------------------------------------------------------------------------------------


def import_lm_eval():
    """The package lm_eval. Raises UsageError if it is not installed."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as e:
        raise UsageError(f"--tasks needs the lm-evaluation-harness: pip install 'lm_eval>=0.4.8' ({e})") from None
    return lm_eval


def task_manager(tasks: list[str], include_path: Path | None):
    """lm_eval's index of tasks. Raises UsageError if it lacks one of tasks."""
    if include_path and not include_path.is_dir():
        raise UsageError(f"--include_path {include_path}: there is no such folder")
    manager = import_lm_eval().tasks.TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [t for t in tasks if t not in manager.all_tasks and not Path(t).is_file()]
    if unknown:
        raise UsageError(f"lm_eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    return manager


def evaluate(lm, tasks: list[str], manager, limit: int | None, chat: bool = False) -> tuple[dict, str]:
    """(lm_eval's results by task and metric, the same as a table)."""
    lm_eval = import_lm_eval()
    load_tasks = getattr(manager, "load", None) or manager.load_task_or_group  # versions differ
    try:
        load_tasks(tasks)
    except Exception as e:  # a task is a program that downloads data, and may raise anything
        raise UsageError(f"lm_eval cannot load {', '.join(tasks)}: {' '.join(str(e).split())[:300]}") from None
    results = lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=False
    )
    table = lm_eval.utils.make_table(results)
    if results.get("groups"):
        table += "\n" + lm_eval.utils.make_table(results, "groups")
    for metrics in results["results"].values():
        metrics.pop("alias", None)  # the task's name in the table
    return results["results"], table


def harness_model(model: Transformer, tokenizer: Tokenizer, max_length: int, batch_size: int, compile: bool):
    """The model as lm_eval's TemplateLM. The class is defined here, so that this file imports without lm_eval."""

    class Model(HarnessModel, import_lm_eval().api.model.TemplateLM):
        """HarnessModel implements the abstract methods of TemplateLM."""

    return Model(model, tokenizer, max_length, batch_size, compile)


class HarnessModel:
    """The abstract methods of lm_eval's TemplateLM. Tokenizes, truncates and scores as lm_eval's Hugging Face class."""

    tokenizer_name = "gpt-fast"

    def __init__(self, model: Transformer, tokenizer: Tokenizer, max_length: int, batch_size: int, compile: bool):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.max_batch_size, self.compile = max_length, batch_size, compile
        self.bos = tokenizer.special_names.get("bos_token")

    @property
    def eot_token_id(self) -> int:
        return next(iter(self.model.config.eos_ids), self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        config, tokenizer = self.model.config, self.tokenizer
        for token in (tokenizer.special.get(self.bos, config.bos_id), *config.eos_ids, *tokenizer.bos_ids):
            if token is not None:
                return token
        raise UsageError("this task scores whole texts, and the model has no token to begin one with")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Special tokens written in the text become special tokens, since a chat template's arrive as text."""
        ids = self.tokenizer.encode_parts(self.tokenizer.split_special(string))
        if add_special_tokens is None:
            add_special_tokens = self.bos is None or not string.startswith(self.bos)
        return self.tokenizer.bos_ids + ids if add_special_tokens else ids

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        template = self.tokenizer.chat_template
        if template is None:
            raise UsageError("this checkpoint has no chat template; leave out --apply_chat_template")
        text = render(template, self.tokenizer.special_names, chat_history, add_generation_prompt)
        if not add_generation_prompt:  # the model shall continue the last message
            last = chat_history[-1]["content"].strip()
            text = text[: text.rindex(last) + len(last)]
        return text

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """For requests (_, context ids, answer ids): the answer's log-likelihood, and whether it is the greedy one."""
        longest = self.max_length + 1
        sequences = [ScoredSequence((context + answer)[-longest:], len(answer)) for _, context, answer in requests]
        if any(sequence.n_scored >= len(sequence.ids) for sequence in sequences):
            raise UsageError(f"an answer to score is longer than --max_seq_length {self.max_length}")
        results = [(0.0, True)] * len(sequences)
        scores = scores_of(self.model, sequences, self.max_batch_size, self.compile) if sequences else []
        for score in tqdm(scores, "log-likelihoods", len(sequences), disable=disable_tqdm or None):
            results[score.index] = score.logprobs.double().sum().item(), bool(score.is_greedy.all())
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((i, *make_disjoint_window(window)))
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for (i, _, _), (logprob, _) in zip(windows, scores, strict=True):
            sums[i] += logprob
        return sums

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The model's answers. Requests with the same options form batches."""
        options = [options_of(request.args[1]) for request in requests]
        prompts = [self.prompt_ids(r.args[0], o) for r, o in zip(requests, options, strict=True)]
        length = max((len(ids) + o.max_new_tokens for ids, o in zip(prompts, options, strict=True)), default=1)
        batch_size = min(self.max_batch_size, max(len(requests), 1))
        kv_cache = make_kv_cache(self.model, batch_size, length, OOM_HINT)  # one, since steps are compiled for it
        steps_of = cache(partial(build_steps, self.model, kv_cache, compile=self.compile))
        results = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (repr(options[i]), len(prompts[i])))
        with tqdm(total=len(requests), desc="generations", disable=disable_tqdm or None) as bar:
            for same_options, group in groupby(order, key=lambda i: options[i]):
                indices, steps = list(group), steps_of(same_options.sampling)
                for start in range(0, len(indices), batch_size):
                    batch = indices[start : start + batch_size]
                    filler = batch[:1] * (batch_size - len(batch))  # the last batch may be smaller
                    texts = self.complete([prompts[i] for i in batch + filler], steps, same_options)
                    for i, text in zip(batch, texts, strict=False):
                        results[i] = text
                    bar.update(len(batch))
        return results

    @torch.inference_mode()
    def complete(self, prompts: list[list[int]], steps: Steps, options: "Options") -> list[str]:
        """The model's continuation of each prompt, up to an end token or one of the texts in options.until. The number
        of prompts must be the batch size of steps.

        Prompts of different lengths are decoded together, each at its own position. Prefill takes each prompt without
        its last token, padded on the right. Decoding begins with the last token. The padding's keys and values lie at
        later positions of the cache. Causal attention does not see them until decoding has overwritten them."""
        device, eos_ids = device_of(self.model), set(self.model.config.eos_ids)
        if max(map(len, prompts)) > 1:
            padded = pad([ids[:-1] for ids in prompts]).to(device)
            steps.prefill(padded, torch.zeros(len(prompts), dtype=torch.long, device=device))
        tokens = torch.tensor([ids[-1] for ids in prompts], device=device)
        positions = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
        until = [end.encode() for end in options.until]
        answers, is_live = [b""] * len(prompts), [True] * len(prompts)
        for _ in range(options.max_new_tokens):
            tokens = steps.decode(tokens[:, None], positions)
            positions = positions + 1
            ids = tokens.tolist()
            check_finite(ids)
            for b in range(len(prompts)):
                if is_live[b]:
                    answers[b] += self.tokenizer.token_bytes(ids[b])
                    is_live[b] = ids[b] not in eos_ids and not any(end in answers[b] for end in until)
            if not any(is_live):
                break
        texts = []
        for answer in answers:
            text = answer.decode("utf-8", "replace")
            ends = [text.find(end) for end in options.until if end in text]
            texts.append(text[: min(ends, default=len(text))])
        return texts

    def prompt_ids(self, text: str, options: "Options") -> list[int]:
        """The token ids of text. If they leave no room for an answer, the first ones are dropped."""
        asked = options.max_new_tokens
        n = self.max_length - asked
        if n < 1:
            raise UsageError(f"a task asks for {asked} tokens, and --max_seq_length is {self.max_length}")
        return self.tok_encode(text)[-n:] or [self.prefix_token_id]


class Options(NamedTuple):
    """The options of a generation request."""

    sampling: Sampling
    max_new_tokens: int
    until: tuple[str, ...]  # texts that end the answer


def options_of(kwargs: dict) -> Options:
    """Reads the keyword arguments of a generation request of lm_eval."""
    temperature = float(kwargs.get("temperature") or 0)
    if kwargs.get("do_sample") is False:
        temperature = 0.0
    elif kwargs.get("do_sample") and "temperature" not in kwargs:
        temperature = 1.0
    sampling = Sampling(temperature, kwargs.get("top_k") or None, kwargs.get("top_p"))
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    max_new_tokens = next((int(kwargs[name]) for name in names if kwargs.get(name) is not None), 256)
    until = kwargs.get("until") or []
    until = [until] if isinstance(until, str) else until
    return Options(sampling, max_new_tokens, tuple(text for text in until if text))


if __name__ == "__main__":
    with tp.ranks():
        cli.run(main, OOM_HINT)
