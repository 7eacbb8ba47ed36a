"""Measure a checkpoint: tasks of the lm-evaluation-harness, or the perplexity of a text.

    python eval.py --checkpoint_path checkpoints/M/model.pth --tasks hellaswag winogrande --limit 100
    python eval.py --checkpoint_path checkpoints/M/model_int8.pth --text_file book.txt

Tasks need `pip install lm_eval`, version 0.4. The perplexity is per token, over windows that don't overlap, each scored
with nothing before it but the token that the tokenizer begins every text with, if it has such a token.
"""

import argparse
import json
import math
import os
import re
import signal
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is being loaded; run() sees to the rest
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import tp
from checkpoint import read_text, run
from generate import Step, build_steps, check_finite, hidden_by_chunks, load, make_caches, pick_device
from model import Transformer, TransformerBlock, UsageError
from tokenizer import Tokenizer, render

LESS = "take a quantized checkpoint, a smaller --batch_size or --max_seq_length"  # for want of memory
HEAD_ROWS = 256  # positions whose logits are in memory at a time


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint_path", type=Path, required=True, help="model.pth, its tokenizer beside it")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="lm_eval's tasks or groups by name, or their files")
    what.add_argument("--text_file", type=Path, help="measure the perplexity of this text")
    add("--limit", type=int, help="examples of each task (default: all)")
    add("--include_path", type=Path, help="folder of further task files")
    add("--apply_chat_template", action="store_true", help="ask as a user would, in the checkpoint's chat template")
    add("--max_seq_length", type=int, help="tokens of a window (default: of a text 1024, of tasks all the model has)")
    add("--batch_size", type=int, default=1, help="sequences scored at a time (default: %(default)s)")
    add("--compile", action="store_true", help="compile the model")
    add("--device", help="cpu, cuda, mps, xpu ... (default: the machine's accelerator, else cpu)")
    add("--precision", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="default: %(default)s")
    add("--kernels", choices=["auto", "off"], default="auto", help="off: PyTorch's plain linear everywhere")
    add("--json", action="store_true", help="the results as one line of JSON")
    args = p.parse_args()
    for name in ("limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    if args.text_file and (args.limit or args.include_path or args.apply_chat_template):
        raise UsageError("--limit, --include_path and --apply_chat_template belong to --tasks")
    text = read_text(args.text_file) if args.text_file else None
    manager = None if args.text_file else task_manager(args.tasks, args.include_path)
    model, tokenizer = load(
        args.checkpoint_path, pick_device(args.device), getattr(torch, args.precision), args.kernels == "auto"
    )
    length = args.max_seq_length
    if length is None:
        length = min(1024 if text else 2**31, model.config.max_seq_len)
    if not 2 <= length <= model.config.max_seq_len:
        raise UsageError(f"--max_seq_length must be 2 to {model.config.max_seq_len}, the model's context, not {length}")
    if text is not None:
        results = perplexity(model, tokenizer, text, length, args.batch_size, args.compile)
        table = "\n".join(f"{name:15}{value:.6g}" for name, value in results.items())
    else:
        lm = harness_model(model, tokenizer, length, args.batch_size, args.compile)
        results, table = evaluate(lm, args.tasks, manager, args.limit, args.apply_chat_template)
    print(json.dumps(results) if args.json else table)


def windows_of(tokenizer: Tokenizer, text: str, length: int) -> list[list[int]]:
    """The whole text in windows of length tokens, the last one shorter; each begins as the tokenizer begins a text."""
    ids, bos = tokenizer.encode(text, bos=False), tokenizer.bos_ids
    step = length - len(bos)
    return [bos + ids[i : i + step] for i in range(0, len(ids), step)]


def perplexity(model, tokenizer: Tokenizer, text: str, length: int, batch_size: int = 1, compile: bool = False) -> dict:
    """exp of the mean negative log-likelihood of text's tokens, in windows of length tokens. A window's first token is
    given, the others are predicted."""
    windows = [w for w in windows_of(tokenizer, text, length) if len(w) > 1]
    if not windows:
        raise UsageError("the text is too short: there must be a token to predict")
    nll = tokens = 0
    with tqdm(total=len(windows), desc="windows", disable=None, leave=False) as bar:
        for _, logprobs, _ in score(model, [(w, len(w) - 1) for w in windows], batch_size, compile):
            nll -= logprobs.double().sum().item()
            tokens += len(logprobs)
            bar.update()
    if not math.isfinite(nll):
        raise UsageError("the model's logits are not finite: NaN weights, or --precision too narrow")
    mean = nll / tokens
    result = math.exp(mean) if mean < 700 else math.inf
    return {"perplexity": result, "tokens": tokens, "windows": len(windows), "nll_per_token": mean}


Scored = tuple[int, Tensor, Tensor]  # index of the row, log-probabilities [n], which of them are the likeliest [n]


@torch.inference_mode()
def score(model: Transformer, rows: list[tuple[list[int], int]], batch_size: int, compile: bool) -> Iterator[Scored]:
    """For every (tokens, n) how likely the model finds the last n tokens, each after those before it; n is less than
    the number of tokens. Longest rows first; shorter ones in a batch are padded on the right, which causal attention
    does not see."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    batch_size = min(batch_size, len(rows))
    make_caches(model, batch_size, len(rows[order[0]][0]) - 1, LESS)
    device = model.rope.device
    block = torch.compile(TransformerBlock.forward, dynamic=True) if compile else None
    for i in range(0, len(order), batch_size):
        batch = [rows[k] for k in order[i : i + batch_size]]
        longest = len(batch[0][0]) - 1
        tokens = torch.zeros(batch_size, longest, dtype=torch.long)
        for b, (ids, _) in enumerate(batch):
            tokens[b, : len(ids) - 1] = torch.tensor(ids[:-1])
        positions = torch.arange(longest, device=device)
        hidden = torch.cat([*hidden_by_chunks(model, tokens.to(device), positions, block)], dim=1)
        for k, x, (ids, n) in zip(order[i:], hidden, batch, strict=False):
            targets = torch.tensor(ids[len(ids) - n :], device=device)
            logprobs, greedy = [], []
            for y, t in zip(x[len(ids) - 1 - n : len(ids) - 1].split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
                logits = model.logits(y)
                logprobs.append(-F.cross_entropy(logits, t, reduction="none"))
                greedy.append(logits.argmax(-1) == t)
            yield k, torch.cat(logprobs), torch.cat(greedy)


def harness():
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as e:
        raise UsageError(f"--tasks needs the lm-evaluation-harness: pip install 'lm_eval>=0.4.8' ({e})") from None
    return lm_eval


def task_manager(tasks: list[str], include_path: Path | None):
    """lm_eval's index of tasks, which knows all of tasks."""
    if include_path and not include_path.is_dir():
        raise UsageError(f"--include_path {include_path}: there is no such folder")
    manager = harness().tasks.TaskManager(include_path=str(include_path) if include_path else None)
    unknown = [t for t in tasks if t not in manager.all_tasks and not Path(t).is_file()]
    if unknown:
        raise UsageError(f"lm_eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    return manager


def evaluate(lm, tasks: list[str], manager, limit: int | None, chat: bool = False) -> tuple[dict, str]:
    """(lm_eval's results by task and metric, the same as a table)."""
    lm_eval = harness()
    try:
        manager.load(tasks) if hasattr(manager, "load") else manager.load_task_or_group(tasks)
    except Exception as e:  # a task is a program that fetches data; each fails in its own way
        raise UsageError(f"lm_eval cannot load {', '.join(tasks)}: {' '.join(str(e).split())[:300]}") from None
    results = lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=manager, limit=limit, apply_chat_template=chat, log_samples=False
    )
    numbers = {t: {k: v for k, v in r.items() if k != "alias"} for t, r in results["results"].items()}
    table = lm_eval.utils.make_table(results)
    return numbers, table + ("\n" + lm_eval.utils.make_table(results, "groups") if results.get("groups") else "")


def harness_model(model: Transformer, tokenizer: Tokenizer, max_length: int, batch_size: int, compile: bool):
    """An lm_eval.api.model.LM that tokenizes, truncates and scores as lm_eval's own Hugging Face class does."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    pieces = "|".join(map(re.escape, sorted(tokenizer.special, key=len, reverse=True))) or "(?!)"
    bos = tokenizer.names.get("bos_token")
    prefix = [tokenizer.special.get(bos, model.config.bos_id), *model.config.eos_ids, *tokenizer.bos_ids]
    prefix = next((i for i in prefix if i is not None), None)

    class Model(TemplateLM):
        tokenizer_name = "gpt-fast"

        @property
        def eot_token_id(self) -> int:
            return next(iter(model.config.eos_ids), self.prefix_token_id)

        @property
        def prefix_token_id(self) -> int:
            if prefix is None:
                raise UsageError("this task scores whole texts, and the model has no token to begin one with")
            return prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            """Special tokens written in the text count as such: the chat template's come this way."""
            parts = [tokenizer.special.get(part, part) for part in re.split(f"({pieces})", string)]
            begun = bos is not None and string.startswith(bos)
            first = add_special_tokens or (add_special_tokens is None and not begun)
            return tokenizer.bos_ids * first + tokenizer.encode_parts(parts)

        def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
            if tokenizer.chat_template is None:
                raise UsageError("this checkpoint has no chat template; leave out --apply_chat_template")
            text = render(tokenizer.chat_template, tokenizer.names, chat_history, add_generation_prompt)
            if not add_generation_prompt:  # the model is to go on with the last message
                last = chat_history[-1]["content"].strip()
                text = text[: text.rindex(last) + len(last)]
            return text

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
            rows = [((context + answer)[-max_length - 1 :], len(answer)) for _, context, answer in requests]
            if any(n >= len(ids) for ids, n in rows):
                raise UsageError(f"an answer to score is longer than --max_seq_length {max_length}")
            results = [(0.0, True)] * len(rows)
            if not rows:
                return results
            with tqdm(total=len(rows), desc="log-likelihoods", disable=disable_tqdm or None) as bar:
                for i, logprobs, greedy in score(model, rows, batch_size, compile):
                    results[i] = logprobs.double().sum().item(), bool(greedy.all())
                    bar.update()
            return results

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows = []
            for i, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])
                for window in get_rolling_token_windows(ids, self.prefix_token_id, max_length, context_len=1):
                    windows.append((i, *make_disjoint_window(window)))
            sums = [0.0] * len(requests)
            scores = self._loglikelihood_tokens(windows, disable_tqdm)
            for (i, _, _), (logprob, _) in zip(windows, scores, strict=True):
                sums[i] += logprob
            return sums

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            results = [""] * len(requests)
            options = [options_of(r.args[1]) for r in requests]
            if (new := max((new for _, new, _ in options), default=0)) >= max_length:
                raise UsageError(f"a task asks for {new} tokens, and --max_seq_length is {max_length}")
            prompts = [self.tok_encode(r.args[0])[o[1] - max_length :] for r, o in zip(requests, options, strict=True)]
            room = max((len(ids) + new for ids, (_, new, _) in zip(prompts, options, strict=True)), default=1)
            make_caches(model, min(batch_size, max(len(requests), 1)), room, LESS)  # once, or steps are compiled anew
            steps = cache(lambda **sampling: build_steps(model, sampling, compile, False))
            order = sorted(range(len(requests)), key=lambda i: (repr(options[i]), len(prompts[i])))
            with tqdm(total=len(requests), desc="generations", disable=disable_tqdm or None) as bar:
                for _, same in groupby(order, key=lambda i: options[i]):
                    same = list(same)
                    sampling, new, until = options[same[0]]
                    kept = [prompts[i] for i in same]
                    texts = continue_prompts(model, steps(**sampling), tokenizer, kept, new, until)
                    for i, text in zip(same, texts, strict=True):
                        results[i] = text
                        bar.update()
            return results

    return Model()


