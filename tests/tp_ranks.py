"""A rank that torchrun starts in test_tp.py. It compares and then dies, or waits for Ctrl-C.

    torchrun --standalone --nproc_per_node=2 tests/tp_ranks.py compare FOLDER RESULTS.json
    torchrun --standalone --nproc_per_node=2 tests/tp_ranks.py wait

FOLDER holds a checkpoint for each of CASES, one with a tokenizer ("whole"), and the results of one process.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as evaluation  # noqa: E402
import formats  # noqa: E402
import generate  # noqa: E402
import loading  # noqa: E402
import tp  # noqa: E402
from checkpoint import empty_model, read_checkpoint, with_tied_head  # noqa: E402
from cli.ranks import process_group  # noqa: E402
from engine import generation  # noqa: E402
from engine.runner import ModelRunner  # noqa: E402
from engine.sampling_params import SamplingParams  # noqa: E402
from formats import QuantizationConfig  # noqa: E402
from layers import collectives  # noqa: E402
from layers.kv_cache import KVCache  # noqa: E402
from model import Transformer  # noqa: E402

# name: (family, changed sizes, quantize.py's mode, numbers of ranks)
CASES = {
    "dense": ("llama3", {}, [], (2, 4)),
    "biases": ("llama-bias", {}, [], (2, 4)),
    "qwen2": ("qwen2", {}, [], (2,)),
    "q and k norms": ("qwen3", {}, [], (4,)),
    "window": ("mistral-window", {}, [], (2,)),
    "mixtral": ("mixtral", {}, [], (2, 4)),
    "qwen3-moe": ("qwen3-moe", {}, [], (2,)),
    "one kv head": ("qwen2", {"num_key_value_heads": 1}, [], (4,)),
    "gemma2": ("gemma2", {}, [], (2,)),
    "gemma3": ("gemma3", {"num_hidden_layers": 3}, [], (2,)),
    "olmo2": ("olmo2", {}, [], (2,)),
    "phi4-mini": ("phi4-mini", {}, [], (2,)),
    "smollm3": ("smollm3", {"num_hidden_layers": 3}, [], (2,)),
    "granite": ("granite", {}, [], (2,)),
    "glm4": ("glm4", {}, [], (2,)),
    "gpt-oss": ("gpt-oss", {}, [], (2,)),
    "qwen2-moe": ("qwen2-moe", {}, [], (2,)),
    "dbrx": ("dbrx", {}, [], (2,)),
    "parallel blocks": ("cohere", {}, [], (2,)),
    "no gate": ("starcoder2", {}, [], (2,)),
    "int8 no gate": ("arcee", {}, ["int8"], (2, 4)),
    "alibi": ("baichuan 13B", {}, [], (2,)),
    "int8": ("llama3", {}, ["int8"], (2, 4)),
    "quantized embedding": ("qwen2", {"tie_word_embeddings": True}, ["int4", "--groupsize", "32"], (2,)),
    "int4 g32": ("llama-bias", {}, ["int4", "--groupsize", "32"], (4,)),
    "int4 g64": ("llama3", {}, ["int4-hqq", "--groupsize", "64"], (2, 4)),
    "int4 g128": ("qwen3", {}, ["int4", "--groupsize", "128"], (2, 4)),
    "int8 mixtral": ("mixtral", {}, ["int8"], (2,)),
    "int4 gpt-oss": ("gpt-oss", {"intermediate_size": 128}, ["int4", "--groupsize", "32"], (2,)),
    "fp8": ("llama-bias", {}, ["fp8"], (2,)),
    "mxfp4": ("llama3", {}, ["mxfp4"], (4,)),
    "act-order": ("llama-bias", {}, ["int4", "--groupsize", "32"], (2, 4)),
    "act-order olmo2": ("olmo2", {}, ["int4", "--groupsize", "32"], (2,)),
    "int4 qwen3-moe": ("qwen3-moe", {}, ["int4", "--groupsize", "32"], (4,)),
}
MODES = {mode for _, _, options, _ in CASES.values() for mode in options[:1]}
CASES |= {mode: ("llama3", {}, [mode], (2,)) for mode in formats.FORMAT_BY_MODE if mode not in MODES}  # of new formats
COMPILED = "mixtral"  # the case that 2 ranks also run with torch.compile, without kernels
GREEDY, SPECULATE = ["--temperature", "0"], ["--ignore_eos", "--prompt", "ab ab ab", "--temperature", "0"]
COMMANDS = {  # name: (arguments of generate.py besides the checkpoint, standard input); FOLDER: the files
    "rows": (["--json", "--batch_size", "3", "--ignore_eos", *GREEDY], None),
    "sampling": (["--json", "--num_samples", "3", "--top_p", "0.9"], None),
    "lookup": (["--json", "--prompt_lookup", *SPECULATE], None),
    "draft": (["--json", "--draft_checkpoint_path", "DRAFT", *SPECULATE], None),
    "whole draft": (["--json", "--draft_checkpoint_path", "DRAFT", "--draft_tp", "off", "--ignore_eos"], None),
    "conversation": (["--interactive", *GREEDY], "Hello\n/reset\nHow are you?\n"),
    "its commands": (
        ["--chat", *GREEDY, "--max_new_tokens", "1"],
        "Hello\n/save FOLDER/said\n/continue\nWho?\n/drop\n/load FOLDER/said\n//drop it\n/continue\n/exit\nHi\n",
    ),
    "text": (["--batch_size", "2", "--profile", "PROFILE"], None),
    "folder": (["--checkpoint_path", "UNCONVERTED", *GREEDY], None),
}
N_ROWS, N_PROMPT, N_NEW = 3, 12, 20
CPU = torch.device("cpu")


def run_command(main, arguments: list, stdin: str | None = None) -> str:
    """Returns the stdout of main."""
    out = io.StringIO()
    sys.argv[1:], sys.stdin = map(str, arguments), io.TextIOWrapper(io.BytesIO((stdin or "").encode()))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        main()
    return out.getvalue()


def run_commands(folder: Path) -> dict[str, str]:
    """Returns the stdout of each of COMMANDS, and a perplexity."""
    path, results = folder / "whole/model.pth", {}
    files = {"PROFILE": folder / "trace.json", "DRAFT": path, "UNCONVERTED": folder / "unconverted"}
    common = ["--checkpoint_path", path, "--precision", "float32", "--device", "cpu"]
    for name, (arguments, stdin) in COMMANDS.items():
        arguments = [files.get(argument, argument) for argument in arguments]
        stdin = stdin and stdin.replace("FOLDER", str(folder))
        results[name] = run_command(generate.main, [*common, "--max_new_tokens", 24, *arguments], stdin)
    text = ["--text_file", path.parent / "config.json", "--max_seq_length", 128]
    results["perplexity"] = run_command(evaluation.main, [*common, *text])
    return results


def compare(folder: Path) -> dict:
    """Returns for each case how far the logits of all ranks are from those of one process, and whether tokens match."""
    results = {}
    for name, (_, _, _, sizes) in CASES.items():
        if collectives.world_size() in sizes:
            is_compiled = name == COMPILED and collectives.world_size() == 2
            results[name] = compare_case(folder / name / "model.pth", is_compiled)
    if collectives.world_size() == 2:
        results["commands"] = run_commands(folder)
    return results


@torch.inference_mode()
def compare_case(path: Path, is_compiled: bool) -> dict:
    """Returns on rank 0 how all ranks compare with one process, which is rank 0 alone, and {} on other ranks.
    is_compiled: whether ranks without kernels, through torch.compile, must give the same tokens, too."""
    one, ours = load(path, torch.float32, sharded=False), load(path, torch.float32)
    prompt = make_prompt()
    all_logits = collectives.gather_objects(logits_of(ours, prompt))
    torch.manual_seed(tp.dist.get_rank())
    sampled = collectives.gather_objects(tokens_of(ours, prompt, SamplingParams(temperature=1.0)))
    greedy = [tokens_of(ours, prompt)]
    if is_compiled:
        greedy.append(tokens_of(load(path, torch.float32, use_kernels=False), prompt, compile=True))
    expected_tokens = tokens_of(one, prompt)  # on every rank, since a step broadcasts the tokens of rank 0
    all_decoded = collectives.gather_objects(decoded_logits(load(path, torch.bfloat16), prompt[:, :8]))
    if tp.dist.get_rank() > 0:
        return {}
    expected = logits_of(one, prompt)
    n_kv_heads = [KVCache(model, 1, 1).layers[0].k.shape[1] for model in (one, ours)]
    return {
        "error": max(relative_error(logits, expected) for logits in all_logits),
        "errors in bfloat16": errors_in_bfloat16(path, one, prompt[:, :8], all_decoded),
        "same": greedy == [expected_tokens] * len(greedy),
        "agreed": len(set(map(str, sampled))) == 1,
        "kv heads": n_kv_heads[1] * collectives.world_size() / n_kv_heads[0],
        **bytes_read(path),
    }


def make_prompt() -> Tensor:
    return torch.randint(3, 97, (N_ROWS, N_PROMPT), generator=torch.Generator().manual_seed(0))


def load(path: Path, dtype: torch.dtype, use_kernels: bool = True, sharded: bool = True) -> Transformer:
    return loading.load_model(path, CPU, dtype, use_kernels=use_kernels, sharded=sharded)


def logits_of(model: Transformer, tokens: Tensor) -> Tensor:
    start_pos, kv_cache = torch.zeros(len(tokens), dtype=torch.long), KVCache(model, *tokens.shape)
    return model(tokens, start_pos, kv_cache)


def tokens_of(model: Transformer, prompt: Tensor, params=SamplingParams(), compile=False) -> list[list[int]]:  # noqa: B008
    runner = ModelRunner(model, KVCache(model, N_ROWS, N_PROMPT + N_NEW), params, compile)
    return list(generation.DecodeLoop(runner).decode_tokens(prompt, N_NEW))


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x - exact).norm() / exact.norm()).item()


def errors_in_bfloat16(path: Path, exact: Transformer, tokens: Tensor, of_ranks: list[Tensor]) -> dict[str, float]:
    """Returns how far the logits of decode steps are from those of exact: for one process with kernels, one without,
    and for of_ranks, the logits of all ranks. Each is a median over tokens, since a rounding error can send a few
    tokens to another expert."""
    expected = decoded_logits(exact, tokens)

    def error(logits: Tensor) -> float:
        differences = (logits - expected).norm(dim=-1)  # [B, T]
        return (differences / expected.norm(dim=-1)).median().item()

    def error_of_one(use_kernels: bool) -> float:
        return error(decoded_logits(load(path, torch.bfloat16, use_kernels, sharded=False), tokens))

    return {"kernels": error_of_one(True), "PyTorch": error_of_one(False), "ranks": max(map(error, of_ranks))}


def decoded_logits(model: Transformer, tokens: Tensor) -> Tensor:
    """Returns the logits of tokens [B, T], decoded one by one."""
    kv_cache, logits = KVCache(model, *tokens.shape), []
    for i, token in enumerate(tokens.split(1, dim=1)):
        logits.append(model(token, torch.full((len(tokens),), i), kv_cache))
    return torch.cat(logits, dim=1)


class BytesRead(TorchDispatchMode):
    """Counts the bytes that operations copy from some tensors."""

    def __init__(self, tensors):
        super().__init__()
        self.storages, self.total = {t.untyped_storage().data_ptr() for t in tensors}, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False, so that PyTorch does not import its compiler, which takes longer than a case."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if args and self.is_watched(args[0]) and isinstance(out, Tensor) and not self.is_watched(out):
            self.total += out.nbytes
        return out

    def is_watched(self, t) -> bool:
        return isinstance(t, Tensor) and t.untyped_storage().data_ptr() in self.storages


def bytes_read(path: Path) -> dict:
    """Returns the bytes that this rank reads from the file, those that it needs, and those of all sharded tensors."""
    config, quantization, tensors = read_checkpoint(path)
    tensors = with_tied_head(config, tensors)
    model = empty_model(config, QuantizationConfig.from_dict(quantization))
    shard_tensor = tp.build_shard_fn(model)
    with BytesRead(tensors.values()) as read:
        parts = {name: shard_tensor(name, t) for name, t in tensors.items()}
    cut = [name for name, part in parts.items() if part is not tensors[name]]
    held = sum(parts[name].nbytes for name in cut)
    return {"read": read.total, "held": held, "cut": sum(tensors[name].nbytes for name in cut)}


def wait():
    print("pid", collectives.gather_objects(os.getpid()), flush=True)
    while True:
        collectives.gather_objects(0)


def main():
    job, *arguments = sys.argv[1:]
    with process_group():
        torch.set_num_threads(1)
        if job == "compare":
            folder, out = map(Path, arguments)
            results = compare(folder)
            if tp.dist.get_rank() == 0:
                out.write_text(json.dumps(results))
            collectives.gather_objects("done")
            if tp.dist.get_rank() == 1:
                raise RuntimeError("this rank dies")
        wait()


if __name__ == "__main__":
    main()
