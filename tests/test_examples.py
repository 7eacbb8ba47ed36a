"""The examples in docstrings are right. Those in RUN run on a tiny model. In all others, every function, method and
attribute exists, and the arguments fit. Commands use only options that their script has.

An example is an indented block of Python that calls something.
"""

import ast
import builtins
import contextlib
import importlib
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
import torch

from converters.checkpoint_path import ensure_converted
from engine.runner import ModelRunner
from engine.sampling_params import SamplingParams
from formats import Int8
from layers.kv_cache import KVCache
from llm import LLM, load
from scripts.benchmarking.speed import random_linear
from tests.test_readme import PAGES, sources
from tests.tiny import call_main, write_folder
from utils.files import ROOT

RUN = (  # other examples need a GPU or more files, or are part of a longer function
    "checkpoint.py", "cli/interrupts.py", "converters/convert_folder.py", "converters/hf_config.py",
    "converters/checkpoint_path.py", "engine/chat.py", "engine/generation.py", "engine/runner.py", "engine/sampler.py",
    "engine/scheduler.py", "engine/sequence.py", "engine/speculate.py", "evaluation/scoring.py", "layers/aten.py",
    "kernels/capture.py", "llm.py", "text/chat_template.py", "text/prompt.py", "text/tokenizer.py",
    "text/tokenizer_files.py", "utils/machine.py",
)
FOLDERS = ("checkpoints/M", "checkpoints/SmolLM2-135M-Instruct", "checkpoints/meta-llama/Llama-3.2-1B")


def docstrings(path: Path) -> list[str]:
    """Returns the docstrings of a file, indented like its code. (From a docstring of one line and an example, ast would
    also remove the indentation of the example.)"""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    found = [node for node in nodes if ast.get_docstring(node) is not None]
    return [re.sub(rf"^ {{{n.body[0].col_offset}}}", "", ast.get_docstring(n, clean=False), flags=re.M) for n in found]


def examples(path: Path) -> list[str]:
    blocks = [block for text in docstrings(path) for block in re.findall(r"(?:^ {4}.*\n?|^\n(?= ))+", text, re.M)]
    return [block for block in map(textwrap.dedent, blocks) if is_example(block)]


def is_example(block: str) -> bool:
    try:
        return any(isinstance(node, ast.Call) for node in ast.walk(ast.parse(block)))
    except SyntaxError:
        return False


EXAMPLES = [
    pytest.param(str(path.relative_to(ROOT)), block, id=f"{path.relative_to(ROOT)}-{i}")
    for path in sources()
    for i, block in enumerate(examples(path))
]
COMMANDS = [
    (script, arguments)
    for text in [*(text for path in sources() for text in docstrings(path)), *(page.read_text() for page in PAGES)]
    for script, arguments in re.findall(r"^    (?:python|torchrun.*?) ([\w/-]+\.py)([^#\n]* --[^#\n]*)", text, re.M)
]


def test_there_are_examples():
    assert {example.values[0] for example in EXAMPLES} >= set(RUN)
    assert len(COMMANDS) > 40


def load_module(file: str):
    return importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


# ---- Examples that run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The paths that examples name. Each of FOLDERS has a converted model."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        write_folder("llama2", tree / folder, max_position_embeddings=2048)
        ensure_converted(tree / folder)
    (tree / "config.json").symlink_to(tree / "checkpoints/M/config.json")
    return tree


@pytest.fixture(scope="module")
def given(tree) -> dict:
    """Names that examples use without a definition or an import."""
    model, tokenizer = load(tree / "checkpoints/M/model.pth", device="cpu")
    kv_cache, ids = KVCache(model, batch_size=1, max_seq_len=300), tokenizer.encode("Once upon a time")
    runner = ModelRunner(model, kv_cache)
    prompt = torch.tensor([ids])
    return {
        "LLM": LLM, "Path": Path, "json": json, "torch": torch, "KVCache": KVCache, "SamplingParams": SamplingParams,
        "model": model, "tokenizer": tokenizer, "kv_cache": kv_cache, "runner": runner, "device": model.device,
        "params": SamplingParams(), "logits": torch.randn(1, 320),
        "prompt": prompt, "tokens": prompt[:, :1], "start_pos": torch.tensor([0]), "prompt_ids": ids, "token_ids": ids,
        "ids": ids, "token": ids[0], "sequences": [], "text": "Once upon a time. " * 9, "template": "{{ eos_token }}",
        "messages": [{"role": "user", "content": "Hello"}],
        "linear": random_linear((32, 64), Int8(), model.device, torch.bfloat16), "x": torch.randn(2, 64).bfloat16(),
    }


@pytest.mark.parametrize("file, example", [example for example in EXAMPLES if example.values[0] in RUN])
def test_example_runs(file, example, tree, given, monkeypatch):
    monkeypatch.chdir(tree)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # limit_threads then leaves the threads of this process as they are
    torch.manual_seed(0)
    with torch.inference_mode():
        exec(compile(example, file, "exec"), vars(load_module(file)) | given)


# ---- Examples that are read -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> dict[str, list]:
    """name -> functions and classes of the project with this name, and members of its classes and of some others"""
    found: dict[str, list] = {}
    for name in re.findall(r"\bself\.(\w+)", " ".join(path.read_text() for path in sources())):
        found[name] = []
    owners = [load_module(str(path.relative_to(ROOT))) for path in sources()]
    owners += {kind for module in owners for kind in vars(module).values() if inspect.isclass(kind)}
    for owner in [*owners, builtins, torch, Path]:
        for name in {*dir(owner), *getattr(owner, "__annotations__", {})}:
            found.setdefault(name, []).append(getattr(owner, name, None))
    return found


@pytest.mark.parametrize("file, example", [example for example in EXAMPLES if example.values[0] not in RUN])
def test_example_fits(file, example, known):
    nodes, names = list(ast.walk(ast.parse(example))), vars(load_module(file))
    assigned = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        assert not isinstance(node, ast.Attribute) or node.attr in known, node.attr
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        found = [names[name]] if isinstance(node.func, ast.Name) and name in names else known.get(name, [])
        assert name in assigned or any(takes(function, node) for function in found), ast.unparse(node)


def takes(function, node: ast.Call) -> bool:
    """Returns whether function, or a method without its self, takes the arguments of node. The argument ... stands for
    any."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not callable, or written in C
        return callable(function)
    if any(isinstance(arg, ast.Starred) for arg in node.args):
        return True
    args = [arg for arg in node.args if not (isinstance(arg, ast.Constant) and arg.value is ...)]
    bind = signature.bind if len(args) == len(node.args) else signature.bind_partial
    for with_self in ([], [None]):
        with contextlib.suppress(TypeError):
            bind(*with_self, *args, **{keyword.arg: None for keyword in node.keywords})
            return True
    return False


# ---- Commands -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, arguments", COMMANDS, ids=[script for script, _ in COMMANDS])
def test_command_has_only_options_of_its_script(script, arguments, capsys):
    main = load_module(script).main
    first = arguments.split()[:1]
    if script != "scripts/benchmark.py":
        first = []  # only benchmark.py has subcommands
    elif first[0].startswith("--"):
        first = ["speed"]
    with pytest.raises(SystemExit, match="0"):
        call_main(main, *first, "--help")
    options = re.findall(r"^  (?:-\w, )?(--\w+)", capsys.readouterr().out, re.M)
    assert set(re.findall(r"--\w+", arguments)) <= set(options)
