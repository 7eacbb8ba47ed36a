"""Generate text from a checkpoint.

    python generate.py --checkpoint_path checkpoints/SmolLM2-135M-Instruct/model.pth --prompt "Hello" --compile

The way: load_model -> build_steps (prefill and decode, compiled or not) -> generate, which yields tokens. Text goes to
stdout, the summary to stderr; with --json stdout holds one JSON object per prompt and nothing else.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is being loaded; run() sees to the rest
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import quantize
import tp
from checkpoint import need_memory, read_checkpoint, read_text, run
from model import Transformer, TransformerBlock, UsageError
from tokenizer import Tokenizer, load_tokenizer, stream

DEMO = Path(__file__).parent / "checkpoints/SmolLM2-135M-Instruct/model.pth"
CONVERSATION = 8192  # tokens that one holds, if the model's context does
LESS = "take a quantized checkpoint, fewer --max_new_tokens or a smaller --batch_size"  # for want of memory
CHUNK = 512  # prompt tokens a prefill step takes; bounds its memory
GPU_CHUNK = 4096  # the same on a GPU, where every step turns all quantized weights into numbers
# How many 16-bit products oneDNN and PyTorch's layer above it keep compiled, one for every number of rows, 0.3 MB each
PRODUCTS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"


def load(path: Path, *how, **more) -> tuple[Transformer, Tokenizer]:
    """load_model, and the tokenizer beside the model. Raises UsageError if the one does not fit the other."""
    model, tokenizer = load_model(path, *how, **more), load_tokenizer(path.parent)
    if tokenizer.vocab_size > (size := model.config.vocab_size):
        raise UsageError(f"{path}: the tokenizer's {tokenizer.vocab_size} tokens exceed the model's {size}")
    return model, tokenizer


def load_model(
    path: Path, device: torch.device, dtype: torch.dtype, fast: bool = True, shared: bool = True
) -> Transformer:
    """The model in path, on device, in dtype, in inference mode. Memory-mapped where nothing needs to change. shared:
    if there are several ranks, each gets its part (tp.py), else each has a model of its own."""
    for name in PRODUCTS:  # read at the first product
        os.environ.setdefault(name, "128")
    config, quantization, tensors = read_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(config)
    quantize.prepare(model, quantization)
    wanted = model.state_dict()
    if config.tie_embeddings:
        tensors.setdefault("output.weight", tensors.get("tok_embeddings.weight"))
    for name in wanted.keys() | tensors.keys():
        ours, theirs = wanted.get(name), tensors.get(name)
        kinds = [t is not None and (t.shape, t.is_floating_point()) for t in (ours, theirs)]
        if kinds[0] != kinds[1]:
            raise UsageError(f"{path}: tensor {name} is missing, left over or of the wrong shape; convert it again")
    shared = shared and tp.world_size() > 1
    if fast and torch.device(device).type == "cpu":
        n = sum(t.numel() * dtype.itemsize if t.dtype.is_floating_point else t.nbytes for t in {*tensors.values()})
        need_memory(n // (tp.world_size() if shared else 1), f"{path}, in {dtype},", LESS)
    cut = tp.shard(model, quantization, torch.device(device)) if shared else lambda name, t: t
    loaded, moved = {}, {}
    for name, t in tensors.items():
        part = cut(name, t)
        key = id(t) if part is t else name  # by identity: a tied head stays tied
        if key not in moved:  # what quantization stores keeps its type
            floats = t.is_floating_point() and not name.endswith(".scales")
            moved[key] = part.to(device, dtype if floats else t.dtype)
            if moved[key] is not t:
                kernels.advise(t, kernels.DONTNEED)  # or the file's pages would count as well
        loaded[name] = moved[key]
    model.load_state_dict(loaded, assign=True)
    del loaded, moved  # kernels.enable lays weights out anew, one by one
    model = model.eval().requires_grad_(False)
    model.quantization = quantization and ".g".join(map(str, quantization.values()))  # int8, int4.g32 ...
    if fast:
        kernels.enable(model, mapped=True)
    if shared:
        tp.join(model)
    return model


def make_caches(model: Transformer, batch_size: int, length: int, less: str = LESS):
    """model.setup_caches, unless a CPU's memory is too small for it: then UsageError, and less says what helps."""
    weight, a = model.tok_embeddings.weight, model.layers[0].attention
    if weight.device.type == "cpu":
        numbers = 2 * len(model.layers) * batch_size * a.n_kv_heads * length * a.head_dim
        need_memory(numbers * weight.itemsize, f"the KV cache of {batch_size} x {length} tokens", less)
    model.setup_caches(batch_size, length)


