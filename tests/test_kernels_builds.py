"""The C++ kernels are built, cached and loaded correctly, compute correctly on other CPUs, and are not needed to
run."""

import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels.build
from config import ACTIVATIONS
from formats import FORMATS, Int4, Int8, Unquantized
from formats.cpu_layouts import ACT_GROUP_SIZE, CPU_BLOCK_N
from formats.integers import join_groups, split_groups
from kernels.schema import (
    CLAMPED_SILU_ALPHA,
    CLAMPED_SILU_LIMIT,
    INVALID_TOKEN,
    MAX_CPU_TOKENS,
    SCHEMAS,
    SMALLEST_TEMPERATURE,
)
from kernels.triton.elements import MAGIC_NUMBERS
from layers import aten, packing
from layers.backend import cpu_backend
from layers.experts import ExpertsDown
from layers.packing import pack_weights
from model import DTYPES
from scripts.kernel_checks import error_bounds as bounds
from scripts.kernel_checks.exact_results import CPU_FORMATS, make_linear
from tests.compiler import write_compiler
from tests.cpu_kernels import built
from tests.kernel_loader import load_kernels
from utils.files import ROOT

# of what the kernels compute
TESTS = [f"tests/test_kernels{part}.py" for part in ("", "_attention", "_experts", "_sampling")]
CASES = "one_thread and not 4-4-8 and not 2-1-256"
COMPILING = "compiling kernels/csrc for this machine, once\n"
CPP_TYPES = {  # type of an argument in kernels/schema.py -> type of the parameter in csrc/ops.cpp
    "Tensor": "Tensor", "Tensor?": "OptTensor", "int": "int64_t", "float": "double", "bool": "bool",
    "ScalarType": "ScalarType", "str": "StringHandle", "str?": "OptString",
}
VNNI_CASES = "one_thread and (test_linear[ or test_linear_of) and not unquantized and not fp8"


@built
def test_names_that_cpp_does_not_know(library):
    """C++ refuses them. Part of a name is no name."""
    x, w = torch.randn(1, 32), make_linear(16, 32, Unquantized(), torch.float32)
    for name in ("Int", "nt8", "Int8, Int4", ""):
        with pytest.raises(RuntimeError, match=f"'{name}' is no weight format"):
            torch.ops.gptfast_cpu.dequantize(**w.kernel_arguments() | {"format": name}, k=32, dtype=torch.float32)
        with pytest.raises(RuntimeError, match=f"'{name}' is no activation"):
            torch.ops.gptfast_cpu.activate(x, name, True)


@built
def test_names_are_freed(library):
    """Calls of an operation with a name take no more memory, not even the bytes of one std::string each."""
    statm, n_calls = Path("/proc/self/statm"), 100_000
    if not statm.exists():
        pytest.skip("the system has no /proc/self/statm")

    def memory_after(n: int) -> int:
        for _ in range(n):
            torch.ops.gptfast_cpu.activate(x, "silu", True)
        return int(statm.read_text().split()[1]) * resource.getpagesize()

    x = torch.zeros(1, 2)
    before = memory_after(1000)
    assert memory_after(n_calls) - before < 32 * n_calls


@built
def test_a_format_without_cpp_code():
    class NotInCpp(Int4):
        pass

    linear = make_linear(33, 72, NotInCpp(32), torch.float32)
    expected = linear.dequantize(torch.float32)
    pack_weights([linear], torch.float32)
    assert linear.format == Unquantized() and torch.equal(linear.weight, expected)


def test_cpp_has_pythons_numbers():
    """Sources have these numbers only by name, and a library with other numbers has another name in the cache."""
    headers = ("weights.h", "activation.h", "sampling.h")
    weights_h, activation_h, sampling_h = ((kernels.build.SOURCES / name).read_text() for name in headers)
    sizes = {"MAX_CPU_TOKENS": MAX_CPU_TOKENS, "BLOCK_N": CPU_BLOCK_N, "ACT_GROUP_SIZE": ACT_GROUP_SIZE}
    parameters = {"CLAMPED_SILU_ALPHA": CLAMPED_SILU_ALPHA, "CLAMPED_SILU_LIMIT": CLAMPED_SILU_LIMIT}
    sampling = {"INVALID_TOKEN": INVALID_TOKEN, "SMALLEST_TEMPERATURE": SMALLEST_TEMPERATURE}
    assert all(f"constexpr int64_t {name} = GPTFAST_{name};" in weights_h for name in sizes)
    assert all(f"constexpr float {name} = GPTFAST_{name};" in activation_h for name in parameters)
    assert all(f" {name} = GPTFAST_{name};" in sampling_h for name in sampling)
    for name, ours in (sizes | parameters | sampling).items():
        assert f"-DGPTFAST_{name}={ours}" in kernels.build.compiler_flags()


