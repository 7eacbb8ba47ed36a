"""The pages are right. Commands and the Python example run on tiny random checkpoints, scripts/tables.py makes the same
tables, and all files, functions and messages exist that a page, a docstring or a comment names.

Commands run in this process, because torch takes seconds to load. Only torchrun starts other processes. A shell script
runs with a python3 that records its arguments. Then this process makes the recorded calls.
"""

import ast
import io
import os
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch

import eval
import generate
import quantize
from kernels import build
from scripts import benchmark, convert_hf_checkpoint, tables, tiny_model
from tests.compiler import write_compiler
from tests.tiny import PACKAGES, call_main, convert, write_folder
from utils.files import ROOT

README, MIXTRAL, MEASUREMENTS = ROOT / "README.md", ROOT / "mixtral-moe/README.md", ROOT / "docs/measurements.md"
PAGES = [README, MIXTRAL, *sorted((ROOT / "docs").glob("*.md"))]
(M,) = re.findall(r"^    .*\bM=(checkpoints/\S+)$", README.read_text(), re.M)  # the demo's model, $M in commands
COMMANDS = [
    re.sub(r"\s+#.*", "", line.strip())
    for page in (README, MEASUREMENTS, MIXTRAL)
    for line in page.read_text().splitlines()
    if re.match(r"    (\w+=\S+ )*(python|torchrun|\./)", line)
]
ELSEWHERE = [  # commands that have test files of their own
    "demo.sh", "download.py", "convert_gguf.py", "compare_llama_cpp.py", "serve.py", "benchmark.py quantization",
    "benchmark.py speculation", "--busy",
]
MAINS = {
    "convert_hf_checkpoint.py": convert_hf_checkpoint.main,
    "quantize.py": quantize.main,
    "generate.py": generate.main,
    "eval.py": eval.main,
    "benchmark.py": benchmark.main,
    "tiny_model.py": tiny_model.main,
}
LESS = {  # added to the commands, for a model with a context of 256 tokens and for a short test
    "generate.py": ["--max_new_tokens", "4"],
    "benchmark.py": ["--max_new_tokens", "4"],
    "int4-gptq": ["--calibration_seq_length", "16"],
}
TINY_MIXTRAL = {"TINY_FAMILY": "mixtral", "MODEL_REPO": "tiny/mixtral"}  # of the scripts of mixtral-moe/
PYTHON = """#!/bin/sh
printf '%s\\0' "$@" >>"$CALLS"
echo >>"$CALLS"
"""


def copy_of_scripts(tree: Path) -> Path:
    """Makes links to the scripts in tree, and a python3 in tree/bin that only records its arguments."""
    for name in [*(path.name for path in ROOT.glob("*.py")), *PACKAGES, "scripts", "mixtral-moe", "tests"]:
        os.symlink(ROOT / name, tree / name)
    (tree / "bin").mkdir()
    (tree / "bin/python3").write_text(PYTHON)
    (tree / "bin/python3").chmod(0o755)
    return tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """copy_of_scripts with a tiny model in M, and the files that commands read."""
    tree = copy_of_scripts(tmp_path_factory.mktemp("tree"))
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}  # as many as the demo's model has
    write_folder("llama3", tree / M, **heads)
    convert(tree / M)
    (tree / "README.md").symlink_to(README)
    (line,) = re.findall(r"^    (printf .* > prompts.txt)$", README.read_text(), re.M)
    subprocess.run(line, shell=True, cwd=tree, check=True)
    assert (tree / "prompts.txt").read_text().count("\n") == 2
    return tree


