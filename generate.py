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
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import kernels
import quantize
from checkpoint import read_checkpoint, run
from model import Transformer, TransformerBlock, UsageError
from tokenizer import Tokenizer, load_tokenizer, stream

DEMO = Path(__file__).parent / "checkpoints/SmolLM2-135M-Instruct/model.pth"
CONVERSATION = 8192  # tokens that one holds, if the model's context does
CHUNK = 512  # prompt tokens a prefill step takes; bounds its memory


def load_model(path: Path, device: torch.device, dtype: torch.dtype, fast: bool = True) -> Transformer:
    """The model in path, on device, in dtype, in inference mode. Memory-mapped where nothing needs to change."""
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
    moved = {}  # by identity: a tied head stays tied; what quantization stores keeps its type
    for name, t in tensors.items():
        if id(t) in moved:
            continue
        moved[id(t)] = t.to(device, dtype if t.is_floating_point() and not name.endswith(".scales") else t.dtype)
        if moved[id(t)] is not t:
            kernels.advise(t, kernels.DONTNEED)  # or the file's pages would count as well
    model.load_state_dict({name: moved[id(t)] for name, t in tensors.items()}, assign=True)
    model = model.eval().requires_grad_(False)
    model.quantization = quantization and ".g".join(map(str, quantization.values()))  # int8, int4.g32 ...
    if fast and torch.device(device).type == "cpu":
        kernels.enable(model, mapped=True)
    return model