def compare_parameters(ops_cpp: str):
    """Compares the parameters of the functions that csrc/ops.cpp registers with the schemas in kernels/schema.py: types
    and names, in their order. PyTorch passes arguments to C++ by position, and compares only their number."""
    for name in re.findall(r"TORCH_BOX\(&(\w+)\)", ops_cpp):
        parameters = re.search(rf"^\S.* {name}\(([^()]*)\) {{$", ops_cpp, re.M)[1]
        theirs = [" ".join(parameter.split()) for parameter in parameters.split(",")]
        arguments = re.sub(r"\(\w!\)|\*, ", "", SCHEMAS[name])  # without (a!), which marks a result, and without *
        arguments = [argument.split() for argument in re.match(r"\w+\((.*)\) ->", arguments)[1].split(", ")]
        assert theirs == [f"{CPP_TYPES[kind]} {argument}" for kind, argument in arguments], name


def test_functions_take_the_arguments_of_the_schemas():
    """They take them in the same order, and every operation of the CPU has a function."""
    ops_cpp = (kernels.build.SOURCES / "ops.cpp").read_text()
    compare_parameters(ops_cpp)
    assert {*re.findall(r'm.impl\("(\w+)", TORCH_BOX\(&\1\)\);', ops_cpp)} == SCHEMAS.keys()
    changes = [
        ("double softcap, double clip", "double clip, double softcap"),
        ("int64_t k, ScalarType dtype", "double k, ScalarType dtype"),
        ("double top_p, double min_p)", "double top_p)"),
    ]
    for change in changes:
        assert change[0] in ops_cpp
        with pytest.raises(AssertionError):
            compare_parameters(ops_cpp.replace(*change))


def test_the_schema_that_the_docstring_shows():
    """It is fused_linear's, but for the notes behind the lines."""
    shown = re.search(r"fused_linear\(.*? -> Tensor", kernels.schema.__doc__, re.S)[0].splitlines()
    assert " ".join(re.split(" {3,}", line.strip())[0] for line in shown) == SCHEMAS["fused_linear"]


@built
def test_formats_and_activations_are_the_same_in_both_languages():
    library = kernels.build.load_cpp_kernels()
    formats = {format_class.__name__: format_class for format_class in FORMATS}
    cpp_formats, cpp_activations = kernels.build.cpp_formats(library), kernels.build.cpp_activations(library)
    assert len(cpp_formats) > 5 and formats.keys() >= {*cpp_formats}
    assert len(cpp_activations) > 4 and {*ACTIVATIONS} >= {*cpp_activations}
    for name in cpp_formats:
        assert library.format_elements_per_byte(name.encode()) == formats[name].elements_per_byte


@built
def test_limits_of_fused_linear_are_those_of_the_table():
    """The table at the top of layers/backend.py, for this CPU: up to how many tokens the kernels multiply."""
    if os.environ.get("CXXFLAGS") or os.uname().machine != "x86_64":
        return
    flags = re.search(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.M)[0].split()
    has_amx = bool(kernels.build.load_cpp_kernels().has_amx_bf16())

    def limit(dtype: torch.dtype, format, model_is_quantized: bool) -> float:
        is_bf16 = dtype == torch.bfloat16
        rounds_to_int8 = type(format).__name__ in ("Int8", "Int4", "GroupedInt8", "MXFP4")
        if has_amx and is_bf16:
            return 64
        if "avx512_bf16" in flags and is_bf16 and not rounds_to_int8:
            return math.inf
        if "avx2" in flags and not has_amx and dtype.itemsize == 2 and rounds_to_int8:
            return math.inf
        if model_is_quantized:
            return 64
        return 8 if "avx512f" not in flags else 64 if is_bf16 else 32

    for dtype, format in product(DTYPES, CPU_FORMATS):
        for model_is_quantized in {True, format.is_quantized}:
            backend = cpu_backend(dtype, format, model_is_quantized)
            assert backend.token_limits["fused_linear"] == limit(dtype, format, model_is_quantized), (dtype, format)