def sample(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """float32 logits [B, vocab_size] -> token ids [B]; -1 for a row that is not finite. Temperature 0 is argmax; else
    temperature, top_k and top_p (arXiv:1904.09751) apply in this order, and what is left is sampled exactly."""
    token = draw(probabilities(logits, temperature, top_k, top_p)) if temperature else logits.argmax(-1)
    return torch.where(logits.sum(-1).isfinite(), token, -1)


def probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """The distribution [B, vocab_size] that sample draws from; temperature must be above 0."""
    scores = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # nothing overflows
    if top_k is not None and top_k < scores.shape[-1]:
        values, tokens = scores.topk(top_k)
        scores = torch.full_like(scores, -torch.inf).scatter(-1, tokens, values)
    if top_p is not None and top_p < 1:
        probs, order = scores.softmax(-1).sort(-1, descending=True)
        drop = probs.cumsum(-1) - probs >= top_p  # the tokens before it are enough
        scores = scores.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return scores.softmax(-1)


def draw(probs: Tensor) -> Tensor:
    """A token [B] for every row of [B, vocab_size], which need not sum to one. Never a token of probability 0, and no
    synchronisation."""
    if probs.is_cuda:  # the winner of a race at these speeds; there a single row's cumsum is slow
        return (probs / torch.empty_like(probs, dtype=torch.float64).exponential_()).argmax(-1)
    wide = torch.float64 if probs.device.type == "cpu" else torch.float32  # some devices have no float64
    below = probs.cumsum(-1, dtype=wide)  # the first that exceeds a random number
    number = torch.rand(len(probs), 1, dtype=wide, device=probs.device) * below[:, -1:]
    return (below <= number).sum(-1).clamp(max=probs.shape[-1] - 1)


Step = Callable[[Tensor, Tensor], Tensor]  # (tokens [B, T], positions [T]) -> the next token of every row [B]


def build_steps(model: Transformer, sampling: dict, compile: bool, compile_prefill: bool) -> tuple[Step, Step]:
    """(prefill, decode) as plain functions."""
    head = lambda x: tp.agree(sample(model.logits(x[:, -1]), **sampling))  # noqa: E731

    def prefill(tokens: Tensor, positions: Tensor) -> Tensor:
        for x in hidden_by_chunks(model, tokens, positions, block):
            last = x  # one chunk is in memory at a time
        return head(last)

    block = torch.compile(TransformerBlock.forward, dynamic=True) if compile_prefill else None
    return prefill, build_step(model, head, compile)


def hidden_by_chunks(model: Transformer, tokens: Tensor, positions: Tensor, block: Callable | None) -> Iterator[Tensor]:
    """model.hidden of tokens [B, T], chunk by chunk: [B, part of T, dim]. block stands in for
    TransformerBlock.forward, except for few rows, which have kernels of their own."""
    start = int(positions[0])
    size = CHUNK if tokens.device.type == "cpu" else max(1, GPU_CHUNK // tokens.shape[0])
    for i in range(0, tokens.shape[1], size):
        part = tokens[:, i : i + size]
        chosen = block if part.numel() > kernels.MAX_ROWS else None
        yield model.hidden(part, positions[i : i + size], start + i + part.shape[1], chosen)


def build_step(model: Transformer, head: Callable, compile: bool) -> Callable:
    """head(hidden states [B, T, dim], *more) as a function of (tokens [B, T], positions [T], *more). compile: on a CPU
    one compiled block serves all layers, which compiles in a third of the time of the whole step and runs as fast, and
    where kernels.cpp's operations do the work nothing is left to compile; elsewhere the whole step becomes a graph of
    the device, compiled first if it is not made of kernels_triton's operations."""

    def step(tokens: Tensor, positions: Tensor, *more, block=None, head=head) -> Tensor:
        return head(model.hidden(tokens, positions, None, block), *more)

    if not compile:
        return step
    is_fast = model.layers[0].attention.is_fast
    whole = {"fullgraph": not model.config.moe, "dynamic": False}  # experts of many tokens are not to be compiled
    if model.tok_embeddings.weight.device.type != "cpu":
        compiled = torch.compile(step, mode="reduce-overhead", **whole)
        first, moe = model.layers[0], model.config.moe
        if not first.attention.wqkv.gpu or (moe and not first.feed_forward.experts.whole()) or tp.world_size() > 1:
            return compiled
        graph = captured(step, model)
        return lambda tokens, *rest: (graph if is_fast(tokens) else compiled)(tokens, *rest)

    @cache
    def compiled() -> dict:  # when it is needed: the compiler's import alone takes a second and 150 MB
        return {"block": torch.compile(TransformerBlock.forward, **whole), "head": torch.compile(head, **whole)}

    return lambda tokens, *rest: step(tokens, *rest, **({} if is_fast(tokens) else compiled()))


def captured(step: Callable, model: Transformer) -> Callable:
    """step as a graph of the GPU for every combination of shapes: one launch in place of hundreds, with nothing to
    compile. What it returns is overwritten when it is called again."""
    graphs = {}

    def run(*args: Tensor | None):
        key = tuple(None if a is None else a.shape for a in args)
        if key not in graphs or graphs[key][0] is not model.rope:  # which comes and goes with the caches
            inputs = [None if a is None else a.clone() for a in args]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # compiles and loads the kernels, which must not happen while capturing
                step(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = step(*inputs)
            graphs[key] = model.rope, inputs, graph, result
        _, inputs, graph, result = graphs[key]
        for own, a in zip(inputs, args, strict=True):
            if a is not None:
                own.copy_(a)
        graph.replay()
        return result

    return run


@torch.inference_mode()
def generate(prefill: Step, decode: Step, prompt: Tensor, start: int, max_new_tokens: int) -> Iterator[list[int]]:
    """prompt [B, T], the first of it at position start -> max_new_tokens times the next token of every row. The
    cache must have start + T + max_new_tokens - 1 places. Raises UsageError when the model's output is not finite."""
    position = torch.arange(start, start + prompt.shape[1], device=prompt.device)
    token, position = prefill(prompt, position), position[-1:]

    def step():
        nonlocal token, position
        position = position + 1
        token = decode(token.view(-1, 1).clamp(min=0), position)  # -1 is found out too late

    for left in reversed(range(max_new_tokens)):
        read = fetched(token)
        if left and token.is_cuda:  # the GPU has its next step before the host reads this one's token
            step()
        ids = read()
        check_finite(ids)
        yield ids
        if left and not token.is_cuda:
            step()


def fetched(token: Tensor) -> Callable[[], list[int]]:
    """Begins to copy tokens [B] to the host. The function returned waits for them, and for nothing that a GPU was given
    to do after them."""
    if not token.is_cuda:
        return token.tolist
    copy, done = token.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read() -> list[int]:
        done.synchronize()
        return copy.tolist()

    return read


def one_by_one(
    prefill: Step, decode: Step, batch_size: int, device: torch.device, text: list[int], start: int, max_new_tokens: int
) -> Iterator[list[list[int]]]:  # fmt: skip
    """generate in the form of speculate: runs of one token, [1][B]. text goes into every row, of which the cache holds
    start tokens."""
    prompt = torch.tensor([text[start:]] * batch_size, device=device)
    return ([ids] for ids in generate(prefill, decode, prompt, start, max_new_tokens))


def check_finite(ids: list[int]):
    if min(ids) < 0:
        raise UsageError("the model's logits are not finite: NaN weights, or --precision too narrow")


# Of a text so far and a number k: k tokens [k] that may come next and the distributions [k, V] they were drawn from,
# or None for these, or None at all if it knows nothing. It is asked before every step, before a plain one with k = 0.
Proposer = Callable[[list[int], int], tuple[Tensor, Tensor | None] | None]
PRIOR = 1.0, 0.5  # proposed tokens that were kept and steps that lost one, assumed before there are any
FADE, FADE_IDLE = 0.9, 0.97  # what a step leaves of what is known of earlier ones; the second if it proposed nothing
LONGEST = 32  # run of tokens to propose or to look up
VERIFY = 0.1  # what one more token in a step of the model costs, in steps: 0.01 in 16 bits, 0.02 in 8, 0.15 in 4


@torch.inference_mode()
def speculate(
    steps: tuple[Step, Step, Callable], propose: Proposer, cost: float, k: int, device: torch.device,
    history: list[int], start: int, max_new_tokens: int,
) -> Iterator[list[list[int]]]:  # fmt: skip
    """What generate does, for one row, several tokens a step: yields runs [n][1], max_new_tokens in all. Of up to k
    proposed tokens the model keeps, in one step, those that it could have sampled itself, so that the output is
    distributed as generate's (arXiv:2211.17192). steps: prefill, decode, verify. history: the text so far, of which the
    cache holds start tokens. cost: of one proposed token, in steps of the model. k shrinks while too few are kept."""
    prefill, decode, verify = steps
    history, made, kept, lost = list(history), 0, *PRIOR
    propose(history[: start + 1], 0)  # the rest may have changed since it was asked last
    run = prefill(
        torch.tensor([history[start:]], device=device), torch.arange(start, len(history), device=device)
    ).tolist()
    while True:
        check_finite(run)
        yield [[i] for i in run]
        history += run
        made += len(run)
        if made == max_new_tokens:
            return
        n = best_size([n for n in sizes(k) if n < max_new_tokens - made], kept / (kept + lost), cost)
        at, last = len(history) - 1, torch.tensor([history[-1:]], device=device)
        proposal, fade = propose(history, n), FADE_IDLE
        if proposal is None:
            run = decode(last, torch.tensor([at], device=device)).tolist()
        else:
            drafted, probs = proposal
            tokens = torch.cat([last, drafted[None]], dim=1)
            count, *run = verify(tokens, torch.arange(at, at + n + 1, device=device), drafted, probs).tolist()
            run, fade = run[: count + 1], FADE
            kept, lost = kept + count, lost + (count < n)
        kept, lost = (prior + fade * (x - prior) for prior, x in zip(PRIOR, (kept, lost), strict=True))


def sizes(k: int) -> list[int]:
    """The numbers of tokens that are proposed at a time: k and a third of it, no more, since each is compiled."""
    return sorted({k, max(1, k // 3)})


def best_size(sizes: list[int], chance: float, cost: float) -> int:
    """Which of sizes, or 0, promises most tokens for the time, if each token is kept with this chance."""
    return max([0, *sizes], key=lambda n: sum(chance**i for i in range(n + 1)) / (1 + n * (cost + VERIFY)))


def verified(logits: Tensor, drafted: Tensor, probs: Tensor | None, sampling: dict) -> Tensor:
    """The model's logits [k + 1, V] after each of the k + 1 last tokens, of which drafted [k] were proposed, drawn from
    probs [k, V] or smaller V -> [k + 2]: how many are kept, then the tokens to go on with, one more than are kept."""
    if probs is None:  # what the model samples is what it says, and the proposal is right as long as it says the same
        tokens = sample(logits, **sampling)
        return torch.cat([(tokens[:-1] == drafted).cumprod(0).sum()[None], tokens])
    ours = probabilities(logits, **sampling)
    chance = lambda p: p.gather(1, drafted[:, None])[:, 0]  # noqa: E731
    keep = torch.rand(len(drafted), device=logits.device) * chance(probs) < chance(ours)
    count = keep.cumprod(0).sum()[None]
    # In place of the first token not kept, one of those that the draft proposes too seldom; after all, any
    missing = (ours - F.pad(probs, (0, ours.shape[1] - probs.shape[1], 0, 1))).clamp(min=0)[count]
    missing = torch.where(missing.sum() > 0, missing, ours[count])
    tokens = torch.cat([drafted, drafted[:1]]).scatter(0, count, draw(missing))
    finite = logits.sum().isfinite()
    return torch.where(finite, torch.cat([count, tokens]), torch.cat([count * 0, tokens * 0 - 1]))


def prompt_lookup(longest: int, device: torch.device) -> Proposer:
    """Proposes what followed when the last few tokens, longest or fewer down to 2, were last in the text."""
    follows, known = {}, 0  # n-gram -> where what followed it begins

    def propose(history: list[int], k: int):
        nonlocal known
        if known >= len(history):
            follows.clear()
            known = 0
        for at in range(max(known, 2), len(history)):
            for n in range(2, longest + 1):
                follows[tuple(history[max(0, at - n) : at])] = at
        known = len(history)
        for n in range(longest, 1, -1) if k else ():
            if at := follows.get(tuple(history[-n:])):  # beyond the text's end, it repeats itself
                return torch.tensor([history[at + i % (known - at)] for i in range(k)], device=device), None
        return None

    return propose


def draft_model(prefill: Step, step: Callable, vocab: int, device: torch.device) -> Proposer:
    """Proposes what a smaller model, of tokens below vocab, samples. step: as decode, but gives (token [1], the
    distribution [1, vocab] or None)."""
    ready = 0  # tokens of the text that are in the draft's cache

    def propose(history: list[int], k: int):
        nonlocal ready
        ready = min(ready, len(history) - 1)  # of its own tokens those that were kept
        if not k:
            return None
        begin = len(history) - 2  # always two tokens, since one is missing when all were kept
        ready = min(ready, begin)
        tokens = torch.tensor([history[ready:]], device=device).clamp(max=vocab - 1)
        positions = torch.arange(ready, len(history), device=device)
        if ready < begin:
            prefill(tokens[:, :-2], positions[:-2])
        tokens, positions = tokens[:, -2:], positions[-2:]
        drafted, probs = [], []
        for _ in range(k):
            token, p = step(tokens, positions)
            drafted.append(token.clone())  # the next step may reuse their memory
            probs += [p.clone()] if p is not None else []
            tokens, positions = drafted[-1][None], positions[-1:] + 1
        ready = len(history) + k - 1
        return torch.cat(drafted), torch.cat(probs) if probs else None

    return propose


def build_speculation(model: Transformer, draft: Transformer | None, lookup: int | None, sampling: dict, compile: bool):
    """What speculate needs beside the model's own steps: verify, propose and the cost of a proposed token. Proposals
    are draft's, or without one those of prompt_lookup with lookup tokens."""
    device, vocab = model.tok_embeddings.weight.device, model.config.vocab_size
    head = lambda x, *proposal: tp.agree(verified(model.logits(x[0]), *proposal, sampling))  # noqa: E731
    verify = build_step(model, head, compile)
    if draft is None:
        return verify, prompt_lookup(lookup, device), 0.0

    def draft_head(x: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = draft.logits(x[:, -1])[:, :vocab]  # heads of one family are filled up to different sizes
        if not sampling["temperature"]:
            return tp.agree(logits.argmax(-1)), None
        probs = probabilities(logits, **sampling)
        return tp.agree(draw(probs)), probs

    prefill, _ = build_steps(draft, {"temperature": 0}, compile=False, compile_prefill=False)
    step = build_step(draft, draft_head, compile)
    propose = draft_model(prefill, step, draft.config.vocab_size, device)
    return verify, propose, draft.step_bytes() / model.step_bytes()


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a sum over 512 MiB reads: what weights could be read at. The best of five."""
    x = torch.ones(2**27, device=device)
    seconds = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        x.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> int:
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated()
    try:  # Linux's ru_maxrss is inherited from the parent
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--checkpoint_path", type=Path, default=DEMO, help="model.pth, its tokenizer beside it (default: the demo's)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="Hello, my name is", help="text to continue (default: %(default)r)")
    what.add_argument("--prompt_file", type=Path, help="text file, one prompt a line, each run in turn")
    what.add_argument("--prompt_tokens", type=int, metavar="N", help="N random tokens, for benchmarks")
    add("--chat", action="store_true", help="--prompt as a chat message; without --prompt, a conversation")
    add("--interactive", action="store_true", help="a conversation: the same as --chat without --prompt")
    add("--system", help="system message of a chat")
    add("--num_samples", type=int, default=1, help="times each prompt is run (default: %(default)s)")
    add("--max_new_tokens", type=int, default=200, help="default: %(default)s")
    add("--batch_size", type=int, default=1, help="independent samples at a time; the first streams (default: 1)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    add("--top_k", type=int, help="sample among the k likeliest tokens only")
    add("--top_p", type=float, help="sample among the likeliest tokens that make up p")
    add("--seed", type=int, default=1234, help="default: %(default)s")
    add("--draft_checkpoint_path", type=Path, help="a smaller model of the same vocabulary, to speculate")
    add("--draft_tp", choices=["on", "off"], help="off: of several ranks, each has all of the draft (default: on)")
    add("--prompt_lookup", type=int, nargs="?", const=3, metavar="N",
        help="speculate without a draft: on what followed the last N tokens, or fewer, before (default: 3)")
    add("--speculate_k", type=int, metavar="K", help="tokens to propose at a time, at most (default: 5, looked up: 7)")
    add("--ignore_eos", action="store_true", help="go on after an end token, for benchmarks")
    add("--compile", action="store_true", help="compile the decode step")
    add("--compile_prefill", action="store_true", help="compile prefill too")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the last sample (of every rank)")
    add("--device", help="cpu, cuda, mps, xpu ... (default: the machine's accelerator, else cpu)")
    add("--precision", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="default: %(default)s")
    add("--kernels", choices=["auto", "off"], default="auto", help="off: PyTorch's plain linear everywhere")
    add("--json", action="store_true", help="one JSON object for each prompt on stdout instead of text")
    args = p.parse_args()
    given = args.prompt is not p.get_default("prompt") or args.prompt_file  # even if it equals the default
    args.conversation = args.interactive or (args.chat and not given)
    if args.prompt_tokens and (args.chat or args.interactive) or (args.interactive and given):
        raise UsageError("a conversation takes its messages from standard input: leave the prompt out")
    if args.conversation and args.json:
        raise UsageError("--json needs --prompt: a conversation has no single result")
    args.speculative = args.draft_checkpoint_path is not None or args.prompt_lookup is not None
    if args.draft_checkpoint_path and args.prompt_lookup:
        raise UsageError("--draft_checkpoint_path and --prompt_lookup are two ways to speculate; choose one")
    if args.draft_tp and not args.draft_checkpoint_path:
        raise UsageError("--draft_tp belongs to --draft_checkpoint_path")
    if args.speculate_k and not args.speculative:
        raise UsageError("--speculate_k belongs to --draft_checkpoint_path or --prompt_lookup")
    if args.speculative and args.batch_size > 1:
        raise UsageError("speculation is for one row: leave out --batch_size")
    if args.prompt_lookup is not None and args.prompt_lookup < 2:
        raise UsageError(f"--prompt_lookup looks for at least 2 tokens, not {args.prompt_lookup}")
    for name in ("speculate_k", "prompt_lookup"):
        if (getattr(args, name) or 0) > LONGEST:
            raise UsageError(f"--{name} must be at most {LONGEST}, not {getattr(args, name)}")
    for name in ("num_samples", "max_new_tokens", "batch_size", "top_k", "prompt_tokens", "speculate_k"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
    args.speculate_k = args.speculate_k or (7 if args.prompt_lookup else 5)  # a lookup costs nothing
    if not 0 <= args.temperature < float("inf"):
        raise UsageError(f"--temperature must be 0 or more, not {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UsageError(f"--top_p must be above 0 and at most 1, not {args.top_p}")
    if args.conversation and (args.batch_size > 1 or args.num_samples > 1 or args.ignore_eos or args.profile):
        raise UsageError("a conversation does without --batch_size, --num_samples, --ignore_eos and --profile")
    if args.system and not (args.chat or args.interactive):
        raise UsageError("--system belongs to a chat: add --chat")
    if not -(2**63) <= args.seed < 2**64:
        raise UsageError(f"--seed must fit 64 bits, not {args.seed}")
    if (f := args.profile) and (f.exists() and not f.is_file() or not f.absolute().parent.is_dir()):
        raise UsageError(f"--profile {args.profile} must be a file in a folder that exists")
    if args.compile and not any(map(shutil.which, (*shlex.split(os.environ.get("CXX") or "g++")[:1], "clang++"))):
        raise UsageError("--compile needs a C++ compiler ($CXX, g++ or clang++); install one or leave it out")
    if args.checkpoint_path == DEMO and not DEMO.is_file():
        raise UsageError("no --checkpoint_path given and no demo model here; run ./scripts/demo.sh, which gets one")
    return args


def pick_device(name: str | None) -> torch.device:
    """The device called name, or the accelerator of this machine, or its CPU. Raises UsageError if it is not here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # which a device without memory, like meta, cannot do
        if device.type != "cpu" and device.index is not None:  # what PyTorch measures is the current one
            torch.accelerator.set_device_index(device.index)
        return device
    except Exception:  # each backend has its own way to be absent
        have = ["cpu"] + ([accelerator.type] if accelerator else [])
        raise UsageError(f"device {name!r} is not available here; this machine has: {', '.join(have)}") from None


def main():
    args = parse_args()
    device = pick_device(args.device)
    began = time.perf_counter()
    how = device, getattr(torch, args.precision), args.kernels == "auto"
    model, tokenizer = load(args.checkpoint_path, *how)
    load_seconds = time.perf_counter() - began
    models, draft = {"model": model}, None
    if args.draft_checkpoint_path:
        draft = load_draft(args.draft_checkpoint_path, tokenizer, *how, shared=args.draft_tp != "off")
        models["draft"] = draft

    prompts = [] if args.conversation else read_prompts(args, tokenizer, model.config.vocab_size)
    name, context = min(((name, m.config.max_seq_len) for name, m in models.items()), key=lambda pair: pair[1])
    room = min(context, CONVERSATION) if args.conversation else max(map(len, prompts)) + args.max_new_tokens
    if room > context:
        raise UsageError(
            f"{room - args.max_new_tokens} prompt tokens and {args.max_new_tokens} new ones exceed the {name}'s "
            f"context of {context}; lower --max_new_tokens or shorten the prompt"
        )
    for m in models.values():
        make_caches(m, args.batch_size, room)
    began = time.perf_counter()
    zeros = lambda n: (  # noqa: E731
        torch.zeros(args.batch_size, n, dtype=torch.long, device=device), torch.arange(n, device=device),
    )  # fmt: skip
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    prefill, decode = build_steps(model, sampling, args.compile, args.compile_prefill)
    with torch.inference_mode():  # what this leaves in the cache, the prompt overwrites
        if args.compile_prefill:
            prefill(*zeros(len(prompts[0]) if prompts else 2))
        for _ in range(2 if args.compile else 0):
            decode(*zeros(1))
        if args.speculative:
            verify, propose, cost = build_speculation(model, draft, args.prompt_lookup, sampling, args.compile)
            for n in 2 * sizes(args.speculate_k) if args.compile else ():
                if n < args.max_new_tokens:
                    verify(*zeros(n + 1), *propose([0, 0, 0], n))
            run = partial(speculate, (prefill, decode, verify), propose, cost, args.speculate_k, device)
        else:
            run = partial(one_by_one, prefill, decode, args.batch_size, device)
    stats = {"compile_seconds": time.perf_counter() - began, "load_seconds": load_seconds}
    if args.json and tp.world_size() > 1:
        stats["world_size"] = tp.world_size()
        stats["communication_share"] = tp.communication_share(lambda: decode(*zeros(1)))
    torch.manual_seed(args.seed)
    if args.conversation:
        if name == "draft" and room == context:
            print(f"The draft's context of {context} tokens is the conversation's.", file=sys.stderr)
        return converse(args, model, tokenizer, run)
    bus = None
    for prompt in prompts:
        result = {**run_prompt(args, model, tokenizer, run, prompt), **stats}
        if tp.world_size() > 1:
            result["rank_peak_memory_bytes"] = tp.everywhere(result["peak_memory_bytes"])
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            bus = bus or read_bandwidth(device) / 1e9
            report(result, bus)


def load_draft(path: Path, tokenizer: Tokenizer, *how, **more) -> Transformer:
    """load_model. Raises UsageError if the draft's tokens are not those of tokenizer."""
    draft, theirs = load(path, *how, **more)
    sample = range(0, tokenizer.vocab_size, max(1, tokenizer.vocab_size // 1000))
    if theirs.vocab_size != tokenizer.vocab_size:
        raise UsageError(f"the draft's vocabulary has {theirs.vocab_size} tokens, the model's {tokenizer.vocab_size}")
    for i in sample:
        if theirs.token_bytes(i) != tokenizer.token_bytes(i):
            raise UsageError(f"the draft's vocabulary is another: token {i} is {theirs.token_bytes(i)!r} there, and in "
                             f"the model {tokenizer.token_bytes(i)!r}")  # fmt: skip
    return draft


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The prompts asked for, as token ids."""
    if args.prompt_tokens:
        generator = torch.Generator().manual_seed(args.seed)
        return [torch.randint(vocab_size, (args.prompt_tokens,), generator=generator).tolist()]
    texts = [args.prompt]
    if args.prompt_file:
        texts = [line for line in read_text(args.prompt_file).split("\n") if line.strip()]
    for text in [*texts, args.system or ""]:
        if any("\ud800" <= c <= "\udfff" for c in text):  # how an argument's bytes that are not text arrive
            raise UsageError("the prompt is not valid UTF-8")
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompts = [tokenizer.encode_chat([*system, {"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    if not all(texts) or not all(prompts) or not prompts:
        raise UsageError(f"{args.prompt_file or 'the prompt'} is empty; give some text")
    return prompts


Run = Callable[[list[int], int, int], Iterator[list[list[int]]]]  # as one_by_one, its last three arguments


def run_prompt(args, model: Transformer, tokenizer: Tokenizer, run: Run, prompt: list[int]) -> dict:
    """Generates num_samples times, streaming row 0, and returns DESIGN's JSON object as far as it is known here."""
    device = model.rope.device
    after = () if args.chat else prompt
    ends = set() if args.ignore_eos else set(model.config.eos_ids)
    rates = []
    for sample_index in range(args.num_samples):
        rows, times, lengths = [[] for _ in range(args.batch_size)], [], []

        def first_row(rows=rows, times=times, lengths=lengths) -> Iterator[int]:
            """Row 0's tokens up to its end, while all rows fill up; done when every row has met an end token."""
            live = [True] * len(rows)
            for step in run(prompt, 0, args.max_new_tokens):
                times.append(time.perf_counter())
                lengths.append(0)
                for ids in step:
                    lengths[-1] += any(live)
                    for b, i in enumerate(ids):
                        if live[b]:
                            rows[b].append(i)
                            live[b] = i not in ends
                            if b == 0 and live[b]:
                                yield i
                if not any(live):
                    return

        profiled = args.profile and sample_index == args.num_samples - 1
        with torch.profiler.profile() if profiled else contextlib.nullcontext() as profile:
            began = time.perf_counter()
            for piece in stream(tokenizer, first_row(), after):
                if not args.json:
                    print(piece, end="", flush=True)
        if profiled:
            path = tp.own(args.profile)
            path.unlink(missing_ok=True)
            profile.export_chrome_trace(str(path))  # which is silent about what it cannot do
            if not path.is_file():
                path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
                raise UsageError(f"cannot write --profile {path}")
        texts = [tokenizer.decode([i for i in row if i not in ends], after) for row in rows]
        if not args.json:
            print()
            for i, text in enumerate(texts[1:], 1):
                print(f"--- row {i}\n{text}")
        if len(times) > 1:
            seconds = times[-1] - times[0]
            rates.append((sum(lengths[1:]) / seconds, (len(times) - 1) / seconds))
    rate, steps_per_second = map(statistics.median, zip(*rates, strict=True)) if rates else (0.0, 0.0)
    seen = model.step_bytes() + model.cache_bytes(len(prompt) + sum(lengths) // 2, args.compile)
    return {
        "text": texts,
        "tokens": rows,
        "prompt_tokens": len(prompt),
        "generated_tokens": sum(map(len, rows)),
        "finish_reason": ["stop" if row[-1] in ends else "length" for row in rows],
        "prefill_seconds": times[0] - began,
        "decode_tokens_per_sec": rate,
        "model_bytes": model.step_bytes(),
        "bandwidth_gb_per_sec": seen * steps_per_second / 1e9,
        "peak_memory_bytes": peak_memory(device),
        "device": str(device),
        "precision": args.precision,
        "quantization": model.quantization,
        "accept_counts": [lengths[1:].count(n + 1) for n in range(args.speculate_k + 1)] if args.speculative else None,
    }


def report(r: dict, bus: float):
    """One sentence on a run; bus is what the machine reads in GB/s. What a draft reads is not counted."""
    if counts := r["accept_counts"]:
        tokens, steps = sum(n * count for n, count in enumerate(counts, 1)), sum(counts)
        per_step = f", {tokens / max(steps, 1):.2f} tokens a step"
    else:
        per_step = ""
    print(
        f"{r['prompt_tokens']} prompt tokens in {r['prefill_seconds']:.2f} s, {r['generated_tokens']} generated at "
        f"{r['decode_tokens_per_sec']:.1f} tokens/s{per_step}: {r['bandwidth_gb_per_sec']:.1f} GB/s, "
        f"{100 * r['bandwidth_gb_per_sec'] / bus:.0f} % of the {bus:.1f} GB/s this machine reads "
        f"(load {r['load_seconds']:.1f} s, compile {r['compile_seconds']:.1f} s)",
        file=sys.stderr,
    )


def read_line() -> str | None:
    """The next line of standard input, without white space around it; None behind the last."""
    if sys.stdin is None:  # closed: <&-
        return None
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
        line.encode()  # which fails for what some locales let pass
        return line
    except EOFError:
        return None
    except UnicodeError:
        raise UsageError("what came on standard input is not UTF-8 text") from None


def converse(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, run: Run):
    """A conversation on stdin and stdout. What the cache already holds of the rendered conversation stays there."""
    ends = set(model.config.eos_ids)
    fresh = [{"role": "system", "content": args.system}] if args.system else []
    messages, cached = list(fresh), []  # cached: the tokens whose keys and values are in the cache
    tokenizer.encode_chat([*fresh, {"role": "user", "content": "Hello"}])  # complains now if there is no template
    dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
    say = lambda text: print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)  # noqa: E731
    full = "The context is full: /drop forgets the oldest message and its answer, /reset all of them."
    commands = "Type a message; /drop forgets the oldest, /reset all of them, /exit ends."
    say(commands)
    for line in tp.lines(read_line):
        if line == "/exit":
            return
        if line in ("/reset", "/drop"):
            del messages[len(fresh) : len(fresh) + 2 if line == "/drop" else None]
            say(f"{len(messages) - len(fresh)} messages left.")
        elif re.fullmatch(r"/\w+", line):
            say(commands)
        elif line:
            messages.append({"role": "user", "content": line})
            ids = tokenizer.encode_chat(messages)
            room = len(model.rope) - len(ids)
            if room < 1:
                alone = f"That takes {len(ids)} tokens, and the context has {len(model.rope)}: shorten it."
                say(full if len(messages) > len(fresh) + 1 else alone)
                messages.pop()
                continue
            same = 0
            while same < min(len(cached), len(ids) - 1) and cached[same] == ids[same]:
                same += 1
            del cached[same:]
            answer, times = [], []

            def answers(ids=ids, same=same, room=room, answer=answer, times=times) -> Iterator[int]:
                for (i,) in chain.from_iterable(run(ids, same, min(args.max_new_tokens, room))):
                    times.append(time.perf_counter())
                    cached.extend(answer[-1:] or ids[same:])
                    if i in ends:
                        return
                    answer.append(i)
                    yield i

            interrupted = False
            try:
                for piece in stream(tokenizer, answers()):
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:  # stops the answer, not the conversation
                interrupted = True
            print(flush=True)
            if len(times) > 1:
                say(f"{len(times)} tokens, {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s")
            if len(answer) == room:
                say(full)
            if interrupted and not answer:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": tokenizer.decode(answer)})


if __name__ == "__main__":
    with tp.ranks():
        run(main, LESS)