def sample(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """float32 logits [B, vocab_size] -> token ids [B]; -1 for a row that is not finite. Temperature 0 is argmax; else
    temperature, top_k and top_p (arXiv:1904.09751) apply in this order, and what is left is sampled exactly."""
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        scores = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # nothing overflows
        if top_k is not None and top_k < scores.shape[-1]:
            values, tokens = scores.topk(top_k)
            scores = torch.full_like(scores, -torch.inf).scatter(-1, tokens, values)
        if top_p is not None and top_p < 1:
            probs, order = scores.softmax(-1).sort(-1, descending=True)
            drop = probs.cumsum(-1) - probs >= top_p  # the tokens before it are enough
            scores = scores.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
        # The first token whose cumulative probability is above a random number, without a synchronisation
        wide = torch.float64 if scores.device.type in ("cpu", "cuda") else torch.float32  # some devices have no float64
        below = scores.softmax(-1).cumsum(-1, dtype=wide)
        draw = torch.rand(len(scores), 1, dtype=wide, device=scores.device) * below[:, -1:]
        token = (below <= draw).sum(-1).clamp(max=scores.shape[-1] - 1)
    return torch.where(logits.sum(-1).isfinite(), token, -1)


Step = Callable[[Tensor, Tensor], Tensor]  # (tokens [B, T], positions [T]) -> the next token of every row [B]


def build_steps(model: Transformer, sampling: dict, compile: bool, compile_prefill: bool) -> tuple[Step, Step]:
    """(prefill, decode) as plain functions. compile: on a CPU one compiled block serves all layers, which compiles in a
    third of the time of the whole step and runs as fast, and where kernels.cpp's operations do the work nothing is left
    to compile; elsewhere the whole step is compiled and captured in a graph of the device."""
    head = lambda x: sample(model.logits(x[:, -1]), **sampling)  # noqa: E731

    def prefill(tokens: Tensor, positions: Tensor) -> Tensor:
        start = int(positions[0])
        for i in range(0, tokens.shape[1], CHUNK):
            part = tokens[:, i : i + CHUNK]
            block = prefill_block if part.shape[1] > kernels.MAX_ROWS else None  # fewer have kernels of their own
            x = model.hidden(part, positions[i : i + CHUNK], start + i + part.shape[1], block)
        return head(x)

    prefill_block = torch.compile(TransformerBlock.forward, dynamic=True) if compile_prefill else None

    def decode(tokens: Tensor, positions: Tensor, block=None, head=head) -> Tensor:
        return head(model.hidden(tokens, positions, None, block))

    if not compile:
        return prefill, decode
    if model.tok_embeddings.weight.device.type != "cpu":
        return prefill, torch.compile(decode, mode="reduce-overhead", fullgraph=True)
    block = torch.compile(TransformerBlock.forward, fullgraph=True, dynamic=False)
    compiled_head = torch.compile(head, fullgraph=True, dynamic=False)
    is_fast = model.layers[0].attention.is_fast
    return prefill, lambda t, at: decode(t, at) if is_fast(t) else decode(t, at, block, compiled_head)


@torch.inference_mode()
def generate(prefill: Step, decode: Step, prompt: Tensor, start: int, max_new_tokens: int) -> Iterator[list[int]]:
    """prompt [B, T], the first of it at position start -> max_new_tokens times the next token of every row. The
    cache must have start + T + max_new_tokens - 1 places. Raises UsageError when the model's output is not finite."""
    position = torch.arange(start, start + prompt.shape[1], device=prompt.device)
    token = prefill(prompt, position)
    position = position[-1:] + 1
    for i in range(max_new_tokens):
        ids = token.tolist()  # the one synchronisation of a step
        if min(ids) < 0:
            raise UsageError("the model's logits are not finite: NaN weights, or --precision too narrow")
        yield ids
        if i + 1 < max_new_tokens:
            token = decode(token.view(-1, 1).clone(), position)
            position = position + 1


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
    add("--ignore_eos", action="store_true", help="go on after an end token, for benchmarks")
    add("--compile", action="store_true", help="compile the decode step")
    add("--compile_prefill", action="store_true", help="compile prefill too")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the last sample")
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
    for name in ("num_samples", "max_new_tokens", "batch_size", "top_k", "prompt_tokens"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, not {value}")
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
    if args.profile and (args.profile.is_dir() or not args.profile.absolute().parent.is_dir()):
        raise UsageError(f"--profile {args.profile} must be a file in a folder that exists")
    if args.compile and shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
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
        return device
    except Exception:  # each backend has its own way to be absent
        have = ["cpu"] + ([accelerator.type] if accelerator else [])
        raise UsageError(f"device {name!r} is not available here; this machine has: {', '.join(have)}") from None


def main():
    args = parse_args()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character still gets the rest
    device = pick_device(args.device)
    began = time.perf_counter()
    model = load_model(args.checkpoint_path, device, getattr(torch, args.precision), args.kernels == "auto")
    tokenizer = load_tokenizer(args.checkpoint_path.parent)
    load_seconds = time.perf_counter() - began
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(f"the tokenizer's {tokenizer.vocab_size} tokens exceed the model's {config.vocab_size}")
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    prefill, decode = build_steps(model, sampling, args.compile, args.compile_prefill)

    prompts = [] if args.conversation else read_prompts(args, tokenizer, config.vocab_size)
    room = min(config.max_seq_len, CONVERSATION) if args.conversation else max(map(len, prompts)) + args.max_new_tokens
    if room > config.max_seq_len:
        raise UsageError(
            f"{room - args.max_new_tokens} prompt tokens and {args.max_new_tokens} new ones exceed the model's "
            f"context of {config.max_seq_len}; lower --max_new_tokens or shorten the prompt"
        )
    try:
        model.setup_caches(args.batch_size, room)
    except (RuntimeError, MemoryError):  # the allocators' ways to say no
        kv = 2 * args.batch_size * room * config.n_layers * config.n_kv_heads * config.head_dim / 1e9
        raise UsageError(f"no memory for a cache of {kv:.1f}e9 numbers; lower --max_new_tokens, --batch_size") from None
    began = time.perf_counter()
    with torch.inference_mode():  # what this leaves in the cache, the prompt overwrites
        if args.compile_prefill:
            prefill(torch.zeros(args.batch_size, len(prompts[0]) if prompts else 2, dtype=torch.long, device=device),
                    torch.arange(len(prompts[0]) if prompts else 2, device=device))  # fmt: skip
        for _ in range(2 if args.compile else 0):
            decode(torch.zeros(args.batch_size, 1, dtype=torch.long, device=device), torch.tensor([0], device=device))
    stats = {"compile_seconds": time.perf_counter() - began, "load_seconds": load_seconds}
    torch.manual_seed(args.seed)
    if args.conversation:
        return converse(args, model, tokenizer, prefill, decode)
    bus = None
    for prompt in prompts:
        result = {**run_prompt(args, model, tokenizer, prefill, decode, prompt), **stats}
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            bus = bus or read_bandwidth(device) / 1e9
            report(result, bus)


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, vocab_size: int) -> list[list[int]]:
    """The prompts asked for, as token ids."""
    if args.prompt_tokens:
        generator = torch.Generator().manual_seed(args.seed)
        return [torch.randint(vocab_size, (args.prompt_tokens,), generator=generator).tolist()]
    texts = [args.prompt]
    if args.prompt_file:
        try:
            texts = [line for line in args.prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"cannot read --prompt_file {args.prompt_file}: {e}") from None
    for text in [*texts, args.system or ""]:
        if any("\ud800" <= c <= "\udfff" for c in text):  # how an argument's bytes that are not text arrive
            raise UsageError("the prompt is not valid UTF-8")
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompts = [tokenizer.encode_chat([*system, {"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    if not all(texts) or not all(prompts) or not prompts:
        raise UsageError("the prompt is empty; give some text")
    return prompts


def run_prompt(args, model: Transformer, tokenizer: Tokenizer, prefill: Step, decode: Step, prompt: list[int]) -> dict:
    """Generates num_samples times, streaming row 0, and returns DESIGN's JSON object as far as it is known here."""
    device = model.rope.device
    tokens, after = torch.tensor([prompt] * args.batch_size, device=device), () if args.chat else prompt
    ends = set() if args.ignore_eos else set(model.config.eos_ids)
    rates = []
    for sample_index in range(args.num_samples):
        rows, times = [[] for _ in range(args.batch_size)], []

        def first_row(rows=rows, times=times) -> Iterator[int]:
            """Row 0's tokens up to its end, while all rows fill up; done when every row has met an end token."""
            live = [True] * len(rows)
            for ids in generate(prefill, decode, tokens, 0, args.max_new_tokens):
                times.append(time.perf_counter())
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
            profile.export_chrome_trace(str(args.profile))
        texts = [tokenizer.decode([i for i in row if i not in ends], after) for row in rows]
        if not args.json:
            print()
            for i, text in enumerate(texts[1:], 1):
                print(f"--- row {i}\n{text}")
        if len(times) > 1:
            rates.append((len(times) - 1) / (times[-1] - times[0]))
    rate = statistics.median(rates) if rates else 0.0
    return {
        "text": texts,
        "tokens": rows,
        "prompt_tokens": len(prompt),
        "generated_tokens": sum(map(len, rows)),
        "finish_reason": ["stop" if row[-1] in ends else "length" for row in rows],
        "prefill_seconds": times[0] - began,
        "decode_tokens_per_sec": rate,
        "model_bytes": model.step_bytes(),
        "bandwidth_gb_per_sec": (model.step_bytes() + model.cache_bytes(len(prompt) + len(times) // 2)) * rate / 1e9,
        "peak_memory_bytes": peak_memory(device),
        "device": str(device),
        "precision": args.precision,
        "quantization": model.quantization,
        "accept_counts": None,
    }


def report(r: dict, bus: float):
    """One sentence on a run; bus is what the machine reads in GB/s."""
    print(
        f"{r['prompt_tokens']} prompt tokens in {r['prefill_seconds']:.2f} s, {r['generated_tokens']} generated at "
        f"{r['decode_tokens_per_sec']:.1f} tokens/s: {r['bandwidth_gb_per_sec']:.1f} GB/s, "
        f"{100 * r['bandwidth_gb_per_sec'] / bus:.0f} % of the {bus:.1f} GB/s this machine reads "
        f"(load {r['load_seconds']:.1f} s, compile {r['compile_seconds']:.1f} s)",
        file=sys.stderr,
    )


def converse(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, prefill: Step, decode: Step):
    """A conversation on stdin and stdout. What the cache already holds of the rendered conversation stays there."""
    device, ends = model.rope.device, set(model.config.eos_ids)
    fresh = [{"role": "system", "content": args.system}] if args.system else []
    messages, cached = list(fresh), []  # cached: the tokens whose keys and values are in the cache
    tokenizer.encode_chat([*fresh, {"role": "user", "content": "Hello"}])  # complains now if there is no template
    print("Type a message; /reset forgets, /exit ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UsageError("what came on standard input is not UTF-8 text") from None
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(fresh)
            cached.clear()
        elif line:
            messages.append({"role": "user", "content": line})
            ids = tokenizer.encode_chat(messages)
            room = len(model.rope) - len(ids)
            if room < 1:
                print("The context is full; /reset starts a new conversation.", file=sys.stderr)
                messages.pop()
                continue
            same = 0
            while same < min(len(cached), len(ids) - 1) and cached[same] == ids[same]:
                same += 1
            del cached[same:]
            answer = []

            def answers(ids=ids, same=same, room=room, answer=answer) -> Iterator[int]:
                tokens = torch.tensor([ids[same:]], device=device)
                for (i,) in generate(prefill, decode, tokens, same, min(args.max_new_tokens, room)):
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
            print()
            if interrupted and not answer:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": tokenizer.decode(answer)})


if __name__ == "__main__":
    run(main)
