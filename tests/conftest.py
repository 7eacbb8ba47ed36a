"""Loads fixtures.py, and says which test files come first."""

import os

# Idle threads sleep. Otherwise OpenMP threads would spin for milliseconds after every operation, on a core that the
# other process of test.sh needs. torch reads this variable when it is loaded.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch and transformers do

import pytest

pytest.register_assert_rewrite("tests.serving")  # pytest must know the module before its import

# The files that take longest, in this order. The two processes of test.sh take file after file and should end together,
# so the last files must be short. The demo compiles the kernels, while the interpreter of Triton needs none.
LONGEST = [
    "test_demo", "test_triton", "test_tp", "test_kernels_builds", "test_robust", "test_add_a_model", "test_speculative",
    "test_generate", "test_readme", "test_kernels_attention", "test_kernels", "test_benchmark", "test_convert",
    "test_mixtral", "test_capture", "test_fuzz", "test_speculative_cli", "test_serve_clients", "test_kernels_experts",
]


def pytest_configure(config: pytest.Config):
    """Loads fixtures.py, but not in the process of pytest-xdist that only hands out tests: its imports take seconds."""
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