@pytest.mark.parametrize("command", [c for c in COMMANDS if not any(word in c for word in ELSEWHERE)])
def test_command(command, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    if "--cold_start" in command and build.load_cpp_kernels():  # with an empty cache, so the kernels are compiled
        monkeypatch.setenv("CXX", write_compiler(tmp_path / "compiler"))
    command = command.replace("meta-llama/Llama-3.2-1B", Path(M).name).replace("TinyLlama-1.1B", f"{M}/config.json")
    command = command.replace("$M", M)
    if command.startswith("torchrun"):
        run_torchrun(f"{command} --max_new_tokens 4")
        return
    calls = calls_of_script(command, tree) if "./" in command else [shlex.split(command)[1:]]
    assert calls
    for arguments in calls:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
        run_python(arguments)
        assert capsys.readouterr().out


def run_torchrun(command: str):
    command = command.replace("torchrun", f"{sys.executable} -m torch.distributed.run", 1)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout


def calls_of_script(command: str, tree: Path) -> list[list[str]]:
    """Returns the arguments with which a shell script calls Python."""
    log = tree / "calls"
    log.write_text("")
    env = os.environ | {"CALLS": str(log), "PATH": f"{tree}/bin:{os.environ['PATH']}"}
    if "mixtral" in command:
        env |= TINY_MIXTRAL
    subprocess.run(command, shell=True, env=env, check=True)
    calls = [line.split("\0")[:-1] for line in log.read_text().splitlines()]
    return [arguments for arguments in calls if "scripts/download.py" not in arguments]


def run_python(arguments: list[str], less: dict[str, list[str]] = LESS):
    """Calls the main of the script in arguments, with the arguments that less adds."""
    names = [Path(word).name for word in arguments]
    name = next(name for name in names if name in MAINS)  # a launcher may stand before the script
    more = [option for word in names for option in less.get(word, [])]
    call_main(MAINS[name], *arguments[names.index(name) + 1 :], *more)


def test_there_are_commands():
    assert len(COMMANDS) > 10


def test_python_example(tree, monkeypatch, capsys):
    monkeypatch.chdir(tree)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    torch.manual_seed(1)  # a seed with which no end token comes early
    exec(compile(example, "README.md", "exec"), {})
    assert len(capsys.readouterr().out) > 50  # texts and an answer


def test_tables():
    texts = {page: page.read_text() for page in tables.PAGES}
    for page, text in texts.items():
        assert tables.with_tables(text) == text, f"{page} is not what scripts/tables.py makes"
    for name in tables.TABLES:
        assert sum(text.count(f"<!-- {name} -->") for text in texts.values()) == 1, name


def test_messages():
    """Each message in the last table of docs/platforms.md is in the code, where values may interrupt it."""
    code = " ".join(path.read_text() for path in sources())
    rows = (ROOT / "docs/platforms.md").read_text().partition("## When it says")[2].splitlines()
    messages = re.findall(r"`([^`]+)`", "\n".join(row.split("|")[1] for row in rows if row.startswith("| `")))
    assert len(messages) > 5
    for message in messages:
        pattern = ".+".join(re.escape(piece) for piece in message.split("..."))
        assert re.search(pattern, code), message


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_pages_exist(page):
    """The file and the heading of each link exist, each `FILE` exists, and in `FILE: NAME` it contains the name."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)", linked.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for quoted in re.findall(r"`([^`]+)`", prose):
        file, _, names = " ".join(quoted.split()).partition(": ")
        if re.fullmatch(r"[\w/-]+\.(py|sh|h|cpp)", file):
            assert (ROOT / file).is_file(), file
            code = (ROOT / file).read_text()
            for name in names.split(", ") if names else []:
                assert all(re.search(rf"\b{part}\b", code) for part in name.split(".")), quoted


def test_names_in_comments_exist():
    """Docstrings and comments, also in tests and C++, name files and folders that exist and, in FILE: NAME and NAME
    (FILE), names in them. In Python every word with underscores is in the code, or is a test file. (C++ has such words
    in formulas.) In NAME (FILE), and in tests in FILE: NAME, a NAME has underscores or inner capitals, which ordinary
    words lack."""
    comments, code = {}, []
    for path in [*sources(), *(ROOT / "tests").glob("*.py"), *(ROOT / "kernels/csrc").iterdir()]:
        split = split_comments if path.suffix == ".py" else split_cpp_comments
        comments[path], rest = split(path.read_text())
        code.append(rest)
    files = [*comments, *(ROOT / "docs").iterdir(), *(ROOT / "scripts").glob("*.sh")]
    words = re.findall(r"\w+", " ".join(code))
    known = {*words, *(word.removesuffix("_ptr") for word in words)}  # of a kernel's pointer, the tensor's name
    known |= {path.stem for path in (ROOT / "tests").iterdir()}
    for path, text in comments.items():
        named = re.findall(r"([\w/-]+\.(?:py|sh|h|cpp|md))\b(?:: ((?:\w+, )*\w+))?", text)
        before = re.findall(r"\b(\w*[a-z0-9][_A-Z]\w*) \(([\w/-]+\.(?:py|sh|h|cpp))\)", text)
        for file, names in [*named, *((file, name) for name, file in before)]:
            if file in ("llama.cpp", "Python.h"):
                continue
            places = [folder / file for folder in (path.parent, path.parent.parent, ROOT, ROOT / "tests")]
            if path.parent == ROOT / "tests":  # in a test, the name of a tested file may lack the folder
                places += [place for place in files if f"/{place}".endswith(f"/{file}")]
                names = ", ".join(re.findall(r"\w*[a-z0-9][_A-Z]\w*", names))
            found = [place for place in places if place.is_file()]
            assert found, f"{path}: {file}"
            for name in names.split(", ") if names else []:
                assert re.search(rf"\b{name}\b", found[0].read_text()), f"{path}: {file}: {name}"
        for folder in re.findall(r"(?<![\w/.~-])((?:[\w-]+/)+)(?![\w<{*$]|\.\w)", text):
            assert any((place / folder).is_dir() for place in (path.parent, path.parent.parent, ROOT)), (path, folder)
        words = re.findall(r"\b[a-z][a-z0-9]*(?:_[a-z][a-z0-9]*)+\b(?!\.(?:md|pth|py))", text)
        assert path.suffix != ".py" or set(words) <= known, f"{path}: {set(words) - known}"


def test_sizes_of_the_code():
    """The numbers of lines in README.md are right to 5%."""
    text = README.read_text()
    spine = [ROOT / name for name in re.findall(r"^\d+\. `([\w/]+\.py)`", text, re.M)]
    code = [*sources(), *(ROOT / "kernels/csrc").iterdir()]
    groups = [("kernels", "layers", "formats"), ("converters",), ("scripts",)]
    parts = [[path for path in code if path.relative_to(ROOT).parts[0] in group] for group in groups]
    rest = [path for path in code if not any(path in part for part in parts)]
    tests = [path for path in (ROOT / "tests").iterdir() if path.suffix in (".py", ".cpp")]
    said = re.search(
        r"(\d+) files, ([\d,]+) lines in all\. .* code is ([\d,]+) lines of Python and C\+\+: kernels, layers and "
        r"weight formats ([\d,]+), converters ([\d,]+), scripts ([\d,]+), everything else ([\d,]+)\. "
        r"The tests are ([\d,]+) more",
        " ".join(text.split()),
    )
    n_files, *sizes = said.groups()
    assert int(n_files) == len(spine)
    for number, paths in zip(sizes, [spine, code, *parts, rest, tests], strict=True):
        n_lines = sum(len(path.read_text().splitlines()) for path in paths)
        assert int(number.replace(",", "")) == pytest.approx(n_lines, rel=0.05), [path.name for path in paths]


def test_index_of_tests():
    """tests/__init__.py lists every test file, and every file and folder of the project."""
    index = (ROOT / "tests/__init__.py").read_text()
    assert set(re.findall(r"\btest_\w+", index)) == {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    listed = {part for row in re.findall(r"^    (\S.*?)  ", index, re.M) for part in row.split(", ")}
    assert {path.name for path in ROOT.glob("*.py")} | {f"{name}/" for name in (*PACKAGES, "scripts")} <= listed
    assert all((ROOT / part).exists() for part in listed if "." in part or "/" in part)


def split_comments(text: str) -> tuple[str, str]:
    """Returns (docstrings and comments, everything else) of a Python file, each on one line."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    docstring_lines = {node.body[0].lineno for node in nodes if ast.get_docstring(node) is not None}
    comments, code = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstring_lines
        is_comment = token.type == tokenize.COMMENT
        (comments if is_docstring or is_comment else code).append(token.string.lstrip("#"))
    return " ".join(" ".join(comments).split()), " ".join(code)


def split_cpp_comments(text: str) -> tuple[str, str]:
    """Returns the same for a C++ file."""
    parts = [line.partition("//") for line in text.splitlines()]
    return " ".join(comment.strip() for _, _, comment in parts), " ".join(code for code, _, _ in parts)


def test_imports_go_one_way():
    """Each file imports only from files above it in the list of how_it_works.md and, in some folders, in that of
    __init__.py."""
    text = (ROOT / "docs/how_it_works.md").read_text()
    names = [Path(name).stem for name in re.findall(r"^    (\w+(?:\.py|/)) ", text, re.M)]
    assert names[0] == "utils" and names[-1] == "generate"
    everything = {path.stem for path in ROOT.glob("*.py")} | set(PACKAGES)
    assert {*names, "eval", "gptq", "quantize"} == everything
    for i, name in enumerate(names):
        folder = ROOT / name
        for path in folder.rglob("*.py") if folder.is_dir() else [ROOT / f"{name}.py"]:
            nodes = [*ast.walk(ast.parse(path.read_text()))]
            modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
            assert {module.split(".")[0] for module in modules} & everything <= {*names[:i], name}, path
    for folder in ("cli", "engine", "evaluation", "formats", "layers", "text", "utils"):
        files = re.findall(r"^    (\w+)\.py ", (ROOT / folder / "__init__.py").read_text(), re.M)
        assert {*files, "__init__"} == {path.stem for path in (ROOT / folder).glob("*.py")}
        for i, name in enumerate(files):
            nodes = ast.walk(ast.parse((ROOT / folder / f"{name}.py").read_text()))
            imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
            imported = {node.module.split(".")[1] for node in imports if node.module.startswith(f"{folder}.")}
            imported |= {alias.name for node in imports if node.module == folder for alias in node.names}
            assert imported <= set(files[:i]), name


def sources() -> list[Path]:
    in_folders = [path for name in (*PACKAGES, "scripts") for path in (ROOT / name).rglob("*.py")]
    return [*ROOT.glob("*.py"), *in_folders]
