"""What several test files share: each family's pair of models, made once."""

import functools
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch and transformers do

import pytest
import torch

from tests.byte_models import ask, call_cli, chain, chatty, refused  # noqa: F401  (fixtures)
from tests.cpu_kernels import library, threads  # noqa: F401  (fixtures)
from tests.tiny import make_hf, to_ours

torch.set_num_threads(1)  # models this small only wait for a second one

# Files that take longest for their tests, in this order. The two processes of test.sh take file after file, and should
# end together, so the last files must be short. The demo compiles the kernels while Triton's interpreter needs none.
LONGEST = [
    "test_demo", "test_triton", "test_kernels_builds", "test_tp", "test_speculative", "test_kernels", "test_fuzz",
    "test_kernels_attention", "test_mixtral",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def pair():
    """family -> (transformers' model, the same in ours, with kernels or in plain PyTorch), float32."""

    @functools.cache
    def make(family: str, use_kernels: bool = True):
        theirs = make_hf(family)
        return theirs, to_ours(theirs, use_kernels)

    return make