def options_of(kwargs: dict) -> tuple[dict, int, list[str]]:
    """(sampling, new tokens, texts that end the answer) of an lm_eval request."""
    until = kwargs.get("until") or []
    temperature = float(kwargs.get("temperature") or 0) if kwargs.get("do_sample") is not False else 0.0
    if kwargs.get("do_sample") and "temperature" not in kwargs:
        temperature = 1.0
    sampling = {"temperature": temperature, "top_k": kwargs.get("top_k") or None, "top_p": kwargs.get("top_p")}
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    new = next((int(kwargs[name]) for name in names if kwargs.get(name) is not None), 256)
    return sampling, new, [u for u in ([until] if isinstance(until, str) else until) if u]


@torch.inference_mode()
def continue_prompts(
    model: Transformer, steps: tuple[Step, Step], tokenizer: Tokenizer, prompts: list[list[int]], new: int,
    until: list[str],
) -> Iterator[str]:  # fmt: skip
    """What the model makes of each prompt in at most new tokens, up to an end token or one of the texts in until.
    Rows of a batch share their positions: from the end of the shortest prompt on, the others are fed theirs."""
    (prefill, decode), batch_size = steps, len(model.layers[0].attention.k_cache)
    device, ends = model.rope.device, set(model.config.eos_ids)
    for i in range(0, len(prompts), batch_size):
        batch = prompts[i : i + batch_size]
        rows = batch + batch[:1] * (batch_size - len(batch))
        shortest = min(map(len, rows))
        answers, live = [b""] * len(batch), [True] * len(batch)
        tokens = torch.tensor([row[:shortest] for row in rows], device=device)
        token = prefill(tokens, torch.arange(shortest, device=device))
        for position in range(shortest, max(map(len, rows)) + new):
            ids = token.tolist()
            check_finite(ids)
            for b, row in enumerate(batch):
                if position < len(row):
                    continue
                answers[b] += tokenizer.token_bytes(ids[b]) if live[b] else b""
                stopped = ids[b] in ends or any(u.encode() in answers[b] for u in until)
                live[b] = live[b] and not stopped and position + 1 < len(row) + new
            if not any(live):
                break
            ids = [row[position] if position < len(row) else t for row, t in zip(rows, ids, strict=True)]
            token = decode(torch.tensor(ids, device=device)[:, None], torch.tensor([position], device=device))
        for answer in answers:
            text = answer.decode("utf-8", "replace")
            yield text[: min((text.find(u) for u in until if u in text), default=len(text))]


if __name__ == "__main__":
    with tp.ranks():
        run(main, LESS)