@built
@pytest.mark.parametrize("march", ["x86-64-v3", "x86-64-v3 -mavxvnni", "x86-64"])
def test_without_this_cpus_instructions(march):
    """The tests of the kernels pass on the code for CPUs with only AVX2, for CPUs of any kind, and for CPUs with AVX2
    and AVX-VNNI, which only products of bytes use.

    To save time, heads have 64 and 128 elements, which the code names, or one other size, since all sizes use the same
    instructions. How threads share work is not tested again, since that code is the same everywhere. -O1 compiles
    faster than -O3, and with -O0 the tests would take longer."""
    if os.environ.get("CXXFLAGS") or os.uname().machine != "x86_64":
        return
    needs_vnni = "avxvnni" in march
    if needs_vnni and "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-VNNI")
    optimization, cases = ("-O0", VNNI_CASES) if needs_vnni else ("-O1", CASES)
    env = os.environ | {"CXXFLAGS": f"-march={march} {optimization}", "OMP_NUM_THREADS": "1"}
    # Without conftest.py, whose fixtures import transformers, which takes seconds
    options = ["--noconftest", "-p", "tests.cpu_kernels", "-k", cases]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *options, *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def build_in_a_process(expected: bool, **env: str) -> str:
    """Loads the kernels in a process with this environment. Returns its stderr."""
    with tempfile.NamedTemporaryFile("r") as err:
        is_loaded = load_kernels(env, Path(err.name))
        said = err.read()
    assert is_loaded is expected, said
    return said


def test_builds(tmp_path, monkeypatch):
    """Several processes that build at the same time all get the library. A broken one is built again. Once built, a
    library needs no compiler, but is used only with the flags that it was built with."""
    script = write_compiler(tmp_path / "compiler")
    cxx = f"{script} -O0"  # a command with an argument
    env = {"XDG_CACHE_HOME": str(tmp_path), "CXX": cxx, "CXXFLAGS": "-O0", "TMPDIR": str(tmp_path)}
    with monkeypatch.context() as context:
        context.setenv("CXXFLAGS", "-O0")
        library = tmp_path / "gpt-fast" / kernels.build.library_name(cxx.split())
    library.parent.mkdir()
    library.touch()
    with ThreadPoolExecutor() as pool:
        assert [*pool.map(lambda _: build_in_a_process(True, **env), range(2))] == [COMPILING, COMPILING]
    assert [*library.parent.iterdir()] == [library] and library.stat().st_size > 0

    assert build_in_a_process(True, **env | {"PATH": "", "CXX": ""}) == ""
    assert build_in_a_process(True, **env | {"CXX": "false"}) == COMPILING  # `false` is tried, then the library serves
    said = build_in_a_process(False, **env | {"PATH": "", "CXX": "", "CXXFLAGS": "-O1"})
    assert "no C++ compiler" in said and said.count("\n") == 1

    # A cache that cannot be written
    env |= {"CXX": script, "XDG_CACHE_HOME": "/dev/null"}
    said = build_in_a_process(True, **env)
    elsewhere = tmp_path / f"gpt-fast-{os.getuid()}"
    assert said.startswith(f"{COMPILING}/dev/null/gpt-fast does not serve ([Errno 20] Not a directory")
    assert said.endswith(f": the kernels are in {elsewhere}\n") and said.count("\n") == 2
    assert build_in_a_process(True, **env) == ""  # found there
    elsewhere.chmod(0o777)  # other users can write here
    tmp_path.chmod(0o777)
    assert "another user" in build_in_a_process(False, **env)


def test_a_folder_from_which_nothing_is_run(tmp_path, monkeypatch):
    kernels.build.check_folder(tmp_path)
    mounted = SimpleNamespace(f_flag=getattr(os, "ST_NOEXEC", 0))
    monkeypatch.setattr(os, "statvfs", lambda folder: mounted)
    with pytest.raises(OSError, match="noexec"):
        kernels.build.check_folder(tmp_path)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_the_compiler_ends_with_the_process(sig, tmp_path):
    """Ctrl-C ends the compiler and the processes that it has started, as g++ starts cc1plus.

    A background command of a shell ignores SIGINT, and so do its children, until they set a handler of their own."""
    script, pid = tmp_path / "compiler", tmp_path / "pid"
    script.write_text(f'#!/bin/sh\n[ "$1" = -march=native ] && exit\nsleep 20 &\necho $! >{pid}\nwait\n')
    script.chmod(0o755)
    env = os.environ | {"CXX": str(script), "XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    code = (
        "import signal; from kernels import build\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); build.load_cpp_kernels()"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stderr=subprocess.DEVNULL) as process:
        while not (pid.exists() and pid.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sig)
        try:
            assert process.wait(10) in (128 + sig, -sig)
        finally:
            process.kill()
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":  # Z: a zombie, which waits for its parent
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not list((tmp_path / "gpt-fast").iterdir())  # nothing is left over


@pytest.mark.parametrize("compiler", ["false", "script"])
def test_no_compiler(compiler, tmp_path):
    """Without a compiler, one line says so, and everything runs on PyTorch."""
    (tmp_path / "script").write_text("no program")
    (tmp_path / "script").chmod(0o755)
    cxx = "false" if compiler == "false" else str(tmp_path / "script")
    said = build_in_a_process(False, CXX=cxx, XDG_CACHE_HOME=str(tmp_path), TMPDIR=str(tmp_path))
    said = said.removeprefix(COMPILING)  # a script that is not a program has failed before
    assert said.count("\n") == 1 and said.endswith("running on PyTorch's own, slower operations\n")


def test_without_kernels_weights_are_dequantized_once(monkeypatch, capsys):
    """They are dequantized to the same bits as by PyTorch."""
    monkeypatch.setattr(kernels.build, "load_cpp_kernels", lambda: None)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 256)  # several chunks, and some rows over
    for format in CPU_FORMATS[1:]:
        torch.manual_seed(0)
        linear = make_linear(33, 72, format, torch.float32, bias=True)
        experts = make_linear(10, 72, format, torch.float32, n_experts=3, kind=ExpertsDown)
        expected = [w.dequantize(torch.float32) for w in (linear, experts)]
        with monkeypatch.context() as context:
            context.setattr(packing, "free_memory", lambda: 4 * (33 * 72 + 3 * 10 * 72) - 1)
            pack_weights([linear, experts], torch.float32)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "every token dequantizes" in said and linear.format == format
        pack_weights([linear, experts], torch.float32)
        for w, matrix in zip((linear, experts), expected, strict=True):
            assert w.format == Unquantized() and w.scales is w.zeros is None
            assert torch.equal(w.weight, matrix) and torch.equal(w.dequantize(torch.float32), matrix)
            assert w.backend.name == "torch" and capsys.readouterr().err == ""


def test_pytorchs_kernels_without_a_compiler(monkeypatch):
    """Kernels of PyTorch multiply int8 and int4 weights of linear layers with 16-bit activations. All other weights are
    dequantized."""
    monkeypatch.setattr(kernels.build, "load_cpp_kernels", lambda: None)
    monkeypatch.setattr(aten, "CHUNK_ROWS", 128)
    for dtype in (torch.bfloat16, torch.float16):
        for format in (Int8(), Int4(32), Int4(64)):
            for n, k in [(16, 64), (272, 192), (33, 72), (48, 96)]:
                torch.manual_seed(0)
                linear = make_linear(n, k, format, dtype, bias=True)
                experts = make_linear(16, 64, format, dtype, n_experts=2, kind=ExpertsDown)
                exact, bias = linear.dequantize(torch.float64), linear.bias.double()
                pack_weights([linear, experts], dtype)
                has_kernel = k % 16 == 0 if isinstance(format, Int8) else n % 16 == 0 and k % format.group_size == 0
                assert (linear.aten_weight is not None) == has_kernel and linear.format.is_quantized == has_kernel
                assert not hasattr(experts, "aten_weight") and not experts.format.is_quantized
                for num_tokens in (1, 3, aten.MAX_ATEN_TOKENS, aten.MAX_ATEN_TOKENS + 1):
                    x = torch.randn(1, num_tokens, k).to(dtype)
                    # Of each weight: scale, and offset of up to 15 scales or the weight itself; of the result: a
                    # product rounded before the bias is added, and the sum; float32 sums
                    u, magnitude = bounds.U[dtype], x.double().abs() @ largest_weights(format, exact).T
                    products = x.double() @ exact.T
                    bound = (3 * u + k * bounds.U[torch.float32]) * magnitude + 2 * u * (products.abs() + bias.abs())
                    bounds.check(linear(x), products + bias, bound)


def largest_weights(format, exact: torch.Tensor) -> torch.Tensor:
    """Returns how large the numbers [N, K] are with which kernels of PyTorch compute each weight: its magnitude or, in
    int4, where they add and subtract, the span of its group."""
    if isinstance(format, Int8):
        return exact.abs()
    groups = split_groups(exact, format.group_size)
    spans = groups.amax(-1, keepdim=True).clamp(min=0) - groups.amin(-1, keepdim=True).clamp(max=0)
    return join_groups(spans.expand_as(groups), exact.shape[1])


def test_every_check_says_what_is_wrong():
    """Every check in C++ has a message of four words or more, or that of validate."""
    code = "".join(path.read_text() for path in kernels.build.SOURCES.iterdir())
    checks = [text.partition(");")[0] for text in code.split("STD_TORCH_CHECK(")[1:]]
    bare = [check for check in checks if not re.search(r'"(\S+ ){3,}\S+"$', check)]
    assert len(checks) > 20 and bare == ['!error, error ? error : ""']


def test_magic_numbers():
    """The magic numbers are what elements.py draws."""
    assert MAGIC_NUMBERS == {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}
